"""One contract for every structured layer: same results as its dense twin, in every dtype, with gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kronfold.base.errors import ShapeError
from kronfold.structures.grouped_embedding import GroupedEmbedding, GroupedEmbeddingSpec
from kronfold.structures.kronecker import KroneckerLinear
from kronfold.structures.layer import FusedLinear, StructuredLinear
from kronfold.structures.levels import FactorizedEmbedding, TiedHead
from kronfold.structures.low_rank import LowRankLinear, LowRankSpec
from kronfold.structures.sums import SumLinear


def _randomised(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew, every gather a random permutation."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for gather in module.buffers():
            gather.copy_(torch.randperm(gather.numel(), generator=generator))
    return module


def _kronecker(rank, a, b, sides, bias=True):
    return _randomised(KroneckerLinear(a, b, rank, "in" in sides, "out" in sides, bias, dtype=torch.float64))


def _low_rank(out_features, rank, bias=True):
    return _randomised(LowRankLinear(8, out_features, rank, bias, dtype=torch.float64))


def _sum(terms, bias=True):
    layer = SumLinear(terms, bias, dtype=torch.float64)
    if bias:
        with torch.no_grad():
            layer.bias.copy_(torch.arange(layer.out_features))
    return layer


LAYERS = {
    "kronecker rank 1 (1, 2)": lambda: _kronecker(1, (6, 4), (1, 2), "in"),
    "kronecker rank 4 (4, 2)": lambda: _kronecker(4, (3, 4), (4, 2), "in out"),
    "kronecker rank 2 (2, 4)": lambda: _kronecker(2, (6, 2), (2, 4), "out"),
    "kronecker plain, no bias": lambda: _kronecker(2, (3, 4), (2, 2), "", bias=False),
    "low rank, tall": lambda: _low_rank(12, 3),
    "low rank, wide, no bias": lambda: _low_rank(5, 2, bias=False),
    "low rank of full rank": lambda: _low_rank(6, 6),
    "sum of low rank and two Kronecker": lambda: _sum(
        [
            _low_rank(6, 2, bias=False),
            _kronecker(2, (3, 4), (2, 2), "in out", False),
            _kronecker(1, (6, 4), (1, 2), "", False),
        ]
    ),
    "sum without bias": lambda: _sum([_low_rank(6, 1, bias=False), _kronecker(1, (3, 4), (2, 2), "in", False)], False),
    "fused": lambda: FusedLinear(
        {
            "q": _low_rank(6, 2),
            "k": nn.Linear(8, 6, dtype=torch.float64),
            "v": _kronecker(2, (3, 4), (2, 2), "in out"),
        }
    ),
}


def _twin(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense weight and bias, from the definition: W = P_outᵀ (Σ A_k ⊗ B_k) P_in, or G [I; C] P."""
    if isinstance(layer, FusedLinear):
        weights, biases = zip(*(_twin(part) for part in layer.parts.values()), strict=True)
        return torch.cat(weights), torch.cat(biases)
    if isinstance(layer, SumLinear):
        return sum(_twin(term)[0] for term in layer.terms), layer.bias
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    if isinstance(layer, LowRankLinear):
        factors = torch.cat([torch.eye(layer.spec.rank, dtype=torch.float64), layer.mix.weight])
        rows = torch.eye(layer.out_features, dtype=torch.float64)[layer.gather_out.long()]
        return rows @ factors @ layer.pivots.weight, layer.bias
    a = layer.a.weight.reshape(layer.spec.rank, *layer.spec.a)
    dense = sum(torch.kron(a[k], layer.b[k]) for k in range(layer.spec.rank))
    if layer.gather_in is not None:
        p_in = torch.eye(layer.in_features, dtype=dense.dtype)[layer.gather_in.long()]
        dense = dense @ p_in
    if layer.gather_out is not None:
        dense = torch.eye(layer.out_features, dtype=dense.dtype)[layer.gather_out.long()] @ dense
    return dense, layer.bias


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lead", [(1,), (3, 5), (900,)])  # layers compute in another way when many tokens share a call
def test_layer_is_its_dense_twin(name, lead):
    layer = LAYERS[name]()
    weight, bias = _twin(layer)
    x = torch.randn(*lead, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=0, atol=1e-12)
    if isinstance(layer, StructuredLinear):
        torch.testing.assert_close(layer.dense_weight(), weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients(name):
    layer = LAYERS[name]()
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    parameters = tuple(layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *parameters))
    layer(x).square().sum().backward()
    assert all(p.numel() == 0 or p.grad.abs().sum() > 0 for p in parameters)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_many_tokens_are_sums_of_those_of_few(name):
    layer = LAYERS[name]()
    x = torch.randn(900, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    many = torch.autograd.grad(layer(x).square().sum(), tuple(layer.parameters()))
    few = torch.autograd.grad(sum(layer(part).square().sum() for part in x.split(1)), tuple(layer.parameters()))
    for one, other in zip(many, few, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
# Largest relative deviation seen: 5e-7, 1.5e-2, 2e-3.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_layer_in_other_dtypes(name, dtype, tolerance):
    layer = LAYERS[name]()
    x = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = layer(x)
    actual = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert actual.dtype == dtype
    assert (actual.double() - expected).norm() <= tolerance * expected.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = copy.deepcopy(layer).float()(x.float())
    assert (mixed.double() - expected).norm() <= 4e-2 * expected.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_layer_compiles(name):
    layer = LAYERS[name]().float()
    x = torch.randn(4, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "fused"])
def test_spec_round_trip(name):
    layer = LAYERS[name]()
    again = type(layer).from_spec(layer.to_spec(), bias=layer.bias is not None, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(again(x), layer(x))
    assert again.to_spec() == layer.to_spec()
    assert all(buffer.dtype == torch.int32 for buffer in layer.buffers())
    ranks = [term.spec.rank for term in layer.terms] if isinstance(layer, SumLinear) else [layer.spec.rank]
    assert all(str(rank) in repr(layer) for rank in ranks)


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "fused"])
def test_layer_holds_what_its_spec_counts(name):
    layer = LAYERS[name]()
    held = sum(p.numel() for key, p in layer.named_parameters() if key != "bias")
    assert held == layer.spec.held_parameters
    assert sum(buffer.numel() for buffer in layer.buffers()) == layer.spec.index_count
    twin = copy.deepcopy(layer)
    assert not {p.data_ptr() for p in twin.parameters() if p.numel()} & {p.data_ptr() for p in layer.parameters()}
    x = torch.randn(2, 8, dtype=torch.float64)
    assert torch.equal(twin(x), layer(x))


