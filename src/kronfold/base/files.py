"""Writing files so that nothing is ever half-written: a temporary neighbour first, then one rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kronfold.base.errors import NotFiniteError, OutputError


def _explain(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Could not write {path}: {error.strerror or error}. What was there before is unchanged. "
        "Free some space, fix the permissions, or choose another place with -o/--output."
    )


@contextlib.contextmanager
def explain_write_errors(path: str | Path) -> Iterator[None]:
    """Turn what goes wrong while writing `path` into an OutputError.

    Libraries written in Rust (safetensors, tokenizers) report a full disk as their own error, with "(os error 28)" in
    the text instead of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise _explain(Path(path), error) from error
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        if code is None:
            raise
        raise _explain(Path(path), OSError(int(code[1]), os.strerror(int(code[1])))) from error


UNFINISHED = ".tmp"  # ends the names of files that a killed `atomic_file` leaves behind


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and is gone when it fails. Raises OSError.

    Its content is on the disk before its name is: after a power failure there is the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Have the disk keep a file, or the names in a directory. A file system that knows no such order is let be."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):
            raise
    finally:
        os.close(handle)


def files_below(place: str | Path) -> list[str]:
    """Names of everything below a directory that is no directory itself, relative to it, sorted, `/` between parts.

    Links are named, and not followed. Raises OSError.
    """

    def fail(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(place, onerror=fail):
        linked = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.relpath(os.path.join(folder, name), place).replace(os.sep, "/") for name in names + linked]
    return sorted(found)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file atomically. Raises OutputError."""
    with explain_write_errors(path), atomic_file(path) as file:
        file.write(text.encode("utf-8"))


def write_json(path: str | Path, document: Any) -> None:
    """Write a JSON document atomically, indented, keys in the order given.

    Raises NotFiniteError for numbers that JSON does not know, NaN and infinity, and OutputError.
    """
    if faults := list(_not_finite(document)):
        more = f" and {len(faults) - 4} more" if len(faults) > 4 else ""
        raise NotFiniteError(
            f"{path} was not written: {', '.join(faults[:4])}{more}. A number that is not finite is no result; find "
            "out which model or text gives it."
        )
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _not_finite(value: Any, place: str = "") -> Iterator[str]:
    """`stages[0].loss is nan`, for every such number in a document."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place or 'the document'} is {value}"
    elif isinstance(value, dict):
        for key, entry in value.items():
            yield from _not_finite(entry, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _not_finite(entry, f"{place}[{index}]")


def sha256_of(*paths: str | Path) -> str:
    """Hex SHA-256 over the bytes of the files, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def sha256_of_source(source: str | Path) -> str:
    """Hex SHA-256 of a file, or of all files of a directory in the order of their paths.

    What is not on this machine counts as empty.
    """
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256_of(*(file for file in files if file.is_file()))


def sha256_of_content(
    source: str | Path | None, known: dict[str, Any] | None = None, without: Iterable[Path] = ()
) -> str | None:
    """One hash of all that a file or directory holds, names included. None where there is nothing on this machine.

    Args:
        known: what was hashed before, by path, with size, time and inode of then; equal ones are not read again, and
            new ones are added.
        without: directories whose content does not count.
    """
    if source is None or not os.path.exists(source):
        return None
    path, known = Path(source), {} if known is None else known
    left_out = [Path(os.path.realpath(place)) for place in without]
    found = []
    for name in files_below(path) if path.is_dir() else [""]:
        file = Path(os.path.abspath(path / name if name else path))
        if not file.is_file() or any(place in Path(os.path.realpath(file)).parents for place in left_out):
            continue
        stat = file.stat()
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        entry = known.get(str(file))
        if entry is None or entry[:3] != state:
            entry = known[str(file)] = [*state, sha256_of(file)]
        found.append([name, entry[3]])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


# Where kronfold keeps what it can make again: calibration statistics, token ids.


def cache_directory() -> Path:
    """`$KRONFOLD_CACHE`, else `~/.cache/kronfold`."""
    return Path(os.environ.get("KRONFOLD_CACHE") or Path.home() / ".cache" / "kronfold")
