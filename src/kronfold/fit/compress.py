"""The Python entry points: `plan` says what will happen, `compress` does it on a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError, RecipeError
from kronfold.distill.objective import Objective
from kronfold.fit.calibration import Calibration
from kronfold.fit.fit import Progress, absorb_gathers, calibrate_on, compress_stage, fit_rows, keep_layers, plan_auto
from kronfold.models.calibrate import fingerprint
from kronfold.models.load import load_tokenizer
from kronfold.planner import planning
from kronfold.planner.budget import Budget
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import AutoRecipe, Recipe, load_recipe

Text = str | Path | Sequence[str | Path] | Tensor | Calibration


def plan(
    model_or_config: PreTrainedModel | PretrainedConfig,
    recipe: str | Recipe,
    calibration: Text | None = None,
    *,
    budget: Budget | None = None,
    tokenizer: Any = None,
    errors: bool = True,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """What a recipe does to a model: sites, specs, exact counts. Nothing is changed.

    Args:
        model_or_config: a causal language model, or just its config (recipes with an `auto` entry need the model).
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        calibration: for recipes with an `auto` entry, as in `compress`.
        budget: for recipes with an `auto` entry; default: the recipe's target_ratio.
        errors: with weights at hand, also fit them and give the relative errors (on a copy); not for `auto`.
        cache: directory that keeps statistics and curves by content; None keeps nothing.

    Raises RecipeError: the recipe does not fit the model, all faults at once; a budget for a recipe that has shapes of
    its own. InputError: `auto` without weights or text.
    """
    recipe = load_recipe(recipe)
    check_objectives(recipe)
    has_weights = isinstance(model_or_config, PreTrainedModel) and model_or_config.device.type != "meta"
    if recipe.auto is not None:
        if not has_weights:
            raise InputError(
                f"Recipe {recipe.name!r} plans from weights and text, and this is only a config. Give a model with "
                "weights, or a recipe of fixed shapes such as tqcompressor."
            )
        found = _calibration(model_or_config, calibration, recipe.auto, tokenizer, seed, cache, progress)
        return plan_auto(model_or_config, found, recipe, budget, progress=progress)
    if budget is not None:
        raise RecipeError(
            f"Recipe {recipe.name!r} has fixed shapes, so it cannot be given a budget. Use --recipe auto, or a recipe "
            "with an auto entry."
        )
    made = planning.plan(model_or_config, recipe)
    if errors and has_weights:
        scratch = _copy_for(model_or_config, made)
        for stage in made.stages:
            stage.rows = compress_stage(scratch, stage.rows, seed=seed, progress=progress)
    return made


def compress(
    model: PreTrainedModel,
    recipe_or_plan: str | Recipe | Plan = "auto",
    calibration: Text | None = None,
    *,
    budget: Budget | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """A compressed copy of `model`: the same class, structured modules in place, ready to heal and to save.

    Hidden units and value channels are reordered where that saves a gather; block outputs keep their order.

    Args:
        model: a causal language model with weights; unchanged.
        recipe_or_plan: a recipe (name, file, object), or a plan made for this model. All its stages are carried out.
        calibration: text to fit to: a path or datasets id, several of them, token windows (n, window), or what
            `calibrate_on` returned. `auto` needs it; any other recipe is fitted to the weights alone without it.
        budget: for `auto`, e.g. `Budget.parse(params="81M")`; default: 65 % of the held parameters.
        tokenizer: reads the calibration text; default: the one beside the model.
        seed: of the permutation search and of the calibration windows.
        cache: directory that keeps calibration statistics and curves by content; None keeps nothing.

    Raises:
        RecipeError: recipe or plan does not fit the model. DataError: calibration text missing or too short.
        ShapeError, InputError: a weight that cannot be fitted (NaN, infinite, zero), statistics of another model, a
            budget below the floor or above the dense model. The given model is unchanged in every case.
    """
    ready = isinstance(recipe_or_plan, Plan)
    recipe = None if isinstance(recipe_or_plan, Plan) else load_recipe(recipe_or_plan)
    settings = (recipe.auto if recipe else None) or AutoRecipe.model_validate({})
    planned = recipe is not None and recipe.auto is not None
    found = None
    if recipe is not None and planned:
        found = _calibration(model, calibration, settings, tokenizer, seed, cache, progress)
        made = plan_auto(model, found, recipe, budget, progress=progress)
    elif budget is not None:
        raise RecipeError("A plan or a recipe of fixed shapes cannot be given a budget; use recipe auto.")
    else:
        made = recipe_or_plan if ready else planning.plan(model, recipe)  # type: ignore[assignment, arg-type]
    planning.check_plan(made, model)
    student = _copy_for(model, made)
    if calibration is not None and not planned:
        found = _calibration(student, calibration, settings, tokenizer, seed, cache, progress)
    for stage in made.stages:
        fit_rows(
            student, stage.rows, found,
            sequential=settings.sequential, adapt=settings.adapt, seed=seed, progress=progress,
        )  # fmt: skip
    absorb_gathers(student)
    return student


def _copy_for(model: PreTrainedModel, made: Plan) -> PreTrainedModel:
    """A copy of `model` with the blocks that the plan keeps."""
    begun = keep_layers(model, made.layers)
    return copy.deepcopy(model) if begun is model else begun


def _calibration(
    model: Any,
    text: Text | None,
    settings: AutoRecipe,
    tokenizer: Any,
    seed: int,
    cache: str | Path | None,
    progress: Progress | None,
) -> Calibration:
    if isinstance(text, Calibration):
        text.statistics.check_model(fingerprint(model))
        return text
    if text is None:
        raise InputError(
            "Recipe auto fits to data and needs calibration text like the model will see: --calibration FILE (or "
            "calibration= in Python). About 128 windows of 1,024 tokens are enough."
        )
    if not isinstance(text, Tensor) and tokenizer is None:
        if not model.config.name_or_path:
            raise InputError(
                "This model does not say where its tokenizer is; pass tokenizer=, or token windows as text."
            )
        tokenizer = load_tokenizer(model.config.name_or_path)
    sources = [text] if isinstance(text, str | Path) else text
    return calibrate_on(model, tokenizer, sources, settings, seed=seed, cache=cache, progress=progress)


# Objectives as recipes write them, made into those that train.


def check_objectives(recipe: Recipe) -> None:
    """Raises RecipeError with the faults of all stages' objectives; nothing else of a recipe is looked at."""
    faults = []
    for stage in recipe.stages:
        try:
            if stage.heal:
                Objective(stage.heal.objective)
        except InputError as error:
            faults.append(f"{stage.name}.heal.objective: {error}")
    if faults:
        raise RecipeError(f"Recipe {recipe.name} cannot be healed:\n  " + "\n  ".join(faults))
