"""Compare the permutation searches on real weights.

    python benchmarks/permutation_search.py --weights attention.safetensors --transpose -o results.json

Every matrix of the file is fitted with blocks (1, 2) at rank 1 and (4, 2) at rank 4 (equal held parameters), without
permutations ("plain"), by every method of the package, and by random restarts with simulated annealing, as the
signatures of TQCompressor's released code hint (arXiv 2401.16367). Seconds are given as wall time and as processor time
of this process; on a machine that does other work only the second means much.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from kronfold.base.errors import DataError, KronfoldError
from kronfold.base.files import check_output, sha256_of, write_json
from kronfold.base.results import document
from kronfold.ops.threads import one_thread
from kronfold.structures.kronecker import KroneckerSpec, nearest_kronecker, permuted_kronecker
from kronfold.structures.kronecker.moves import assign, chunks
from kronfold.structures.kronecker.search import Options, Search, shuffled

FAMILIES = [((1, 2), 1), ((4, 2), 4)]  # block, rank
COMPARED = ("plain", "auto", "assignment", "annealing", "grouping")

RESTARTS = 2  # of the annealing: the identity, then random arrangements
STAGES = 12  # temperatures; the basis is refitted after each
STEPS = 12  # proposals per group and temperature
HOT, COLD = 1.0, 0.01  # first and last temperature, in units of the typical change a swap makes


def load_matrices(path: Path, transpose: bool) -> dict[str, Tensor]:
    """The 2-D tensors of a safetensors file in canonical orientation (out, in)."""
    if not path.is_file():
        raise DataError(f"{path} is not a file; give a safetensors file with --weights.")
    tensors = {name: t for name, t in load_file(path).items() if t.dim() == 2}
    if not tensors:
        raise DataError(f"{path} holds no matrix; give a safetensors file with 2-D weights.")
    return {name: t.T.contiguous() if transpose else t for name, t in tensors.items()}


def measure(weight: Tensor, spec: KroneckerSpec, method: str, seed: int) -> dict[str, Any]:
    """One fit: relative error (Frobenius, unitless), seconds, entries in the history."""
    wall, processor = time.perf_counter(), time.process_time()
    if method == "annealing":
        error, entries = anneal(weight, spec, seed)
    else:
        plain = method == "plain"
        fit = nearest_kronecker(weight, spec) if plain else permuted_kronecker(weight, spec, seed=seed, method=method)
        error, entries = fit.relative_error, len(fit.history)
    return {
        "relative_error": error,
        "wall_seconds": round(time.perf_counter() - wall, 3),
        "processor_seconds": round(time.process_time() - processor, 3),
        "history_length": entries,
    }


def anneal(weight: Tensor, spec: KroneckerSpec, seed: int) -> tuple[float, int]:
    """The best over the restarts, each cooled and then finished by alternating assignment: (error, history entries).

    One step pairs all groups at random, proposes to swap one random member of each pair of groups, and accepts every
    swap on its own by the Metropolis rule: the pairs are disjoint, so their gains add up exactly.
    """
    with one_thread():
        search = Search(weight, spec, Options(seed, 5e-4 if weight.numel() <= 1 << 20 else 2e-3, -1.0, 40))
        for restart in range(RESTARTS):
            state = search.identity if restart == 0 else shuffled(search)
            for stage in range(STAGES):
                temperature = HOT * (COLD / HOT) ** (stage / (STAGES - 1))

                def cool(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
                    groups = groups.clone()
                    for part in chunks(groups, x.shape[0], x[0].numel(), generator):
                        for _ in range(STEPS):
                            groups[part] = metropolis(x, basis, groups[part], temperature, generator)  # noqa: B023
                    return groups

                for side in search.sides:
                    state = search.moved(state, side, cool)
                search.accept(state)
            search.descend(state, [assign])
        best = search.best
        arranged = weight[best.rows.reshape(-1)] if "out" in search.sides else weight
        arranged = arranged[:, best.cols.reshape(-1)] if "in" in search.sides else arranged
        return nearest_kronecker(arranged, spec).relative_error, len(search.history) + 1


def metropolis(x: Tensor, basis: Tensor, groups: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """One step; shapes as in structures/kronecker/moves.py."""
    g, k = groups.shape
    order = torch.randperm(g, generator=generator)[: g - g % 2]
    slots = torch.randint(k, (len(order),), generator=generator)
    chosen, place = groups[order], torch.arange(len(order))
    taken = chosen[place, slots]
    loose = x[taken]
    rest = -loose @ basis[slots]  # what is left of each group without its loose member
    for slot in range(k):
        rest += x[chosen[:, slot]] @ basis[slot]
    pull = rest @ basis[slots].transpose(1, 2)
    partner = place.view(-1, 2).flip(1).reshape(-1)  # neighbours in the random order trade

    def worth(member: Tensor) -> Tensor:
        return (member @ basis[slots]).square().sum((1, 2)) + 2.0 * (pull * member).sum((1, 2))

    gain = (worth(loose[partner]) - worth(loose)).view(-1, 2).sum(1)
    unit = temperature * gain.abs().mean().clamp_min(torch.finfo(gain.dtype).tiny)
    accepted = torch.rand(len(gain), generator=generator) < (gain / unit).clamp(max=0.0).exp()
    groups = groups.clone()
    groups[order, slots] = torch.where(accepted.repeat_interleave(2), taken[partner], taken)
    return groups


def run(matrices: dict[str, Tensor], seed: int) -> Iterator[dict[str, Any]]:
    """One row per family, method and matrix."""
    for block, rank in FAMILIES:
        for method in COMPARED:
            for name, weight in matrices.items():
                spec = KroneckerSpec.for_weight((weight.shape[0], weight.shape[1]), block, rank)
                row = {"matrix": name, "method": method, "spec": spec.to_dict()}
                yield {**row, "held_parameters": spec.held_parameters, **measure(weight, spec, method, seed)}


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and worst over the matrices for every family and method."""
    found = []
    for block, rank in FAMILIES:
        for method in COMPARED:
            part = [
                r for r in rows if r["method"] == method and r["spec"]["b"] == list(block) and r["spec"]["rank"] == rank
            ]
            errors = [r["relative_error"] for r in part]
            found.append(
                {
                    "block": list(block),
                    "rank": rank,
                    "method": method,
                    "mean_relative_error": statistics.mean(errors),
                    "worst_relative_error": max(errors),
                    "mean_processor_seconds": statistics.mean(r["processor_seconds"] for r in part),
                    "mean_wall_seconds": statistics.mean(r["wall_seconds"] for r in part),
                }
            )
    return found


