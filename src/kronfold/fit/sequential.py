"""Fit a model block by block to data: every layer sees the inputs that the compressed layers before it really give."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.base.progress import Progress, Report
from kronfold.fit.rows import fit_row
from kronfold.models.block_stream import BlockStream
from kronfold.models.calibrate import check_windows
from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.place import fitted_layer, overwrite, place
from kronfold.models.statistics import Statistics
from kronfold.planner import planning
from kronfold.planner.plan import PlanRow
from kronfold.structures.weighting import corrected_weight, covariance

TOKENS_PER_CALL = 4096


@dataclass(frozen=True)
class Moments:
    """Means over the calibration tokens at one layer: H̃ = E[x̃ x̃ᵀ], C = E[x x̃ᵀ], E[x], E[x̃]; x̃ after compression.

    For a layer that writes to the residual stream also E[d x̃ᵀ] (`drift`) and E[d], d what the stream in front of it
    lost by compression: the layer can make up for it.
    """

    second: Tensor
    cross: Tensor
    first: Tensor
    first_now: Tensor
    drift: Tensor | None = None
    drift_first: Tensor | None = None

    def centred(self) -> Moments:
        """The same about the means, for layers whose bias is refitted."""
        return replace(
            self,
            second=covariance(self.second, self.first_now, self.first_now),
            cross=covariance(self.cross, self.first, self.first_now),
            drift=None
            if self.drift is None or self.drift_first is None
            else self.drift - torch.outer(self.drift_first, self.first_now),
        )


def compress_sequentially(
    model: PreTrainedModel,
    rows: Sequence[PlanRow],
    statistics: Statistics,
    windows: Tensor,
    *,
    reference: PreTrainedModel | None = None,
    adapt: bool = False,
    seed: int = 0,
    progress: Report | None = None,
) -> list[PlanRow]:
    """Fit the rows in the order in which the model runs and swap them into `model`, in place.

    Args:
        model: dense where the rows are; changed block by block.
        statistics: weighting of the embedding and head, and the gradient moments of all sites.
        windows: (n, window) calibration token ids.
        reference: the model whose activations are the targets, where `model` was compressed in part already; its
            dense layers must be those of `model`. None stands for `model` as it is given.
        adapt: also refit the dense linear layers of the blocks, by ridge regression, to the inputs they now see; those
            that write to the residual stream make up for what it lost. They keep their sizes.

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
    job = _Job(model, views, {row.name: row for row in rows}, statistics, windows, seed, adapt)
    training = model.training
    model.eval()
    try:
        done = job.run(reference, Progress.of(progress))
    finally:
        model.train(training)
    order = {row.name: i for i, row in enumerate(rows)}
    return sorted(done, key=lambda row: order[row.name])


@dataclass(frozen=True)
class _Job:
    """What one sequential fit works with. `pending`: the rows by name. The rest as in `compress_sequentially`."""

    model: PreTrainedModel
    views: dict[str, LinearView]
    pending: dict[str, PlanRow]
    statistics: Statistics
    windows: Tensor
    seed: int
    adapt: bool

    def run(self, reference: PreTrainedModel | None, progress: Progress) -> list[PlanRow]:
        """What stands outside the blocks first, then block by block."""
        model, views, batch = self.model, self.views, batch_for(self.windows)
        dense = BlockStream(model if reference is None else reference, self.windows, batch)
        dense.start()
        outside = [row for row in self.pending.values() if views[row.name].block is None]
        done = [_fit_outside(model, views[row.name], row, self.statistics, self.seed) for row in outside]
        if not self.adapt and len(outside) == len(self.pending):
            return done
        student = dense.twin() if reference is None else BlockStream(model, self.windows, batch)
        student.model = model
        student.start()
        name = family_of(model).blocks
        progress.step("fit")
        for i, block in enumerate(model.get_submodule(name).children()):
            inside = [view for view in views.values() if view.block == i and view.kind == "linear"]
            inside = [view for view in inside if view.name in self.pending or (self.adapt and view.is_dense)]
            progress.update(i, len(dense.blocks), item=f"block {i}")
            original = dense.blocks[i] if reference is not None else copy.deepcopy(block) if inside else block
            for group in _in_running_order(student, original, i, f"{name}.{i}.", inside, self.statistics):
                moments = _moments(dense, student, original, block, i, group[0], f"{name}.{i}.", self.adapt)
                done += _fit_group(model, group, self.pending, moments, self.statistics, self.seed)
            dense.advance(original, i)
            student.advance(block, i)
        progress.update(len(dense.blocks), len(dense.blocks))
        return done


