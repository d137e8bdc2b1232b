"""The versioned schema of result files: made, checked and read here. Keys are only ever added.

`kinds` says what each kind of document holds; it is imported when a document is checked, since `versions` is asked for
wherever a checkpoint is loaded.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kronfold.base import processes
from kronfold.base.errors import InputError, KronfoldError

SCHEMA_VERSION = 1
LARGEST_FILE = 64_000_000  # bytes; the largest document of ours is below 1 MB, and a page must hold it
_LARGEST_INTEGER = 2**63 - 1
_PACKAGES = ("kronfold", "torch", "transformers", "accelerate", "safetensors", "scipy", "scikit-learn", "numpy")
_SHOWN_FAULTS = 5
_WRITTEN_BY = {
    "run": "the results.json that `kronfold run` or `kronfold demo` wrote",
    "compare": "the results.json that `kronfold compare` wrote",
    "plan": "the document that `kronfold plan --json` prints",
    "plan-diff": "the document that `kronfold plan --diff A B --json` prints",
    "clean": "the manifest.json that `kronfold data clean` wrote",
    "sample": "the manifest.json that `kronfold data sample` wrote",
}


def versions() -> dict[str, str]:
    """Versions of Python, kronfold and the libraries that shape the numbers (none is imported for this)."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor architecture, operating system, the number of cores this process may use; processes, where several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    together = {"processes": processes.count()} if processes.count() > 1 else {}
    return {"machine": platform.machine(), "system": platform.system(), "cores": cores, **together}


def document(kind: str, seed: int | None, **content: Any) -> dict[str, Any]:
    """A result document of one `kind` ("run", "eval", "plan", ...), headed by what is needed to believe it.

    Raises KronfoldError, naming the key, when a number is not finite or the content is not what `kinds` says. A kind
    that is not named there (those of the benchmarks) is checked for its numbers alone.
    """
    made = {
        "schema": f"kronfold/{kind}",
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
        **content,
    }
    if faults := [*_bad_numbers(made), *_faults(made, kind)]:
        raise KronfoldError(
            f"The result of {kind} cannot be written down: {_listed(faults)}. A number that is not finite comes from a "
            "model that holds NaN or has diverged; anything else is a fault of kronfold, please report it."
        )
    return made


def check(document: Any, *kinds: str, where: str = "The result document", finite: bool = False) -> str:
    """Make sure that `document` is a result of one of `kinds`, in a version this kronfold reads. Returns its kind.

    Args:
        where: how messages call it, such as the name of its file.
        finite: also refuse NaN, infinity and integers of more than 64 bits, which no JSON file of ours holds.

    Raises InputError: another schema or version; or all keys that are missing or hold the wrong thing.
    """
    named = " or ".join(repr(f"kronfold/{kind}") for kind in kinds)
    reads = f"this version of kronfold reads {named}, schema_version {SCHEMA_VERSION}"
    wanted = " or ".join(_WRITTEN_BY.get(kind, f"what `kronfold {kind} --json` prints") for kind in kinds)
    if not isinstance(document, Mapping):
        raise InputError(f"{where} must be a JSON object, but this is a {type(document).__name__}; {reads}.")
    schema, version = document.get("schema"), document.get("schema_version")
    if schema not in [f"kronfold/{kind}" for kind in kinds]:
        raise InputError(f"{where} has schema {_short(schema)}; {reads}. Give {wanted}.")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        step = "Upgrade kronfold to read it." if newer else f"Give {wanted}."
        raise InputError(f"{where} has schema_version {_short(version)}; {reads}. {step}")
    kind = str(schema).removeprefix("kronfold/")
    faults = [*(_bad_numbers(document) if finite else ()), *_faults(document, kind)]
    if faults:
        raise InputError(f"{where} is damaged: {_listed(faults)}. Give {wanted}, as it was written.")
    return kind


def read(path: str | Path, *kinds: str) -> dict[str, Any]:
    """The result file `path`, of one of `kinds`; keys that this version does not know are kept.

    Raises InputError, naming the file, the key and the next step: missing, too large, no JSON object, a number that is
    not finite, another schema or version, a key that is missing or holds the wrong thing.
    """
    path = Path(path)
    step = f"Give {' or '.join(_WRITTEN_BY.get(kind, f'a {kind} document') for kind in kinds)}."
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise InputError(
                f"{path} is no result file: it has {size:,} bytes, and none of ours has {LARGEST_FILE:,}. {step}"
            )
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise InputError(f"{path} holds no JSON object, but a {type(found).__name__}. {step}")
        check(found, *kinds, where=str(path), finite=True)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        said = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{path} cannot be read as a result file: {said}. {step}") from error
    return found


def _faults(document: Mapping[str, Any], kind: str) -> list[str]:
    """What `kinds` finds wrong: "lacks teacher, stages" first, then one sentence for each key."""
    from pydantic import ValidationError

    from kronfold.base.results.kinds import KINDS

    if kind not in KINDS:
        return []
    try:
        KINDS[kind].model_validate(dict(document))
    except ValidationError as error:
        entries = error.errors(include_url=False)
    else:
        return []
    missing = [str(entry["loc"][0]) for entry in entries if entry["type"] == "missing" and len(entry["loc"]) == 1]
    found = [f"it lacks {', '.join(missing)}"] if missing else []
    for entry in entries:
        place, said = ".".join(str(part) for part in entry["loc"]), str(entry["msg"])
        if entry["type"] == "missing":
            found += [f"{place} is missing"] if len(entry["loc"]) > 1 else []
        elif entry["type"] == "value_error":  # one of our own, which names the key itself
            found.append(said.removeprefix("Value error, "))
        else:
            found.append(f"{place}: {said[:1].lower()}{said[1:]}, but it is {_short(entry['input'])}")
    return found


def _bad_numbers(value: Any, place: str = "") -> Iterator[str]:
    """Every number that JSON does not have, or that no reader of JSON can be trusted with."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _bad_numbers(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _bad_numbers(item, f"{place}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place} is {value}, which is no finite number"
    elif isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        yield f"{place} is an integer of more than 64 bits"


def _listed(faults: list[str]) -> str:
    rest = f"; and {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
    return "; ".join(faults[:_SHOWN_FAULTS]) + rest


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