def test_sum_counts_its_terms_and_refuses_what_is_no_sum():
    terms = [_low_rank(6, 2, bias=False), _kronecker(2, (3, 4), (2, 2), "", False)]
    layer = SumLinear(terms)
    assert layer.macs_per_token() == sum(term.macs_per_token() for term in terms)
    assert list(layer.terms[0].state_dict()) == ["gather_out", "pivots.weight", "mix.weight"]
    assert [key for key in layer.state_dict() if "0.mix" in key or "1.a" in key] == [
        "terms.0.mix.weight",
        "terms.1.a.weight",
    ]
    with pytest.raises(ShapeError, match="two or more terms"):
        SumLinear(terms[:1])
    with pytest.raises(ShapeError, match="none of them a sum"):
        SumLinear([_sum(terms, False), terms[0]])
    with pytest.raises(ShapeError, match="one shape"):
        SumLinear([terms[0], _low_rank(5, 2, bias=False)])
    with pytest.raises(ShapeError, match="no bias of its own"):
        SumLinear([terms[0], _low_rank(6, 2)])
    with pytest.raises(ShapeError, match="cannot be a term.*'kronecker'"):
        SumLinear.from_spec({"terms": [{"structure": "kroneker"}]}, False)


def test_low_rank_costs_and_fresh_spread():
    layer = LowRankLinear(8, 12, 3)
    assert layer.macs_per_token() == 3 * (8 + 12 - 3)
    assert LowRankSpec.for_ratio((12, 8), 1.0).held_parameters == 96
    for ratio in (0.1, 0.3, 0.5, 0.77):
        spec = LowRankSpec.for_ratio((120, 80), ratio)
        assert spec.held_parameters <= ratio * 9600 < LowRankSpec(120, 80, spec.rank + 1).held_parameters
    torch.manual_seed(0)
    weight = LowRankLinear(256, 256, 64).dense_weight()
    assert weight.std().item() == pytest.approx(nn.Linear(256, 256).weight.std().item(), rel=0.25)