def table(summary: list[dict[str, Any]], count: int) -> Table:
    shown = Table(title=f"Relative error over {count} matrices")
    for name in ("block", "rank", "method", "mean", "worst", "processor s", "wall s"):
        shown.add_column(name, justify="left" if name in ("block", "method") else "right")
    for s in summary:
        shown.add_row(
            str(tuple(s["block"])),
            str(s["rank"]),
            s["method"],
            f"{s['mean_relative_error']:.4f}",
            f"{s['worst_relative_error']:.4f}",
            f"{s['mean_processor_seconds']:.2f}",
            f"{s['mean_wall_seconds']:.2f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file; its 2-D tensors are used")
    parser.add_argument("--transpose", action="store_true", help="the tensors are Conv1D weights (in, out)")
    parser.add_argument("-o", "--output", type=Path, help="write every row and the summary as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch threads (the search itself uses one)")
    options = parser.parse_args()
    try:
        if options.output:
            check_output(options.output, options.overwrite)
        torch.set_num_threads(options.threads)
        matrices = load_matrices(options.weights, options.transpose)
        console = Console(stderr=True)
        total = len(FAMILIES) * len(COMPARED) * len(matrices)
        rows = list(track(run(matrices, options.seed), "Fitting", total=total, console=console))
        summary = summarise(rows)
        Console().print(table(summary, len(matrices)))
        if options.output:
            source = {"file": options.weights.name, "sha256": sha256_of(options.weights)}
            content = {"weights": source, "transpose": options.transpose, "summary": summary, "rows": rows}
            write_json(options.output, document("permutation_search", options.seed, **content))
    except KronfoldError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
