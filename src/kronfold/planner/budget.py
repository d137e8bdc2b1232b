"""A plan that meets a budget: sensitivity curves in, one option per site out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError, RecipeError
from kronfold.models.cost import Cost, cost
from kronfold.models.linear_view import sites
from kronfold.planner.allocate import Allocation, Options, allocate
from kronfold.planner.plan import Plan, PlanRow, PlanStage
from kronfold.planner.planning import check_rows, cost_absorbed, place_empty, skeleton_of
from kronfold.planner.recipe import Recipe
from kronfold.planner.sensitivity import SiteCurve, joined_spec
from kronfold.structures.registry import Unit

_COUNT_SUFFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "b": 1e9}
_BYTE_SUFFIXES = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_BYTE_SUFFIXES |= {key: size for key, size in _COUNT_SUFFIXES.items() if key in ("k", "m", "g")}
_Entry = tuple[Options, list[Any]]  # what `SiteCurve.options` gives
_COUNTED = {"params": "held_parameters", "macs": "macs_per_token", "bytes": "bytes_fp16"}


@dataclass(frozen=True)
class Budget:
    """What the compressed model may cost: `amount` held parameters, multiply-accumulates per token, or bytes in fp16.

    `ratio`: the amount as a share of the dense model's held parameters, when it was given as one (amount is then 0).
    """

    unit: Unit
    amount: float = 0.0
    ratio: float | None = None

    @classmethod
    def parse(
        cls,
        params: str | None = None,
        ratio: float | None = None,
        macs: str | None = None,
        bytes_: str | None = None,
    ) -> Budget:
        """From command-line values such as `81M`, `0.65`, `160MB`. Raises InputError unless exactly one is given."""
        given = {"params": params, "macs": macs, "bytes": bytes_}
        named = {unit: text for unit, text in given.items() if text is not None}
        if len(named) + (ratio is not None) != 1:
            raise InputError(
                "Give one budget: --target-params 81M, --target-ratio 0.65, --target-macs 60M or --target-bytes 160MB."
            )
        if ratio is not None:
            if not 0 < ratio < 1:
                raise InputError(f"--target-ratio {ratio} must lie between 0 and 1: the share of numbers that is kept.")
            return cls("params", ratio=ratio)
        unit, text = next(iter(named.items()))
        return cls(unit, _number(text, f"--target-{unit}"))  # type: ignore[arg-type]

    def on_the_way(self, dense: Cost, reach: float) -> Budget:
        """The budget of a stage that goes the share `reach` of the way from the dense model to this budget."""
        whole = getattr(dense, _COUNTED[self.unit])
        return Budget(self.unit, whole - reach * (whole - self.amount_for(dense)))

    def amount_for(self, dense: Cost) -> float:
        """The budget in its unit. Raises InputError when it is not below the dense model's own cost."""
        whole = getattr(dense, _COUNTED[self.unit])
        amount = self.ratio * whole if self.ratio is not None else self.amount
        if amount >= whole:
            raise InputError(
                f"The budget of {amount:,.0f} {self.unit} is not below what the dense model has, {whole:,.0f}: there "
                "is nothing to compress. Ask for less."
            )
        return amount


