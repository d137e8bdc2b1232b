"""Products that BLAS is slow at: with few rows, as in decoding one token at a time, and with tiny matrices.

`F.linear` hands one row to the matrix-vector product of BLAS and two to four rows to a matrix product that is made for
many. Weight first, `weight @ rows.T`, the same numbers come from a product with few columns, which reads the weight
faster: on one processor (AMD EPYC, Zen 4, MKL) 13 to 27 GB/s where the others read 3 to 12 (benchmarks/few_rows.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kronfold.ops.cost import is_few, rates_for, tokens_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`, weight first where this machine's rates say that it is faster.

    x (..., in), weight (out, in), bias (out,) or None; returns (..., out). With gradients, and compiled, it is
    `F.linear` itself.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    count = tokens_of(x)
    if not is_few(count, weight.shape[1], rates_for(x)) or x.dtype != weight.dtype:
        return F.linear(x, weight, bias)
    rows = x.reshape(count, -1)
    rows = rows if count > 1 else rows.expand(2, -1).contiguous()  # one alone would be the matrix-vector product again
    y = (weight @ rows.t())[:, :count].t().contiguous()
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1)


def mix(small: Tensor, x: Tensor) -> Tensor:
    """small (p, q) times every x[i] of x (n, q, width): (n, p, width). The width lies in one piece throughout."""
    p, q = small.shape
    if x.device.type == "cpu" and x.dtype.itemsize == 2 and p * q < 4:
        # two-byte products this small run at a third of the rate of single precision
        return torch.bmm(small.float().expand(x.shape[0], p, q), x.float()).to(x.dtype)
    return torch.bmm(small.expand(x.shape[0], p, q), x)
