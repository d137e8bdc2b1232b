"""Fit the rows of one stage to the weights, and to statistics of the dense model where there are any."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.export.quantizer import attach
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.place import fitted_layer, place, read_specs
from kronfold.models.statistics import Statistics
from kronfold.models.truncate import depth_of, truncate
from kronfold.pipelines.side_by_side import side_by_side
from kronfold.planner import planning
from kronfold.planner.plan import KeptLayers, PlanRow
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
