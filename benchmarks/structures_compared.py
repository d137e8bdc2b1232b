"""Compare structures at equal held parameters on real weights, by the error that the layer's own inputs see.

    python benchmarks/structures_compared.py MODEL --text train.txt --blocks 1 4 -o results.json

Errors are weighted relative errors (unitless) under H = E[x xᵀ] of each layer, from --tokens tokens of the text.
At each ratio every structure holds at most that share of the weight's numbers:

    low rank            pivoted, optimal under H: what the others have to beat
    low rank + (b)      backfitted sum with a rank-one Kronecker sum of block b, all under H
    Kronecker (b)       of the highest rank that fits; unweighted, and by alternating least squares under H
    Monarch (g x g)     every block of a g x g grid of low rank (Dao et al. 2022, arXiv 2204.00595, section 3, with
                        rectangular blocks of any rank); each block's SVD alone, and by block descent under H
    shared input        one right factor for all layers that read the same input, against as many separate low ranks
    shared neighbours   one right factor for the same layer of two adjacent blocks, against two separate low ranks
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import InputError, KronfoldError
from kronfold.base.files import check_output, sha256_of, write_json
from kronfold.base.results import document
from kronfold.base.specs import LowRankSpec, SumSpec
from kronfold.data.packing import pack
from kronfold.data.sources import documents
from kronfold.decompose.low_rank import nearest_low_rank
from kronfold.decompose.sum_fit import sum_fit
from kronfold.decompose.weighting import Weighting
from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.load import load_model, load_tokenizer
from kronfold.structures.kronecker import KroneckerSpec, nearest_kronecker

WINDOW = 256
ADDED = [(1, 2), (2, 2), (4, 4)]  # blocks of the Kronecker term of a sum
KRONECKER = [(1, 2), (2, 1), (2, 4)]
GRIDS = [2, 4, 8]
SWEEPS = 3
SLACK = 1.001  # by which a Kronecker sum may pass the ratio, so that its few numbers in B do not cost a whole term
Row = dict[str, Any]
Found = tuple[Tensor, int]  # dense approximation (out, in), numbers it holds


def moments(model: PreTrainedModel, views: Sequence[LinearView], windows: Tensor) -> dict[str, Tensor]:
    """E[x xᵀ] (in, in), float64, of the module of each view, by module name."""
    sums: dict[str, Tensor] = {}

    def gather(name: str, _module: Any, given: tuple[Tensor, ...]) -> None:
        x = given[0].flatten(0, -2).float()
        sums[name] = sums.get(name, 0) + (x.T @ x).double()

    with ExitStack() as stack, torch.no_grad():
        for name, module in {view.module_name: view.module for view in views}.items():
            handle = module.register_forward_pre_hook(partial(gather, name))
            stack.callback(handle.remove)
        for window in windows.split(4):
            model.base_model(window, use_cache=False)
    return {name: total / windows.numel() for name, total in sums.items()}


def low_rank(weight: Tensor, metric: Weighting, ratio: float) -> Found:
    """The optimum at `ratio` and the numbers it holds."""
    spec = LowRankSpec.for_ratio((weight.shape[0], weight.shape[1]), ratio)
    return nearest_low_rank(weight, spec, metric).to_dense(), spec.held_parameters


def kronecker(weight: Tensor, metric: Weighting | None, ratio: float, block: tuple[int, int]) -> Found | None:
    """The sum of highest rank within `ratio`, or None where one term is too large."""
    one = KroneckerSpec.for_weight((weight.shape[0], weight.shape[1]), block, 1)
    rank = min(int(SLACK * ratio * weight.numel() / one.held_parameters), one.max_rank)
    if not rank:
        return None
    spec = KroneckerSpec(one.a, one.b, rank)
    return nearest_kronecker(weight, spec, metric).to_dense(), spec.held_parameters


def added(weight: Tensor, metric: Weighting, ratio: float, block: tuple[int, int]) -> Found | None:
    """Low rank plus one Kronecker term, together within `ratio`; None where too little is left for the low rank."""
    term = KroneckerSpec.for_weight((weight.shape[0], weight.shape[1]), block, 1)
    rest = ratio - term.held_parameters / weight.numel()
    if rest < 0.02:
        return None
    spec = SumSpec([LowRankSpec.for_ratio(term.shape, rest), term])
    fit = sum_fit(weight, spec, [nearest_low_rank, nearest_kronecker], metric, SWEEPS)
    return fit.to_dense(), spec.held_parameters


def monarch(weight: Tensor, metric: Weighting | None, ratio: float, grid: int) -> Found | None:
    """A grid of low-rank blocks. None where the grid does not divide the weight.

    Under H the error couples the block columns: given the others' residual E, the best column block i is a low-rank fit
    of W_i + E H_·i H_ii⁻¹ under H_ii (block coordinate descent, from the fit without H).
    """
    out_features, in_features = weight.shape
    if out_features % grid or in_features % grid:
        return None
    spec = LowRankSpec.for_ratio((out_features // grid, in_features // grid), ratio)
    h = torch.eye(in_features, dtype=torch.float64) if metric is None or metric.inputs is None else metric.inputs
    plain = None if metric is None else monarch(weight, None, ratio, grid)
    found = weight if plain is None else plain[0]
    for _ in range(1 if metric is None else SWEEPS):
        for columns in torch.arange(in_features).split(in_features // grid):
            own = h[columns][:, columns]
            residual = (weight - found).index_fill(1, columns, 0.0)
            target = weight[:, columns] + torch.linalg.solve(own, (residual @ h[:, columns]).T).T
            blocks = [nearest_low_rank(part, spec, Weighting(own, damping=0.0)) for part in target.chunk(grid)]
            found = found.index_copy(1, columns, torch.cat([fit.to_dense() for fit in blocks]))
    return found, grid * grid * spec.held_parameters


def candidates(weight: Tensor, metric: Weighting, ratio: float) -> dict[str, Callable[[], Found | None]]:
    """The structures of one weight by name; each call fits one."""
    made: dict[str, Callable[[], Found | None]] = {"low rank": partial(low_rank, weight, metric, ratio)}
    for block in ADDED:
        made[f"low rank + {block}"] = partial(added, weight, metric, ratio, block)
    for block in KRONECKER:
        made[f"Kronecker {block}"] = partial(kronecker, weight, None, ratio, block)
        made[f"Kronecker {block}, under H"] = partial(kronecker, weight, metric, ratio, block)
    for grid in GRIDS:
        made[f"Monarch {grid} x {grid}"] = partial(monarch, weight, None, ratio, grid)
        made[f"Monarch {grid} x {grid}, under H"] = partial(monarch, weight, metric, ratio, grid)
    return made


def single(name: str, weight: Tensor, metric: Weighting, ratio: float, leave_out: Sequence[str]) -> Iterator[Row]:
    """A row for each structure of one weight, with the error of plain low rank beside its own."""
    base = metric.relative_error(weight, low_rank(weight, metric, ratio)[0])
    for structure, fit in candidates(weight, metric, ratio).items():
        if any(fnmatchcase(structure, pattern) for pattern in leave_out) or (found := fit()) is None:
            continue
        errors = {"error": metric.relative_error(weight, found[0]), "baseline": base}
        yield {"what": name, "ratio": ratio, "structure": structure, "share": found[1] / weight.numel(), **errors}


def shared(kind: str, name: str, weights: list[Tensor], metrics: list[Weighting], ratio: float) -> Row:
    """One right factor for all `weights` (out_i, in), fitted under the mean moment; each left factor under its own."""
    moments_ = [metric.inputs for metric in metrics]
    scales = [1 / float(torch.trace(w @ h @ w.T)) for w, h in zip(weights, moments_, strict=True)]
    stack = torch.cat([w * s**0.5 for w, s in zip(weights, scales, strict=True)])
    mean = Weighting(torch.stack([h / h.trace() for h in moments_]).mean(0), damping=0.0)
    spec = LowRankSpec.for_ratio((stack.shape[0], stack.shape[1]), ratio)
    right = torch.linalg.svd(nearest_low_rank(stack, spec, mean).to_dense(), full_matrices=False).Vh[: spec.rank]
    ours, theirs = 0.0, 0.0
    for weight, metric, scale in zip(weights, metrics, scales, strict=True):
        h = metric.inputs
        left = torch.linalg.solve(right @ h @ right.T, right @ h @ weight.T).T
        ours += scale * metric.squared_error(weight - left @ right)
        theirs += scale * metric.squared_error(weight - low_rank(weight, metric, ratio)[0])
    count = len(weights)
    share = spec.held_parameters / stack.numel()
    errors = {"error": (ours / count) ** 0.5, "baseline": (theirs / count) ** 0.5}
    return {"what": name, "ratio": ratio, "structure": f"shared {kind}", "share": share, **errors}


def measure(model: PreTrainedModel, windows: Tensor, options: argparse.Namespace) -> Iterator[Row]:
    """All rows: single weights, layers of one input, neighbours."""
    family = family_of(model)
    every = [view for view in sites(model).values() if view.kind == "linear" and view.block is not None]
    used = [view for view in every if view.block in {b + i for b in options.blocks for i in (0, 1)}]
    last = max(view.block for view in used if view.block is not None)
    blocks = model.get_submodule(family.blocks)
    del blocks[last + 1 :]  # the inputs of earlier blocks do not depend on later ones
    model.config.num_hidden_layers = len(blocks)
    found = moments(model, used, windows)
    metric = {view.name: Weighting(found[view.module_name]).checked(view.shape) for view in used}
    weight = {view.name: view.weight().double() for view in used}
    for view in (view for view in used if view.block in options.blocks):
        neighbour = view.name.replace(f"{family.blocks}.{view.block}.", f"{family.blocks}.{view.block + 1}.")
        for ratio in options.ratios:
            if any(fnmatchcase(view.name, pattern) for pattern in options.sites):
                yield from single(view.name, weight[view.name], metric[view.name], ratio, options.leave_out)
                if neighbour in weight:
                    pair = [view.name, neighbour]
                    parts = [weight[n] for n in pair], [metric[n] for n in pair]
                    yield shared("neighbours", f"{view.name} and next", *parts, ratio)
            group = [v.name for v in used if torch.equal(found[v.module_name], found[view.module_name])]
            if len(group) > 1 and group[0] == view.name:
                parts = [weight[n] for n in group], [metric[n] for n in group]
                yield shared("input", " ".join(group), *parts, ratio)


def table(rows: list[Row]) -> Table:
    """Mean error of each structure and of plain low rank on the same weights; last the best gain on one of them."""
    shown = Table(title="Weighted relative error; gain: fall against plain low rank of the same weight")
    for name in ("ratio", "structure", "weights", "share", "error", "low rank", "mean gain", "best gain"):
        shown.add_column(name, justify="left" if name == "structure" else "right", no_wrap=True)
    for s in summarise(rows):
        shown.add_row(
            *(str(s["ratio"]), s["structure"], str(s["weights"]), f"{s['share']:.3f}"),
            *(f"{s['error']:.4f}", f"{s['baseline']:.4f}", f"{s['mean_gain']:+.1%}", f"{s['best_gain']:+.1%}"),
        )
    return shown


def summarise(rows: list[Row]) -> list[Row]:
    """One entry for each ratio and structure: means over the weights, and the best gain among them."""
    found = []
    for ratio, structure in dict.fromkeys((row["ratio"], row["structure"]) for row in rows):
        part = [row for row in rows if (row["ratio"], row["structure"]) == (ratio, structure)]
        gains = [1 - row["error"] / row["baseline"] for row in part]
        means = {key: sum(row[key] for row in part) / len(part) for key in ("share", "error", "baseline")}
        gain = {"mean_gain": sum(gains) / len(gains), "best_gain": max(gains)}
        found.append({"ratio": ratio, "structure": structure, "weights": len(part), **means, **gain})
    return sorted(found, key=lambda entry: (entry["ratio"], entry["error"] / entry["baseline"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument("--text", required=True, help="text the inputs are measured on (file, directory or hub id)")
    parser.add_argument("--blocks", type=int, nargs="+", required=True, help="transformer blocks, from 0")
    parser.add_argument("--sites", nargs="+", default=["*"], help="name patterns of the weights compared one by one")
    parser.add_argument("--leave-out", nargs="+", default=[], metavar="PATTERN", help="structures not to be fitted")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.7], help="share of the numbers kept")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="write every row and the summary as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args()
    try:
        if options.output:
            check_output(options.output, options.overwrite)
        torch.set_num_threads(options.threads)
        model, tokenizer = load_model(options.model), load_tokenizer(options.model)
        depth = len(model.get_submodule(family_of(model).blocks))
        if wrong := [block for block in options.blocks if not 0 <= block < depth]:
            raise InputError(f"Blocks {wrong} are not in this model; it has blocks 0 to {depth - 1}.")
        packed = pack(documents(options.text), tokenizer, WINDOW, max_tokens=options.tokens)
        windows = torch.stack([packed[i]["input_ids"] for i in range(len(packed))])
        rows, log = [], Console(stderr=True, width=160)
        for row in measure(model, windows, options):
            rows.append(row)
            log.print(f"{row['what']}  {row['ratio']}  {row['structure']}  {row['error']:.4f} ({row['baseline']:.4f})")
        Console(width=120).print(table(rows))
        if options.output:
            text = {"sha256": sha256_of(options.text), "tokens": windows.numel()}
            content = {"model": Path(options.model).name, "blocks": options.blocks, "text": text}
            write_json(
                options.output, document("structures_compared", None, **content, summary=summarise(rows), rows=rows)
            )
    except KronfoldError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
