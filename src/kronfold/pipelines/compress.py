"""Carry out a plan: fit every row, then swap the modules in. `compress` works on a copy, `compress_stage` in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.export.quantizer import attach
from kronfold.models.linear_view import sites
from kronfold.models.surgery import replace_modules
from kronfold.pipelines.gathers import absorb_gathers
from kronfold.pipelines.placement import fit_row, place_embedding, place_linear
from kronfold.planner import planning
from kronfold.planner.plan import Plan, PlanRow
from kronfold.planner.recipe import Recipe

Progress = Callable[[str, int, int], None]  # (what is being done, done, total)


def plan(
    model_or_config: PreTrainedModel | PretrainedConfig,
    recipe: str | Recipe,
    *,
    errors: bool = True,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """What a recipe does to a model: sites, specs, exact counts. Nothing is changed.

    Args:
        model_or_config: a causal language model, or just its config.
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        errors: with weights at hand, also fit them and give the relative errors (on a copy).

    Raises RecipeError: the recipe does not fit the model; all faults at once.
    """
    made = planning.plan(model_or_config, recipe)
    if errors and isinstance(model_or_config, PreTrainedModel) and model_or_config.device.type != "meta":
        scratch = copy.deepcopy(model_or_config)
        for stage in made.stages:
            stage.rows = compress_stage(scratch, stage.rows, seed=seed, progress=progress)
    return made


def compress(
    model: PreTrainedModel,
    recipe_or_plan: str | Recipe | Plan,
    calibration: Any = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A compressed copy of `model`: the same class, structured modules in place, ready to heal and to save.

    Hidden units and value channels are reordered where that saves a gather; block outputs keep their order.

    Args:
        model: a causal language model with weights; unchanged.
        recipe_or_plan: a recipe (name, file, object), or a plan made for this model. All its stages are carried out.
        calibration: text for data-aware structures. No structure of this version uses any.
        seed: of the permutation search.

    Raises:
        RecipeError: recipe or plan does not fit the model. ShapeError, InputError: a weight that cannot be fitted
            (NaN, infinite, zero). The given model is unchanged in every case.
    """
    if calibration is not None:
        raise InputError("No structure of this version is fitted to data; leave calibration out.")
    made = recipe_or_plan if isinstance(recipe_or_plan, Plan) else planning.plan(model, recipe_or_plan)
    planning.check_plan(made, model)
    student = copy.deepcopy(model)
    for stage in made.stages:
        compress_stage(student, stage.rows, seed=seed, progress=progress)
    absorb_gathers(student)
    return student


def compress_stage(
    model: PreTrainedModel, rows: list[PlanRow], *, seed: int = 0, progress: Progress | None = None
) -> list[PlanRow]:
    """Fit the rows of one stage and swap them into `model`, in place. Returns the rows with their errors filled in.

    All fits are done before the first module is swapped. Raises RecipeError when a row does not fit the model.
    """
    views = sites(model)
    planning.check_rows(views, rows)
    modules: dict[str, nn.Module] = {}
    done = []
    for i, row in enumerate(rows):
        if progress:
            progress(row.name, i, len(rows))
        view = views[row.name]
        fit, plain_error = fit_row(view.weight(), row, seed)
        if view.kind == "embedding":
            place_embedding(model, modules, view, row, fit)
        else:
            place_linear(modules, view, row, fit)
        done.append(replace(row, relative_error=fit.relative_error, relative_error_plain=plain_error))
    if progress:
        progress("", len(rows), len(rows))
    replace_modules(model, modules)
    attach(model)
    return done
