"""Choose one option per site so that the predicted loss is least and the total cost stays within a budget.

A multiple-choice knapsack. Lagrangian relaxation: for a price λ per unit of cost every site takes the option of least
`loss + λ · cost` on its own, and λ is bisected until the budget is met (Everett 1963); what is left over is then spent
greedily, and pairs of sites exchange cost where that helps. The dual value bounds from below what any choice could
reach, so the result states its own optimality gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kronfold.base.errors import RecipeError

Array = npt.NDArray[np.float64]
BISECTIONS = 100
EXCHANGES = 20  # pairs of sites changed together, at most
SMALL_GAP = 1e-3  # share of the loss below which no pair is looked for


@dataclass(frozen=True)
class Options:
    """What one site may become.

    Attributes:
        cost: (k,) of each option, in the unit of the budget. loss: (k,) predicted increase of the loss, nats per token.
    """

    cost: Array
    loss: Array


@dataclass(frozen=True)
class Allocation:
    """Attributes:
    choice: index of the option taken, by site. cost: their sum. loss: the sum of their predicted losses.
    bound: no choice within the budget has a smaller loss than this.
    price: λ, nats per unit of cost at the margin.
    """

    choice: dict[str, int]
    cost: float
    loss: float
    bound: float
    price: float

    @property
    def gap(self) -> float:
        """At most this much loss (nats) separates the choice from the best there is."""
        return max(0.0, self.loss - self.bound)


def allocate(options: Mapping[str, Options], budget: float) -> Allocation:
    """The choice of least predicted loss whose cost is at most `budget`, up to the stated gap.

    Raises RecipeError: the budget is below the sum of the cheapest options (the floor is named), or an option's numbers
    are not finite.
    """
    names = list(options)
    curves = [options[name] for name in names]
    if any(not (np.isfinite(c.cost).all() and np.isfinite(c.loss).all()) for c in curves):
        raise RecipeError("An option's cost or predicted loss is NaN or infinite; calibrate again in float32.")
    floor = sum(float(curve.cost.min()) for curve in curves)
    if budget < floor:
        raise RecipeError(f"A budget of {budget:,.0f} is below {floor:,.0f}, the sum of the cheapest options.")
    low, high = 0.0, _highest_price(curves)
    if _total(curves, taken := _cheapest(curves, low)) > budget:
        for _ in range(BISECTIONS):
            price = (low + high) / 2 if low == 0.0 else (low * high) ** 0.5
            if _total(curves, _cheapest(curves, price)) > budget:
                low = price
            else:
                high = price
        taken = _cheapest(curves, high)
    else:
        high = 0.0
    bound = max(_dual(curves, price, budget) for price in (low, high))
    taken = _spend(curves, taken, budget)
    for _ in range(EXCHANGES):
        if _loss(curves, taken) - bound <= SMALL_GAP * _loss(curves, taken) or not _exchange(curves, taken, budget):
            break
    loss = _loss(curves, taken)
    return Allocation(dict(zip(names, taken, strict=True)), _total(curves, taken), loss, min(bound, loss), high)


def _cheapest(curves: Sequence[Options], price: float) -> list[int]:
    """The option of least loss + price · cost of every site; of equals the one that costs less."""
    taken = []
    for curve in curves:
        value = curve.loss + price * curve.cost
        best = np.flatnonzero(value == value.min())
        taken.append(int(best[curve.cost[best].argmin()]))
    return taken


def _total(curves: Sequence[Options], taken: Sequence[int]) -> float:
    return sum(float(curve.cost[i]) for curve, i in zip(curves, taken, strict=True))


def _loss(curves: Sequence[Options], taken: Sequence[int]) -> float:
    return sum(float(curve.loss[i]) for curve, i in zip(curves, taken, strict=True))


def _dual(curves: Sequence[Options], price: float, budget: float) -> float:
    return sum(float((curve.loss + price * curve.cost).min()) for curve in curves) - price * budget


def _highest_price(curves: Sequence[Options]) -> float:
    """A price at which every site takes its cheapest option."""
    worst = max((float(curve.loss.max() - curve.loss.min()) for curve in curves), default=0.0)
    steps = [np.diff(np.unique(curve.cost)) for curve in curves]
    smallest = min((float(step.min()) for step in steps if step.size), default=1.0)
    return 2 * max(worst, 1e-30) / smallest


def _spend(curves: Sequence[Options], taken: list[int], budget: float) -> list[int]:
    """Use what is left of the budget: again and again the affordable exchange that lowers the loss most."""
    left = budget - _total(curves, taken)
    while True:
        best_gain, best = 0.0, None
        for i, (curve, now) in enumerate(zip(curves, taken, strict=True)):
            affordable = curve.cost <= curve.cost[now] + left
            gains = np.where(affordable, curve.loss[now] - curve.loss, -np.inf)
            j = int(gains.argmax())
            if gains[j] > best_gain:
                best_gain, best = float(gains[j]), (i, j)
        if best is None:
            return taken
        i, j = best
        left -= float(curves[i].cost[j] - curves[i].cost[taken[i]])
        taken[i] = j


def _exchange(curves: Sequence[Options], taken: list[int], budget: float) -> bool:
    """Change the two sites in `taken` that together lower the loss most; False where no pair does."""
    left = budget - _total(curves, taken)
    orders = [np.argsort(curve.cost, kind="stable") for curve in curves]
    costs = [curve.cost[order] for curve, order in zip(curves, orders, strict=True)]
    lowest = [np.minimum.accumulate(curve.loss[order]) for curve, order in zip(curves, orders, strict=True)]
    best_gain, best = 1e-12 * _loss(curves, taken), None
    for i, (first, now) in enumerate(zip(curves, taken, strict=True)):
        room = left + first.cost[now] - first.cost
        for j, (second, then) in enumerate(zip(curves, taken, strict=True)):
            if i == j:
                continue
            affordable = np.searchsorted(costs[j], second.cost[then] + room, side="right") - 1
            gains = first.loss[now] - first.loss + second.loss[then] - lowest[j][affordable]
            gains[affordable < 0] = -np.inf
            if gains[a := int(gains.argmax())] > best_gain:
                best_gain, best = float(gains[a]), (i, a, j, int(affordable[a]))
    if best is None:
        return False
    i, a, j, last = best
    taken[i], taken[j] = a, int(orders[j][: last + 1][curves[j].loss[orders[j][: last + 1]].argmin()])
    return True
