"""Fit the rows of one stage to the weights, and to statistics of the dense model where there are any."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError, RecipeError
from kronfold.base.memory import give_back
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import draw_windows
from kronfold.export.quantizer import attach
from kronfold.fit.calibration import Calibration, calibrated
from kronfold.models.absorb import AbsorbReport, absorb, remaining_gathers
from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.place import fitted_layer, place, read_specs
from kronfold.models.statistics import Statistics
from kronfold.models.truncate import depth_of, truncate
from kronfold.options import read
from kronfold.planner import planning
from kronfold.planner.budget import Budget, plan_for_budget
from kronfold.planner.plan import KeptLayers, Plan, PlanRow
from kronfold.planner.recipe import AutoRecipe, Recipe, load_recipe
from kronfold.structures.rates import one_thread
from kronfold.structures.registry import structure_of
from kronfold.structures.weighting import Weighting

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)


def keep_layers(model: PreTrainedModel, layers: KeptLayers | None) -> PreTrainedModel:
    """A new model with the blocks that a plan keeps, `model` itself where it keeps all (None).

    Raises RecipeError when they are not blocks of the model, which is never changed.
    """
    if layers is None:
        return model
    planning.check_layers(layers, depth_of(model))
    student = truncate(model, layers.kept)
    if read_specs(student):
        attach(student)
    return student


def compress_stage(
    model: PreTrainedModel,
    rows: list[PlanRow],
    *,
    seed: int = 0,
    statistics: Statistics | None = None,
    progress: Progress | None = None,
) -> list[PlanRow]:
    """Fit the rows of one stage and swap them into `model`, in place. Returns the rows with their errors filled in.

    `statistics`: of the dense model, to fit under; biases then take up what the fit leaves of the mean output.

    Rows are fitted side by side, as many at once as torch has threads. All fits are done before the first module is
    swapped; without rows nothing is done.
    Raises RecipeError when a row does not fit the model.
    """
    if not rows:
        return []
    views = sites(model)
    planning.check_rows(views, rows)
    layers: list[nn.Module] = []
    done = []
    works = [partial(_fit, views[row.name], row, seed, statistics) for row in rows]
    with closing(side_by_side(works, [math.prod(views[row.name].shape) for row in rows])) as fits:
        for i, row in enumerate(rows):
            if progress:
                progress(row.name, i, len(rows))
            view, (fit, plain) = views[row.name], next(fits)
            layers.append(fitted_layer(view, row.spec, fit, _refitted_bias(view, fit, statistics)))
            done.append(replace(row, relative_error=fit.relative_error, relative_error_plain=plain))
    if progress:
        progress("", len(rows), len(rows))
    for row, layer in zip(rows, layers, strict=True):
        place(model, views[row.name], layer, row.head)
    attach(model)
    return done


def fit_row(weight: Tensor, row: PlanRow, seed: int, weighting: Weighting | None = None) -> tuple[Any, float | None]:
    """The solver's result for a weight (out, in), and the relative error of the same shape without permutations, None
    for a structure that has none to leave out.

    `weighting`: all that is known of the site; the structure takes the part that it is fitted under.

    Raises RecipeError, ShapeError, InputError, each with the row's name.
    """
    structure, spec = structure_of(row.spec), row.spec
    plain = structure.plain(spec)
    if weighting is not None:
        weighting = structure.weighting(spec, weighting)
    searched = weighting is None and plain is not None and structure.held(spec) != plain
    try:
        # first, and only its error is kept: one fit in memory
        plain_error = structure.fit(weight, plain, seed).relative_error if searched else None
        fit = structure.fit(weight, spec, seed, weighting, row.init)
    except InputError as error:
        raise type(error)(f"{row.name}: {error}") from error
    return fit, fit.relative_error if plain is not None and plain_error is None else plain_error


def _fit(view: LinearView, row: PlanRow, seed: int, statistics: Statistics | None) -> tuple[Any, float | None]:
    return fit_row(view.weight(), row, seed, statistics.weighting(view) if statistics else None)


def _refitted_bias(view: LinearView, fit: Any, statistics: Statistics | None) -> Tensor | None:
    """The bias with which the mean output on the calibration text stays what it was; None leaves it alone."""
    bias = view.bias()
    if statistics is None or bias is None:
        return None
    mean = statistics.input_moments(view.module_name)[1].double()
    return bias.double().cpu() + (view.weight().double().cpu() - fit.to_dense()) @ mean


# The `auto` recipe: calibrate, plan for a budget, fit to data.


def settings_of(recipe: str | Recipe | None, changes: Mapping[str, Any] | None = None) -> AutoRecipe:
    """The `auto` entry of a recipe (the default one where it has none) with some fields changed.

    Raises RecipeError: a field that is not there, or a value that is not allowed.
    """
    own = load_recipe(recipe).auto if recipe is not None else None
    known = own.model_dump() if own else {}
    return read(AutoRecipe, {**known, **(changes or {})}, "These options")


def calibrate_on(
    model: PreTrainedModel,
    tokenizer: Any,
    sources: Sequence[str | Path] | Tensor,
    settings: AutoRecipe,
    *,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Draw windows from the texts (or take the given ones) and measure `model` on them. `reading`: how texts are read.

    Raises DataError: a text too short (what it holds is named); and as `calibrate`.
    """
    context = getattr(model.config, "max_position_embeddings", None) or settings.window
    read: list[dict[str, Any]] = []
    if isinstance(sources, Tensor):
        windows = sources
    else:
        window = min(settings.window, context)
        windows, read = draw_windows(
            sources, tokenizer, count=settings.windows, window=window, seed=seed, reading=reading
        )
    found = calibrated(
        model,
        windows,
        gradient_windows=settings.gradient_windows,
        all_windows=not settings.sequential,
        seed=seed,
        cache=cache,
        progress=progress,
    )
    return replace(found, read=tuple(read))


