"""What several jobs ask alike: where the result goes, seed, device, text, budget. A job's class is made of these."""

from __future__ import annotations

from typing import Any

from kronfold.options import Options, option


def output(help: str, default: Any = ...) -> Any:
    """The field `output`, which each job describes in its own words."""
    return option(default, help, group="Output", names=("--output", "-o"))


def text(help: str = "", *, names: tuple[str, ...] = (), default: Any = ...) -> Any:
    """A text source."""
    kinds = ".txt, .jsonl or .parquet (also .gz, .zst), a directory of them, or a datasets id: ID, ID:CONFIG@SPLIT."
    return option(default, f"{help} {kinds}".strip(), names=names)


class Written(Options):
    """A job that writes."""

    output: str = output("Where the result goes.")
    overwrite: bool = option(False, "Replace an output that exists.", group="Output")


class Resumable(Written):
    """A job that writes and can go on where it was cut off."""

    resume: bool = option(False, "Continue an interrupted run.", group="Output")


class Shown(Options):
    """A job that shows what it found, and writes it where it is asked to."""

    output: str | None = output("File for what is shown, as JSON.", None)
    overwrite: bool = option(False, "Replace an output that exists.", group="Output")


class OfModel(Options):
    """A job on one model."""

    model: str = option(..., "A directory, a hub id, a .gguf file, config:NAME, or demo.", argument=True)


class Seeded(Options):
    """A job with something random in it."""

    seed: int = option(0, "Seed of everything random.", group="How", ge=0, lt=2**32)


class OnDevice(Options):
    """A job that may run on an accelerator."""

    device: str = option("auto", "cpu, cuda, ...; auto takes CUDA if there is one.", group="How")


class SavedAs(Options):
    """A job that saves weights."""

    dtype: str | None = option(
        None, "float32, float16 or bfloat16 of the saved weights; default: as in MODEL.", group="Output"
    )


class SkipsRows(Options):
    """A job that leaves out rows without text, up to a limit."""

    max_bad_rows: str | int | None = option(
        None,
        "Rows without text that are skipped at most; default: 100 or 1%, whichever is more, and below half.",
        group="How",
        metavar="N|N%",
    )


class ReadsText(SkipsRows):
    """A job that reads text."""

    text_column: str = option(
        "text", "Column of the text in rows; several, comma-separated: the first that a row has.", group="How"
    )


class Measured(Options):
    """A job that measures perplexity."""

    protocol: str = option("sliding", "Perplexity protocol: sliding or paper.", group="How")


class OnBlocks(Options):
    """A job that reads training text in blocks of one length."""

    block_size: int | None = option(None, "Training window in tokens.", group="Training", ge=1)


class SizeBudget(Options):
    """How small the model shall be. Give one."""

    target_ratio: float | None = option(None, "Budget as a share of the held parameters, e.g. 0.65.", group="How")
    target_params: str | None = option(None, "Budget in held parameters, e.g. 81M.", group="How")

    def targets(self) -> dict[str, Any]:
        """The budgets given, by unit: ratio, params, macs, bytes."""
        names = [name for name in type(self).model_fields if name.startswith("target_")]
        return {name.removeprefix("target_"): value for name in names if (value := getattr(self, name)) is not None}


class AnyBudget(SizeBudget):
    """How small, or how cheap to run or to store. Give one."""

    target_macs: str | None = option(None, "Budget in multiply-accumulates per token, e.g. 60M.", group="How")
    target_bytes: str | None = option(None, "Budget in bytes in fp16, e.g. 160MB.", group="How")


class Calibrated(Options):
    """A job that fits layers to text."""

    calibration: list[str] = option(
        list, "Text to fit the layers to, like what the model will read; may be repeated.", group="How"
    )
    cache: bool = option(
        True,
        "Keep calibration statistics in $KRONFOLD_CACHE (~/.cache/kronfold) for the next budget.",
        group="How",
        names=("--cache/--no-cache",),
    )


class Planned(Calibrated, AnyBudget):
    """A job whose planner may be told more than a budget."""

    structures: tuple[str, ...] | None = option(
        None, "What the planner may choose: low_rank, kronecker; comma-separated.", group="How", commas=True
    )
    calibration_windows: int | None = option(
        None, "Windows of calibration text; default: the recipe's (128).", group="How", ge=1
    )

    def changes(self) -> dict[str, Any]:
        """Fields of a recipe's `auto` entry that are given here."""
        given = {"windows": self.calibration_windows, "structures": list(self.structures or ()) or None}
        return {name: value for name, value in given.items() if value is not None}
