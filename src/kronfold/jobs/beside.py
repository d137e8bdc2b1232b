"""The second track of a run: a planned recipe at the size that the first one reaches, same tokens, same seed.

It is measured where the run is, unhealed and healed, so that both stand in one table; its checkpoint lies in a folder
of the output that has the recipe's name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import processes
from kronfold.base.errors import InputError
from kronfold.base.progress import Progress
from kronfold.export.checkpoint import write_model
from kronfold.fit.compress import check_objectives
from kronfold.fit.fit import calibrate_on, fit, plan_auto
from kronfold.jobs.run_state import Run, RunOptions, made_once
from kronfold.models.cost import cost
from kronfold.models.load import dtype_of, load_model
from kronfold.planner.budget import Budget
from kronfold.planner.recipe import Recipe, load_recipe

SCRATCH = "beside"  # in the work directory: the unhealed model, and what its healing can resume from


def second_recipe(options: RunOptions, first: Recipe) -> Recipe | None:
    """The recipe of `options.beside`, healing at `options.beside_rate` if there is one; None where there is none.

    Raises InputError, before any work: it is not planned, has several stages, or has the first one's name.
    """
    if options.beside is None:
        return None
    recipe = load_recipe(options.beside)
    if options.beside_rate is not None and (heal := recipe.stages[0].heal):
        heal = heal.model_copy(update={"learning_rate": options.beside_rate})
        first_stage = recipe.stages[0].model_copy(update={"heal": heal})
        recipe = recipe.model_copy(update={"stages": [first_stage, *recipe.stages[1:]]})
    if recipe.auto is None or len(recipe.stages) != 1 or recipe.name == first.name:
        raise InputError(
            f"Recipe {recipe.name} cannot stand beside {first.name}: it must be another one, with an auto entry (only "
            "the planner meets any size) and one stage. Take auto."
        )
    check_objectives(recipe)
    return recipe


def second_track(state: Run, recipe: Recipe, tokens: int, heal: Callable[..., Any]) -> dict[str, Any]:
    """The entry `beside` of the results: recipe, sizes, and `stages` as in the run. Three steps, each done once.

    `tokens`: what the run's own stages were healed on in all, whole steps each; this track gets as many.
    `heal`: what heals the run's own stages: (run, student, settings, words, directory of checkpoints, tokens read).
    """
    recipe = recipe.with_heal_tokens(tokens or None)
    place, final = state.place / SCRATCH, state.job.result / recipe.name
    unhealed = state.job.step(f"{SCRATCH}/unhealed", lambda: _unhealed(state, recipe), [place / "unhealed"])
    healed: dict[str, Any] = {}
    if recipe.stages[0].heal and tokens:
        healed = state.job.step(f"{SCRATCH}/healed", lambda: _healed(state, recipe, heal), [place / "healed"])
    last = place / ("healed" if healed else "unhealed")
    state.job.step(f"{SCRATCH}/saved", lambda: _save(state, last, final), [final])
    return {
        "recipe": {"name": recipe.name, "description": recipe.description},
        **unhealed["cost"],
        "gathers": unhealed["gathers"],
        "calibration": unhealed["calibration"],
        "budget": unhealed["budget"],
        "stages": [{**unhealed["stage"], "after_healing": unhealed["stage"]["before_healing"], **healed}],
        "checkpoint": recipe.name,
        "samples": {"before healing": unhealed["sample"], "healed": healed.get("sample")},
    }


def second_samples(options: RunOptions, beside: dict[str, Any] | None) -> list[dict[str, str]]:
    """What the second track's model writes, unhealed and healed, for the `samples` of the results."""
    if options.prompt is None or not beside:
        return []
    name, texts = beside["recipe"]["name"], beside.pop("samples")
    return [{"who": f"{name}, {when}", "prompt": options.prompt, "text": text} for when, text in texts.items() if text]


def _unhealed(state: Run, recipe: Recipe) -> dict[str, Any]:
    """Calibrate, plan for the size, fit, measure; the model is kept for the next step."""
    options, auto, started = state.options, recipe.auto, time.monotonic()
    assert auto is not None  # `second_recipe` takes no other
    texts = options.calibration or [options.train_text]
    facts: dict[str, Any] = {}

    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        found = calibrate_on(
            state.teacher, state.tokenizer, texts, auto, seed=options.seed, cache=options.cache, progress=state.report
        )
        budget = Budget("params", state.plan.held_parameters)
        plan = plan_auto(state.teacher, found, recipe, budget, progress=state.report)
        student = load_model(options.model, device=options.device)
        told = Progress.of(state.report).step(f"decompose by {recipe.name}")
        fitted = fit(
            student, plan, found, sequential=auto.sequential, adapt=auto.adapt, seed=options.seed, in_place=True,
            progress=Progress(lambda at: told.update(at.done, at.total, **at.facts)),
        )  # fmt: skip
        made = {"gathers": fitted.gathers, "calibration": found.to_dict(), "budget": plan.budget}
        return fitted.model, {**made, "rows": [row.to_dict() for row in fitted.stages[0].rows]}

    place = state.place / SCRATCH
    student, facts = made_once(make, place / "fitted", state.tokenizer, options.device)
    seconds = round(time.monotonic() - started, 2)
    measured = state.perplexity(student, f"{recipe.name}, before healing")
    stage = {
        "name": recipe.stages[0].name,
        "rows": facts.pop("rows"),
        "held_parameters": cost(student).held_parameters,
        "before_healing": measured["perplexity"],
        "decompose_seconds": seconds,
        "tokens": 0,
        "seconds": 0.0,
        "losses": [],
    }
    processes.on_main(lambda: write_model(student, state.tokenizer, place / "unhealed"))
    return {"cost": cost(student).to_dict(), **facts, "stage": stage, "sample": state.text(student)}


def _healed(state: Run, recipe: Recipe, heal: Callable[..., Any]) -> dict[str, Any]:
    """Heal what the step before kept, on the run's own blocks, measure and save it."""
    settings, place = recipe.stages[0].heal, state.place / SCRATCH
    assert settings is not None
    student = load_model(place / "unhealed", device=state.options.device)
    done = heal(state, student, settings, f"heal {recipe.name}", place / "trainer", 0)
    found = {
        "after_healing": state.perplexity(student, f"{recipe.name}, healed")["perplexity"],
        "learning_rate": settings.learning_rate,
        "objective": settings.objective.model_dump(),
        "tokens": done.tokens,
        "seconds": done.seconds_in_all,
        "losses": done.losses,
        "sample": state.text(student),
    }
    processes.on_main(lambda: write_model(student, state.tokenizer, place / "healed"))
    return found


def _save(state: Run, source: Path, final: Path) -> None:
    """The model in `source` as it will be loaded, in the dtype of the run's own checkpoint."""
    student = load_model(source, device=state.options.device)
    dtype = state.options.dtype or dtype_of(state.options.model)
    processes.on_main(lambda: write_model(student, state.tokenizer, final, dtype))
