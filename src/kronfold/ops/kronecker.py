"""A sum of Kronecker products as a linear map, with a permutation on either side.

Shapes, for every function here: a (rank, out_a, in_a); b (rank, out_b, in_b); out = out_a·out_b, in = in_a·in_b.
K = Σ_k A_k ⊗ B_k has K[(i1, i2), (j1, j2)] = Σ_k A_k[i1, j1] B_k[i2, j2].

Inside, features stand in the order (j2, j1) and (i2, i1): then every product reads and writes whole rows, and only one
movement on each side remains, that of the permutation or of the order itself.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from torch import Tensor

from kronfold.base.specs import Pair
from kronfold.structures import rates as few_rows
from kronfold.structures.permutations import inverse, permuted
from kronfold.structures.rates import BACKWARD_MOVES, BACKWARD_PRODUCTS, Rates, mix, rates_for, tokens_of

# "dense" builds the weight for the call, gathers and all; "dense_blocks" builds it in the order it comes in and moves
# the features of x instead, which is less where the call has few tokens.
Order = Literal["a_first", "b_first", "dense", "dense_blocks"]


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


def _a_first(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x (n, in_b, in_a) -> (n, out_b, out_a)."""
    rank, out_a, in_a = a.shape
    _, out_b, in_b = b.shape
    t = few_rows.linear(x, a.reshape(rank * out_a, in_a)).view(-1, in_b * rank, out_a)
    return mix(b.permute(1, 2, 0).reshape(out_b, in_b * rank).to(t.dtype), t)


