"""Files in and out: export, import-tq, validate, report."""

from __future__ import annotations

from kronfold.options import Options, option
from kronfold.options.shared import OfModel, SavedAs, Written, output


class ExportOptions(Written, SavedAs, OfModel):
    """All structures folded into plain weights: `kronfold export`."""

    output: str = output("Directory for the plain checkpoint.")


class ImportOptions(Written, SavedAs):
    """A published TQCompressedGPT2 state dict as a checkpoint: `kronfold import-tq`."""

    path: str = option(..., "State dict (.safetensors, .pt, .bin) or its folder.", argument=True)
    output: str = output("Directory for the kronfold checkpoint.")
    tokenizer: str | None = option(None, "Model to take the tokenizer from; default: files beside PATH.", group="How")
    heads: int | None = option(None, "Attention heads; default: config.json's, else of 64 channels.", group="How", ge=1)


class ValidateOptions(Options):
    """A recipe or plan, and whether it fits a model: `kronfold validate`."""

    recipe: str = option(..., "A shipped recipe, a .yaml recipe, or a saved plan (.json).", argument=True)
    model: str | None = option(None, "Also check that it fits this MODEL (config:gpt2 needs no weights).")


class ReportOptions(Written):
    """The HTML page of a result file, drawn anew: `kronfold report`."""

    results: str = option(..., "results.json of run, demo or compare.", argument=True)
    output: str = output("The HTML page to write.", "report.html")
