"""The marker of a result: which files kronfold wrote there, their hashes, and what else stands among them."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kronfold.base.errors import CheckpointError
from kronfold.base.files import files_below, sha256_of, sync, write_json

MARKER = ".kronfold.json"  # in a result directory: its files with their sizes and hashes, and the job that wrote them
MARKER_SCHEMA = "kronfold/output"
BOOK = "job.json"  # in the directory of an unfinished job: its steps with the files they left
SEAL = "files.json"  # in a trainer checkpoint: its files

# What 0.3 wrote, which has no marker: a directory is one of its results when one of these files says so ...
_TOLD_BY = ("results.json", "manifest.json", "statistics.json", "config.json")
# ... and then these names are its own. Rows of a comparison and the parts of a run are directories of such files.
_NAMES_OF_03 = re.compile(
    r"(config|generation_config|results|plan|steps|manifest|statistics|tokenizer|tokenizer_config|special_tokens_map"
    r"|vocab|added_tokens|chat_template|model\.safetensors\.index)\.json|merges\.txt|chat_template\.jinja"
    r"|tokenizer\.model|spiece\.model|model(-\d+-of-\d+)?\.safetensors|moments(-\d+)?\.safetensors|README\.md|table\.md"
    r"|report\.html|(train|validation)\.jsonl|\d{5}(_\d+)?\.(jsonl\.gz|parquet)|(ids|log_probs)-\d{5}\.npy"
)


@dataclass(frozen=True)
class Standing:
    """What stands at an output.

    Attributes:
        kind: nothing; an empty directory; something of kronfold's; anything else.
        foreign: files that kronfold did not write, where all others are its own.
        state: changes when anything there does.
    """

    kind: Literal["nothing", "empty", "own", "other"]
    foreign: tuple[str, ...] = ()
    state: tuple[Any, ...] = ()


def standing(place: Path, closely: bool = True) -> Standing:
    """What stands at `place`; `closely`: look at every file of a result there. Raises OSError."""
    if not os.path.lexists(place):
        return Standing("nothing")
    if place.is_symlink():
        return Standing("other")
    stat = place.stat()
    if not place.is_dir():
        state = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        return Standing("own" if _is_own_file(place) else "other", state=state)
    if is_empty(place):
        return Standing("empty")
    if not closely:
        return Standing("other")
    listed = _own_files(place)
    if listed is None:
        return Standing("other")
    names = files_below(place)
    states = [os.lstat(place / name) for name in names]
    foreign = tuple(name for name in names if not listed(name))
    files = tuple((n, s.st_ino, s.st_size, s.st_mtime_ns) for n, s in zip(names, states, strict=True))
    return Standing("own", foreign, (stat.st_dev, stat.st_ino, files))


def is_empty(place: Path) -> bool:
    """Whether `place` is a directory with nothing in it. Raises OSError."""
    return place.is_dir() and not any(place.iterdir())


def _own_files(place: Path) -> Callable[[str], bool] | None:
    """A test of whether a name below `place` is kronfold's own; None when the directory is no result of its."""
    if (place / MARKER).exists():
        try:
            names = {MARKER, *read_marker(place)["files"]}
        except CheckpointError:
            return None
        return names.__contains__
    for told in _TOLD_BY:
        content = _json(place / told)
        if content is None:
            continue
        quantized = content.get("quantization_config")
        if (
            str(content.get("schema", "")).startswith("kronfold/")
            or (isinstance(quantized, dict) and quantized.get("quant_method") == "kronfold")
            or {"blocks_per_shard", "top_k", "format_version"} <= set(content)  # an offline teacher
            or {"python", "holdout", "splits"} == set(content)  # data stdlib
        ):
            return lambda name: _NAMES_OF_03.fullmatch(name.rpartition("/")[2]) is not None
    return None


