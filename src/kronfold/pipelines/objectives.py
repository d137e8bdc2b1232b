"""Objectives as recipes write them, made into those that train."""

from __future__ import annotations

from kronfold.base.errors import InputError, RecipeError
from kronfold.distill.objective import Objective
from kronfold.planner.recipe import Recipe


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
