"""The Python entry points: `plan` says what will happen, `compress` does it on a copy of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError, RecipeError
from kronfold.base.progress import Report
from kronfold.distill.objective import Objective
from kronfold.fit.calibration import Calibration
from kronfold.fit.fit import calibrate_on, fit, keep_layers, plan_auto, settings_of
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
    progress: Report | None = None,
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
    if recipe.auto is None:
        made, _ = plan_and_measure(model_or_config, recipe, None, budget)
        if errors and has_weights:
            made.stages = fit(model_or_config, made, seed=seed, progress=progress).stages
        return made
    if not has_weights:
        raise InputError(
            f"Recipe {recipe.name!r} plans from weights and text, and this is only a config. Give a model with "
            "weights, or a recipe of fixed shapes such as tqcompressor."
        )
    measure = _measure(calibration, recipe.auto, tokenizer, seed, cache, progress)
    return plan_and_measure(model_or_config, recipe, measure, budget, progress=progress)[0]


def compress(
    model: PreTrainedModel,
    recipe_or_plan: str | Recipe | Plan = "auto",
    calibration: Text | None = None,
    *,
    budget: Budget | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Report | None = None,
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
    asked = recipe_or_plan if isinstance(recipe_or_plan, Plan) else load_recipe(recipe_or_plan)
    settings = settings_of(None if isinstance(asked, Plan) else asked)
    measure = _measure(calibration, settings, tokenizer, seed, cache, progress)
    made, found = plan_and_measure(model, asked, measure, budget, progress=progress)
    return fit(
        model, made, found, sequential=settings.sequential, adapt=settings.adapt, seed=seed, progress=progress
    ).model


Measure = Callable[[PreTrainedModel], Calibration]


def plan_and_measure(
    model_or_config: PreTrainedModel | PretrainedConfig,
    asked: Recipe | Plan,
    measure: Measure | None,
    budget: Budget | None = None,
    *,
    progress: Report | None = None,
) -> tuple[Plan, Calibration | None]:
    """The plan for a model, and the statistics that it is then fitted to (None: to the weights alone).

    Args:
        model_or_config: a config is enough for a plan of fixed shapes that is not measured.
        asked: with an `auto` entry the model is measured first and planned from that. Otherwise the shapes are known,
            and the model is measured without the blocks that they drop.
        measure: takes the statistics of a model; None where there is no calibration text.
        budget: for `auto`; default: the recipe's target_ratio.

    Raises RecipeError: the plan or recipe does not fit, or has fixed shapes and is given a budget. InputError: `auto`
    without text. What `measure` raises.
    """
    if isinstance(asked, Recipe) and asked.auto is not None:
        if measure is None:
            raise InputError(
                "Recipe auto fits to data and needs calibration text like the model will see: --calibration FILE (or "
                "calibration= in Python). About 128 windows of 1,024 tokens are enough."
            )
        assert isinstance(model_or_config, PreTrainedModel)  # whoever measures has weights
        statistics = measure(model_or_config)
        return plan_auto(model_or_config, statistics, asked, budget, progress=progress), statistics
    if budget is not None:
        what = f"Recipe {asked.name!r}" if isinstance(asked, Recipe) else "A saved plan"
        raise RecipeError(
            f"{what} has fixed shapes, so it cannot be given a budget. Use --recipe auto, or a recipe with an auto "
            "entry."
        )
    if isinstance(asked, Recipe):
        made = planning.plan_of_shapes(model_or_config, asked)
    else:
        planning.check_plan(asked, model_or_config)
        made = asked
    if measure is None:
        return made, None
    assert isinstance(model_or_config, PreTrainedModel)
    return made, measure(keep_layers(model_or_config, made.layers))


def _measure(
    text: Text | None,
    settings: AutoRecipe,
    tokenizer: Any,
    seed: int,
    cache: str | Path | None,
    progress: Report | None,
) -> Measure | None:
    """What takes the statistics on `text`, or only checks that ready ones are of the model; None without text."""
    if text is None:
        return None

    def measure(model: PreTrainedModel) -> Calibration:
        if isinstance(text, Calibration):
            text.statistics.check_model(fingerprint(model))
            return text
        reads = tokenizer
        if not isinstance(text, Tensor) and reads is None:
            if not model.config.name_or_path:
                raise InputError(
                    "This model does not say where its tokenizer is; pass tokenizer=, or token windows as text."
                )
            reads = load_tokenizer(model.config.name_or_path)
        sources = [text] if isinstance(text, str | Path) else text
        return calibrate_on(model, reads, sources, settings, seed=seed, cache=cache, progress=progress)

    return measure


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