def batch_for(windows: Tensor) -> int:
    """The largest number of windows per call that divides their count and stays within TOKENS_PER_CALL."""
    count, window = windows.shape
    fitting = [size for size in range(2, count + 1) if count % size == 0 and size * window <= TOKENS_PER_CALL]
    return max(fitting, default=1)


def _fit_outside(model: PreTrainedModel, view: LinearView, row: PlanRow, statistics: Statistics, seed: int) -> PlanRow:
    """The embedding or an untied head, weighted by the statistics of the dense model."""
    fit, plain = fit_row(view.weight(), row, seed, statistics.weighting(view))
    bias = None
    if view.kind == "linear":
        mean = statistics.input_moments(view.module_name)[1]
        bias = _refitted_bias(view, fit.to_dense(), mean, mean)
    place(model, view, fitted_layer(view, row.spec, fit, bias), row.head)
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
    views: Sequence[LinearView],
    statistics: Statistics,
) -> list[list[LinearView]]:
    """The views of a block, those that read the same input together, in the order in which the block runs them.

    Raises InputError for a layer that is never run.
    """
    if not views:
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
    idle = sorted(view.name for view in views if view.module_name not in order)
    if idle:
        raise InputError(f"The calibration text never reaches {', '.join(idle[:3])}; leave these dense.")
    groups: dict[str, list[LinearView]] = {}
    for view in sorted(views, key=lambda view: order.index(view.module_name)):
        groups.setdefault(statistics.reads.get(view.module_name, view.name), []).append(view)
    return list(groups.values())


def _moments(
    dense: BlockStream,
    student: BlockStream,
    original: nn.Module,
    block: nn.Module,
    index: int,
    view: LinearView,
    prefix: str,
    adapt: bool,
) -> Moments:
    """Input moments of the layers that read the same input as `view`."""
    local = view.module_name.removeprefix(prefix)
    pairs = zip(
        dense.inputs_of(original, index, original.get_submodule(local)),
        student.inputs_of(block, index, block.get_submodule(local)),
        strict=True,
    )
    lost = _lost(dense, student, original, block, index, local, view.role) if adapt else None
    sums = [torch.zeros(())] * 6
    tokens = 0
    for i, (before, now) in enumerate(pairs):
        before, now = before.double(), now.double()
        terms = [now.T @ now, before.T @ now, before.sum(0), now.sum(0)]
        if lost is not None:
            drift = lost[i].double()
            terms += [drift.T @ now, drift.sum(0)]
        sums = [total + term for total, term in zip(sums, terms, strict=False)]
        tokens += len(now)
    return Moments(*(total.cpu() / tokens for total in sums))


def _lost(
    dense: BlockStream,
    student: BlockStream,
    original: nn.Module,
    block: nn.Module,
    index: int,
    local: str,
    role: str | None,
) -> list[Tensor] | None:
    """What compression took from the residual stream that a layer adds to, batch by batch (tokens, width).

    In front of the attention's output layer that is the block's input; the MLP's comes last, so there it is the
    block's output less the layer's own. None for any other layer.
    """
    if role == "attention_out":
        pairs = zip(dense.hidden, student.hidden, strict=True)
        return [(before - now).flatten(0, -2) for before, now in pairs]
    if role != "mlp_out":
        return None
    pairs = zip(
        dense.rest_of(original, index, original.get_submodule(local)),
        student.rest_of(block, index, block.get_submodule(local)),
        strict=True,
    )
    return [before - now for before, now in pairs]


def _fit_group(
    model: PreTrainedModel,
    group: Sequence[LinearView],
    pending: Mapping[str, PlanRow],
    moments: Moments,
    statistics: Statistics,
    seed: int,
) -> list[PlanRow]:
    """Fit the views of a group; dense ones first, as a fused layer takes over the dense parts it finds."""
    layers: list[tuple[LinearView, nn.Module]] = []
    done = []
    for view in sorted(group, key=lambda view: view.name in pending):
        row = pending.get(view.name)
        weight = view.weight().double().cpu()
        own = moments if view.bias() is None else moments.centred()
        target = corrected_weight(weight, own.cross, own.second, drift=own.drift)
        if row is None:
            overwrite(view, target, _bias_after(view, target, moments))
            continue
        fit, _ = fit_row(target, row, seed, replace(statistics.weighting(view), inputs=own.second))
        layers.append((view, fitted_layer(view, row.spec, fit, _bias_after(view, fit.to_dense(), moments))))
        done.append(replace(row, relative_error=fit.relative_error, relative_error_plain=None))
    for view, layer in layers:
        place(model, view, layer)
    return done


def _bias_after(view: LinearView, approximation: Tensor, moments: Moments) -> Tensor | None:
    bias = _refitted_bias(view, approximation, moments.first, moments.first_now)
    return bias if bias is None or moments.drift_first is None else bias + moments.drift_first
