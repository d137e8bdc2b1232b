"""From a model (or a bare config) and a recipe to a plan: every site, its spec, its exact count."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError, KronfoldError, RecipeError, suggest
from kronfold.models.absorb import expected_gathers
from kronfold.models.cost import Cost, cost
from kronfold.models.families import empty_model, family_of
from kronfold.models.linear_view import LinearView, is_tied, sites
from kronfold.models.structures import STRUCTURES
from kronfold.models.surgery import build_skeleton, read_specs
from kronfold.models.truncate import depth_of, kept_layers, truncate
from kronfold.planner.patterns import match
from kronfold.planner.plan import KeptLayers, Plan, PlanRow, PlanStage
from kronfold.planner.recipe import CompressRecipe, Recipe, StageRecipe, load_recipe


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


def plan(model_or_config: PreTrainedModel | PretrainedConfig, recipe: str | Recipe) -> Plan:
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
    specs, config = read_specs(skeleton), skeleton.config
    head = name_of_tied_head(skeleton)
    for stage in recipe.stages:
        rows = _rows_of_stage(skeleton, stage.name, stage.compress, faults)
        stages.append(PlanStage(name=stage.name, rows=rows, heal=stage.heal, layers=None if stages else layers))
        if not faults:
            specs = specs_after(sites(skeleton), rows, specs, head)
            skeleton = skeleton_of(config, specs)
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


def check_rows(views: Mapping[str, LinearView], rows: Iterable[PlanRow]) -> None:
    """Raise RecipeError, all faults at once, unless every row names a weight of the model and fits its shape."""
    faults = []
    for row in rows:
        if row.name not in views:
            faults.append(f"{row.name}: no such weight. {suggest(row.name, views, limit=4)}")
            continue
        try:
            spec_of(row).check_weight(views[row.name].shape)
            check_kind(views[row.name], row.spec["structure"])
        except (KronfoldError, KeyError, TypeError) as error:
            faults.append(f"{row.name}: {error}")
    if faults:
        raise RecipeError("The plan does not fit this model, which is unchanged:\n  " + "\n  ".join(faults))


def check_kind(view: LinearView, structure: str) -> None:
    """Raises RecipeError: a structure for embeddings at a linear layer, or the reverse."""
    wanted = STRUCTURES.get(structure)
    embeds = view.kind == "embedding"
    fits = wanted.embedding is not None or structure == "kronecker" if embeds else wanted.module is not None
    if not fits:
        allowed = "kronecker, low_rank or tensor_train" if embeds else "one for linear layers, e.g. low_rank"
        article = "an embedding" if embeds else "a linear layer"
        raise RecipeError(f"structure {structure!r} cannot replace {article}; use {allowed}")


def spec_of(row: PlanRow) -> Any:
    """The typed spec of a row."""
    return STRUCTURES.get(row.spec["structure"]).read_spec(_of_the_weight(row.spec))


def _of_the_weight(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A row's spec without what it says of the head and of the fitting."""
    return {key: value for key, value in spec.items() if key not in ("head", "init")}


def check_plan(made: Plan, model_or_config: PreTrainedModel | PretrainedConfig) -> Cost:
    """What a (perhaps edited) plan makes of a model, counted anew. Raises RecipeError when it does not fit."""
    return recount(made, model_or_config)[0]


def recount(made: Plan, model_or_config: PreTrainedModel | PretrainedConfig) -> tuple[Cost, dict[str, Any]]:
    """Cost and gathers of a (perhaps edited) plan. Raises RecipeError when it does not fit the model."""
    skeleton = skeleton_of(model_or_config)
    if made.layers:
        check_layers(made.layers, depth_of(skeleton))
        skeleton = truncate(skeleton, made.layers.kept)
    head, config = name_of_tied_head(skeleton), skeleton.config
    specs: Mapping[str, Any] = read_specs(skeleton)
    for stage in made.stages:
        views = sites(skeleton)
        check_rows(views, stage.rows)
        specs = specs_after(views, stage.rows, specs, head)
        skeleton = skeleton_of(config, specs)
    return cost_absorbed(skeleton)


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


