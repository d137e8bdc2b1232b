"""Carry out a plan: fit every row, then swap the modules in. `compress` works on a copy, `compress_stage` in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError, RecipeError
from kronfold.decompose.fit import Fit
from kronfold.decompose.nearest import nearest_kronecker
from kronfold.export.quantizer import attach
from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.structures import STRUCTURES
from kronfold.models.surgery import dense_part, replace_modules
from kronfold.nn import FactorizedEmbedding, FusedLinear, TiedHead
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
        fit, plain_error = _fit(view, row, seed)
        if view.kind == "embedding":
            _place_embedding(model, modules, view, row, fit)
        else:
            _place_linear(modules, view, row, fit)
        done.append(replace(row, relative_error=fit.relative_error, relative_error_plain=plain_error))
    if progress:
        progress("", len(rows), len(rows))
    replace_modules(model, modules)
    attach(model)
    return done


def _fit(view: LinearView, row: PlanRow, seed: int) -> tuple[Fit, float]:
    structure = STRUCTURES.get(row.spec["structure"])
    if structure.fit is None:
        raise RecipeError(f"{row.name}: structure {row.spec['structure']!r} cannot be fitted to a weight.")
    spec, weight = planning.spec_of(row), view.weight()
    try:
        fit = structure.fit(weight, spec, seed)
    except InputError as error:
        raise type(error)(f"{row.name}: {error}") from error
    searched = spec.searches_in or spec.searches_out
    return fit, nearest_kronecker(weight, spec).relative_error if searched else fit.relative_error


def _place_linear(modules: dict[str, nn.Module], view: LinearView, row: PlanRow, fit: Fit) -> None:
    cls = STRUCTURES.get(row.spec["structure"]).module
    assert cls is not None
    like = next(view.module.parameters())
    layer = cls.from_factors(fit.a, fit.b, fit.perm_in, fit.perm_out, view.bias(), like.dtype, like.device)
    if view.part is None:
        modules[view.module_name] = layer
        return
    fused = modules.get(view.module_name)
    parts = fused.parts if isinstance(fused, FusedLinear) else _parts_of(view)
    modules[view.module_name] = FusedLinear({**parts, view.part: layer})


def _parts_of(view: LinearView) -> dict[str, nn.Module]:
    """The parts a fused layer has now: its structured parts, or dense copies of its rows."""
    if isinstance(view.module, FusedLinear):
        return view.module.parts
    width = view.rows[1] - view.rows[0]
    return {name: dense_part(view.module, (i * width, (i + 1) * width)) for i, name in enumerate(view.part_names)}


def _place_embedding(
    model: PreTrainedModel, modules: dict[str, nn.Module], view: LinearView, row: PlanRow, fit: Fit
) -> None:
    """One more level inside the embedding; on the first level the head is tied to it or parts from it."""
    old = view.module
    is_first = not isinstance(old, FactorizedEmbedding)
    embedding = FactorizedEmbedding.from_dense(view.weight()) if is_first else old
    assert isinstance(embedding, FactorizedEmbedding)
    new = embedding.add_level(fit.b[:, 0, :], fit.perm_in, fit.a)
    modules[view.module_name] = new
    head_name = family_of(model).head
    if head_name is None:
        return
    head = model.get_submodule(head_name)
    was_tied = isinstance(head, TiedHead) or (is_first and getattr(head, "weight", None) is old.weight)
    if was_tied and row.spec["head"] == "tied":
        modules[head_name] = TiedHead(new)
    elif was_tied:
        modules[head_name] = _own_head(head, view)


def _own_head(head: nn.Module, view: LinearView) -> nn.Module:
    """An LM head with its own copy of the dense embedding (the published model's untied head)."""
    weight = view.weight() if not isinstance(view.module, FactorizedEmbedding) else view.module.dense_weight()
    own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        own.weight.copy_(weight)
    return own.train(head.training)
