"""kronfold: make GPT-style language models smaller, planned for a budget and fitted to data; heal them by distillation.

import kronfold as kf
student = kf.compress(teacher, "auto", calibration="my-text.txt")
kf.heal(student, teacher, blocks)
student.save_pretrained("out")          # loads with AutoModelForCausalLM.from_pretrained after `import kronfold`
"""

from __future__ import annotations

import importlib
from typing import Any

from kronfold.export import autoload

__version__ = "0.3.0"

# Public names and where they live; imported on first use, so that `import kronfold` stays light.
_PUBLIC = {
    "KroneckerSpec": "kronfold.structures.kronecker",
    "nearest_kronecker": "kronfold.structures.kronecker",
    "permuted_kronecker": "kronfold.structures.kronecker",
    "plan": "kronfold.fit.compress",
    "compress": "kronfold.fit.compress",
    "heal": "kronfold.train.heal",
    "Budget": "kronfold.planner.budget",
    "LowRankSpec": "kronfold.structures.low_rank",
    "perplexity": "kronfold.evaluate.perplexity",
    "to_dense": "kronfold.export.dense",
    "cache_dense": "kronfold.structures.layer",
    "dense_cache_bytes": "kronfold.structures.layer",
    "register_structure": "kronfold.structures.registry",
    "store_teacher": "kronfold.train.store_teacher",
    "StoredTeacher": "kronfold.distill.stored",
}
__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kronfold' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


autoload.install()
