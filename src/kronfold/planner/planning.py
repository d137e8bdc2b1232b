"""From a model (or a bare config) and a recipe to a plan: every site, its spec, its exact count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError, KronfoldError, RecipeError, suggest
from kronfold.models.absorb import expected_gathers
from kronfold.models.cost import Cost, cost
from kronfold.models.families import empty_model
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.place import build_skeleton, empty_layer, place, read_specs
from kronfold.models.truncate import depth_of, kept_layers, truncate
from kronfold.planner.patterns import match
from kronfold.planner.plan import KeptLayers, Plan, PlanRow, PlanStage
from kronfold.planner.recipe import CompressRecipe, Recipe, StageRecipe, load_recipe
from kronfold.structures.registry import STRUCTURES, cannot_replace, structure_of


def skeleton_of(
    model_or_config: PreTrainedModel | PretrainedConfig, specs: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """The same architecture without weights (meta device), structured modules included. The argument is unchanged.

    `specs`: the structured modules to put in; None takes those that the model or the config of a checkpoint has.
    """
    is_config = isinstance(model_or_config, PretrainedConfig)
    config = model_or_config if is_config else model_or_config.config
    if specs is None:
        stored = config.to_dict().get("quantization_config") or {}
        specs = stored.get("specs", {}) if is_config else read_specs(model_or_config)
    skeleton = empty_model(config)
    build_skeleton(skeleton, specs)
    return skeleton


def plan_of_shapes(model_or_config: PreTrainedModel | PretrainedConfig, recipe: str | Recipe) -> Plan:
    """What `recipe` does to the model, exactly, without touching a weight.

    Args:
        model_or_config: a causal language model (also on the meta device) or its config.
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.

    Raises:
        RecipeError: a pattern that matches nothing, a shape that does not divide, a site asked for twice; all faults
            of the recipe against this model at once.
    """
    recipe = load_recipe(recipe)
    skeleton = skeleton_of(model_or_config)
    teacher = cost(skeleton)
    stages: list[PlanStage] = []
    faults: list[str] = []
    layers = _kept(recipe.stages[0], skeleton, faults)
    if layers:
        skeleton = truncate(skeleton, layers.kept)
    for stage in recipe.stages:
        rows = _rows_of_stage(skeleton, stage.name, stage.compress, faults)
        stages.append(PlanStage(name=stage.name, rows=rows, heal=stage.heal, layers=None if stages else layers))
        if not faults:
            place_empty(skeleton, rows)
    if faults:
        raise RecipeError(
            f"Recipe {recipe.name!r} does not fit this model, which is unchanged:\n  " + "\n  ".join(faults)
        )
    after, gathers = cost_absorbed(skeleton)
    return Plan(
        recipe=recipe.name,
        description=recipe.description,
        stages=stages,
        teacher=teacher,
        cost=after,
        gathers=gathers,
    )


def cost_absorbed(skeleton: PreTrainedModel) -> tuple[Cost, dict[str, Any]]:
    """What a compressed model costs once its gathers are absorbed as far as they can be, and the `gathers` of its plan.

    Args:
        skeleton: with the gathers as fitting leaves them (meta device).
    """
    found, whole = expected_gathers(skeleton), cost(skeleton)
    saved = found.bytes_before - found.bytes_after
    keys = ("index_bytes", "bytes_fp16", "bytes_fp32")
    return replace(whole, **{key: getattr(whole, key) - saved for key in keys}), found.to_dict()


def place_empty(skeleton: PreTrainedModel, rows: Iterable[PlanRow]) -> None:
    """Carry out `rows` on a model without weights (meta device), in place: what fitting them would leave."""
    views = sites(skeleton)
    for row in rows:
        place(skeleton, views[row.name], empty_layer(views[row.name], row.spec), row.head)


def check_rows(views: Mapping[str, LinearView], rows: Iterable[PlanRow]) -> None:
    """Raise RecipeError, all faults at once, unless every row names a weight of the model and fits its shape."""
    faults = []
    for row in rows:
        if row.name not in views:
            faults.append(f"{row.name}: no such weight. {suggest(row.name, views, limit=4)}")
            continue
        try:
            view = views[row.name]
            structure_of(row.spec).check_site(row.spec, view.kind, view.shape, view.is_inside)
        except KronfoldError as error:
            faults.append(f"{row.name}: {error}")
    if faults:
        raise RecipeError("The plan does not fit this model, which is unchanged:\n  " + "\n  ".join(faults))


def check_plan(made: Plan, model_or_config: PreTrainedModel | PretrainedConfig) -> Cost:
    """What a (perhaps edited) plan makes of a model, counted anew. Raises RecipeError when it does not fit."""
    return recount(made, model_or_config)[0]


def recount(made: Plan, model_or_config: PreTrainedModel | PretrainedConfig) -> tuple[Cost, dict[str, Any]]:
    """Cost and gathers of a (perhaps edited) plan. Raises RecipeError when it does not fit the model."""
    return cost_absorbed(check_stages(made.stages, model_or_config))


def check_stages(stages: Sequence[PlanStage], model_or_config: PreTrainedModel | PretrainedConfig) -> PreTrainedModel:
    """The model that stages of a plan, one after the other, make of a model; without weights (meta device).

    Raises RecipeError when they do not fit the model, which is unchanged.
    """
    skeleton = skeleton_of(model_or_config)
    if stages and (layers := stages[0].layers):
        check_layers(layers, depth_of(skeleton))
        skeleton = truncate(skeleton, layers.kept)
    for stage in stages:
        check_rows(sites(skeleton), stage.rows)
        place_empty(skeleton, stage.rows)
    return skeleton


def check_layers(layers: KeptLayers, depth: int) -> None:
    """Raise RecipeError unless the blocks a plan keeps are blocks of a model of `depth` blocks."""
    if layers.depth != depth:
        raise RecipeError(
            f"The plan keeps blocks of a model of {layers.depth} blocks; this one has {depth}. It is unchanged. Make a "
            "plan for this model."
        )
    try:
        kept_layers(layers.kept, depth)
    except InputError as error:
        raise RecipeError(f"The plan does not fit this model, which is unchanged: {error}") from error


def _kept(stage: StageRecipe, skeleton: PreTrainedModel, faults: list[str]) -> KeptLayers | None:
    if stage.layers is None:
        return None
    depth = depth_of(skeleton)
    try:
        kept = kept_layers(stage.layers, depth, stage.layer_count)
    except InputError as error:
        faults.append(f"stage {stage.name}, layers: {error}")
        return None
    return KeptLayers(kept, depth, stage.layers if isinstance(stage.layers, str) else None)


def _rows_of_stage(
    skeleton: PreTrainedModel, stage: str, entries: Iterable[CompressRecipe], faults: list[str]
) -> list[PlanRow]:
    views = sites(skeleton)
    rows: dict[str, PlanRow] = {}
    for entry in entries:
        try:
            found = match(views.values(), entry.modules, entry.blocks)
        except KronfoldError as error:
            faults.append(f"stage {stage}: {error}")
            continue
        for view in found:
            try:
                row = _row(view, entry)
            except KronfoldError as error:
                faults.append(f"stage {stage}, {view.name}: {error}")
                continue
            if view.name in rows:
                faults.append(f"stage {stage}, {view.name}: matched by two entries; name it in one only")
            rows[view.name] = row
    return list(rows.values())


def _row(view: LinearView, entry: CompressRecipe) -> PlanRow:
    """The row that an entry means at a site. Raises RecipeError, ShapeError."""
    structure = STRUCTURES.get(entry.structure)
    if (name := structure.at(view.kind)) is not None:
        structure = STRUCTURES.get(name)
    content = entry.model_dump()
    if structure.spec is not None and view.kind not in structure.replaces:
        raise RecipeError(cannot_replace(structure.name, view.kind))
    spec = structure.ask(view.shape, content, view.kind)
    structure.check_site(spec, view.kind, view.shape, view.is_inside)
    return PlanRow(
        name=view.name,
        spec=spec,
        teacher_parameters=view.shape[0] * view.shape[1],
        head=entry.head if view.kind == "embedding" else None,
        init=None if entry.init == structure.inits[0] else entry.init,
    )
