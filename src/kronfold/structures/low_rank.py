"""Low rank: a weight held by some of its own rows and the way from these to the others.

The best low-rank approximation under a quadratic form is exact. With roots H = R Rᵀ and G = S Sᵀ the weighted error of
Ŵ is the plain error of Sᵀ Ŵ R against Sᵀ W R, so the truncated SVD of the latter is the optimum (Eckart and Young 1936;
with G = I this is the truncation-aware whitening of SVD-LLM, arXiv 2403.07378, section 3). The singular vectors of one
side come from a Gram matrix. Holding rows of the matrix itself saves rank² numbers (pivoting, arXiv 2501.19090).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import scipy.linalg
import torch
from torch import Tensor, nn

from kronfold.base.errors import RecipeError, ShapeError
from kronfold.structures.layer import TOKEN_COUNTS, StructuredLinear, plain_weight, product, product_weight
from kronfold.structures.permutations import drop_identity, permuted
from kronfold.structures.rates import BACKWARD_MOVES, BACKWARD_PRODUCTS, Rates, linear, rates_for, rates_of, tokens_of
from kronfold.structures.registry import Kind, Structure
from kronfold.structures.spec import Pair
from kronfold.structures.weighting import Weighting, check_weight, root


@dataclass(frozen=True)
class LowRankSpec:
    """A matrix (out_features, in_features) of rank `rank`, held by `rank` of its own rows and the way to the others.

    Two factors (out, rank) and (rank, in) hold rank² numbers too many: any invertible matrix may be put between them.
    Taking rank rows of the matrix itself as second factor uses that up, so the count is rank·(out + in - rank),
    never above the dense one (pivoting factorisation, arXiv 2501.19090).

    Args:
        permuted: hold where each output stands; False once a neighbour gives the outputs in the order of the factors.

    Raises:
        ShapeError: a size below 1, or a rank above the smaller side.
    """

    structure: ClassVar[str] = "low_rank"
    out_features: int
    in_features: int
    rank: int
    permuted: bool = True

    def __post_init__(self) -> None:
        if min(self.out_features, self.in_features, self.rank) < 1:
            raise ShapeError(f"Low-rank spec {self.shape} rank {self.rank}: every size must be at least 1.")
        if self.rank > min(self.shape):
            raise ShapeError(
                f"Rank {self.rank} is above the smaller side of a weight {self.shape}; use {min(self.shape)} or less."
            )

    @classmethod
    def for_ratio(cls, shape: Pair, ratio: float) -> LowRankSpec:
        """The spec of highest rank that holds at most `ratio` of the dense numbers (at least rank 1)."""
        if not 0 < ratio <= 1:
            raise ShapeError(f"ratio {ratio} must lie in (0, 1]: the share of a weight's numbers that is kept.")
        total = shape[0] + shape[1]
        budget = ratio * shape[0] * shape[1]
        # the smaller root of r(m + n - r) = budget
        rank = int((total - math.sqrt(total * total - 4 * budget)) / 2 + 1e-9)
        return cls(shape[0], shape[1], max(1, min(rank, *shape)))

    @property
    def shape(self) -> Pair:
        return (self.out_features, self.in_features)

    @property
    def held_parameters(self) -> int:
        return self.rank * (self.out_features + self.in_features - self.rank)

    @property
    def index_count(self) -> int:
        """Stored integers (int32 each): where each output comes from."""
        return self.permuted * self.out_features

    @property
    def macs_per_token(self) -> int:
        return self.held_parameters

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless a weight of `shape` (out, in) is what this spec describes."""
        if tuple(shape) != self.shape:
            raise ShapeError(
                f"Low-rank spec describes a weight {self.shape}, but the weight is {tuple(shape)} "
                "(out_features, in_features)."
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def label(self) -> str:
        """Short text for tables, e.g. `rank 120 of 576`."""
        return f"rank {self.rank} of {min(self.shape)}"


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
    z = linear(x, pivots)
    return in_order(z, linear(z, mix), gather_out, bias)


def in_order(z: Tensor, rest: Tensor, gather_out: Tensor | None, bias: Tensor | None) -> Tensor:
    """The pivots' outputs z (..., rank) and the others' (..., out - rank), in the order of the outputs."""
    y = torch.cat([z, rest], dim=-1)
    y = y if gather_out is None else permuted(y, gather_out)
    return y if bias is None else y + bias.to(y.dtype)


def apply_factor(x: Tensor, pivots: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    """The same by `output_factor`."""
    return linear(linear(x, pivots), factor, bias)


@dataclass
class LowRankFit:
    """`weight ≈ cat([pivots, mix @ pivots])[gather_out]`.

    Attributes:
        spec: sizes and rank. pivots: (rank, in_features), float64. mix: (out_features - rank, rank), float64.
        gather_out: (out_features,) int64.
        relative_error: as `Weighting.relative_error`, unitless; the plain Frobenius one without a weighting.
        history: one entry; there is no iteration.
    """

    spec: LowRankSpec
    pivots: Tensor
    mix: Tensor
    gather_out: Tensor
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """(out_features, in_features), float64."""
        return torch.cat([self.pivots, self.mix @ self.pivots])[self.gather_out]


def nearest_low_rank(weight: Tensor, spec: LowRankSpec, weighting: Weighting | None = None) -> LowRankFit:
    """The exact minimiser of the weighted error among matrices of rank `spec.rank`.

    Args:
        weight: (out_features, in_features), any floating dtype; worked on in float64 on the CPU.
        weighting: H and G; None is the plain Frobenius norm.

    Raises:
        ShapeError, InputError: the weight does not fit the spec or is not finite; the statistics do not fit.
    """
    weight = check_weight(weight, spec).double()
    weighting = (weighting or Weighting()).checked(spec.shape)
    left, right = truncated(weight, spec.rank, weighting)
    pivots, mix, gather = pivoted(left, right)
    fit = LowRankFit(spec, pivots, mix, gather, 0.0)
    fit.relative_error = weighting.relative_error(weight, fit.to_dense())
    fit.history = [fit.relative_error]
    return fit


def truncated(weight: Tensor, rank: int, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Factors (out, rank) and (rank, in) of the optimum; `weighting` as `Weighting.checked` returns it."""
    whitened = weight
    if weighting.inputs is not None:
        right_root, right_inverse = root(weighting.inputs)
        whitened = whitened @ right_root
    if weighting.outputs is not None:
        whitened = _rooted(weighting.outputs, whitened)
    if whitened.shape[0] <= whitened.shape[1]:
        left = torch.linalg.eigh(whitened @ whitened.T).eigenvectors[:, -rank:]
        right = left.T @ whitened
    else:
        basis = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:]
        left, right = whitened @ basis, basis.T
    if weighting.inputs is not None:
        right = right @ right_inverse
    if weighting.outputs is not None:
        left = _rooted(weighting.outputs, left, inverse=True)
    return left, right


def _rooted(outputs: Tensor, matrix: Tensor, inverse: bool = False) -> Tensor:
    """Sᵀ matrix for G = S Sᵀ, or S⁻ᵀ matrix; `outputs` is G (out, out) or its diagonal (out,), matrix (out, n)."""
    if outputs.dim() == 1:
        scale = outputs.rsqrt() if inverse else outputs.sqrt()
        return scale[:, None] * matrix
    factor, inverted = root(outputs)
    return (inverted if inverse else factor).T @ matrix


def tail_energies(weight: Tensor, weighting: Weighting) -> Tensor:
    """Weighted squared error of the optimum at every rank 0 .. min(out, in): (min + 1,) float64, falling to 0.

    The sensitivity curve of a weight: half of it is the predicted loss increase in nats when H and G are those of
    K-FAC. `weighting` as `Weighting.checked` returns it.
    """
    whitened = weight.double()
    if weighting.inputs is not None:
        whitened = whitened @ root(weighting.inputs)[0]
    if weighting.outputs is not None:
        whitened = _rooted(weighting.outputs, whitened)
    gram = whitened @ whitened.T if whitened.shape[0] <= whitened.shape[1] else whitened.T @ whitened
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending: the smallest are lost first
    return torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)])


def pivoted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`left @ right` by rows of its own: pivots (rank, in), mix (out - rank, rank), gather (out,).

    The rows are chosen by a QR factorisation with column pivoting of leftᵀ, which keeps `mix` small.
    """
    rank = left.shape[1]
    triangular, order = scipy.linalg.qr(left.T.numpy(), mode="r", pivoting=True)
    order = torch.from_numpy(order).long()
    # leftᵀ[:, order] = Q [R1, R2], so the other rows are (R1⁻¹ R2)ᵀ times the pivot rows.
    square, rest = triangular[:, :rank], triangular[:, rank:]
    diagonal = abs(square.diagonal())
    if diagonal.min() > 1e-12 * diagonal.max():
        mix = scipy.linalg.solve_triangular(square, rest).T
    else:  # the true rank is below the one asked for
        mix = (scipy.linalg.pinv(square) @ rest).T
    gather = torch.argsort(order)
    return left[order[:rank]] @ right, torch.from_numpy(mix.copy()), gather


class LowRankLinear(StructuredLinear):
    """`y = gather([z, C z]) + bias` with `z = P x`: P holds `rank` rows of the weight, C makes the others from them.

    Args:
        in_features, out_features, rank: sizes; rank at most the smaller of the two. bias: hold a bias.
        permuted: hold a gather for the output features.

    Modules: `pivots`, an `nn.Linear` (in -> rank) whose weight is P, and `mix` (rank -> out - rank), whose weight is C;
    either may be replaced (an adapter, a quantised layer). Parameter: `bias` (out,) or None. Buffer (int32):
    `gather_out` (out,), where in [z, C z] each output stands; None where they stand in that order.

    Raises:
        ShapeError: impossible sizes.

    Source: pivoting factorisation, arXiv 2501.19090: rank·(out + in - rank) numbers and multiply-accumulates.
    """

    structure = "low_rank"
    pivots: nn.Linear
    mix: nn.Linear
    gather_out: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        permuted: bool = True,
    ) -> None:
        super().__init__()
        self.spec = LowRankSpec(out_features, in_features, rank, permuted)
        self.in_features, self.out_features = in_features, out_features
        self.pivots = product(in_features, rank, device, dtype)
        self.mix = product(rank, out_features - rank, device, dtype)
        self.add_bias(bias, device, dtype)
        identity = torch.arange(out_features, dtype=torch.int32, device=device)
        self.register_buffer("gather_out", identity if permuted else None)
        nn.init.normal_(self.pivots.weight, std=1 / math.sqrt(3 * in_features))  # rows as a fresh nn.Linear has them
        nn.init.normal_(self.mix.weight, std=1 / math.sqrt(rank))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        inner = self._modules  # attributes of a module are slow to read
        pivots, mix = plain_weight(inner["pivots"]), plain_weight(inner["mix"])
        if pivots is None or mix is None:
            z = self.pivots(x)
            return in_order(z, self.mix(z), self.gather_out, self.bias)
        tokens, rates = tokens_of(x), rates_for(x)
        if self.may_keep() and self._by_factor(tokens, rates, kept=True):
            return apply_factor(x, pivots, self.kept(self._factor), self.bias)
        training = torch.is_grad_enabled() and (x.requires_grad or mix.requires_grad)
        if self._by_factor(tokens, rates, training):
            return apply_factor(x, pivots, self._factor(), self.bias)
        return apply_gathered(x, pivots, mix, self.gather_out, self.bias)

    def _factor(self) -> Tensor:
        return output_factor(self.mix.weight, self.gather_out)

    def _by_factor(self, tokens: int, rates: Rates, training: bool = False, kept: bool = False) -> bool:
        gather = self.gather_out is not None
        return factor_is_faster(self.out_features, self.spec.rank, tokens, gather, rates, training, kept)

    def kept_shape(self) -> tuple[int, int] | None:
        pivots, mix = plain_weight(self.pivots), plain_weight(self.mix)
        if pivots is None or mix is None:
            return None
        rates = rates_of(mix.device.type, mix.dtype)
        wanted = any(self._by_factor(tokens, rates, kept=True) for tokens in TOKEN_COUNTS)
        return (self.out_features, self.spec.rank) if wanted else None

    def dense_weight(self) -> Tensor:
        pivots = product_weight(self.pivots, self.in_features)
        weight = torch.cat([pivots, product_weight(self.mix, self.spec.rank) @ pivots])
        return weight if self.gather_out is None else weight[self.gather_out.long()]

    def permute_inputs(self, perm: Tensor) -> None:
        """Reorder the input features in place: the layer then takes `x[..., perm]` where it took x. perm: (in,)."""
        with torch.no_grad():
            self.pivots.weight.copy_(self.pivots.weight[:, perm.to(self.pivots.weight.device)])

    def permute_outputs(self, perm: Tensor) -> None:
        """Reorder the output features in place, bias included: the layer then returns `y[..., perm]`. perm: (out,)."""
        perm = perm.to(self.pivots.weight.device)
        gather = perm if self.gather_out is None else self.gather_out[perm]
        self.gather_out = drop_identity(gather.int())
        self.spec = replace(self.spec, permuted=self.gather_out is not None)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(self.bias[perm])

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LowRankLinear:
        s = LowRankSpec(**{k: v for k, v in spec.items() if k != "structure"})
        return cls(s.in_features, s.out_features, s.rank, bias, device, dtype, s.permuted)

    @classmethod
    def from_fit(
        cls,
        fit: Any,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> LowRankLinear:
        """`fit`: a `LowRankFit`."""
        s = fit.spec
        layer = cls(s.in_features, s.out_features, s.rank, bias is not None, device=device, dtype=dtype)
        with torch.no_grad():
            layer.pivots.weight.copy_(fit.pivots)
            layer.mix.weight.copy_(fit.mix)
            layer.gather_out = fit.gather_out.to(layer.pivots.weight.device, torch.int32)
        layer.set_bias(bias)
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.spec.label()}, bias={self.bias is not None}"


def ask_low_rank(shape: Pair, entry: Mapping[str, Any]) -> LowRankSpec:
    """`rank`, or `ratio`: the share of the weight's numbers that is kept. Raises RecipeError, ShapeError."""
    if entry.get("block") is not None:
        raise RecipeError("structure low_rank takes rank or ratio, not block")
    if (entry.get("rank") is None) == (entry.get("ratio") is None):
        raise RecipeError("structure low_rank needs either rank: N or ratio: R (the share of numbers kept)")
    if entry.get("rank") is not None:
        return LowRankSpec(shape[0], shape[1], entry["rank"])
    return LowRankSpec.for_ratio(shape, entry["ratio"])


class LowRank(Structure):
    """Asked for at an embedding it is an embedding of one group, which a lookup reads row by row."""

    name = "low_rank"
    spec = LowRankSpec
    layer = LowRankLinear
    takes = ("rank", "ratio")
    planned = ("linear",)

    def at(self, kind: Kind) -> str | None:
        return "grouped_embedding" if kind == "embedding" else self.name

    def ask(self, shape: Pair, entry: Mapping[str, Any], kind: Kind) -> LowRankSpec:
        return ask_low_rank(shape, entry)

    def held(self, spec: LowRankSpec) -> LowRankSpec:
        """As fitted, whatever an edited plan says: only a neighbour can take its gather over."""
        return replace(spec, permuted=True)

    def sizes(self, spec: LowRankSpec) -> list[LowRankSpec]:
        """All ranks below the full one."""
        return [replace(spec, rank=rank) for rank in range(1, max(2, min(spec.shape)))]

    def fit(
        self,
        weight: Tensor,
        spec: LowRankSpec,
        seed: int = 0,
        weighting: Weighting | None = None,
        init: str | None = None,
    ) -> LowRankFit:
        return nearest_low_rank(weight, spec, weighting)

    def choices(self, shape: Pair, kind: Kind) -> list[LowRankSpec]:
        """At the full rank nothing is saved, so that is no choice."""
        return [LowRankSpec(*shape, rank) for rank in range(1, min(shape))]

    def losses(self, weight: Tensor, weighting: Weighting, kind: Kind) -> list[Tensor]:
        shape = (weight.shape[0], weight.shape[1])
        return [0.5 * tail_energies(weight, weighting.checked(shape))[1 : min(shape)]]


STRUCTURE = LowRank()
