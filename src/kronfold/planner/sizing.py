"""Bring a recipe to a size: the same structures at the same places, more or fewer numbers in them.

A comparison is fair at equal held parameters, and every recipe comes in a size of its own. What may be turned:

1. a truncation that names a strategy: how many blocks it keeps;
2. ranks, all by one factor, so that the recipe keeps its proportions; what is left of the budget then raises single
   matrices by one step, in order;
3. where the ranks are at their highest and the model is still too small, matrices stay dense, the last ones first;
4. where all is at its smallest and the model still too big, entries for some blocks take in the same matrices of the
   others too, as many as it takes.

What a recipe leaves alone stays alone, so some sizes cannot be reached; the note says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import RecipeError
from kronfold.planner import planning
from kronfold.planner.plan import Plan, PlanRow
from kronfold.planner.recipe import Recipe, load_recipe
from kronfold.structures.registry import structure_of

TOLERANCE = 0.005  # of the size asked for


@dataclass(frozen=True)
class Sized:
    """A plan at (or as near as it gets to) a size.

    Attributes:
        own: held parameters of the recipe as it is written.
        reached: the plan holds the size asked for within the tolerance, never above it by more.
        note: what was turned, or why the size is out of reach.
    """

    plan: Plan
    own: int
    reached: bool
    note: str


@dataclass(frozen=True)
class _Dial:
    """One row and what it may become instead, ascending by numbers held; the last is None where it may stay dense."""

    row: PlanRow
    choices: list[PlanRow | None]
    added: bool = False  # not in the recipe as it is written

    def numbers(self, index: int) -> int:
        choice = self.choices[index]
        return self.row.teacher_parameters if choice is None else choice.held_parameters

    @property
    def top(self) -> int:
        """Index of the largest structured choice."""
        return len(self.choices) - 1 - (self.choices[-1] is None)

    def below(self, numbers: float) -> int:
        """The largest structured choice that holds at most `numbers`, else the smallest."""
        return max((i for i in range(self.top + 1) if self.numbers(i) <= numbers), default=0)


def plan_at_size(
    model_or_config: PreTrainedModel | PretrainedConfig,
    recipe: str | Recipe,
    amount: float,
    *,
    tolerance: float = TOLERANCE,
) -> Sized:
    """The plan of `recipe` brought to `amount` held parameters.

    Args:
        tolerance: share of `amount` by which the plan may differ.

    Raises RecipeError when the recipe does not fit the model, whatever its size.
    """
    recipe = load_recipe(recipe)
    written = planning.plan_of_shapes(model_or_config, recipe)
    own = written.held_parameters
    if abs(own - amount) <= tolerance * amount:
        return Sized(written, own, True, "its own size")
    if not written.rows:
        return _truncated(model_or_config, recipe, written, amount, tolerance)
    plan, dials = written, _dials(written, written)
    if _total(plan, dials, [0] * len(dials)) > amount and (wider := _in_all_blocks(model_or_config, recipe)):
        plan, dials = wider, _dials(wider, written)
    chosen, note = _turned(plan, dials, amount)
    made = _with_choices(plan, dials, chosen)
    made.cost, made.gathers = planning.recount(made, model_or_config)
    reached = abs(made.held_parameters - amount) <= tolerance * amount
    if not reached:
        note = f"{amount:,.0f} is out of reach: {note} ({made.held_parameters:,})"
    return Sized(made, own, reached, note)


def _truncated(
    model_or_config: PreTrainedModel | PretrainedConfig, recipe: Recipe, written: Plan, amount: float, tolerance: float
) -> Sized:
    """Truncation alone comes in whole blocks: the count that lands nearest to the size."""
    own, first, layers = written.held_parameters, recipe.stages[0], written.layers
    assert layers is not None  # a plan without rows drops blocks
    plans = [written]
    if isinstance(first.layers, str):
        stages = [
            [first.model_copy(update={"layer_count": count}), *recipe.stages[1:]]
            for count in range(1, layers.depth + 1)
        ]
        plans = [
            planning.plan_of_shapes(model_or_config, recipe.model_copy(update={"stages": entry})) for entry in stages
        ]
    made = min(plans, key=lambda plan: abs(plan.held_parameters - amount))
    assert made.layers is not None
    note = f"{len(made.layers.kept)} of {layers.depth} blocks kept"
    if abs(made.held_parameters - amount) <= tolerance * amount:
        return Sized(made, own, True, note)
    step = "" if len(plans) == 1 else f", a block holds {plans[-1].held_parameters - plans[-2].held_parameters:,}"
    return Sized(made, own, False, f"{amount:,.0f} is out of reach: {note}{step} ({made.held_parameters:,})")


def _in_all_blocks(model_or_config: PreTrainedModel | PretrainedConfig, recipe: Recipe) -> Plan | None:
    """The plan with every entry for some of the blocks taking in all; None where nothing changes or entries collide."""
    stages = [
        stage.model_copy(update={"compress": [entry.model_copy(update={"blocks": "all"}) for entry in stage.compress]})
        for stage in recipe.stages
    ]
    if stages == recipe.stages:
        return None
    try:
        return planning.plan_of_shapes(model_or_config, recipe.model_copy(update={"stages": stages}))
    except RecipeError:
        return None


def _dials(plan: Plan, written: Plan) -> list[_Dial]:
    """A dial per row of `plan`, which may hold more rows than the recipe as it is `written`."""
    rows, own = plan.rows, {row.name for row in written.rows}
    last = {row.name: i for i, row in enumerate(rows)}  # a factor that a later row factors again cannot stay dense
    return [
        _Dial(row, [*_sizes(row), *([None] if last[row.name] == i else [])], row.name not in own)
        for i, row in enumerate(rows)
    ]


def _total(plan: Plan, dials: Sequence[_Dial], chosen: Sequence[int]) -> int:
    """Held parameters of the model with these choices."""
    outside = plan.held_parameters - sum(dial.row.held_parameters for dial in dials)
    return outside + sum(dial.numbers(i) for dial, i in zip(dials, chosen, strict=True))


def _sizes(row: PlanRow) -> list[PlanRow]:
    """The row at every size its structure comes in, ascending."""
    sizes = structure_of(row.spec).sizes(row.spec)
    return [replace(row, spec=spec) for spec in sizes if spec.held_parameters < row.teacher_parameters] or [row]


def _turned(plan: Plan, dials: Sequence[_Dial], amount: float) -> tuple[list[int], str]:
    """A choice per dial so that the model holds at most `amount`, and what was turned."""

    def fits(chosen: Sequence[int]) -> bool:
        return _total(plan, dials, chosen) <= amount

    def scaled(factor: float) -> list[int]:
        return [dial.below(factor * dial.row.held_parameters) for dial in dials]

    lowest, tops = [0] * len(dials), [dial.top for dial in dials]
    if not fits(lowest):
        return lowest, "its matrices are at their smallest and the rest of the model stays as it is"
    low, high = 0.0, 1.0
    while fits(scaled(high)) and scaled(high) != tops:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(scaled(middle)) else (low, middle)
    chosen = scaled(high) if fits(scaled(high)) else scaled(low)
    room = amount - _total(plan, dials, chosen)
    room = _raise(dials, chosen, room, tops)
    if chosen == tops:
        _raise(dials, chosen, room, [len(dial.choices) - 1 for dial in dials])
    return chosen, _note(dials, chosen)


def _note(dials: Sequence[_Dial], chosen: Sequence[int]) -> str:
    pairs = list(zip(dials, chosen, strict=True))
    parts = ["taken to the other blocks too"] if any(dial.added and dial.choices[i] for dial, i in pairs) else []
    own = sum(dial.row.held_parameters for dial, i in pairs if dial.choices[i])
    now = sum(dial.numbers(i) for dial, i in pairs if dial.choices[i])
    if now != own:
        parts.append(f"ranks changed, its matrices hold {now / own:.2f} x as many numbers as written")
    if dense := sum(dial.choices[i] is None for dial, i in pairs):
        parts.append(f"{dense} of {len(dials)} matrices left dense")
    return "; ".join(parts)


def _raise(dials: Sequence[_Dial], chosen: list[int], room: float, tops: Sequence[int]) -> float:
    """Raise single dials by one step, added rows and the last first, while there is room. Returns what room is left."""
    order = sorted(range(len(dials)), key=lambda i: (dials[i].added, i), reverse=True)
    moved = True
    while moved:
        moved = False
        for i in order:
            if chosen[i] >= tops[i]:
                continue
            step = dials[i].numbers(chosen[i] + 1) - dials[i].numbers(chosen[i])
            if step <= room:
                chosen[i], room, moved = chosen[i] + 1, room - step, True
    return room


def _with_choices(plan: Plan, dials: Sequence[_Dial], chosen: Sequence[int]) -> Plan:
    rows = iter([dial.choices[i] for dial, i in zip(dials, chosen, strict=True)])
    stages = []
    for stage in plan.stages:
        made = [next(rows) for _ in stage.rows]
        stages.append(replace(stage, rows=[row for row in made if row is not None]))
    return replace(plan, stages=stages)
