"""The offline teacher: a checkpoint run once over a text, for `heal` without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kronfold.base import results
from kronfold.base.output import check_output
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import pack
from kronfold.data.sources import documents
from kronfold.models.load import load_model, load_tokenizer
from kronfold.train.heal import bf16_is_fast
from kronfold.train.store_teacher import store_teacher


def teach_to(
    model: str,
    train_text: str,
    output: str | Path,
    *,
    tokens: int,
    k: int = 64,
    temperature: float = 1.0,
    block_size: int | None = None,
    batch_size: int = 8,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    device: str = "cpu",
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Store the `k` likeliest tokens of the checkpoint `model` at every position of a text in the directory `output`.

    Args:
        tokens: how many of the text, in whole blocks; a healing may read them as often as it likes.
        block_size: default: the model's context, at most 1024, as `heal_to` takes it.
        batch_size: blocks that go through the model at once. reading: how the text is read.

    Returns the results document. Raises as `store_teacher`, before the model is run.
    """
    check_output(output, overwrite, allow_existing=resume)  # `store_teacher` looks closer
    teacher, tokenizer = load_model(model, device=device), load_tokenizer(model)
    size = block_size or min(1024, getattr(teacher.config, "max_position_embeddings", 1024))
    blocks = pack(documents(train_text, **asdict(reading)), tokenizer, size, max_tokens=tokens)
    stored = store_teacher(
        teacher, blocks, output,
        top_k=k, temperature=temperature, batch_size=batch_size, bf16=bf16_is_fast(device),
        about={"model": Path(model).name, "text": Path(train_text).name, "versions": results.versions()},
        inputs=[model, train_text], resume=resume, overwrite=overwrite,
        progress=lambda done, total: report("run the teacher", done, total),
    )  # fmt: skip
    manifest = stored.manifest
    return results.document(
        "teach",
        None,
        **manifest.to_dict(),
        read=blocks.read,
        tokens=manifest.tokens,
        bytes_per_token=manifest.bytes_per_token,
        bytes=manifest.tokens * manifest.bytes_per_token,
    )