def _number(text: str, option: str) -> float:
    found = re.fullmatch(r"\s*([0-9][0-9_,]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower())
    suffixes, example = (_BYTE_SUFFIXES, "160MB") if option == "--target-bytes" else (_COUNT_SUFFIXES, "81M")
    if not found or found[2] not in suffixes:
        raise InputError(f"{option} {text!r} is no number; write for example {example}, or all its digits.")
    return float(found[1].replace("_", "").replace(",", "")) * suffixes[found[2]]


def plan_for_budget(
    model_or_config: PreTrainedModel | PretrainedConfig,
    curves: Sequence[SiteCurve],
    budget: Budget,
    *,
    recipe: Recipe | None = None,
) -> Plan:
    """The plan of least predicted loss within the budget; sites that gain nothing stay dense and have no row.

    Args:
        curves: from `sensitivity`, of this model.
        recipe: gives the plan its name, and its stages their names and healing; None is a plan that does not heal. Of
            several stages all but the last are planned on their turn and have no rows here.

    Raises:
        InputError: the budget is above the dense model, or below the floor (which is named).
        RecipeError: curves of another model.
    """
    skeleton = skeleton_of(model_or_config)
    views = sites(skeleton)
    _check_curves(curves, {site: view.shape for site, view in views.items() if view.is_dense})
    dense = cost(skeleton)
    amount = budget.amount_for(dense)
    fixed = getattr(dense, _COUNTED[budget.unit]) - sum(curve.dense_cost(budget.unit) for curve in curves)
    table = {curve.key: curve.options(budget.unit) for curve in curves}
    found, floor = _choose(curves, table, amount, fixed, budget.unit)
    rows = _rows(curves, table, found)
    check_rows(views, rows)
    place_empty(skeleton, rows)
    after, gathers = cost_absorbed(skeleton)
    return Plan(
        recipe=recipe.name if recipe else "auto",
        description=f"Planned for {amount:,.0f} {budget.unit}: least predicted loss, site by site.",
        stages=_stages(recipe, rows),
        teacher=dense,
        cost=after,
        budget={
            "unit": budget.unit,
            "amount": amount,
            "floor": floor,
            "met_by": getattr(after, _COUNTED[budget.unit]),
            "predicted_loss": found.loss,
            "optimality_gap": found.gap,
            "left_dense": sorted({curve.site for curve in curves} - {row.name for row in rows}),
        },
        gathers=gathers,
    )


def _stages(recipe: Recipe | None, rows: list[PlanRow]) -> list[PlanStage]:
    if recipe is None:
        return [PlanStage("auto", rows)]
    *earlier, last = recipe.stages
    done = [PlanStage(stage.name, [], stage.heal, reach=stage.reach) for stage in earlier]
    return [*done, PlanStage(last.name, rows, last.heal, reach=1.0 if earlier else None)]


def _choose(
    curves: Sequence[SiteCurve], table: Mapping[str, _Entry], amount: float, fixed: float, unit: Unit
) -> tuple[Allocation, float]:
    """The allocation, and the floor: the least the model can cost.

    In bytes an embedding in groups also holds the place of every token. That is all or nothing, so both are tried:
    with it, and with the embedding as it is.
    """
    groups = {curve.key for curve in curves if curve.group}
    options = {key: found for key, (found, _) in table.items()}
    whole = {key: Options(o.cost[:1], o.loss[:1]) if key in groups else o for key, o in options.items()}
    places = sum(curve.place_cost(unit) for curve in curves)
    tries = [(options, fixed + places)] + ([(whole, fixed)] if places else [])
    floors = [base + sum(float(o.cost.min()) for o in choices.values()) for choices, base in tries]
    if amount < min(floors):
        raise InputError(
            f"A budget of {amount:,.0f} {unit} is below the floor of this model, {min(floors):,.0f}: "
            f"{fixed:,.0f} cannot be compressed, and every other matrix is at its smallest. Ask for more."
        )
    found = [
        allocate(choices, amount - base)
        for (choices, base), least in zip(tries, floors, strict=True)
        if least <= amount
    ]
    bound = min(allocation.bound for allocation in found)
    if places and len(found) == 2 and all(found[0].choice[key] == 0 for key in groups):
        found = found[1:]  # the places would be held for nothing
    best = min(found, key=lambda allocation: allocation.loss)
    return replace(best, bound=min(bound, best.loss)), min(floors)


def _check_curves(curves: Sequence[SiteCurve], shapes: Mapping[str, tuple[int, int]]) -> None:
    """`shapes`: of the dense sites of the model."""
    covered: dict[str, tuple[int, int]] = {}
    for curve in curves:
        rows = covered.get(curve.site, (0, 0))[0]
        follows = rows == (curve.group[0] if curve.group else 0)
        covered[curve.site] = (rows + curve.shape[0] if follows else -1, curve.shape[1])
    strangers = sorted(site for site, shape in covered.items() if shapes.get(site) != shape)
    if strangers or not curves:
        raise RecipeError(
            "The sensitivity curves are of another model"
            + (f": this one has no dense {', '.join(strangers[:3])} of that shape" if strangers else ": there are none")
            + ". Calibrate this model."
        )


def _rows(curves: Sequence[SiteCurve], table: Mapping[str, _Entry], found: Allocation) -> list[PlanRow]:
    by_site: dict[str, list[SiteCurve]] = {}
    for curve in curves:
        by_site.setdefault(curve.site, []).append(curve)
    rows = [_row(own, table, found) for own in by_site.values()]
    return [row for row in rows if row is not None]


def _row(slices: Sequence[SiteCurve], table: Mapping[str, _Entry], found: Allocation) -> PlanRow | None:
    """The row of one site from the choices for its slices; None where all of it stays dense."""
    spec = joined_spec(slices, [table[own.key][1][found.choice[own.key]] for own in slices])
    if spec is None:
        return None
    losses = [float(table[own.key][0].loss[found.choice[own.key]]) for own in slices]
    first, worst = slices[0], int(np.argmax(losses))
    why = _why(table[first.key][0], found.choice[first.key])
    if len(slices) > 1:
        start, count = slices[worst].group or (0, 0)
        why = (
            f"common tokens keep more than rare ones; tokens {start:,} to {start + count:,} by frequency cost most, "
            f"{losses[worst]:.4f} nats"
        )
    return PlanRow(
        name=first.site,
        spec=spec,
        teacher_parameters=spec.shape[0] * spec.shape[1],
        head=None if first.kind == "linear" else "tied" if first.tied else "untied",
        predicted_loss=sum(losses),
        why=why,
    )


def _why(options: Options, choice: int) -> str:
    """What a little less and a little more would have cost."""
    dense = float(options.cost[0])
    share = float(options.cost[choice]) / dense
    said = f"{options.loss[choice]:.4f} nats at {share:.0%}"
    for step in (-0.1, 0.1):
        near = np.abs(options.cost / dense - (share + step))
        other = int(near.argmin())
        if near[other] < 0.05 and other != choice:
            said += f"; {options.loss[other]:.4f} at {options.cost[other] / dense:.0%}"
    return said
