"""One local text file as a stream of documents: its container, compression and encoding, and rows without text.

Every fault of a file leaves here as a DataError that names the file and, where there is one, the row.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from kronfold.base.errors import DataError, suggest
from kronfold.data.bad_rows import BadRows

ENDINGS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
_CHUNK = 1 << 20  # bytes of a .txt file read at a time
_READ_ROWS = 1024
_LONGEST_ROW = 1 << 28  # bytes of one line of .jsonl; more is a damaged file, or one made to fill the memory


class Part(NamedTuple):
    """A text or, of a long .txt file, a part of it; `ends`: its document ends here.

    `rows`: for a document that is a row, what it is a row of; None for a document that is a whole file.
    """

    text: str
    ends: bool
    rows: str | None


def ending(name: str) -> str:
    """The ending that tells the container, in small letters, without that of a compression: ".jsonl" of A.JSONL.GZ."""
    name = name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    return Path(name).suffix


def source_files(path: Path) -> list[Path]:
    """The text files of a local source, sorted. Raises DataError for another kind, or a directory without any.

    Of a directory, what is hidden (`.DS_Store`, `._a.jsonl`, `.cache/`) or between double underscores (`__MACOSX/`,
    `__pycache__/`) is not text of its owner and is left out; a file that is named itself is read whatever its name.
    """
    kinds = f"{', '.join(ENDINGS)} file (plain, .gz or .zst)"
    if path.is_dir():
        files = sorted(
            found
            for found in path.rglob("*")
            if ending(found.name) in ENDINGS
            and not any(part.startswith((".", "__")) for part in found.relative_to(path).parts)
            and found.is_file()
        )
        if not files:
            raise DataError(f"The directory {path} holds no {kinds}.")
        return files
    if ending(path.name) not in ENDINGS:
        found = "".join(path.suffixes[-2:]) or "no ending"
        raise DataError(
            f"{path} has an unknown ending ({found}). {suggest(ending(path.name), ENDINGS)} Each may be .gz or .zst."
        )
    if not path.is_file():
        raise DataError(f"{path} is not a regular file. Give a {kinds}, or a directory of them.")
    return [path]


def read_file(path: Path, name: str, column: str, bad: BadRows) -> Iterator[Part]:
    """The documents of one file, read as they are asked for.

    `name`: what rows are said to be rows of. `column`: of the text; several, separated by commas, mean the first that
    a row has. Rows without text are told to `bad`. Raises DataError.
    """
    columns = column.split(",")
    try:
        with _opened(path) as file:
            if ending(path.name) == ".txt":
                yield from _whole(file, path)
            elif ending(path.name) == ".jsonl":
                yield from (Part(text, True, name) for text in _jsonl(file, path, columns, bad))
            else:
                yield from (Part(text, True, name) for text in _parquet(file, path, columns, bad))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}). Get it again.") from error
    except OSError as error:
        if path.name.lower().endswith(".zst") and error.errno is None:
            raise DataError(f"{path} is a damaged Zstandard file ({error}). Get it again.") from error
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The unpacked bytes, buffered (with `peek`), unpacked as they are read."""
    name = path.name.lower()
    if name.endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    elif name.endswith(".zst"):
        import pyarrow as arrow

        with open(path, "rb") as packed, arrow.CompressedInputStream(packed, "zstd") as stream:
            yield io.BufferedReader(stream)
    else:
        with open(path, "rb") as file:
            yield file


def _whole(file: Any, path: Path) -> Iterator[Part]:
    """A .txt file, one document, in parts."""
    _check_head(file.peek(4096)[:4096], path)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    seen = 0
    while True:
        content = file.read(_CHUNK)
        seen += len(content)
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeDecodeError as error:
            raise DataError(_not_utf8(error, seen - len(error.object), path)) from error
        if text or not content:
            yield Part(text, not content, None)
        if not content:
            return


def _check_head(head: bytes, path: Path) -> None:
    """Raises DataError for UTF-16, UTF-32 and binary files, which may well be valid UTF-8 full of zero bytes."""
    for mark, codec in (
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF32_BE, "UTF-32"),
        (codecs.BOM_UTF16_LE, "UTF-16"),
        (codecs.BOM_UTF16_BE, "UTF-16"),
    ):
        if head.startswith(mark):
            raise DataError(
                f"{path} is not UTF-8 text: it begins with the byte order mark of {codec}. {_convert(codec)}"
            )
    zeros = [head[start::2].count(0) for start in (0, 1)]
    if sum(zeros) * 10 < len(head) or not sum(zeros):
        return
    if min(zeros) * 10 < max(zeros):  # Latin text: every second byte is zero
        codec = "UTF-16LE" if zeros[1] > zeros[0] else "UTF-16BE"
        raise DataError(f"{path} is not UTF-8 text: every second byte is zero, as in {codec}. {_convert(codec)}")
    raise DataError(f"{path} is no text: {sum(zeros):,} of its first {len(head):,} bytes are zero. Give a text file.")


