"""Tensor trains of rows: exact where they are planted, the SVD with two cores, counted as held."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import kronfold as kf
import pico
import train_examples
from kronfold.base.errors import InputError, RecipeError, ShapeError
from kronfold.base.tensor_train import TensorTrainSpec, balanced_factors
from kronfold.decompose.tensor_train import tensor_train
from kronfold.decompose.weighting import Weighting
from kronfold.nn import TensorTrainEmbedding, TiedHead, tensor_train_embedding
from kronfold.options import read
from kronfold.planner.recipe import Recipe


def rows(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(cores: list[torch.Tensor]) -> torch.Tensor:
    """Entry by entry from the definition: a product of matrices for each index."""
    sizes = [core.shape[2] for core in cores]
    out = torch.empty(cores[0].shape[0], *sizes, dtype=torch.float64)
    for token in range(out.shape[0]):
        for place in torch.cartesian_prod(*(torch.arange(n) for n in sizes)).tolist():
            product = torch.eye(1, dtype=torch.float64)
            for core, i in zip(cores, place, strict=True):
                product = product @ core[token, :, i, :]
            out[(token, *place)] = product[0, 0]
    return out.flatten(1)


SPECS = {
    "two": TensorTrainSpec(7, (3, 4), (2,)),
    "three": TensorTrainSpec(7, (2, 3, 4), (2, 3)),
    "four, rank 1": TensorTrainSpec(7, (2, 2, 2, 2), (1, 1, 1)),
}


@pytest.mark.parametrize("name", SPECS)
def test_planted_trains_are_found(name):
    spec = SPECS[name]
    planted = naive([rows(7, math.prod(core), k).reshape(7, *core) for k, core in enumerate(spec.core_shapes)])
    fit = tensor_train(planted, spec)
    torch.testing.assert_close(fit.to_dense(), planted, rtol=0, atol=1e-12)
    torch.testing.assert_close(naive(fit.cores), fit.to_dense(), rtol=0, atol=1e-12)
    assert fit.relative_error < 1e-12
    assert [tuple(core.shape[1:]) for core in fit.cores] == spec.core_shapes
    assert sum(core.numel() for core in fit.cores) == spec.held_parameters


def test_two_cores_are_the_truncated_svd_of_each_row():
    weight, spec = rows(5, 24), TensorTrainSpec(5, (4, 6), (2,))
    fit = tensor_train(weight, spec)
    lost = sum(float(torch.linalg.svdvals(row.reshape(4, 6))[2:].square().sum()) for row in weight)
    assert fit.relative_error == pytest.approx((lost / float(weight.square().sum())) ** 0.5, rel=1e-12)


def test_more_cores_stay_within_their_bound():
    """Oseledets 2011, theorem 2.2: at most the root of the unfoldings' summed squared tails."""
    weight, spec = rows(3, 60), TensorTrainSpec(3, (3, 4, 5), (2, 3))
    fit = tensor_train(weight, spec)
    for row, found in zip(weight, fit.to_dense(), strict=True):
        tails = [float(torch.linalg.svdvals(row.reshape(3, 20))[2:].square().sum()),
                 float(torch.linalg.svdvals(row.reshape(12, 5))[3:].square().sum())]  # fmt: skip
        assert max(tails) - 1e-12 <= float((row - found).square().sum()) <= sum(tails) + 1e-12


def test_the_weighted_error_is_reported():
    weight, spec = rows(5, 12), TensorTrainSpec(5, (3, 4), (1,))
    frequencies, metric = torch.arange(1.0, 6).double(), torch.diag(torch.arange(1.0, 13).double())
    fit = tensor_train(weight, spec, Weighting(metric, frequencies, damping=0.0))
    lost = (frequencies[:, None] * (weight - fit.to_dense()).square() * metric.diagonal()).sum()
    total = (frequencies[:, None] * weight.square() * metric.diagonal()).sum()
    assert fit.relative_error == pytest.approx(float((lost / total).sqrt()), rel=1e-12)
    assert torch.equal(fit.cores[0], tensor_train(weight, spec).cores[0])
    with pytest.raises(InputError):
        tensor_train(torch.zeros(5, 12), spec)
    with pytest.raises(ShapeError, match="describes an embedding"):
        tensor_train(weight[:4], spec)


# --- spec -------------------------------------------------------------------------------------------------------


def test_balanced_factors_by_hand():
    assert balanced_factors(768, 2) == (24, 32)
    assert balanced_factors(768, 3) == (8, 8, 12)
    assert balanced_factors(768, 9) == (2, 2, 2, 2, 2, 2, 2, 2, 3)
    with pytest.raises(ShapeError, match="13 is no product of 2 factors"):
        balanced_factors(13, 2)


@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_ranks_fill_the_ratio(cores, ratio):
    spec = TensorTrainSpec.for_ratio((101, 768), ratio, cores)
    assert spec.held_parameters <= ratio * 101 * 768
    assert spec.held_parameters == 101 * sum(a * n * b for a, n, b in spec.core_shapes)
    for bond in range(cores - 1):
        ranks = tuple(rank + (k == bond) for k, rank in enumerate(spec.ranks))
        try:
            assert TensorTrainSpec(101, spec.dims, ranks).held_parameters > ratio * 101 * 768
        except ShapeError:
            continue


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, (3, 4), (4,)), "cannot use them"),
        ((5, (12,), ()), "two dims or more"),
        ((5, (3, 4), (1, 1)), "one rank between"),
        ((5, (3, 4), (0,)), "at least 1"),
    ],
)
def test_spec_refuses(arguments, message):
    with pytest.raises(ShapeError, match=message):
        TensorTrainSpec(*arguments)
    with pytest.raises(ShapeError, match="at least 56 numbers a token"):
        TensorTrainSpec.for_ratio((9, 768), 0.07)


