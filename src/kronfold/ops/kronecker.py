"""A sum of Kronecker products as a linear map, without permutations.

Shapes, for every function here: a (rank, out_a, in_a); b (rank, out_b, in_b); out = out_a·out_b, in = in_a·in_b.
K = Σ_k A_k ⊗ B_k has K[(i1, i2), (j1, j2)] = Σ_k A_k[i1, j1] B_k[i2, j2].
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kronfold.ops.cost import COPY, GATHER, ROW

Order = Literal["a_first", "b_first", "dense"]


def to_dense(a: Tensor, b: Tensor) -> Tensor:
    """K as a dense matrix (out, in), in the dtype of the factors. One matrix product, whatever the rank."""
    rank, out_a, in_a = a.shape
    _, out_b, in_b = b.shape
    # R(K) = vec(A)ᵀ vec(B), then undo the rearrangement (Van Loan and Pitsianis 1993, section 2).
    rearranged = a.reshape(rank, -1).T @ b.reshape(rank, -1)
    blocks = rearranged.view(out_a, in_a, out_b, in_b)
    return blocks.permute(0, 2, 1, 3).reshape(out_a * out_b, in_a * in_b)


def rearrange(weight: Tensor, out_b: int, in_b: int) -> Tensor:
    """R(W): (out, in) -> (out_a·in_a, out_b·in_b); row (i1, j1) is the block W[i1·out_b:, j1·in_b:] flattened."""
    out_features, in_features = weight.shape[-2:]
    lead = weight.shape[:-2]
    blocks = weight.reshape(*lead, out_features // out_b, out_b, in_features // in_b, in_b)
    n = len(lead)
    blocks = blocks.permute(*range(n), n, n + 2, n + 1, n + 3)
    return blocks.reshape(*lead, -1, out_b * in_b)


def apply_a_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """K x for x (..., in), contracting the A factors first; returns (..., out)."""
    rank, out_a, in_a = a.shape
    _, out_b, in_b = b.shape
    lead = x.shape[:-1]
    columns = x.reshape(-1, in_a, in_b).transpose(1, 2)  # (n, in_b, in_a)
    t = columns @ a.reshape(rank * out_a, in_a).T  # (n, in_b, rank·out_a)
    t = t.reshape(-1, in_b, rank, out_a).permute(0, 3, 2, 1).reshape(-1, rank * in_b)  # rows (n, out_a)
    y = t @ b.permute(0, 2, 1).reshape(rank * in_b, out_b)  # (n·out_a, out_b)
    return y.reshape(*lead, out_a * out_b)


def apply_b_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """K x for x (..., in), contracting the B factors first; returns (..., out)."""
    rank, out_a, in_a = a.shape
    _, out_b, in_b = b.shape
    lead = x.shape[:-1]
    t = x.reshape(-1, in_b) @ b.permute(2, 1, 0).reshape(in_b, out_b * rank)  # (n·in_a, out_b·rank)
    t = t.reshape(-1, in_a, out_b, rank).permute(0, 2, 3, 1).reshape(-1, out_b, rank * in_a)
    y = t @ a.permute(0, 2, 1).reshape(rank * in_a, out_a)  # (n, out_b, out_a)
    return y.transpose(1, 2).reshape(*lead, out_a * out_b)


def macs(a_shape: tuple[int, int], b_shape: tuple[int, int], rank: int, order: Order, tokens: float = 1.0) -> float:
    """Multiply-accumulates per token. `dense` spreads the cost of building K over `tokens` tokens."""
    (out_a, in_a), (out_b, in_b) = a_shape, b_shape
    if order == "a_first":
        return rank * (in_b * out_a * in_a + out_a * in_b * out_b)
    if order == "b_first":
        return rank * (out_b * out_a * in_a + in_a * in_b * out_b)
    size = out_a * in_a * out_b * in_b
    return size + rank * size / tokens


def fastest_order(
    a_shape: tuple[int, int], b_shape: tuple[int, int], rank: int, tokens: float, gather_in: bool, gather_out: bool
) -> Order:
    """The order that takes the least time for a call over `tokens` tokens, by multiply-accumulates, copies and gathers.

    `dense` builds the weight once per call, with the gathers in it; the others gather every token's features.
    """
    (out_a, in_a), (out_b, in_b) = a_shape, b_shape
    ins, outs = in_a * in_b, out_a * out_b
    gathers = GATHER * (ins * gather_in + outs * gather_out)
    moved = (ins + rank * out_a * in_b, outs + rank * in_a * out_b)  # rearranged between the two products
    building = rank + 2 * COPY + ROW * gather_out + (COPY + ROW) * gather_in
    cost: dict[Order, float] = {
        "a_first": tokens * (macs(a_shape, b_shape, rank, "a_first") + COPY * moved[0] + gathers),
        "b_first": tokens * (macs(a_shape, b_shape, rank, "b_first") + COPY * moved[1] + gathers),
        "dense": ins * outs * (tokens + building),
    }
    return min(cost, key=lambda order: cost[order])


def cheapest_order(a_shape: tuple[int, int], b_shape: tuple[int, int], rank: int, tokens: float) -> Order:
    """The contraction order with the fewest multiply-accumulates for a call over `tokens` tokens."""
    orders: tuple[Order, ...] = ("b_first", "a_first", "dense")
    return min(orders, key=lambda order: macs(a_shape, b_shape, rank, order, tokens))


def apply(x: Tensor, a: Tensor, b: Tensor, order: Order | None = None) -> Tensor:
    """K x for x (..., in); returns (..., out). `order` None picks the fastest for the number of tokens in x."""
    if order is None:
        shapes: tuple[tuple[int, int], ...] = (tuple(a.shape[1:]), tuple(b.shape[1:]))  # type: ignore[assignment]
        order = fastest_order(shapes[0], shapes[1], a.shape[0], x.shape[:-1].numel(), False, False)
    if order == "a_first":
        return apply_a_first(x, a, b)
    if order == "b_first":
        return apply_b_first(x, a, b)
    return torch.nn.functional.linear(x, to_dense(a, b))
