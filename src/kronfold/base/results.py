"""The versioned schema of result files. Scripts and the report read these; keys are only ever added."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from typing import Any

from kronfold.base import processes

SCHEMA_VERSION = 1
_PACKAGES = ("kronfold", "torch", "transformers", "accelerate", "safetensors", "scipy", "scikit-learn", "numpy")


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
    """A result document of one `kind` ("run", "eval", "plan", ...), headed by what is needed to believe it."""
    return {
        "schema": f"kronfold/{kind}",
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "versions": versions(),
        "machine": machine(),
        **content,
    }
