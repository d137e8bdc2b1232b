"""A permuted sum of Kronecker products: its spec, its numbers, and the ways to multiply by it.

Shapes, for every function here: a (rank, out_a, in_a); b (rank, out_b, in_b); out = out_a·out_b, in = in_a·in_b.
K = Σ_k A_k ⊗ B_k has K[(i1, i2), (j1, j2)] = Σ_k A_k[i1, j1] B_k[i2, j2].

Inside `apply`, features stand in the order (j2, j1) and (i2, i1): then every product reads and writes whole rows, and
only one movement on each side remains, that of the permutation or of the order itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from kronfold.base.errors import ShapeError
from kronfold.structures.permutations import inverse, permuted
from kronfold.structures.rates import BACKWARD_MOVES, BACKWARD_PRODUCTS, Rates, linear, mix, rates_for, tokens_of
from kronfold.structures.spec import Pair, divisors


@dataclass(frozen=True)
class KroneckerSpec:
    """`W ≈ P_outᵀ (Σ_{k=1..rank} A_k ⊗ B_k) P_in` with A_k of shape `a`, B_k of shape `b`.

    Args:
        a: (out_a, in_a), shape of each A_k.
        b: (out_b, in_b), shape of each B_k ("the block").
        rank: number of terms; at most `max_rank`.
        permute_in: look for a permutation of the input features. No effect where in_b or in_a is 1.
        permute_out: the same for the output features.

    Raises:
        ShapeError: a size below 1, or a rank above `max_rank`.
    """

    structure: ClassVar[str] = "kronecker"
    a: Pair
    b: Pair
    rank: int = 1
    permute_in: bool = True
    permute_out: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", (int(self.a[0]), int(self.a[1])))
        object.__setattr__(self, "b", (int(self.b[0]), int(self.b[1])))
        if min(*self.a, *self.b, self.rank) < 1:
            raise ShapeError(f"Kronecker spec a={self.a} b={self.b} rank={self.rank}: every size must be at least 1.")
        if self.rank > self.max_rank:
            raise ShapeError(
                f"Kronecker rank {self.rank} is above the maximum {self.max_rank} for a={self.a} b={self.b} "
                f"(the smaller of {self.a[0] * self.a[1]} and {self.b[0] * self.b[1]}); "
                f"use rank {self.max_rank} or less."
            )

    @classmethod
    def for_weight(cls, shape: Pair, b: Pair, rank: int = 1, **flags: bool) -> KroneckerSpec:
        """The spec with block `b` for a weight of `shape` (out, in). Raises ShapeError with the nearest blocks."""
        for side, size, block in (("out", shape[0], b[0]), ("in", shape[1], b[1])):
            if block < 1 or size % block:
                near = sorted(divisors(size), key=lambda d: (abs(d - block), d))[:4]
                raise ShapeError(
                    f"Block size {block} does not divide the {side}_features {size} of a weight {tuple(shape)}; "
                    f"nearest allowed: {', '.join(map(str, sorted(near)))}."
                )
        return cls(a=(shape[0] // b[0], shape[1] // b[1]), b=b, rank=rank, **flags)

    @property
    def out_features(self) -> int:
        return self.a[0] * self.b[0]

    @property
    def in_features(self) -> int:
        return self.a[1] * self.b[1]

    @property
    def shape(self) -> Pair:
        return (self.out_features, self.in_features)

    @property
    def max_rank(self) -> int:
        """Rank at which every matrix is represented exactly: min(out_a·in_a, out_b·in_b)."""
        return min(self.a[0] * self.a[1], self.b[0] * self.b[1])

    @property
    def held_parameters(self) -> int:
        """Numbers in all A_k and B_k; permutations are integers and counted beside this, in `index_count`."""
        return self.rank * (self.a[0] * self.a[1] + self.b[0] * self.b[1])

    @property
    def searches_in(self) -> bool:
        """An input permutation is wanted and can change something (both in_a and in_b exceed 1)."""
        return self.permute_in and self.a[1] > 1 and self.b[1] > 1

    @property
    def searches_out(self) -> bool:
        return self.permute_out and self.a[0] > 1 and self.b[0] > 1

    @property
    def index_count(self) -> int:
        """Stored permutation entries (int32 each)."""
        return self.searches_in * self.in_features + self.searches_out * self.out_features

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless a weight of `shape` (out, in) is exactly what this spec factors."""
        if tuple(shape) == self.shape:
            return
        message = (
            f"Spec a={self.a} b={self.b} describes a weight {self.shape}, but the weight is {tuple(shape)} "
            "(out_features, in_features)."
        )
        try:
            fixed = KroneckerSpec.for_weight((shape[0], shape[1]), self.b, 1)
            message += f" With b={self.b} use a={fixed.a}."
        except ShapeError as error:
            message += f" {error}"
        raise ShapeError(message)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "a": list(self.a), "b": list(self.b)}

    def label(self) -> str:
        """Short text for tables, e.g. `4 x (192, 384)⊗(4, 2)`."""
        return f"{self.rank} x {self.a}⊗{self.b}"