# --- module -----------------------------------------------------------------------------------------------------


def embedding(name: str) -> TensorTrainEmbedding:
    spec = SPECS[name]
    module = TensorTrainEmbedding(spec.num_embeddings, spec.dims, spec.ranks, dtype=torch.float64)
    with torch.no_grad():
        for k, core in enumerate(module.cores):
            core.copy_(rows(7, core[0].numel(), k).reshape(core.shape))
    return module


@pytest.mark.parametrize("chunk", [1 << 22, 24])
@pytest.mark.parametrize("name", SPECS)
def test_module_is_its_dense_twin(name, chunk, monkeypatch):
    monkeypatch.setattr(tensor_train_embedding, "CHUNK_NUMBERS", chunk)
    module = embedding(name)
    dense = naive([core.detach() for core in module.cores])
    tokens = torch.tensor([[0, 3], [6, 3]])
    torch.testing.assert_close(module(tokens), dense[tokens], rtol=0, atol=1e-12)
    torch.testing.assert_close(module.dense_weight(), dense, rtol=0, atol=1e-12)
    hidden = rows(6, dense.shape[1], 9).reshape(2, 3, -1).requires_grad_()
    head = TiedHead(module)
    torch.testing.assert_close(head(hidden), hidden @ dense.T, rtol=0, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(head(hidden), hidden @ dense.T, rtol=0, atol=1e-12)
    parameters = tuple(module.parameters())
    assert torch.autograd.gradcheck(lambda hidden, *_: head(hidden), (hidden, *parameters))
    assert torch.autograd.gradcheck(lambda *_: head(module(tokens)), parameters)


@pytest.mark.parametrize("name", SPECS)
def test_module_contract(name):
    module, spec = embedding(name), SPECS[name]
    assert sum(p.numel() for p in module.parameters()) == spec.held_parameters
    assert module.to_spec() == {"structure": "tensor_train", **spec.to_dict()}
    again = TensorTrainEmbedding.from_spec(module.to_spec(), dtype=torch.float64)
    again.load_state_dict(module.state_dict())
    tokens = torch.arange(7)
    assert torch.equal(again(tokens), module(tokens))
    assert str(spec.ranks) in repr(module)
    pair = copy.deepcopy(nn.ModuleList([module, TiedHead(module)]))
    assert pair[1].embedding is pair[0]
    expected = pair[1](module(tokens))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 6e-2), (torch.float16, 5e-3)):
        other = copy.deepcopy(module).to(dtype)
        actual = TiedHead(other)(other(tokens))
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()
    single = copy.deepcopy(module).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (TiedHead(single)(single(tokens)).double() - expected).norm() <= 6e-2 * expected.norm()
    compiled = torch.compile(nn.Sequential(single, TiedHead(single)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), TiedHead(single)(single(tokens)))


def test_a_fresh_embedding_has_the_spread_of_gpt2s():
    torch.manual_seed(0)
    weight = TensorTrainEmbedding(500, (8, 8), (4,)).dense_weight()
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    spec = TensorTrainSpec(1, (2, 3, 4), (2, 3))
    assert spec.expand_macs == 2 * 2 * 3 * 3 + 6 * 3 * 4


def test_it_heals_alike_in_chunks(monkeypatch):
    """The path that makes rows anew for gradients trains exactly as the one that keeps them."""
    teacher = train_examples.gpt2(dropout=0.0)
    ends = []
    for chunk in (1 << 22, 7 * 16):
        monkeypatch.setattr(tensor_train_embedding, "CHUNK_NUMBERS", chunk)
        student = kf.compress(teacher, recipe(ratio=0.6))
        result = kf.heal(student, teacher, train_examples.Blocks(), steps=3, bf16=False, learning_rate=1e-2)
        assert result.tokens > 0
        ends.append([core.detach() for core in student.transformer.wte.cores])
    for whole, chunked in zip(*ends, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=0, atol=1e-5)
    start = kf.compress(teacher, recipe(ratio=0.6)).transformer.wte.cores
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(start, ends[0], strict=True))


# --- recipes ----------------------------------------------------------------------------------------------------


def recipe(**changes) -> Recipe:
    entry = {"modules": "role:embedding", "structure": "tensor_train", "ratio": 0.5, **changes}
    return read(Recipe, {"name": "mine", "stages": [{"name": "one", "compress": [entry]}]}, "Recipe mine")


def test_the_shipped_recipe_trains_nothing():
    made = kf.plan(pico.config(), "tensorgpt")
    (row,) = made.rows
    assert row.spec["dims"] == [2, 4, 4]
    assert made.stages[0].heal is None
    assert row.held_parameters <= 0.5 * 101 * 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": "*.mlp.c_fc"}, "cannot replace a linear layer"),
        ({"ratio": None}, "needs ratio"),
        ({"rank": 3}, "not rank"),
        ({"cores": 6}, "no product of 6 factors"),
        ({"ratio": 0.2}, "hold at least 12 numbers a token"),
        ({"structure": "low_rank", "cores": 2}, "cores belong to structure tensor_train"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(RecipeError, match=message):
        kf.plan(pico.config(), recipe(**changes))