def name_of_tied_head(skeleton: PreTrainedModel) -> str | None:
    """Dotted name of the LM head if it reads the token embedding, else None."""
    family = family_of(skeleton)
    return family.head if is_tied(skeleton, family) else None


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
    structure = STRUCTURES.get(entry.structure)
    if structure.fit is None or structure.ask is None:
        allowed = [name for name in STRUCTURES if STRUCTURES.get(name).fit]
        raise RecipeError(f"structure {entry.structure!r} cannot be asked for. {suggest(entry.structure, allowed)}")
    if entry.structure == "low_rank" and view.kind == "embedding":
        return _row(view, entry.model_copy(update={"structure": "grouped_embedding"}))
    check_kind(view, entry.structure)
    spec = structure.ask(view.shape, entry.model_dump())
    spec_dict: dict[str, Any] = {"structure": entry.structure, **spec.to_dict()}
    if entry.init != "van_loan":
        spec_dict["init"] = entry.init
    if view.kind == "embedding":
        if entry.structure == "kronecker":
            if spec.b[0] != 1:
                raise RecipeError(
                    f"an embedding keeps one row per token: block {list(spec.b)} must be [1, n], e.g. [1, {spec.b[1]}]"
                )
            spec_dict["permute_out"] = False
        spec_dict["head"] = entry.head
    return PlanRow(
        name=view.name,
        spec=spec_dict,
        label=spec.label(),
        held_parameters=spec.held_parameters,
        teacher_parameters=view.shape[0] * view.shape[1],
    )


def specs_after(
    views: Mapping[str, LinearView], rows: Iterable[PlanRow], before: Mapping[str, Any], tied_head: str | None
) -> dict[str, Any]:
    """Module specs of the model once `rows` are carried out on a model that has the specs `before`.

    Args:
        tied_head: name of the LM head if it is tied to the embedding, else None.
    """
    specs = {name: dict(spec) for name, spec in before.items()}
    for row in rows:
        view = views[row.name]
        spec = spec_of(row)
        module_spec = _of_the_weight(row.spec)
        if row.spec["structure"] == "kronecker":
            module_spec |= {"permute_in": spec.searches_in, "permute_out": spec.searches_out}
        elif row.spec["structure"] == "low_rank":
            module_spec["permuted"] = True  # as fitted, whatever an edited plan says
        if view.kind == "embedding":
            head_ties = _is_tied_head(specs.get(tied_head or ""))
            may_tie = view.module_name not in before or head_ties
            if row.spec["structure"] == "kronecker":
                level = {"block": spec.b[1], "rank": spec.rank, "permute": spec.searches_in}
                levels = [*specs.get(view.module_name, {}).get("levels", []), level]
                specs[view.module_name] = {"structure": "factorized_embedding", "levels": levels}
            else:
                specs[view.module_name] = module_spec
            if tied_head and row.spec["head"] == "tied" and may_tie:
                specs[tied_head] = {"structure": "tied_head"}
            elif tied_head and head_ties:
                specs.pop(tied_head)
        elif view.part is None:
            specs[view.module_name] = module_spec
        else:
            fused = specs.setdefault(view.module_name, _dense_parts(views, view.module_name))
            fused["parts"][view.part] = module_spec
    return specs


def _is_tied_head(spec: Mapping[str, Any] | None) -> bool:
    return spec is not None and spec["structure"] == "tied_head"


def _dense_parts(views: Mapping[str, LinearView], module_name: str) -> dict[str, Any]:
    parts = {
        v.part: {"structure": "dense", "out_features": v.shape[0]}
        for v in views.values()
        if v.module_name == module_name
    }
    return {"structure": "fused", "parts": parts}
