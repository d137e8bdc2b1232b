"""From a compressed checkpoint back to a plain one, and how every job saves a model as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kronfold.base import results
from kronfold.base.job import Job
from kronfold.export.checkpoint import write_model
from kronfold.export.dense import to_dense
from kronfold.models.cost import cost
from kronfold.models.load import dtype_of, load_model, load_tokenizer, read_dtype


def export_dense(
    model: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Fold the structures of the checkpoint `model` back into plain weights and save that in `output`, tokenizer too.

    Returns the results document (schema `kronfold/export`). Raises OutputError, CheckpointError, InputError, before
    anything is written.
    """
    with Job.open(output, "export", inputs=[model], overwrite=overwrite, resumable=False) as job:
        saved_dtype = read_dtype(dtype) if dtype else None
        compressed, tokenizer = load_model(model), load_tokenizer(model)
        plain = to_dense(compressed)
        sizes = {"source": cost(compressed).to_dict(), **cost(plain).to_dict()}
        job.begin()
        document = results.document("export", None, model=model, **sizes)
        write_saved(plain, tokenizer, model, job.result, saved_dtype)
        job.finish(document)
    return document


def write_saved(model: PreTrainedModel, tokenizer: Any, source: str, place: Path, dtype: torch.dtype | None) -> None:
    """Write model and tokenizer into `place`, in `dtype` or in that of the checkpoint `source`. Raises as
    `write_model`."""
    write_model(model, tokenizer, place, dtype or dtype_of(source))