def _not_utf8(error: UnicodeDecodeError, start: int, path: Path) -> str:
    """What to say of bytes that are no UTF-8; `start`: offset in the file of what was decoded."""
    content = error.object
    said = f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} at offset {start + error.start:,}. "
    if error.reason == "unexpected end of data":
        return said + "The text ends in the middle of a character, as a file that was cut off does. Get it again."
    # Windows-1252 has its quotes, dashes and the euro sign where Latin-1 has control characters, which no text holds.
    windows = any(0x80 <= byte <= 0x9F for byte in content[max(0, error.start - 4096) : error.start + 4096])
    return said + _convert("WINDOWS-1252" if windows else "LATIN1")


def _convert(codec: str) -> str:
    kind = {"LATIN1": "Latin-1 (ISO 8859-1)", "WINDOWS-1252": "Windows-1252"}.get(codec)
    guess = f"It looks like {kind}. " if kind else ""
    return f"{guess}Convert it first: iconv -f {codec} -t UTF-8 OLD > NEW."


def _jsonl(file: Any, path: Path, columns: list[str], bad: BadRows) -> Iterator[str]:
    _check_head(file.peek(4096)[:4096], path)
    offset = number = 0
    while raw := file.readline(_LONGEST_ROW + 1):
        number += 1
        start, offset = offset, offset + len(raw)
        place = f"{path}, line {number}"
        if len(raw) > _LONGEST_ROW:
            raise DataError(f"{place} is longer than {_LONGEST_ROW:,} bytes. A .jsonl file has one document per line.")
        if not raw.strip():
            continue
        bad.rows += 1
        try:
            row = json.loads(raw.decode("utf-8-sig" if start == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            place_in_file = start + len(raw) - len(error.object)
            bad.skip("not UTF-8", f"line {number}: " + _not_utf8(error, place_in_file, path))
        except RecursionError:
            bad.skip("not JSON", f"{place} is JSON nested too deeply to be read.")
        except ValueError as error:  # also a number of too many digits
            bad.skip("not JSON", f"{place} is not JSON: {error}. A .jsonl file has one object per line.")
        else:
            if not isinstance(row, dict):
                kind = type(row).__name__
                bad.skip("not an object", f"{place} is a JSON {kind}; an object per line is expected.")
            elif (text := text_of(row, columns, place, bad)) is not None:
                yield text


def text_of(row: dict[str, Any], columns: list[str], place: str, bad: BadRows) -> str | None:
    """The text of a row, None (and told to `bad`) where it has none."""
    column = next((name for name in columns if name in row), None)
    if column is None:
        bad.skip("column missing", no_column(place, columns, row))
        return None
    value = row[column]
    if isinstance(value, str):
        return value
    kind = "null" if value is None else type(value).__name__
    bad.skip("null" if value is None else "not text", f"{place}: '{column}' holds {kind}, not text.")
    return None


def no_column(place: object, columns: list[str], found: Iterable[str]) -> str:
    """The message for rows that have none of `columns`; `found`: the columns they have."""
    return (
        f"{place} has no column {' or '.join(repr(name) for name in columns)}. Columns found: "
        f"{', '.join(map(str, found)) or 'none'}. Name the one of the text with --text-column."
    )


def _parquet(file: Any, path: Path, columns: list[str], bad: BadRows) -> Iterator[str]:
    with contextlib.ExitStack() as opened:
        if path.name.lower().endswith(COMPRESSIONS):  # parquet is read from its end, so it is unpacked first
            if not file.peek(4).startswith(b"PAR1"):
                raise DataError(f"{path} is not a readable parquet file: unpacked, it does not begin as one.")
            unpacked = opened.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(file, unpacked, _CHUNK)
            file = unpacked
        number = 0
        for column, values in _batches(file, path, columns):
            for value in values:
                number += 1
                bad.rows += 1
                place = f"{path}, row {number}"
                if isinstance(value, bytes):
                    try:
                        value = value.decode()
                    except UnicodeDecodeError as error:
                        byte = f"byte 0x{value[error.start]:02x} at offset {error.start:,}"
                        bad.skip("not UTF-8", f"{place}: '{column}' is not UTF-8 text: {byte} of the value.")
                        continue
                text = text_of({column: value}, [column], place, bad)
                if text is not None:
                    yield text


def _batches(file: Any, path: Path, columns: list[str]) -> Iterator[tuple[str, list[Any]]]:
    """(name of the column, its values) of some rows at a time; bytes where strings are not valid."""
    from pyarrow import parquet, types

    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
        column = next((name for name in columns if name in names), None)
        if column is None:
            raise DataError(no_column(path, columns, names))
        kind = table.schema_arrow.field(column).type
        plain = kind.value_type if types.is_dictionary(kind) else kind
        kinds = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_null)
        if not any(check(plain) for check in kinds):
            raise DataError(f"{path}: column '{column}' holds {kind}, not text. Name another with --text-column.")
        for batch in table.iter_batches(_READ_ROWS, columns=[column]):
            values = batch.column(0)
            values = values.dictionary_decode() if types.is_dictionary(kind) else values
            try:
                found = values.to_pylist()
            except UnicodeDecodeError:
                large = types.is_large_string(values.type)
                found = values.view("large_binary" if large else "binary").to_pylist()
            yield column, found
    except DataError:
        raise
    except Exception as error:  # a damaged file ends in any of the library's errors
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path} is not a readable parquet file: {first.rstrip('.')}. Get it again.") from error
