"""The offline teacher: a checkpoint run once over a text, for `heal` without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kronfold.base import processes, results
from kronfold.base.output import check_output
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import pack
from kronfold.data.sources import documents
from kronfold.models.load import load_model, load_tokenizer
from kronfold.options.healing import TeachOptions
from kronfold.train.heal import bf16_is_fast
from kronfold.train.store_teacher import store_teacher


def teach_to(
    options: TeachOptions, *, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, Any]:
    """Store the likeliest tokens of the checkpoint `options.model` at every position of a text in `options.output`.

    As many tokens of the text as asked for, in whole blocks; a healing may read them as often as it likes.

    Returns the results document. Raises as `store_teacher`, before the model is run.
    """
    model, output, device = options.model, options.output, processes.usable(options.device)
    check_output(output, options.overwrite, allow_existing=options.resume)  # `store_teacher` looks closer
    teacher, tokenizer = load_model(model, device=device), load_tokenizer(model)
    size = options.block_size or min(1024, getattr(teacher.config, "max_position_embeddings", 1024))
    texts = documents(options.train_text, **asdict(Reading.of(options)))
    blocks = pack(texts, tokenizer, size, max_tokens=options.tokens)
    stored = store_teacher(
        teacher, blocks, output,
        top_k=options.top_k, temperature=options.temperature, batch_size=options.batch_size, bf16=bf16_is_fast(device),
        about={"model": Path(model).name, "text": Path(options.train_text).name, "versions": results.versions()},
        inputs=[model, options.train_text], resume=options.resume, overwrite=options.overwrite,
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
