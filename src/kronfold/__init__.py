"""kronfold: make GPT-style language models smaller, planned for a budget and fitted to data; heal them by distillation.

import kronfold as kf
student = kf.compress(teacher, "auto", calibration="my-text.txt")
kf.heal(student, teacher, blocks)
student.save_pretrained("out")          # loads with AutoModelForCausalLM.from_pretrained after `import kronfold`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kronfold.export import autoload

if TYPE_CHECKING:  # for type checkers and the API reference; the table below says the same at run time
    from kronfold.distill.stored import StoredTeacher as StoredTeacher
    from kronfold.evaluate.perplexity import perplexity as perplexity
    from kronfold.export.dense import to_dense as to_dense
    from kronfold.fit.compress import compress as compress
    from kronfold.fit.compress import plan as plan
    from kronfold.planner.budget import Budget as Budget
    from kronfold.structures.kronecker import KroneckerSpec as KroneckerSpec
    from kronfold.structures.kronecker import nearest_kronecker as nearest_kronecker
    from kronfold.structures.kronecker import permuted_kronecker as permuted_kronecker
    from kronfold.structures.layer import cache_dense as cache_dense
    from kronfold.structures.layer import dense_cache_bytes as dense_cache_bytes
    from kronfold.structures.low_rank import LowRankSpec as LowRankSpec
    from kronfold.structures.registry import register_structure as register_structure
    from kronfold.train.heal import heal as heal
    from kronfold.train.store_teacher import store_teacher as store_teacher

__version__ = "0.4.0.dev0"

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
