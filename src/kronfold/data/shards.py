"""Any text source as numbered shards on disk, the common ground of all tasks of a pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kronfold.base.files import sha256_of, write_json
from kronfold.data.sources import documents
from kronfold.data.text_files import source_files

_ROWS = 1000
DONE = "shards.json"


def spool(
    source: str | Path,
    folder: Path,
    shard_characters: int,
    *,
    text_column: str = "text",
    max_bad_rows: str | int | None = None,
) -> dict[str, Any]:
    """Write the documents of `source` to `folder`/00000.parquet and on, columns id (place in the source) and text.

    A shard takes whole documents in order until it holds `shard_characters`, so shards depend on the source only.
    Documents of white space are left out and counted apart (`blank`). Reads once, holds one shard's batch in memory.
    Returns (and writes to `folder`, last, as the mark of completion) source, files with hashes, counts, shards,
    sha256 of all texts. Raises DataError as `documents` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    found = {"documents": 0, "blank": 0, "characters": 0, "words": 0}
    writer = ShardWriter(folder, shard_characters)
    texts = documents(source, text_column=text_column, max_bad_rows=max_bad_rows)
    for index, text in enumerate(texts):
        content = text.encode()
        digest.update(len(content).to_bytes(8, "little") + content)
        if not text.strip():
            found["blank"] += 1
            continue
        found["documents"] += 1
        found["characters"] += len(text)
        found["words"] += len(text.split())
        writer.add(str(index), text)
    shards = writer.close()
    path = Path(source)
    files = source_files(path) if path.exists() else []
    summary = {
        "source": texts.about["source"],
        **found,
        "sha256": digest.hexdigest(),
        "files": described(files, path if path.is_dir() else path.parent),
        "shards": shards,
        "read": texts.record(),
    }
    write_json(folder / DONE, summary)
    return summary


def described(files: Iterable[Path], root: Path) -> list[dict[str, Any]]:
    """Name relative to `root`, size and sha256 of each file."""
    return [
        {"name": str(file.relative_to(root)), "bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files
    ]


class ShardWriter:
    """Numbered parquet files of about `shard_characters` characters each, columns id and text."""

    def __init__(self, folder: Path, shard_characters: int) -> None:
        import pyarrow as arrow

        self.folder, self.limit = folder, shard_characters
        self.schema = arrow.schema([("id", arrow.string()), ("text", arrow.string())])
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.held = 0  # characters of the open shard
        self.shards = 0  # shards begun
        self.file: Any = None

    def add(self, name: str, text: str) -> None:
        if self.file is None:
            from pyarrow import parquet

            self.file = parquet.ParquetWriter(self.folder / f"{self.shards:05d}.parquet", self.schema)
            self.shards += 1
        self.ids.append(name)
        self.texts.append(text)
        self.held += len(text)
        if len(self.ids) >= _ROWS or self.held >= self.limit:
            self._flush()
        if self.held >= self.limit:
            self._end()

    def _flush(self) -> None:
        import pyarrow as arrow

        if self.ids:
            self.file.write_batch(arrow.record_batch([self.ids, self.texts], schema=self.schema))
        self.ids, self.texts = [], []

    def _end(self) -> None:
        if self.file is not None:
            self._flush()
            self.file.close()
        self.file, self.held = None, 0

    def close(self) -> int:
        self._end()
        return self.shards
