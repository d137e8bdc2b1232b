"""Looking at models and measuring them: eval, inspect, tune."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from kronfold.options import option
from kronfold.options.shared import Measured, OfModel, OnDevice, ReadsText, Shown


class EvalOptions(Shown, Measured, ReadsText, OnDevice, OfModel):
    """Perplexity of a model on a text, a suite of measurements, or tasks of lm-eval: `kronfold eval`."""

    eval_text: list[str] = option(
        list,
        "Text to measure on; files, a directory, or a datasets id. With --suite: NAME=TEXT, may be repeated.",
        names=("--eval-text", "--text"),
    )
    suite: str | None = option(None, "lm: perplexity on every --text, and LAMBADA, in one pass.")
    lambada: str | None = option(None, "LAMBADA's passages for --suite lm, as .jsonl.")
    tasks: tuple[str, ...] | None = option(
        None, "Tasks of lm-eval instead, comma-separated (needs the extra 'harness').", commas=True
    )
    task_files: str | None = option(None, "Directory of further lm-eval task files.")
    rows: Literal["auto", "lines", "documents"] = option(
        "auto",
        "Whether rows are the lines of one text or documents: auto (say which was found), lines, documents.",
        group="How",
    )
    batch_size: int | None = option(None, "Windows per forward pass; changes no number.", group="How", ge=1)
    tokenizer: str | None = option(None, "Take the tokenizer from another model.", group="How")
    dtype: str = option("float32", "dtype to compute in.", group="How")

    @model_validator(mode="after")
    def _one_measurement(self) -> EvalOptions:
        if self.suite and self.tasks:
            raise ValueError("--suite and --tasks are two measurements; run them one after the other.")
        if self.lambada and not self.suite:
            raise ValueError("--lambada belongs to a suite; add --suite lm.")
        if not (self.suite or self.tasks) and len(self.eval_text) != 1:
            given = f"{len(self.eval_text)} texts" if self.eval_text else "no text"
            raise ValueError(
                f"eval was given {given}. Give one --eval-text, or several with --suite lm --lambada PATH."
            )
        return self


class InspectOptions(OfModel):
    """What a checkpoint holds: `kronfold inspect`."""

    verify: bool = option(
        False,
        "Check every file against the hash it was written with; any result directory, also an unfinished one.",
        group="How",
    )


class TuneOptions(OnDevice):
    """The rates of this machine: `kronfold tune`."""

    device: str = option("cpu", "cpu, cuda, ...; auto takes CUDA if there is one.", group="How")
    threads: int | None = option(
        None, "Threads that models will run with; default: as torch has it.", group="How", ge=1
    )
    dtypes: tuple[str, ...] = option(
        ("float32", "bfloat16"), "float32, bfloat16, float16; comma-separated.", group="How", commas=True
    )
    save: bool = option(
        True,
        "Keep the rates in $KRONFOLD_CACHE (~/.cache/kronfold).",
        group="Output",
        names=("--save/--no-save",),
    )
