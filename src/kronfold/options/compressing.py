"""Making models smaller: plan, compress, run, demo, compare."""

from __future__ import annotations

from typing import Any, Literal

from kronfold.options import Options, option
from kronfold.options.shared import (
    AnyBudget,
    Calibrated,
    Measured,
    OfModel,
    OnBlocks,
    OnDevice,
    Planned,
    ReadsText,
    Resumable,
    SavedAs,
    Seeded,
    Shown,
    SizeBudget,
    Written,
    output,
    text,
)

RECIPES = ("auto", "svd", "tqcompressor", "kngpt2", "distilgpt2", "short-study-alt", "krony-pt")


class _Healed(Options):
    """A job that heals, or counts what healing takes."""

    heal_tokens: int | None = option(
        None, "Healing budget over all stages, in tokens; default: the recipe's own.", group="Training", ge=1
    )
    micro_batch: int | None = option(
        None, "The most windows a process takes at once; changes memory only.", group="Training", ge=1
    )


def _recipe(default: str | None, more: str = "") -> Any:
    return option(default, f"Name of a shipped recipe, or a YAML file{more}.", group="How", names=("--recipe", "-r"))


class PlanOptions(Shown, Planned, ReadsText, Seeded, _Healed, OnBlocks):
    """What a recipe or a budget does to a model: `kronfold plan`."""

    model: str | None = option(None, OfModel.model_fields["model"].description or "", argument=True, metavar="MODEL")
    recipe: str | None = _recipe(None, "; default: auto with a budget or calibration text, else tqcompressor")
    diff: tuple[str, str] | None = option(None, "Compare two saved plans.", metavar="A B")
    errors: bool = option(
        True,
        "With weights at hand, also fit them and show relative errors.",
        group="How",
        names=("--errors/--no-errors",),
    )
    train: bool = option(False, "Also what healing takes: memory per device, tokens, steps.", group="Training")
    batch_size: int | None = option(
        None, "With --train: windows per step, over all processes; default: the recipe's.", group="Training", ge=1
    )
    processes: int = option(1, "With --train: processes, one for each device.", group="Training", ge=1)
    precision: str = option("bf16", "With --train: bf16 or fp32 matrix products.", group="Training")
    sharded: bool = option(False, "With --train: the student split over the processes (FSDP2).", group="Training")


class CompressOptions(Written, Planned, ReadsText, Seeded, SavedAs, OfModel):
    """A model made smaller and saved, without healing: `kronfold compress`."""

    output: str = output("Directory for the compressed checkpoint.")
    recipe: str = _recipe("auto")
    plan: str | None = option(None, "A saved plan to carry out instead of a recipe.", group="How")
    sequential: bool | None = option(
        None,
        "Fit each layer to what the compressed ones before it give (slower, better where much is cut), or all to the "
        "dense model; default: as the recipe says.",
        group="How",
        names=("--sequential/--together",),
    )
    adapt: bool | None = option(
        None, "In sequence, also refit the layers that stay dense.", group="How", names=("--adapt",)
    )
    stream: bool = option(
        False,
        "Work block by block from the files of a local checkpoint into new ones, for models that do not fit into "
        "memory; recipes of fixed shapes, no calibration text.",
        group="How",
    )
    resume: bool = option(False, "With --stream: continue after the last block done.", group="Output")

    def changes(self) -> dict[str, Any]:
        """Fields of a recipe's `auto` entry that are given here; adapting is done in sequence."""
        sequential = True if self.adapt and self.sequential is None else self.sequential
        given = {"sequential": sequential, "adapt": self.adapt}
        return {**super().changes(), **{name: value for name, value in given.items() if value is not None}}


class RunOptions(
    Resumable, Calibrated, AnyBudget, Measured, ReadsText, Seeded, OnDevice, SavedAs, _Healed, OnBlocks, OfModel
):
    """The whole job, from the dense model to the report: `kronfold run`."""

    train_text: str = text("What to heal on:")
    eval_text: str = text("What to measure on:")
    output: str = output("Directory for checkpoint, results.json and report.")
    recipe: str = _recipe("tqcompressor")
    controls: tuple[str, ...] = option(
        ("dense", "plain"),
        "dense (fine-tune the teacher alike), plain (no permutations), or none; comma-separated.",
        group="How",
        commas=True,
    )
    prompt: str | None = option(None, "Start of the text samples in the report.", group="Output")


class DemoOptions(Resumable, Seeded, OnDevice):
    """Two ways to the same size on the model inside the package: `kronfold demo`."""

    output: str = output("Where the results go.", "kronfold-demo")
    # 48 whole steps in all, so that every track heals on exactly as many tokens
    heal_tokens: int = option(196_608, "Healing budget of each track, in tokens.", group="Training", ge=1)


class CompareOptions(Resumable, Calibrated, SizeBudget, Measured, ReadsText, Seeded, OnDevice, OnBlocks, OfModel):
    """Recipes side by side at one size, healed on the same tokens: `kronfold compare`."""

    train_text: str = option(..., "Text that every recipe heals on.", names=("--text", "--train-text"))
    eval_text: list[str] = option(
        ..., "Text to measure on, NAME=PATH or PATH; the first is the main one.", names=("--eval", "--eval-text")
    )
    lambada: str | None = option(None, "LAMBADA passages (.jsonl) to measure the last word on.")
    output: str = output("Directory for results.json, table.md, report.html.")
    recipes: tuple[str, ...] = option(
        RECIPES, "Recipes or YAML files, comma-separated.", group="How", names=("--recipes", "-r"), commas=True
    )
    heal_tokens: int = option(1_000_000, "Healing budget of every row, in tokens.", group="Training", ge=1)
    objective: Literal["own", "same"] = option(
        "own", "own: each recipe's objective; same: the default one for all.", group="Training"
    )
