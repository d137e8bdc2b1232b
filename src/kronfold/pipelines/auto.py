"""The `auto` recipe: calibrate, plan for a budget, fit to data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import RecipeError
from kronfold.data.bad_rows import Reading
from kronfold.data.calibration import draw_windows
from kronfold.models.surgery import read_specs
from kronfold.options import read
from kronfold.pipelines.calibration import Calibration, calibrated
from kronfold.pipelines.sequential import compress_sequentially
from kronfold.pipelines.stage import compress_stage
from kronfold.planner.budget import Budget, plan_for_budget
from kronfold.planner.plan import Plan, PlanRow
from kronfold.planner.recipe import AutoRecipe, Recipe, load_recipe

Progress = Callable[[str, int, int], None]


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
    if calibration is None or not rows:
        return compress_stage(model, rows, seed=seed, progress=progress)
    if sequential:
        return compress_sequentially(
            model, rows, calibration.statistics, calibration.windows, adapt=adapt, seed=seed, progress=progress
        )
    return compress_stage(model, rows, seed=seed, statistics=calibration.statistics, progress=progress)
