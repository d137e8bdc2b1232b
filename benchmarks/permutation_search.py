"""Compare the permutation searches on real weights.

    python benchmarks/permutation_search.py --weights attention.safetensors --transpose -o permutation_search.json

Every matrix of the file (default: attention output of the model in the package) is fitted with blocks (1, 2) at rank 1
and (4, 2) at rank 4 (equal held parameters), without permutations ("plain") and by every method. Seconds are given as
wall time and as processor time of this process; on a machine that does other work only the second means much. The
search itself runs on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

import kronfold as kf
from bench import Benchmark, Run, figure
from kronfold.assets import teacher_path
from kronfold.base.errors import DataError
from kronfold.base.files import sha256_of
from kronfold.structures.kronecker.permutations import METHODS

FAMILIES = [((1, 2), 1), ((4, 2), 4)]  # block, rank


def load_matrices(path: Path, transpose: bool) -> dict[str, Tensor]:
    """The 2-D tensors of a safetensors file in canonical orientation (out, in). Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a safetensors file with --weights.")
    tensors = {name: t for name, t in load_file(path).items() if t.dim() == 2}
    if not tensors:
        raise DataError(f"{path} holds no matrix; give a safetensors file with 2-D weights.")
    return {name: t.T.contiguous() if transpose else t for name, t in tensors.items()}


def fitted(weight: Tensor, spec: kf.KroneckerSpec, method: str, seed: int) -> dict[str, Any]:
    """One fit: relative error (Frobenius, unitless), seconds, entries in the history."""
    wall, processor = time.perf_counter(), time.process_time()
    if method == "plain":
        fit = kf.nearest_kronecker(weight, spec)
    else:
        fit = kf.permuted_kronecker(weight, spec, seed=seed, method=method)
    return {
        "relative_error": fit.relative_error,
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "processor_seconds": round(time.process_time() - processor, 3),
        "history_length": len(fit.history),
    }


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    if options.weights:
        source, matrices = options.weights, load_matrices(options.weights, options.transpose)
    else:
        source = teacher_path() / "model.safetensors"
        own = load_matrices(source, transpose=True)  # GPT-2's Conv1D weights are (in, out)
        matrices = {name: weight for name, weight in own.items() if name.endswith("attn.c_proj.weight")}
    if options.quick:
        matrices = dict(list(matrices.items())[:1])
    rows, summary, figures = [], [], []
    for block, rank in FAMILIES:
        for method in ("plain", *METHODS):
            part = []
            for name, weight in matrices.items():
                spec = kf.KroneckerSpec.for_weight((weight.shape[0], weight.shape[1]), block, rank)
                found = fitted(weight, spec, method, options.seed)
                held = {"spec": spec.to_dict(), "held_parameters": spec.held_parameters}
                part.append({"matrix": name, "method": method, **held, **found})
            errors = [row["relative_error"] for row in part]
            entry = {"block": list(block), "rank": rank, "method": method,
                     "mean_relative_error": statistics.mean(errors), "worst_relative_error": max(errors)}  # fmt: skip
            for key in ("processor_seconds", "wall_seconds"):
                entry[f"mean_{key}"] = statistics.mean(row[key] for row in part)
            name = f"{block}, rank {rank}, {method}"
            figures.append(figure(f"{name}: mean relative error", entry["mean_relative_error"]))
            figures.append(figure(f"{name}: processor s per matrix", entry["mean_processor_seconds"]))
            summary.append(entry)
            rows += part
    return {"figures": figures, "weights": {"file": source.name, "sha256": sha256_of(source)}, "summary": summary,
            "rows": rows}  # fmt: skip


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--weights", type=Path, help="safetensors file; its 2-D tensors are used")
    made.add_argument("--transpose", action="store_true", help="the tensors are Conv1D weights (in, out)")


QUICK = {"weights": None}
BENCHMARK = Benchmark("permutation_search", __doc__ or "", add_options, measure, QUICK)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
