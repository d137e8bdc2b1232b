"""A reproducible share of a text source: each document is drawn or not by its own hash, whatever stands around it."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kronfold.base import results
from kronfold.base.errors import DataError, InputError, suggest
from kronfold.base.files import explain_write_errors
from kronfold.base.job import Job
from kronfold.data.clean_settings import FORMATS
from kronfold.data.shards import ShardWriter, described
from kronfold.data.sources import documents
from kronfold.data.text_files import source_files

_REPORT_EVERY = 10_000  # documents


def is_drawn(text: str, fraction: float, seed: int) -> bool:
    """Whether `text` belongs to the share `fraction` under `seed`.

    Its hash, uniform in [0, 2^64), lies below fraction·2^64: so the draw of a smaller fraction is part of that of a
    larger one, and order, files and workers do not matter. Equal documents share their fate.
    """
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(key.digest(), "little") < fraction * 2.0**64


def sample(
    source: str | Path,
    output: str | Path,
    fraction: float,
    *,
    seed: int = 0,
    format: str = "jsonl",
    text_column: str = "text",
    max_bad_rows: str | int | None = None,
    shard_megabytes: float = 256,
    overwrite: bool = False,
    report: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw about `fraction` of the documents of `source`, independently of each other, into `output`.

    TQCompressor heals on 3.1 % of OpenWebText (arXiv 2401.16367): fraction 0.031. Reads as a stream; blank documents
    are never drawn. `text_column`, `max_bad_rows`: see `Reading`.
    `output` receives shards of `shard_megabytes` million characters that `documents` reads, and
    manifest.json (returned). Raises InputError (fraction, seed, format), DataError (source; nothing drawn),
    OutputError (place taken).
    """
    if not 0 < fraction <= 1:
        raise InputError(f"fraction {fraction} must lie in (0, 1]: the share of the documents, e.g. 0.031 for 3.1 %.")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed {seed} must lie in [0, 2^32).")
    if format not in FORMATS:
        raise InputError(f"Unknown format {format!r}. {suggest(format, FORMATS)}")
    if not shard_megabytes > 0:
        raise InputError(f"shard_megabytes {shard_megabytes} must be above 0.")
    with (
        Job.open(output, "sample", inputs=[source], apart=[source], overwrite=overwrite, resumable=False) as job,
        explain_write_errors(output),
    ):
        seen = {"documents": 0, "characters": 0, "words": 0}
        drawn = dict(seen)
        texts = documents(source, text_column=text_column, max_bad_rows=max_bad_rows)
        job.begin()
        place = job.result
        kind = GzipShards if format == "jsonl" else ShardWriter
        writer = kind(place, int(shard_megabytes * 1e6))
        try:
            for index, text in enumerate(texts):
                if report and index % _REPORT_EVERY == 0:
                    report("sample", drawn["documents"], index)
                _add(seen, text)
                if text.strip() and is_drawn(text, fraction, seed):
                    _add(drawn, text)
                    writer.add(str(index), text)
        finally:
            writer.close()
        if not drawn["documents"]:
            raise DataError(
                f"None of the {seen['documents']} documents of {source} is in the share {fraction} under seed {seed}. "
                "Give more documents (a .txt file is one), a larger fraction, or another seed."
            )
        path = Path(source)
        document = results.document(
            "sample",
            seed,
            settings={"fraction": fraction, "format": format, "text_column": text_column},
            input={
                "source": texts.about["source"],
                **seen,
                "read": texts.record(),
                "files": described(source_files(path), path if path.is_dir() else path.parent) if path.exists() else [],
            },
            output={**drawn, "files": described(sorted(place.iterdir()), place)},
            share={key: drawn[key] / seen[key] for key in seen if seen[key]},
        )
        job.finish(document, "manifest.json")
    return document


def _add(counts: dict[str, int], text: str) -> None:
    counts["documents"] += 1
    counts["characters"] += len(text)
    counts["words"] += len(text.split())


class GzipShards:
    """Numbered .jsonl.gz files of about `shard_characters` characters each; equal documents give equal bytes."""

    def __init__(self, folder: Path, shard_characters: int) -> None:
        self.folder, self.limit = folder, shard_characters
        self.held = self.shards = 0
        self.raw: Any = None
        self.file: Any = None

    def add(self, name: str, text: str) -> None:
        if self.file is None:
            self.raw = open(self.folder / f"{self.shards:05d}.jsonl.gz", "wb")  # noqa: SIM115 - closed in close()
            self.file = gzip.GzipFile("", "wb", 6, self.raw, mtime=0)
            self.shards += 1
        row = json.dumps({"id": name, "text": text}, ensure_ascii=False)
        self.file.write(row.encode() + b"\n")
        self.held += len(text)
        if self.held >= self.limit:
            self.close()

    def close(self) -> int:
        if self.file is not None:
            self.file.close()
            self.raw.close()
        self.file, self.held = None, 0
        return self.shards