@dataclass
class Fit:
    """What a solver found: `weight ≈ P_outᵀ (Σ_k A_k ⊗ B_k) P_in`, i.e. `weight[perm_out][:, perm_in] ≈ Σ_k A_k ⊗ B_k`.

    Attributes:
        spec: the shapes that were asked for.
        a: (rank, out_a, in_a), float64. b: (rank, out_b, in_b), float64. Each pair A_k, B_k has equal norms.
        perm_in: (in_features,) int64, or None where the input side was not permuted.
        perm_out: (out_features,) int64, or None.
        relative_error: ‖W − Ŵ‖ / ‖W‖, Frobenius (weighted, if a weighting was given), unitless, exact.
        history: relative errors as the search went on, never rising; the last is `relative_error`.
    """

    spec: KroneckerSpec
    a: Tensor
    b: Tensor
    perm_in: Tensor | None
    perm_out: Tensor | None
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """The approximation in the source's own order: (out_features, in_features), float64."""
        dense = to_dense(self.a, self.b)
        if self.perm_out is not None:
            dense = dense[torch.argsort(self.perm_out)]
        if self.perm_in is not None:
            dense = dense[:, torch.argsort(self.perm_in)]
        return dense


def rearrange(weight: Tensor, out_b: int, in_b: int) -> Tensor:
    """R(W): (..., out, in) -> (..., out_a·in_a, out_b·in_b); row (i1, j1) is the block at W[i1·out_b, j1·in_b],
    flattened. R turns Σ_k A_k ⊗ B_k into Σ_k vec(A_k) vec(B_k)ᵀ (Van Loan and Pitsianis 1993, section 2)."""
    *lead, out_features, in_features = weight.shape
    blocks = weight.reshape(*lead, out_features // out_b, out_b, in_features // in_b, in_b)
    return blocks.transpose(-3, -2).reshape(*lead, -1, out_b * in_b)


def to_dense(a: Tensor, b: Tensor) -> Tensor:
    """K as a dense matrix (out, in), in the dtype of the factors. One matrix product, whatever the rank."""
    (rank, out_a, in_a), (_, out_b, in_b) = a.shape, b.shape
    rearranged = a.reshape(rank, -1).T @ b.reshape(rank, -1)  # R(K) = vec(A)ᵀ vec(B); what is left is to undo R
    blocks = rearranged.view(out_a, in_a, out_b, in_b)
    return blocks.permute(0, 2, 1, 3).reshape(out_a * out_b, in_a * in_b)


# The ways to compute y = K x. "dense" builds the weight for the call, gathers and all; "dense_blocks" builds it in the
# order it comes in and moves the features of x instead, which is less where the call has few tokens.
Order = Literal["a_first", "b_first", "dense", "dense_blocks"]


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
        return linear(x, dense_weight(a, b, gather_in, gather_out), bias)

    lead = x.shape[:-1]
    x = _entered(x, gather_in, in_a, in_b)
    if order == "dense_blocks":
        weight = _block_weight(a, b)
        weight = weight if gather_out is None else permuted(weight, gather_out, 0)
        return linear(x.view(*lead, in_b * in_a), weight, bias)

    rows_are_outputs = False
    if order == "a_first":
        y = _mixed_by_b(linear(x, a.reshape(rank * out_a, in_a)), b)
    else:
        rows_are_outputs = out_b == 1 and gather_out is None  # then the product with A can add the bias
        inner_bias = bias if rows_are_outputs else None
        t = mix(b.permute(1, 0, 2).reshape(out_b * rank, in_b), x)
        if rank > 1 and t.dtype == a.dtype and t.dtype.itemsize > 2:
            terms = t.view(-1, rank, in_a).transpose(0, 1)  # summed in place; two-byte sums would be rounded rank times
            start = t.new_zeros(()) if inner_bias is None else inner_bias
            y = torch.addbmm(start, terms, a.transpose(1, 2), beta=inner_bias is not None).view(-1, out_b, out_a)
        else:
            wide = a.transpose(0, 1).reshape(out_a, rank * in_a)
            y = linear(t.view(-1, out_b, rank * in_a), wide, inner_bias)

    if rows_are_outputs:
        return y.view(*lead, out_a)
    return _left(y, gather_out, bias, lead)


def apply_a_first(
    x: Tensor,
    by_a: Callable[[Tensor], Tensor],
    b: Tensor,
    gather_in: Tensor | None = None,
    gather_out: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`apply` in the order "a_first", with `by_a` as the product with A: (..., in_a) -> (..., rank·out_a)."""
    in_b = b.shape[2]
    y = _mixed_by_b(by_a(_entered(x, gather_in, x.shape[-1] // in_b, in_b)), b)
    return _left(y, gather_out, bias, x.shape[:-1])


def _entered(x: Tensor, gather_in: Tensor | None, in_a: int, in_b: int) -> Tensor:
    """x (..., in), gathered and in the order the factors take it, in one movement: (n, in_b, in_a)."""
    if gather_in is not None:
        return permuted(x, _block_order(gather_in, in_a, in_b)).view(-1, in_b, in_a)
    return x.reshape(-1, in_a, in_b).transpose(1, 2).contiguous()


def _mixed_by_b(t: Tensor, b: Tensor) -> Tensor:
    """t (n, in_b, rank·out_a), what A makes of the input: (n, out_b, out_a)."""
    rank, out_b, in_b = b.shape
    small = b.permute(1, 2, 0).reshape(out_b, in_b * rank).to(t.dtype)
    return mix(small, t.reshape(t.shape[0], in_b * rank, t.shape[-1] // rank))


def _left(y: Tensor, gather_out: Tensor | None, bias: Tensor | None, lead: Sequence[int]) -> Tensor:
    """y (n, out_b, out_a) in the order of the outputs, again in one movement: (*lead, out)."""
    _, out_b, out_a = y.shape
    if gather_out is None:
        y = y.transpose(1, 2).reshape(*lead, out_b * out_a)
    else:
        place = gather_out if out_b == 1 else gather_out % out_b * out_a + gather_out // out_b
        y = permuted(y.view(-1, out_b * out_a), place).view(*lead, out_b * out_a)
    return y if bias is None else y + bias.to(y.dtype)


def dense_weight(a: Tensor, b: Tensor, gather_in: Tensor | None = None, gather_out: Tensor | None = None) -> Tensor:
    """The weight (out, in) of `apply` with these gathers, in the dtype of the factors."""
    in_a, in_b = a.shape[2], b.shape[2]
    weight = _block_weight(a, b)
    if gather_out is not None:
        weight = permuted(weight, gather_out, 0)
    if gather_in is not None:
        return permuted(weight, inverse(_block_order(gather_in, in_a, in_b)))
    return weight.view(-1, in_b, in_a).transpose(1, 2).reshape(weight.shape)


def _block_weight(a: Tensor, b: Tensor) -> Tensor:
    """K (out, in) with its columns in the order (j2, j1): a batch of small products that writes it in one pass."""
    (rank, out_a, in_a), (_, out_b, in_b) = a.shape, b.shape
    return mix(b.reshape(rank, out_b * in_b).t(), a.transpose(0, 1)).reshape(out_a * out_b, in_b * in_a)


def _block_order(gather_in: Tensor, in_a: int, in_b: int) -> Tensor:
    """The input gather (in the order (j1, j2)) in the order (j2, j1)."""
    return gather_in if in_b == 1 else gather_in.view(in_a, in_b).t().reshape(-1)


def macs(a_shape: Pair, b_shape: Pair, rank: int, order: Order, tokens: float = 1.0) -> float:
    """Multiply-accumulates per token. `dense` spreads the cost of building K over `tokens` tokens."""
    (out_a, in_a), (out_b, in_b) = a_shape, b_shape
    if order == "a_first":
        return rank * (in_b * out_a * in_a + out_a * in_b * out_b)
    if order == "b_first":
        return rank * (out_b * out_a * in_a + in_a * in_b * out_b)
    size = out_a * in_a * out_b * in_b
    return size + rank * size / tokens


def cheapest_order(a_shape: Pair, b_shape: Pair, rank: int, tokens: float) -> Order:
    """The contraction order with the fewest multiply-accumulates for a call over `tokens` tokens."""
    orders: tuple[Order, ...] = ("b_first", "a_first", "dense")
    return min(orders, key=lambda order: macs(a_shape, b_shape, rank, order, tokens))


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


def _fastest(*call: Any) -> Order:
    best: Order = "b_first"
    least = math.inf
    orders: tuple[Order, ...] = ("b_first", "a_first", "dense", "dense_blocks")
    for order in orders:  # torch.compile cannot follow min() with a key
        took = seconds(order, *call)
        if took < least:
            best, least = order, took
    return best


_remembered = functools.lru_cache(maxsize=4096)(_fastest)  # deciding takes as long as a small product