def _is_own_file(path: Path) -> bool:
    """Whether a single file is a document or a page of kronfold's."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.lstrip()[:1] == b"{":
        content = _json(path)
        return content is not None and str(content.get("schema", "")).startswith("kronfold/")
    return re.search(rb"<title>[^<]* kronfold report</title>", head) is not None


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a file, None when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def seal(place: Path, kind: str, **facts: Any) -> None:
    """Note every file of a finished result with its size and hash in its marker, and have the disk keep them all.

    Temporary files of killed writers are removed first. Raises OSError, OutputError.
    """
    for name in files_below(place):
        if name.rpartition("/")[2].startswith("."):
            (place / name).unlink()
    files = {}
    for name in files_below(place):
        files[name] = {"bytes": (place / name).stat().st_size, "sha256": sha256_of(place / name)}
    marker = {"schema": MARKER_SCHEMA, "schema_version": 1, "kind": kind, **facts, "files": files}
    write_json(place / MARKER, sealed(marker))
    for folder, _, names in os.walk(place):
        for path in (*names, "."):
            sync(os.path.join(folder, path))


def read_marker(place: str | Path) -> dict[str, Any]:
    """The marker of a result. Raises CheckpointError when there is none that can be read."""
    path = Path(place) / MARKER
    content = _json(path)
    if content is None or content.get("schema") != MARKER_SCHEMA or not is_sealed(content):
        why = "is damaged" if path.exists() else "does not exist; results of version 0.3 and of other tools have none"
        raise CheckpointError(f"{path}, which lists the files of a result with their hashes, {why}.")
    return content


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON document with the hash of all else in it as its last entry."""
    return {**document, "seal": _digest(document)}


def is_sealed(document: Mapping[str, Any]) -> bool:
    """Whether a document read back is what `sealed` gave."""
    return document.get("seal") == _digest({key: value for key, value in document.items() if key != "seal"})


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def verified(place: str | Path) -> dict[str, Any]:
    """Check a directory against all lists of hashes in it: a finished result, an unfinished job, a trainer checkpoint.

    Returns {"files": how many were checked, "bytes": theirs, "unlisted": names of those that no list has}.
    Raises CheckpointError with every fault; or where there is no list.
    """
    place = Path(place)
    lists = [name for name in files_below(place) if name.rpartition("/")[2] in (MARKER, BOOK, SEAL)]
    if not lists:
        read_marker(place)
    expected: dict[str, Any] = {}
    faults = []
    for name in lists:
        content = _json(place / name)
        if content is None or not is_sealed(content):
            faults.append(f"{name}, which lists the others, is damaged")
            continue
        steps = [step["files"] for step in content.get("steps", {}).values()] if name.endswith(BOOK) else []
        folder = name.rpartition("/")[0]
        for files in steps or [content.get("files", {})]:
            expected |= {f"{folder}/{file}" if folder else file: facts for file, facts in files.items()}
    if faults := faults + faults_in(place, expected):
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise CheckpointError(
            f"{place} is damaged: {'; '.join(faults[:20])}{more}. Restore it from a copy, or make it anew."
        )
    unlisted = [name for name in files_below(place) if name not in expected and name not in lists]
    return {"files": len(expected), "bytes": sum(facts["bytes"] for facts in expected.values()), "unlisted": unlisted}


def kind_of(place: Path) -> str | None:
    """Which job a result is of, by its marker."""
    try:
        return read_marker(place).get("kind")
    except CheckpointError:
        return None


def faults_in(place: str | Path, files: Mapping[str, Any] | None = None) -> list[str]:
    """Every file of a result that is missing or is not what was written, as phrases; by its marker, or by `files`.

    Raises CheckpointError when there is no marker.
    """
    if files is None:
        files = read_marker(place)["files"]
    faults = []
    for name, expected in files.items():
        path = Path(place) / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                faults.append(f"{name} has {size:,} bytes and should have {expected['bytes']:,}")
            elif sha256_of(path) != expected["sha256"]:
                faults.append(f"{name} has the right size and another content")
        except FileNotFoundError:
            faults.append(f"{name} is missing")
        except OSError as error:
            faults.append(f"{name} cannot be read ({error.strerror})")
        except (TypeError, KeyError):
            faults.append(f"{name} has no size and hash in {MARKER}")
    return faults
