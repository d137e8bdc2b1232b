"""Writing files so that nothing is ever half-written: a temporary neighbour first, then one rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kronfold.base.errors import NotFiniteError, OutputError


def _explain(path: Path, error: OSError) -> OutputError:
    return OutputError(
        f"Could not write {path}: {error.strerror or error}. What was there before is unchanged. "
        "Free some space, fix the permissions, or choose another place with -o/--output."
    )


def check_output(path: str | Path, overwrite: bool = False, allow_existing: bool = False) -> Path:
    """Refuse early: the output may not exist yet (unless `overwrite` or `allow_existing`) and must be writable.

    Returns the path. An empty directory counts as not existing. Raises OutputError.
    """
    path = Path(path)
    if path.resolve() == Path.cwd():
        raise OutputError(f"-o {path} is the current directory, which cannot be replaced. Name a new one inside it.")
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not (overwrite or allow_existing):
        raise OutputError(f"{path} exists already. Choose another -o/--output, or pass --overwrite to replace it.")
    parent = path if path.is_dir() else path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"Cannot write to {path}: {parent} is a file, not a directory. Choose another -o/--output.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write to {path}: {error.strerror} in {parent}. Choose another -o/--output or fix the permissions."
        ) from error
    return path


def work_directory(output: str | Path, resume: bool, overwrite: bool) -> Path:
    """`<output>.partial`, emptied unless the job there is to be resumed. Raises OutputError when one lies there."""
    work = Path(output).with_name(Path(output).name + ".partial")
    if work.is_dir() and any(work.iterdir()) and not resume:
        if not overwrite:
            raise OutputError(f"An unfinished job lies in {work}. Continue it with --resume, or pass --overwrite.")
        shutil.rmtree(work)
    return work


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


@contextlib.contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it takes the name `path`, on failure it vanishes.

    With `overwrite` an old directory is moved aside first and deleted only after the new one is in place.
    Raises OutputError when the place is taken or cannot be written.
    """
    path = check_output(path, overwrite)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield scratch
            scratch.chmod(0o755)
            swap_directory(scratch, path)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def swap_directory(scratch: Path, path: Path) -> None:
    """Let `scratch` take the name `path`; what stood there is deleted only after that. Raises OSError."""
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        scratch.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


UNFINISHED = ".tmp"  # ends the names of files that a killed `atomic_file` leaves behind


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path` when the block ends, and is gone when it fails. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=UNFINISHED, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


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
    """The same over a file, or all files of a directory sorted by path; of nothing for what is not on this machine."""
    path = Path(source)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return sha256_of(*(file for file in files if file.is_file()))
