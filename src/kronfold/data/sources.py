"""Documents from files, directories or the `datasets` library, one string each."""

from __future__ import annotations

import contextlib
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from kronfold.base.errors import DataError, suggest

_ENDINGS = (".txt", ".jsonl", ".parquet")
_READ_ROWS = 1024


def documents(source: str | Path, *, split: str = "train", text_column: str = "text") -> Iterator[str]:
    """Yield the documents of `source`, in a fixed order, reading as it goes.

    `source`: a .txt file (one document), a .jsonl or .parquet file (one document per row, from `text_column`),
    any of these as .gz, a directory of them (sorted by name, subdirectories too), or, when no such path exists,
    a `datasets` id written `id`, `id:config` or `id:config:split`. `split` applies to `datasets` ids only.

    Raises DataError when the source is missing, holds no text, is not UTF-8 (with the byte offset), has no column
    `text_column` (with the columns it has) or has an unknown ending. The path is checked at the call; its content
    while reading.
    """
    path = Path(source)
    if path.exists():
        return _non_empty((text for file in source_files(path) for text in _read(file, text_column)), path)
    if isinstance(source, Path) or _looks_local(source):
        raise DataError(f"{source} does not exist. Give a file, a directory, or a datasets id like 'id:config:split'.")
    return _non_empty(_hub_documents(source, split, text_column), source)


def _looks_local(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.removesuffix(".gz").endswith(_ENDINGS)


def _ending(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def source_files(path: Path) -> list[Path]:
    """The text files of a local source, sorted. Raises DataError for another kind, or a directory without any."""
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _ending(p) in _ENDINGS)
        if not files:
            raise DataError(f"The directory {path} holds no {', '.join(_ENDINGS)} file (plain or .gz).")
        return files
    if _ending(path) not in _ENDINGS:
        found = "".join(path.suffixes[-2:]) or "no ending"
        raise DataError(f"{path} has an unknown ending ({found}). {suggest(_ending(path), _ENDINGS)} Each may be .gz.")
    return [path]


def _read(path: Path, text_column: str) -> Iterator[str]:
    ending = _ending(path)
    try:
        with _open(path) as file:
            if ending == ".txt":
                yield _decode(file.read(), path, 0)
            elif ending == ".jsonl":
                yield from _jsonl(file, path, text_column)
            else:
                yield from _parquet(file, path, text_column)
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}). Get it again.") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rb") as file:
        yield file


def _decode(content: bytes, path: Path, start: int) -> str:
    try:
        return content.decode("utf-8-sig" if start == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {start + error.start:,}. "
            "Convert it first, for example with iconv -f latin1 -t utf-8."
        ) from error


def _jsonl(file: Iterable[bytes], path: Path, text_column: str) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(file, 1):
        line = _decode(raw, path, offset)
        offset += len(raw)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}, line {number} is not JSON: {error}. A .jsonl file has one object per line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is a JSON {type(row).__name__}; an object per line is expected.")
        yield _column(row, text_column, f"{path}, line {number}")


def _parquet(file: IO[bytes], path: Path, text_column: str) -> Iterator[str]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable parquet file: {error}") from error
    if text_column not in table.schema_arrow.names:
        raise _no_column(path, text_column, table.schema_arrow.names)
    for batch in table.iter_batches(_READ_ROWS, columns=[text_column]):
        for value in batch.column(0).to_pylist():
            yield _column({text_column: value}, text_column, path)


def _column(row: dict[str, Any], text_column: str, place: object) -> str:
    if text_column not in row:
        raise _no_column(place, text_column, row)
    if not isinstance(row[text_column], str):
        raise DataError(f"{place}: '{text_column}' holds {type(row[text_column]).__name__}, not text.")
    return row[text_column]


def _no_column(place: object, text_column: str, columns: Iterable[str]) -> DataError:
    return DataError(f"{place} has no column '{text_column}'. Columns found: {', '.join(columns) or 'none'}.")


def _hub_documents(source: str, split: str, text_column: str) -> Iterator[str]:
    import datasets

    name, config, chosen = (*source.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=chosen or split, streaming=True)
    except Exception as error:  # the library raises many kinds, from the network up
        raise DataError(
            f"{source} is neither an existing path nor a datasets id that can be loaded: "
            f"{str(error).splitlines()[0]}. Check the spelling or the network, or give a local file."
        ) from error
    for row in rows:
        yield _column(row, text_column, source)


def _non_empty(texts: Iterator[str], source: object) -> Iterator[str]:
    found = False
    for text in texts:
        found = found or bool(text.strip())
        yield text
    if not found:
        raise DataError(f"{source} holds no text. Give a source with at least one non-empty document.")
