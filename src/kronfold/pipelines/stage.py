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

from kronfold.export.quantizer import attach
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.statistics import Statistics
from kronfold.models.surgery import read_specs, replace_modules
from kronfold.models.truncate import depth_of, truncate
from kronfold.pipelines.placement import fit_row, place_embedding, place_linear, weighting_for
from kronfold.pipelines.side_by_side import side_by_side
from kronfold.planner import planning
from kronfold.planner.plan import KeptLayers, PlanRow

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
    modules: dict[str, nn.Module] = {}
    done = []
    works = [partial(_fit, views[row.name], row, seed, statistics) for row in rows]
    with closing(side_by_side(works, [math.prod(views[row.name].shape) for row in rows])) as fits:
        for i, row in enumerate(rows):
            if progress:
                progress(row.name, i, len(rows))
            view, (fit, plain_error) = views[row.name], next(fits)
            if view.kind == "embedding":
                place_embedding(model, modules, view, row, fit)
            else:
                place_linear(modules, view, row, fit, _refitted_bias(view, fit, statistics))
            plain = (
                plain_error if row.spec["structure"] == "kronecker" else None
            )  # others have no permutations to leave out
            done.append(replace(row, relative_error=fit.relative_error, relative_error_plain=plain))
    if progress:
        progress("", len(rows), len(rows))
    replace_modules(model, modules)
    attach(model)
    return done


def _fit(view: LinearView, row: PlanRow, seed: int, statistics: Statistics | None) -> tuple[Any, float]:
    weighting = weighting_for(row, statistics.weighting(view)) if statistics else None
    return fit_row(view.weight(), row, seed, weighting)


def _refitted_bias(view: LinearView, fit: Any, statistics: Statistics | None) -> Tensor | None:
    """The bias with which the mean output on the calibration text stays what it was; None leaves it alone."""
    bias = view.bias()
    if statistics is None or bias is None:
        return None
    mean = statistics.input_moments(view.module_name)[1].double()
    return bias.double().cpu() + (view.weight().double().cpu() - fit.to_dense()) @ mean
