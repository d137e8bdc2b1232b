"""The rows of a comparison: every recipe with the same healing budget, brought to the same size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from kronfold.base.errors import InputError, KronfoldError, RecipeError
from kronfold.base.progress import Report
from kronfold.fit.calibration import Calibration
from kronfold.fit.compress import check_objectives
from kronfold.fit.fit import plan_auto
from kronfold.options.healing import HealConfig, ObjectiveConfig
from kronfold.planner import planning
from kronfold.planner.budget import Budget
from kronfold.planner.recipe import Recipe
from kronfold.planner.sizing import Sized, plan_at_size

Objective = Literal["own", "same"]


@dataclass(frozen=True)
class Row:
    """One recipe at its size. `track`: its directory below the output, named after all that shapes it."""

    recipe: Recipe
    sized: Sized
    track: str


def with_budget(recipe: Recipe, tokens: int, objective: Objective) -> Recipe:
    """The recipe healing on `tokens` in all; one that never heals does so at its end.

    `objective`: "own" keeps the recipe's, "same" gives every stage the default one.
    """
    stages = list(recipe.stages)
    if not any(stage.heal for stage in stages):
        stages[-1] = stages[-1].model_copy(update={"heal": HealConfig(tokens=tokens)})
    if objective == "same":
        same = {"objective": ObjectiveConfig()}
        stages = [
            stage.model_copy(update={"heal": stage.heal.model_copy(update=same)}) if stage.heal else stage
            for stage in stages
        ]
    return recipe.model_copy(update={"stages": stages}).with_heal_tokens(tokens)


def row_of(
    teacher: PreTrainedModel,
    recipe: Recipe,
    sized: Sized | None,
    amount: float | None,
    calibration: Calibration | None,
    progress: Report | None = None,
) -> Row:
    """The recipe at `amount` held parameters (None: at its own size).

    `sized`: as `check_rows` found it. `calibration`: one that is planned needs it.
    """
    if sized is None:
        assert calibration is not None
        budget = Budget("params", amount) if amount else None
        plan = plan_auto(teacher, calibration, recipe, budget, progress=progress)
        sized = Sized(plan, plan.held_parameters, True, "planned for the size" if amount else "its own size")
    rows = [{"name": stage.name, "rows": [row.to_dict() for row in stage.rows]} for stage in sized.plan.stages]
    shape = json.dumps([recipe.model_dump(mode="json", exclude_none=True), rows], sort_keys=True)
    return Row(recipe, sized, f"rows/{recipe.name}-{hashlib.sha256(shape.encode()).hexdigest()[:8]}")


def check_rows(teacher: PreTrainedModel, recipes: Sequence[Recipe], amount: float | None) -> dict[str, Sized | None]:
    """Every recipe of fixed shapes at its size, by name; None for those that only the planner can size.

    Raises, before any work: InputError for two recipes of one name, RecipeError naming every one that does not fit.
    """
    names = [recipe.name for recipe in recipes]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"Recipes are told apart by name, and {', '.join(twice)} is named twice.")
    sizes: dict[str, Sized | None] = {}
    faults = []
    for recipe in recipes:
        try:
            check_objectives(recipe)
            sizes[recipe.name] = _sized(teacher, recipe, amount)
        except KronfoldError as error:
            faults.append(str(error))
    if faults:
        raise RecipeError("Nothing was compared:\n  " + "\n  ".join(faults))
    return sizes


def _sized(teacher: PreTrainedModel, recipe: Recipe, amount: float | None) -> Sized | None:
    """None for a recipe that only the planner can size."""
    if recipe.auto:
        return None
    if amount is not None:
        return plan_at_size(teacher, recipe, amount)
    plan = planning.plan_of_shapes(teacher, recipe)
    return Sized(plan, plan.held_parameters, True, "its own size")
