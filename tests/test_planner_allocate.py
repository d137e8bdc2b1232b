"""The knapsack against brute force."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from kronfold.base.errors import RecipeError
from kronfold.planner.allocate import Options, allocate


def curve(chooser: np.random.Generator, convex: bool) -> Options:
    count = int(chooser.integers(1, 6))
    cost = np.sort(chooser.choice(np.arange(1, 60), size=count, replace=False)).astype(float)
    if convex:
        loss = (60 - cost) ** 2 * chooser.uniform(1e-5, 1e-2)
    else:
        loss = chooser.exponential(1.0, count) * 10.0 ** chooser.integers(-6, 3)
    order = chooser.permutation(count)
    return Options(cost[order], loss[order])


def best(options: dict[str, Options], budget: float) -> float:
    choices = itertools.product(*(range(len(o.cost)) for o in options.values()))
    losses = []
    for choice in choices:
        pairs = list(zip(options.values(), choice, strict=True))
        if sum(o.cost[i] for o, i in pairs) <= budget:
            losses.append(sum(o.loss[i] for o, i in pairs))
    return float(min(losses))


@pytest.mark.parametrize("convex", [True, False])
def test_within_the_stated_gap_of_the_optimum(convex):
    chooser = np.random.default_rng(0)
    exact = 0
    for _ in range(120):
        options = {f"s{i}": curve(chooser, convex) for i in range(int(chooser.integers(1, 6)))}
        low = sum(o.cost.min() for o in options.values())
        high = sum(o.cost.max() for o in options.values())
        budget = float(chooser.uniform(low, high + 1))
        found = allocate(options, budget)
        optimum = best(options, budget)
        taken = [(o, found.choice[name]) for name, o in options.items()]
        assert found.cost == sum(o.cost[i] for o, i in taken) <= budget
        assert found.loss == pytest.approx(sum(o.loss[i] for o, i in taken), rel=1e-12)
        slack = 1e-9 * (1 + optimum)
        assert found.bound <= optimum + slack
        assert found.loss >= optimum - slack
        assert found.loss - optimum <= found.gap + slack
        exact += found.loss <= optimum + slack
    assert exact >= 60  # most small instances are solved outright


def test_a_budget_for_everything_costs_nothing():
    chooser = np.random.default_rng(1)
    options = {}
    for i in range(8):
        made = curve(chooser, True)
        options[f"s{i}"] = Options(np.append(made.cost, 70.0), np.append(made.loss, 0.0))
    found = allocate(options, 8 * 70.0)
    assert (found.loss, found.gap, found.price) == (0.0, 0.0, 0.0)


def test_of_equal_losses_the_cheaper_is_taken():
    found = allocate({"s": Options(np.array([9.0, 4.0, 6.0]), np.array([0.0, 0.0, 0.0]))}, 100)
    assert found.choice == {"s": 1}


def test_the_floor_is_named():
    options = {name: Options(np.array([1000.0, 600.0]), np.array([0.0, 1.0])) for name in "ab"}
    assert allocate(options, 1200).choice == {"a": 1, "b": 1}
    with pytest.raises(RecipeError, match="1,199 is below 1,200"):
        allocate(options, 1199)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_must_be_finite(bad):
    with pytest.raises(RecipeError, match="NaN or infinite"):
        allocate({"a": Options(np.array([1.0, 2.0]), np.array([bad, 0.0]))}, 5)


def test_nothing_to_choose():
    assert allocate({}, 10).loss == 0


def gpt2_options() -> dict[str, Options]:
    """Low-rank curves of the 72 sites of GPT-2 small with power-law energies of scattered size and slope."""
    chooser = np.random.default_rng(2)
    options = {}
    for block in range(12):
        for name, shape in (("q", (768, 768)), ("k", (768, 768)), ("v", (768, 768)), ("o", (768, 768)),
                            ("fc", (3072, 768)), ("proj", (768, 3072))):  # fmt: skip
            ranks = np.arange(1, 768)
            energies = np.arange(1, 769) ** -chooser.uniform(0.3, 2.0) * 10 ** chooser.uniform(-4, 0)
            tail = np.append(energies[::-1].cumsum()[::-1], 0.0)
            cost = np.append(float(shape[0] * shape[1]), ranks * (sum(shape) - ranks))
            options[f"{block}.{name}"] = Options(cost.astype(float), np.append(0.0, tail[1:768]))
    return options


@pytest.mark.parametrize("share", [0.15, 0.4, 0.65, 0.9])
def test_a_model_of_the_size_of_gpt2_meets_its_budget(share):
    options = gpt2_options()
    budget = share * sum(o.cost.max() for o in options.values())
    started = time.process_time()
    found = allocate(options, budget)
    assert time.process_time() - started < 5
    assert 0.998 * budget <= found.cost <= budget
    assert found.gap <= 1e-3 * found.loss
