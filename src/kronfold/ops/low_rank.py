"""A weight held by some of its rows, as a linear map: y = [z, C z][..., gather_out] with z = P x.

Shapes: pivots P (rank, in); mix C (out - rank, rank); gather_out (out,) integers or None.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.ops import few_rows
from kronfold.ops.cost import BACKWARD_MOVES, BACKWARD_PRODUCTS, Rates
from kronfold.ops.permutation import permuted


def output_factor(mix: Tensor, gather_out: Tensor | None) -> Tensor:
    """[I; C] with its rows in the order of the outputs: (out, rank)."""
    own = torch.eye(mix.shape[1], device=mix.device, dtype=mix.dtype)
    factor = torch.cat([own, mix])
    return factor if gather_out is None else permuted(factor, gather_out, 0)


def factor_is_faster(
    out_features: int,
    rank: int,
    tokens: float,
    gather: bool,
    rates: Rates,
    training: bool = False,
    kept: bool = False,
) -> bool:
    """Whether to multiply by `output_factor` rather than to gather the outputs of every token.

    The factor spares that gather and costs rank² more multiply-accumulates a token, and its making unless it is `kept`.
    """
    products, moves = (BACKWARD_PRODUCTS, BACKWARD_MOVES) if training else (1.0, 1.0)
    rest = out_features - rank
    outputs = rates.moved(rates.row, tokens * out_features)
    outputs += rates.moved(rates.gather, tokens * out_features if gather else 0)
    making = rates.moved(rates.row, 0 if kept else 2 * out_features * rank)
    by_factor = products * rates.product(tokens, rank, out_features) + moves * making
    return by_factor < products * rates.product(tokens, rank, rest) + moves * outputs


def apply_gathered(x: Tensor, pivots: Tensor, mix: Tensor, gather_out: Tensor | None, bias: Tensor | None) -> Tensor:
    """x (..., in) -> (..., out), by a gather of every token's outputs."""
    z = few_rows.linear(x, pivots)
    y = torch.cat([z, few_rows.linear(z, mix)], dim=-1)
    y = y if gather_out is None else permuted(y, gather_out)
    return y if bias is None else y + bias.to(y.dtype)


def apply_factor(x: Tensor, pivots: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """The same by `output_factor`."""
    return few_rows.linear(few_rows.linear(x, pivots), factor, bias)
