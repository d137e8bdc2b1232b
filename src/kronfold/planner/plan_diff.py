"""What two plans do differently."""

from __future__ import annotations

from typing import Any

from kronfold.base.results import document
from kronfold.planner.plan import Plan, PlanRow


def diff(a: Plan, b: Plan) -> dict[str, Any]:
    """The JSON document of `kronfold plan --diff A B`: totals of both, and every weight whose spec is not the same.

    A weight that only one plan touches is `dense` in the other. Weights are told apart by stage and name; where a plan
    drops blocks (`layers` of its totals), names count the blocks it keeps.
    """
    rows_a, rows_b = _by_place(a), _by_place(b)
    rows = []
    for place in [*rows_a, *(place for place in rows_b if place not in rows_a)]:
        one, other = rows_a.get(place), rows_b.get(place)
        if one and other and _choice(one) == _choice(other):
            continue
        known = one or other
        assert known is not None
        rows.append(
            {
                "name": known.name,
                **_side("a", one, known.teacher_parameters),
                **_side("b", other, known.teacher_parameters),
            }
        )
    return document(
        "plan-diff",
        None,
        a=_totals(a),
        b=_totals(b),
        rows=rows,
        equal_rows=len({*rows_a} | {*rows_b}) - len(rows),
    )


def _by_place(plan: Plan) -> dict[tuple[int, str], PlanRow]:
    return {(i, row.name): row for i, stage in enumerate(plan.stages) for row in stage.rows}


def _choice(row: PlanRow) -> tuple[Any, ...]:
    """All that the plan says becomes of the weight."""
    return row.spec, row.head, row.init, row.storage


def _side(which: str, row: PlanRow | None, dense: int) -> dict[str, Any]:
    if row is None:
        return {f"{which}_label": "dense", f"{which}_held_parameters": dense, f"{which}_predicted_loss": 0.0}
    return {
        f"{which}_label": f"{row.structure} {row.label}",
        f"{which}_held_parameters": row.held_parameters,
        f"{which}_predicted_loss": row.predicted_loss,
    }


def _totals(plan: Plan) -> dict[str, Any]:
    predicted = [row.predicted_loss for row in plan.rows]
    return {
        "recipe": plan.recipe,
        **plan.cost.to_dict(),
        **({"layers": plan.layers.to_dict()} if plan.layers else {}),
        "predicted_loss": None if None in predicted or not predicted else sum(predicted),
    }