@pytest.mark.parametrize("wrong", [0, 7])
def test_low_rank_refuses_impossible_ranks(wrong):
    with pytest.raises(ShapeError):
        LowRankLinear(8, 6, wrong)


def test_from_factors_keeps_the_meaning_and_drops_identities():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 2, 2)
    perm_in, perm_out = torch.randperm(8), torch.randperm(6)
    layer = KroneckerLinear.from_factors(a, b, perm_in, perm_out)
    dense = sum(torch.kron(a[k], b[k]) for k in range(2))
    torch.testing.assert_close(layer.dense_weight()[perm_out][:, perm_in], dense)
    assert layer.bias is None
    plain = KroneckerLinear.from_factors(a, b, torch.arange(8), torch.arange(6))
    assert plain.gather_in is None
    assert plain.gather_out is None


def test_fresh_layer_has_the_spread_of_a_fresh_linear():
    torch.manual_seed(0)
    for rank in (1, 4):
        weight = KroneckerLinear((64, 64), (4, 4), rank).dense_weight()
        assert weight.std().item() == pytest.approx(nn.Linear(256, 256).weight.std().item(), rel=0.25)


def _embedding(levels) -> FactorizedEmbedding:
    embedding = FactorizedEmbedding(11, 12, levels, dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in embedding.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
            else:
                tensor.copy_(torch.randperm(tensor.numel(), generator=generator))
    return embedding


LEVELS = {
    "one": [{"block": 2}],
    "one permuted": [{"block": 3, "permute": True}],
    "rank 2": [{"block": 4, "rank": 2, "permute": True}],
    "two permuted": [{"block": 2, "permute": True}, {"block": 3, "permute": True}],
    "two, outer of rank 2": [{"block": 2, "rank": 2, "permute": True}, {"block": 3}],
}


@pytest.mark.parametrize("name", LEVELS)
def test_embedding_is_its_dense_twin(name):
    embedding = _embedding(LEVELS[name])
    wide = embedding.weight
    for level in reversed(embedding.levels):
        terms = wide.reshape(11, level.rank, level.width)
        wide = sum(torch.kron(terms[:, k], level.b[k : k + 1]) for k in range(level.rank))
        if level.gather is not None:
            wide = wide[:, level.gather.long()]
    tokens = torch.tensor([[0, 3], [10, 3]])
    torch.testing.assert_close(embedding(tokens), wide[tokens], rtol=0, atol=1e-12)
    torch.testing.assert_close(embedding.dense_weight(), wide, rtol=0, atol=1e-12)
    hidden = torch.randn(2, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(TiedHead(embedding)(hidden), hidden @ wide.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", LEVELS)
def test_head_and_embedding_share_their_gradients(name):
    embedding = _embedding(LEVELS[name])
    head = TiedHead(embedding)
    tokens = torch.tensor([1, 4])
    parameters = tuple(embedding.parameters())
    assert torch.autograd.gradcheck(lambda *_: head(embedding(tokens)), parameters)
    assert list(head.parameters()) == []
    assert head.state_dict() == {}
    assert {id(p) for p in head.source_parameters()} == {id(p) for p in parameters}


def test_deepcopy_keeps_the_tie():
    embedding = _embedding(LEVELS["two permuted"])
    pair = copy.deepcopy(nn.ModuleList([embedding, TiedHead(embedding)]))
    assert pair[1].embedding is pair[0]
    assert pair[0] is not embedding


def test_add_level_reproduces_an_exact_factorisation():
    stored = torch.randn(11, 3, dtype=torch.float64)
    b = torch.randn(1, 2, dtype=torch.float64)
    perm = torch.tensor([3, 0, 5, 1, 2, 4])
    wide = torch.empty(11, 6, dtype=torch.float64)
    wide[:, perm] = torch.kron(stored, b)
    outer = FactorizedEmbedding.of(nn.Embedding.from_pretrained(wide)).add_level(b, perm, stored[None])
    torch.testing.assert_close(outer.dense_weight(), wide)
    assert outer.weight.shape == (11, 3)
    again = outer.add_level(torch.ones(1, 1, dtype=torch.float64), None, outer.weight[None])
    torch.testing.assert_close(again.dense_weight(), wide)


def test_embedding_refuses_a_block_that_does_not_divide():
    with pytest.raises(ShapeError, match="block 5 does not divide width 12"):
        FactorizedEmbedding(11, 12, [{"block": 5}])


def _grouped(sizes, ranks):
    return _randomised(GroupedEmbedding(sizes, ranks, 6, dtype=torch.float64))


GROUPS = {
    "one": ((11,), (2,)),
    "one of full rank": ((11,), (6,)),
    "three": ((6, 4, 1), (6, 3, 1)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_embedding_is_its_dense_twin(name):
    embedding = _grouped(*GROUPS[name])
    stored = []
    for group in embedding.groups:
        rows = group.rows
        if group.rank < 6:
            columns = torch.cat([torch.eye(group.rank, dtype=torch.float64), group.mix.weight], dim=1)
            rows = rows @ columns @ torch.eye(6, dtype=torch.float64)[group.gather.long()].T
        stored.append(rows)
    wide = torch.eye(11, dtype=torch.float64)[embedding.position.long()] @ torch.cat(stored)
    tokens = torch.tensor([[0, 3, 10], [10, 3, 5]])
    torch.testing.assert_close(embedding(tokens), wide[tokens], rtol=0, atol=1e-12)
    torch.testing.assert_close(embedding.dense_weight(), wide, rtol=0, atol=1e-12)
    for lead in ((1,), (2, 5), (900,)):
        hidden = torch.randn(*lead, 6, dtype=torch.float64)
        torch.testing.assert_close(TiedHead(embedding)(hidden), hidden @ wide.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_embedding_contract(name):
    embedding = _grouped(*GROUPS[name])
    head = TiedHead(embedding)
    spec = GroupedEmbeddingSpec(*GROUPS[name], 6)
    assert sum(p.numel() for p in embedding.parameters()) == spec.held_parameters
    assert sum(b.numel() for b in embedding.buffers()) == spec.index_count
    assert {b.dtype for b in embedding.buffers()} == {torch.int32}
    assert embedding.to_spec() == {"structure": "grouped_embedding", **spec.to_dict()}
    again = GroupedEmbedding.from_spec(embedding.to_spec(), dtype=torch.float64)
    again.load_state_dict(embedding.state_dict())
    tokens = torch.arange(11)
    assert torch.equal(again(tokens), embedding(tokens))
    assert torch.autograd.gradcheck(lambda *_: head(embedding(tokens)), tuple(embedding.parameters()))
    assert head.macs_per_token() == spec.held_parameters
    pair = copy.deepcopy(nn.ModuleList([embedding, head]))
    assert pair[1].embedding is pair[0]
    assert str(GROUPS[name][1]) in repr(embedding)


@pytest.mark.parametrize("name", GROUPS)
def test_grouped_embedding_in_other_dtypes_and_compiled(name):
    embedding = _grouped(*GROUPS[name])
    tokens = torch.arange(11)
    expected = TiedHead(embedding)(embedding(tokens))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        other = copy.deepcopy(embedding).to(dtype)
        actual = TiedHead(other)(other(tokens))
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= tolerance * expected.norm()
    single = copy.deepcopy(embedding).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = TiedHead(single)(single(tokens))
    assert (mixed.double() - expected).norm() <= 4e-2 * expected.norm()
    compiled = torch.compile(nn.Sequential(single, TiedHead(single)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens), TiedHead(single)(single(tokens)))


@pytest.mark.parametrize(
    ("sizes", "ranks"), [((3, 4), (2,)), ((3,), (7,)), ((), ()), ((3, 4), (2, 0)), ((3, 8), (4, 2))]
)
def test_grouped_embedding_refuses_what_does_not_fit(sizes, ranks):
    with pytest.raises(ShapeError, match="Grouped embedding"):
        GroupedEmbedding(sizes, ranks, 6)
