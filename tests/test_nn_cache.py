"""Weights kept between calls: used where asked for, never stale, never saved."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import kronfold as kf
from kronfold.structures import rates as cost
from kronfold.structures.kronecker import KroneckerLinear
from kronfold.structures.layer import FusedLinear
from kronfold.structures.low_rank import LowRankLinear
from kronfold.structures.rates import Rates
from kronfold.structures.sums import SumLinear

FREE = Rates(*(1e-30,) * 8)


@pytest.fixture
def building_costs(monkeypatch):
    """A machine on which a kept weight always wins."""
    rates = replace(FREE, mix=1.0, row=1.0, gather=1.0, copy=1.0)
    monkeypatch.setattr(cost, "_rates_now", lambda *_: rates)


def _layer(kind: str):
    layer = {
        "kronecker": lambda: KroneckerLinear((6, 5), (4, 2), 2, True, True, dtype=torch.float64),
        "low rank": lambda: LowRankLinear(10, 24, 3, dtype=torch.float64),
    }[kind]()
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.copy_(torch.randperm(buffer.numel()))
        layer.bias.normal_()
    return layer.eval()


def _expected(layer, x):
    return nn.functional.linear(x, layer.dense_weight(), layer.bias)


@pytest.fixture
def builds(monkeypatch):
    """Counts the weights built."""
    count = []
    for cls, name in ((KroneckerLinear, "dense_weight"), (LowRankLinear, "_factor")):
        real = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, real=real: count.append(1) or real(self))
    return count


KINDS = ("kronecker", "low rank")


@pytest.mark.parametrize("kind", KINDS)
def test_a_kept_weight_is_built_once_and_gives_the_same(kind, building_costs, builds):
    layer, x = _layer(kind), torch.randn(3, 10, dtype=torch.float64)
    with torch.no_grad():
        before = layer(x)
        assert kf.cache_dense(layer) == kf.dense_cache_bytes(layer) == 8 * (24 * 10 if kind == "kronecker" else 24 * 3)
        del builds[:]
        for _ in range(3):
            torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)
        assert len(builds) == 1
        assert kf.cache_dense(layer, False) == 0
        assert layer._kept is None
        torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-12)


def _in_place(layer):
    with torch.no_grad():
        (layer.a if isinstance(layer, KroneckerLinear) else layer.mix).weight.mul_(2)


def _step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(torch.ones(1, 10, dtype=torch.float64)).sum().backward()
    optimizer.step()


def _loaded(layer, assign=False):
    layer.load_state_dict({key: value * 3 if value.is_floating_point() else value.flip(0)
                           for key, value in layer.state_dict().items()}, assign=assign)  # fmt: skip


def _replaced(layer):
    factor = layer.a if isinstance(layer, KroneckerLinear) else layer.mix
    factor.weight = nn.Parameter(torch.randn_like(factor.weight))


CHANGES = {
    "in place": _in_place,
    "optimiser step": _step,
    "load_state_dict": _loaded,
    "load_state_dict, assigned": lambda layer: _loaded(layer, assign=True),
    "replaced": _replaced,
    "outputs permuted": lambda layer: layer.permute_outputs(torch.randperm(24)),
    "gather in place": lambda layer: layer.gather_out.copy_(layer.gather_out.flip(0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_is_never_missed(kind, change, building_costs):
    layer, x = _layer(kind), torch.randn(3, 10, dtype=torch.float64)
    kf.cache_dense(layer)
    with torch.no_grad():
        before = layer(x)
        assert layer._kept is not None
        CHANGES[change](layer)
        torch.testing.assert_close(layer(x), _expected(layer, x), rtol=0, atol=1e-11)
        assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_training_gradients_moves_and_copies_do_not_use_it(kind, building_costs):
    layer, x = _layer(kind), torch.randn(3, 10, dtype=torch.float64)
    kf.cache_dense(layer)
    with torch.no_grad():
        layer(x)
    assert layer._kept is not None
    assert not [key for key in layer.state_dict() if "kept" in key]
    twin = copy.deepcopy(layer)
    assert twin._kept is None
    layer(x).sum().backward()  # gradients reach the factors though a weight is kept
    assert all(p.grad is not None for p in layer.parameters())
    layer.train()
    assert layer._kept is None
    with torch.no_grad():
        layer(x)
        assert layer._kept is None  # in train mode nothing is kept
        twin(x)
        assert twin._kept is not None
        assert twin.float()._kept is None
        assert twin(x.float()).dtype == torch.float32
    with torch.inference_mode():
        twin(x.float())
    with torch.no_grad():
        torch.testing.assert_close(twin(x.float()), _expected(twin, x.float()))


def test_inference_tensors_are_not_kept(building_costs):
    with torch.inference_mode():
        layer = _layer("kronecker")
        kf.cache_dense(layer)
        x = torch.randn(3, 10, dtype=torch.float64)
        layer(x)
        assert layer._kept is None
        layer.a.weight.mul_(2)
        torch.testing.assert_close(layer(x), _expected(layer, x))


def test_only_layers_that_gain_are_counted():
    """By the built-in rates: TQ's FFN gains from a dense weight, a (1, 2) projection is faster without one."""
    with torch.device("meta"):
        half, ffn = KroneckerLinear((768, 384), (1, 2), 1, True), KroneckerLinear((768, 384), (4, 2), 4, True, True)
        model = nn.Sequential(FusedLinear({"q": half}), ffn, nn.Linear(8, 8), SumLinear([LowRankLinear(8, 6, 2, False),
                              KroneckerLinear((6, 4), (1, 2), 1, bias=False)]))  # fmt: skip
    assert kf.dense_cache_bytes(half) == 0
    assert kf.dense_cache_bytes(ffn) == 3072 * 768 * 4
    assert kf.dense_cache_bytes(ffn.to(torch.bfloat16)) == 3072 * 768 * 2
    assert kf.cache_dense(model) == kf.dense_cache_bytes(model) >= 3072 * 768 * 2
    assert ffn._keeps
    assert not half._keeps