def plan_auto(
    model: PreTrainedModel,
    calibration: Calibration,
    recipe: Recipe,
    budget: Budget | None = None,
    *,
    progress: Progress | None = None,
) -> Plan:
    """The plan of least predicted loss for `budget` (default: the recipe's `target_ratio`).

    `recipe`: one with an `auto` entry; its last stage takes the rows.

    Raises RecipeError for a model that is already structured, and as `plan_for_budget`.
    """
    if read_specs(model):
        raise RecipeError(
            "The planner starts from a dense model, and this one holds structured layers already. Plan from the "
            "original, or fold this one first: kronfold.to_dense(model)."
        )
    settings = settings_of(recipe)
    curves = calibration.curves(model, settings.structures, progress)
    return plan_for_budget(model, curves, budget or Budget("params", ratio=settings.target_ratio), recipe=recipe)


def fit_rows(
    model: PreTrainedModel,
    rows: list[PlanRow],
    calibration: Calibration | None,
    *,
    sequential: bool = True,
    adapt: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[PlanRow]:
    """Fit rows and swap them into `model`, in place: to its weights alone, or to data when there is any.

    `sequential`: fit each layer to what the compressed layers before it produce; else to the dense model's inputs.
    `adapt`: then refit the dense layers of the blocks likewise.
    Returns the rows with their errors.
    """
    from kronfold.fit.sequential import compress_sequentially

    if calibration is None or not rows:
        return compress_stage(model, rows, seed=seed, progress=progress)
    if sequential:
        return compress_sequentially(
            model, rows, calibration.statistics, calibration.windows, adapt=adapt, seed=seed, progress=progress
        )
    return compress_stage(model, rows, seed=seed, statistics=calibration.statistics, progress=progress)


# Independent fits side by side: one matrix per core, each on one thread, instead of all cores on one matrix.
#
# A permutation search is many short tensor operations that leave a second thread waiting, and they give up Python's
# lock (so does scipy's assignment solver): threads share the model's weights and still run at once. A fit always runs
# on one thread, or for a very large weight always alone on all, so its numbers do not depend on what runs beside it.


AT_ONCE = 1 << 25  # numbers in all weights worked on at a time; a search holds about 40 bytes for each
LARGE = 1 << 24  # numbers, from which a weight is worked on alone

T = TypeVar("T")


def side_by_side(works: Sequence[Callable[[], T]], numbers: Sequence[int]) -> Generator[T, None, None]:
    """The results of `works`, in order; as many run at a time as torch has threads here, within AT_ONCE.

    Args:
        numbers: how many numbers each of them works on.

    What a work raises is raised in its turn; those that were not begun then never run.
    """
    jobs = list(zip(works, numbers, strict=True))
    for is_large, group in groupby(jobs, key=lambda job: job[1] > LARGE):
        alike = list(group)
        if is_large:
            for work, _ in alike:
                yield _done(work)
        else:
            fitting = AT_ONCE // max(1, *(size for _, size in alike))
            yield from _shared([work for work, _ in alike], min(torch.get_num_threads(), len(alike), fitting))


def _shared(works: Sequence[Callable[[], T]], workers: int) -> Generator[T, None, None]:
    if workers == 1:
        for work in works:
            with one_thread():
                result = _done(work)
            yield result
        return
    grad = torch.is_grad_enabled()  # a setting of each thread

    def run(work: Callable[[], T]) -> T:
        with torch.set_grad_enabled(grad):
            return _done(work)

    with one_thread():  # new threads take their number of threads from here
        pool = ThreadPoolExecutor(workers)
        try:
            for future in [pool.submit(run, work) for work in works]:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _done(work: Callable[[], T]) -> T:
    try:
        return work()
    finally:
        give_back()  # a search frees twenty times what it leaves


# After fitting: let neighbouring layers absorb the gathers of the structured ones, where that changes no function.


def absorb_gathers(model: PreTrainedModel, blocks: Iterable[int] | None = None) -> dict[str, Any]:
    """Reorder hidden units and value channels, in place, so that fewer gathers run; logits stay as they are.

    The residual stream is left alone: hidden states between blocks still agree with the teacher's, channel by channel.
    Call it once, after the last stage is fitted: a later stage would search its permutations from another start. Of a
    model without a family record nothing is reordered.

    `blocks`: only these, each once; None for all.

    Returns the `gathers` entry of documents: {"absorbed": how many are gone, "remaining": names, "bytes": theirs}.
    """
    if family_of(model).generic:
        return gathers_of(model)
    report = absorb(model, residual=False, blocks=blocks)
    if report.absorbed:
        attach(model)  # with the specs as they are now
    return report.to_dict()


def gathers_of(model: PreTrainedModel) -> dict[str, Any]:
    """The same entry for a model as it stands: nothing absorbed. Works on the meta device."""
    held = remaining_gathers(model)
    total = sum(gather.bytes for gather in held)
    return AbsorbReport([], held, total, total).to_dict()