def _b_first(x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (n, in_b, in_a) -> (n, out_b, out_a); bias (out_a,) is added to each."""
    rank, out_a, in_a = a.shape
    _, out_b, in_b = b.shape
    t = mix(b.permute(1, 0, 2).reshape(out_b * rank, in_b), x)
    if rank > 1 and t.dtype == a.dtype and t.dtype.itemsize > 2:
        terms = t.view(-1, rank, in_a).transpose(0, 1)  # summed in place; two-byte sums would be rounded rank times
        y = torch.addbmm(t.new_zeros(()) if bias is None else bias, terms, a.transpose(1, 2), beta=bias is not None)
        return y.view(-1, out_b, out_a)
    return few_rows.linear(t.view(-1, out_b, rank * in_a), a.transpose(0, 1).reshape(out_a, rank * in_a), bias)


def block_weight(a: Tensor, b: Tensor) -> Tensor:
    """K (out, in) with its columns in the order (j2, j1): a batch of small products that writes it in one pass."""
    rank, out_a, in_a = a.shape
    _, out_b, in_b = b.shape
    return mix(b.reshape(rank, out_b * in_b).t(), a.transpose(0, 1)).reshape(out_a * out_b, in_b * in_a)


def dense_weight(a: Tensor, b: Tensor, gather_in: Tensor | None = None, gather_out: Tensor | None = None) -> Tensor:
    """The weight (out, in) of `apply` with these gathers, in the dtype of the factors."""
    _, _, in_a = a.shape
    _, _, in_b = b.shape
    weight = block_weight(a, b)
    if gather_out is not None:
        weight = permuted(weight, gather_out, 0)
    if gather_in is not None:
        return permuted(weight, inverse(_block_order(gather_in, in_a, in_b)))
    return weight.view(-1, in_b, in_a).transpose(1, 2).reshape(weight.shape)


def _block_order(gather_in: Tensor, in_a: int, in_b: int) -> Tensor:
    """The input gather (in the order (j1, j2)) in the order (j2, j1)."""
    return gather_in if in_b == 1 else gather_in.view(in_a, in_b).t().reshape(-1)


def _enter(x: Tensor, in_a: int, in_b: int, gather_in: Tensor | None) -> Tensor:
    """x (..., in), gathered and in the order the factors take it: (n, in_b, in_a). One movement at most."""
    if gather_in is not None:
        return permuted(x, _block_order(gather_in, in_a, in_b)).view(-1, in_b, in_a)
    return x.reshape(-1, in_a, in_b).transpose(1, 2).contiguous()


def _leave(y: Tensor, gather_out: Tensor | None) -> Tensor:
    """y (n, out_b, out_a) as (n, out) in the order of the outputs. One movement at most."""
    n, out_b, out_a = y.shape
    if gather_out is None:
        return y.transpose(1, 2).reshape(n, out_b * out_a)
    place = gather_out if out_b == 1 else gather_out % out_b * out_a + gather_out // out_b
    return permuted(y.view(n, out_b * out_a), place)


def macs(a_shape: Pair, b_shape: Pair, rank: int, order: Order, tokens: float = 1.0) -> float:
    """Multiply-accumulates per token. `dense` spreads the cost of building K over `tokens` tokens."""
    (out_a, in_a), (out_b, in_b) = a_shape, b_shape
    if order == "a_first":
        return rank * (in_b * out_a * in_a + out_a * in_b * out_b)
    if order == "b_first":
        return rank * (out_b * out_a * in_a + in_a * in_b * out_b)
    size = out_a * in_a * out_b * in_b
    return size + rank * size / tokens


def seconds(
    order: Order,
    a_shape: Pair,
    b_shape: Pair,
    rank: int,
    tokens: float,
    gather_in: bool,
    gather_out: bool,
    rates: Rates,
    training: bool = False,
    kept: bool = False,
) -> float:
    """What a call over `tokens` tokens takes by `rates`, with its backward pass where `training`.

    Args:
        gather_in, gather_out: the layer permutes that side. kept: the dense weight stands ready, nothing is built.
    """
    (out_a, in_a), (out_b, in_b) = a_shape, b_shape
    ins, outs, size = in_a * in_b, out_a * out_b, out_a * in_a * out_b * in_b
    enter = rates.moved(rates.gather if gather_in else rates.copy, tokens * ins if gather_in or in_b > 1 else 0)
    leave = rates.moved(rates.gather if gather_out else rates.copy, tokens * outs if gather_out or out_b > 1 else 0)
    moves, products = enter + leave, 0.0
    if order == "a_first":
        products = rates.product(tokens * in_b, in_a, rank * out_a)
        products += rates.moved(rates.mix, tokens * (rank * in_b + out_b) * out_a)
    elif order == "b_first":
        products = rates.product(tokens * out_b, rank * in_a, out_a, in_one=rank == 1)
        products += rates.moved(rates.mix, tokens * (in_b + rank * out_b) * in_a)
    else:
        products, moves = rates.product(tokens, ins, outs), 0.0
        if not kept:
            products += rates.moved(rates.mix, (rank + out_b * in_b) * out_a * in_a)
            moves = rates.moved(rates.row, size if gather_out else 0)
            folded = rates.moved(rates.gather if gather_in else rates.copy, size if gather_in or in_b > 1 else 0)
            moves += folded if order == "dense" else enter
    return products * (BACKWARD_PRODUCTS if training else 1.0) + moves * (BACKWARD_MOVES if training else 1.0)


def fastest_order(
    a_shape: Pair,
    b_shape: Pair,
    rank: int,
    tokens: float,
    gather_in: bool,
    gather_out: bool,
    rates: Rates,
    training: bool = False,
    kept: bool = False,
) -> Order:
    """The order of least `seconds` (see there for the arguments); the same for the same arguments everywhere.

    Orders differ by rounding, so another machine's rates may change the last digits of a result.
    """
    call = (a_shape, b_shape, rank, tokens, gather_in, gather_out, rates, training, kept)
    return _fastest(*call) if torch.compiler.is_compiling() else _remembered(*call)


def _fastest(a_shape: Pair, b_shape: Pair, rank: int, tokens: float, *how: Any) -> Order:
    best: Order = "b_first"
    least = math.inf
    orders: tuple[Order, ...] = ("b_first", "a_first", "dense", "dense_blocks")
    for order in orders:  # torch.compile cannot follow min() with a key
        took = seconds(order, a_shape, b_shape, rank, tokens, *how)
        if took < least:
            best, least = order, took
    return best


_remembered = functools.lru_cache(maxsize=4096)(_fastest)  # deciding takes as long as a small product


def cheapest_order(a_shape: Pair, b_shape: Pair, rank: int, tokens: float) -> Order:
    """The contraction order with the fewest multiply-accumulates for a call over `tokens` tokens."""
    orders: tuple[Order, ...] = ("b_first", "a_first", "dense")
    return min(orders, key=lambda order: macs(a_shape, b_shape, rank, order, tokens))


def apply(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    order: Order | None = None,
    gather_in: Tensor | None = None,
    gather_out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`(K x[..., gather_in])[..., gather_out] + bias` for x (..., in); returns (..., out).

    Args:
        order: None picks the fastest for the number of tokens in x. gather_in (in,), gather_out (out,), bias (out,):
            each may be None.
    """
    (rank, out_a, in_a), (_, out_b, in_b) = a.shape, b.shape
    if order is None:
        training = torch.is_grad_enabled() and (x.requires_grad or a.requires_grad)
        gathers = (gather_in is not None, gather_out is not None)
        rates = rates_for(x)
        order = fastest_order((out_a, in_a), (out_b, in_b), rank, tokens_of(x), *gathers, rates, training)
    if order == "dense":
        return few_rows.linear(x, dense_weight(a, b, gather_in, gather_out), bias)
    lead, inner = x.shape[:-1], _enter(x, in_a, in_b, gather_in)
    if order == "dense_blocks":
        weight = block_weight(a, b)
        weight = weight if gather_out is None else permuted(weight, gather_out, 0)
        return few_rows.linear(inner.view(*lead, in_b * in_a), weight, bias)
    if order == "b_first" and b.shape[1] == 1 and gather_out is None:  # the product's rows are the outputs
        return _b_first(inner, a, b, bias).view(*lead, out_a)
    y = _a_first(inner, a, b) if order == "a_first" else _b_first(inner, a, b)
    y = _leave(y, gather_out).view(*lead, out_a * out_b)
    return y if bias is None else y + bias.to(y.dtype)
