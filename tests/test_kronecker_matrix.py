"""The spec by hand, and every way of applying a Kronecker sum against torch.kron."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from kronfold.base.errors import ShapeError
from kronfold.ops.cost import built_in
from kronfold.ops.permutation import drop_identity
from kronfold.structures.kronecker import KroneckerSpec, matrix


def test_spec_counts_by_hand():
    # TQCompressor's c_fc: 3072 x 768 as 4 terms of (768, 384) ⊗ (4, 2): 4 · (294,912 + 8) numbers.
    spec = KroneckerSpec(a=(768, 384), b=(4, 2), rank=4)
    assert spec.shape == (3072, 768)
    assert spec.held_parameters == 1_179_680
    assert spec.max_rank == 8
    assert spec.index_count == 3072 + 768
    one_sided = KroneckerSpec(a=(768, 384), b=(1, 2))
    assert not one_sided.searches_out
    assert one_sided.index_count == 768


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": (3, 0), "b": (1, 2)}, "at least 1"),
        ({"a": (3, 4), "b": (1, 2), "rank": 3}, "maximum 2.*use rank 2 or less"),
        ({"a": (3, 4), "b": (1, 2), "rank": 0}, "at least 1"),
    ],
)
def test_spec_refuses(arguments, message):
    with pytest.raises(ShapeError, match=message):
        KroneckerSpec(**arguments)


def test_spec_for_weight_says_the_nearest_blocks():
    assert KroneckerSpec.for_weight((6, 8), (2, 4), 2).a == (3, 2)
    with pytest.raises(ShapeError, match=r"Block size 5 .*in_features 768.*nearest allowed: 2, 3, 4, 6"):
        KroneckerSpec.for_weight((768, 768), (1, 5))


def test_spec_check_weight_says_what_would_fit():
    with pytest.raises(ShapeError, match=r"With b=\(2, 2\) use a=\(5, 4\)"):
        KroneckerSpec(a=(4, 4), b=(2, 2)).check_weight((10, 8))


SHAPES = [  # rank, (out_a, in_a), (out_b, in_b)
    (1, (6, 4), (1, 2)),
    (1, (6, 4), (2, 1)),
    (4, (6, 5), (4, 2)),
    (2, (5, 3), (1, 2)),
    (3, (2, 3), (3, 5)),
    (2, (1, 7), (6, 1)),
]


def _factors(rank, a, b):
    generator = torch.Generator().manual_seed(7)
    return (
        torch.randn(rank, *a, dtype=torch.float64, generator=generator),
        torch.randn(rank, *b, dtype=torch.float64, generator=generator),
    )


@pytest.mark.parametrize(("rank", "a_shape", "b_shape"), SHAPES)
def test_all_orders_are_the_sum_of_krons(rank, a_shape, b_shape):
    a, b = _factors(rank, a_shape, b_shape)
    dense = sum(torch.kron(a[k], b[k]) for k in range(rank))
    torch.testing.assert_close(matrix.to_dense(a, b), dense, rtol=0, atol=1e-12)
    x = torch.randn(2, 5, dense.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bias = torch.arange(dense.shape[0], dtype=torch.float64)
    for order in (*get_args(matrix.Order), None):
        torch.testing.assert_close(matrix.apply(x, a, b, order), x @ dense.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(matrix.apply(x, a, b, order, bias=bias), x @ dense.T + bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rank", "a_shape", "b_shape"), SHAPES)
@pytest.mark.parametrize("order", get_args(matrix.Order))
def test_gradients(rank, a_shape, b_shape, order):
    a, b = (t.requires_grad_() for t in _factors(rank, a_shape, b_shape))
    x = torch.randn(3, a_shape[1] * b_shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(a_shape[0] * b_shape[0], dtype=torch.float64, requires_grad=True)
    apply = matrix.apply
    assert torch.autograd.gradcheck(lambda x, a, b, bias: apply(x, a, b, order, bias=bias), (x, a, b, bias))


def test_rearrangement_makes_a_kron_an_outer_product():
    a, b = _factors(1, (3, 4), (2, 5))
    outer = torch.outer(a[0].flatten(), b[0].flatten())
    torch.testing.assert_close(matrix.rearrange(torch.kron(a[0], b[0]), 2, 5), outer)
    stack = torch.stack([torch.kron(a[0], b[0])] * 2)
    torch.testing.assert_close(matrix.rearrange(stack, 2, 5), torch.stack([outer] * 2))


def test_macs_by_hand():
    # TQCompressor's c_fc. A first: 4 · (2·768·384 + 768·2·4) = 2,383,872.
    # B first: 4 · (4·768·384 + 384·2·4) = 4,730,880.
    shape = ((768, 384), (4, 2), 4)
    assert matrix.macs(*shape, "a_first") == 2_383_872
    assert matrix.macs(*shape, "b_first") == 4_730_880
    assert matrix.macs(*shape, "dense", tokens=math.inf) == 3072 * 768
    assert matrix.cheapest_order(*shape, 1) == "a_first"
    assert matrix.cheapest_order(*shape, 4096) == "dense"
    # A rank-1 (1, 2) projection: B first halves the work at any number of tokens.
    for tokens in (1, 4096):
        assert matrix.cheapest_order((768, 384), (1, 2), 1, tokens) == "b_first"


def test_the_fastest_order_counts_what_is_moved():
    def choose(*call):
        return matrix.fastest_order(*call, built_in("cpu", torch.float32))

    ffn = ((768, 384), (4, 2), 4)
    assert choose(*ffn, 1, True, True) == "a_first"
    assert choose(*ffn, 512, True, True) == "dense_blocks"  # the tokens' features are fewer than the weight's numbers
    assert choose(*ffn, 4096, True, True) == "dense"  # gathers are in the weight, once per call
    half = ((768, 384), (1, 2), 1)
    assert choose(*half, 1, True, False) == "b_first"
    assert choose(*half, 4096, False, False) == "b_first"  # half the products
    # a square 64 x 64 product of 8 x 8 factors: products 8x fewer, gathers of both sides outweigh them
    assert choose((8, 8), (8, 8), 1, 4096, True, True) == "dense"
    big = ((2048, 1024), (1, 2), 1)
    assert choose(*big, 4096, True, False) == "b_first"  # gathers grow with n, products with n²


def test_identity_permutations_are_dropped():
    assert drop_identity(torch.arange(5)) is None
    assert drop_identity(None) is None
    assert drop_identity(torch.tensor([1, 0])) is not None
