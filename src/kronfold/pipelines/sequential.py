"""Fit a model block by block to data: every layer sees the inputs that the compressed layers before it really give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.decompose.correction import corrected_weight
from kronfold.decompose.weighting import covariance
from kronfold.export.quantizer import attach
from kronfold.models.block_stream import BlockStream
from kronfold.models.calibrate import check_windows
from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.statistics import Statistics
from kronfold.models.surgery import replace_modules
from kronfold.pipelines.placement import fit_row, place_embedding, place_linear
from kronfold.planner import planning
from kronfold.planner.plan import PlanRow

TOKENS_PER_CALL = 4096

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Moments:
    """Means over the calibration tokens at one layer: H̃ = E[x̃ x̃ᵀ], C = E[x x̃ᵀ], E[x], E[x̃]; x̃ after compression."""

    second: Tensor
    cross: Tensor
    first: Tensor
    first_now: Tensor

    def centred(self) -> Moments:
        """The same about the means, for layers whose bias is refitted."""
        return replace(
            self,
            second=covariance(self.second, self.first_now, self.first_now),
            cross=covariance(self.cross, self.first, self.first_now),
        )


def compress_sequentially(
    model: PreTrainedModel,
    rows: Sequence[PlanRow],
    statistics: Statistics,
    windows: Tensor,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[PlanRow]:
    """Fit the rows in the order in which the model runs and swap them into `model`, in place.

    Args:
        model: dense where the rows are; changed block by block.
        statistics: weighting of the embedding and head, and the gradient moments of all sites.
        windows: (n, window) calibration token ids.

    Returns the rows, in the order given, with their weighted errors.

    Raises, before anything changes: RecipeError when a row does not fit. DataError or InputError for windows that the
    model cannot be run on, and for statistics that hold nothing about a row. InputError while fitting: a layer that
    its block never runs, or that gets no inputs but zeros; the blocks before it are compressed by then.
    """
    views = sites(model)
    planning.check_rows(views, rows)
    check_windows(model, windows)
    for row in rows:
        if views[row.name].kind == "linear":
            statistics.input_moments(views[row.name].module_name)
    training = model.training
    model.eval()
    try:
        done = _run(model, views, rows, statistics, windows, seed, progress or (lambda _what, _done, _total: None))
    finally:
        model.train(training)
    attach(model)
    order = {row.name: i for i, row in enumerate(rows)}
    return sorted(done, key=lambda row: order[row.name])


def _run(
    model: PreTrainedModel,
    views: dict[str, LinearView],
    rows: Sequence[PlanRow],
    statistics: Statistics,
    windows: Tensor,
    seed: int,
    progress: Progress,
) -> list[PlanRow]:
    """What stands outside the blocks first, then block by block."""
    pending = {row.name: row for row in rows}
    dense = BlockStream(model, windows, batch_for(windows))
    dense.start()
    done: list[PlanRow] = []
    outside = [row for row in rows if views[row.name].block is None]
    for row in outside:
        done.append(_fit_outside(model, views[row.name], row, statistics, seed))
        del pending[row.name]
    student = dense.twin()
    student.start()
    name = family_of(model).blocks
    for i, block in enumerate(model.get_submodule(name).children()):
        inside = [row for row in pending.values() if views[row.name].block == i]
        progress(f"fit block {i}", i, len(dense.blocks))
        original = copy.deepcopy(block) if inside else block
        for group in _in_running_order(student, original, i, f"{name}.{i}.", views, inside, statistics):
            moments = _moments(dense, student, original, block, i, group, views, f"{name}.{i}.")
            done += _fit_group(model, views, group, moments, statistics, seed)
        dense.advance(original, i)
        student.advance(block, i)
    progress("fit", len(dense.blocks), len(dense.blocks))
    return done


def batch_for(windows: Tensor) -> int:
    """The largest number of windows per call that divides their count and stays within TOKENS_PER_CALL."""
    count, window = windows.shape
    return max(
        size for size in range(1, count + 1) if count % size == 0 and (size == 1 or size * window <= TOKENS_PER_CALL)
    )


def _fit_outside(model: PreTrainedModel, view: LinearView, row: PlanRow, statistics: Statistics, seed: int) -> PlanRow:
    """The embedding or an untied head, weighted by the statistics of the dense model."""
    fit, plain = fit_row(view.weight(), row, seed, statistics.weighting(view))
    modules: dict[str, nn.Module] = {}
    if view.kind == "embedding":
        place_embedding(model, modules, view, row, fit)
    else:
        mean = statistics.input_moments(view.module_name)[1]
        place_linear(modules, view, row, fit, _refitted_bias(view, fit.to_dense(), mean, mean))
    replace_modules(model, modules)
    return replace(row, relative_error=fit.relative_error, relative_error_plain=plain)


def _refitted_bias(view: LinearView, approximation: Tensor, mean: Tensor, mean_now: Tensor) -> Tensor | None:
    """The bias that keeps the mean output: it absorbs what the means of the inputs moved by and what the fit leaves of
    them. `mean`, `mean_now`: of the inputs before and after compression."""
    bias = view.bias()
    if bias is None:
        return None
    shift = view.weight().double().cpu() @ mean.double().cpu() - approximation @ mean_now.double().cpu()
    return bias.double().cpu() + shift


def _in_running_order(
    stream: BlockStream,
    block: nn.Module,
    index: int,
    prefix: str,
    views: Mapping[str, LinearView],
    rows: Sequence[PlanRow],
    statistics: Statistics,
) -> list[list[PlanRow]]:
    """The rows of a block, those that read the same input together, in the order in which the block runs them.

    Raises InputError for a row whose layer is never run.
    """
    if not rows:
        return []
    order: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _module, _args, name=name: order.append(prefix + name))
        for name, module in block.named_modules()
        if name
    ]
    try:
        with torch.no_grad():
            stream.call(block, index, stream.hidden[0])
    finally:
        for handle in handles:
            handle.remove()
    idle = sorted(row.name for row in rows if views[row.name].module_name not in order)
    if idle:
        raise InputError(f"The calibration text never reaches {', '.join(idle[:3])}; leave these dense.")
    groups: dict[str, list[PlanRow]] = {}
    for row in sorted(rows, key=lambda row: order.index(views[row.name].module_name)):
        key = statistics.reads.get(views[row.name].module_name, row.name)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _moments(
    dense: BlockStream,
    student: BlockStream,
    original: nn.Module,
    block: nn.Module,
    index: int,
    group: Sequence[PlanRow],
    views: dict[str, LinearView],
    prefix: str,
) -> Moments:
    """Input moments of the layers of a group, which all read the same input."""
    local = views[group[0].name].module_name.removeprefix(prefix)
    pairs = zip(
        dense.inputs_of(original, index, original.get_submodule(local)),
        student.inputs_of(block, index, block.get_submodule(local)),
        strict=True,
    )
    second = cross = first = first_now = torch.zeros(())
    tokens = 0
    for before, now in pairs:
        wide = torch.promote_types(now.dtype, torch.float32)
        before, now = before.to(wide), now.to(wide)
        second = second + now.T @ now
        cross = cross + before.T @ now
        first, first_now = first + before.sum(0), first_now + now.sum(0)
        tokens += len(now)
    return Moments(second / tokens, cross / tokens, first / tokens, first_now / tokens)


def _fit_group(
    model: PreTrainedModel,
    views: dict[str, LinearView],
    group: Sequence[PlanRow],
    moments: Moments,
    statistics: Statistics,
    seed: int,
) -> list[PlanRow]:
    modules: dict[str, nn.Module] = {}
    done = []
    centred = moments.centred()
    for row in group:
        view = views[row.name]
        own = moments if view.bias() is None else centred
        target = corrected_weight(view.weight().cpu(), own.cross.cpu(), own.second.cpu())
        weighting = replace(statistics.weighting(view), inputs=own.second)
        fit, _ = fit_row(target, row, seed, weighting)
        bias = _refitted_bias(view, fit.to_dense(), moments.first, moments.first_now)
        place_linear(modules, view, row, fit, bias)
        done.append(replace(row, relative_error=fit.relative_error, relative_error_plain=None))
    replace_modules(model, modules)
    return done
