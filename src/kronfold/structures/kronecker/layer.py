"""The layer that holds a permuted sum of Kronecker products, what a recipe entry asks of it, and how it is fitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfold.base.errors import RecipeError
from kronfold.base.specs import Pair
from kronfold.decompose.weighting import Weighting
from kronfold.nn.structured import TOKEN_COUNTS, StructuredLinear
from kronfold.ops import few_rows
from kronfold.ops.cost import Rates, rates_for, rates_of, tokens_of
from kronfold.ops.permutation import drop_identity
from kronfold.structures.kronecker import matrix
from kronfold.structures.kronecker.matrix import Fit, KroneckerSpec
from kronfold.structures.kronecker.permutations import permuted_kronecker
from kronfold.structures.kronecker.van_loan import nearest_kronecker, pruned_kronecker, with_equal_entries


class KroneckerLinear(StructuredLinear):
    """`y = P_outᵀ (Σ_k A_k ⊗ B_k) P_in x + bias`, never forming the dense weight unless that is the cheapest way.

    Args:
        a: (out_a, in_a), shape of each A_k. b: (out_b, in_b), shape of each B_k. rank: number of terms.
        permute_in: hold a gather for the input features. permute_out: the same for the output features.
        bias: hold a bias of out_a·out_b numbers.

    Parameters: `a` (rank, out_a, in_a), `b` (rank, out_b, in_b), `bias` (out,) or None.
    Buffers (int32): `gather_in` (in,): A and B see `x[..., gather_in]`; `gather_out` (out,): the layer returns
    `y[..., gather_out]` of what they give. None where the side is not permuted.

    Raises:
        ShapeError: impossible sizes or rank.
    """

    structure = "kronecker"
    a: nn.Parameter
    b: nn.Parameter
    gather_in: Tensor | None
    gather_out: Tensor | None

    def __init__(
        self,
        a: Pair,
        b: Pair,
        rank: int = 1,
        permute_in: bool = False,
        permute_out: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = KroneckerSpec(a, b, rank, permute_in, permute_out)
        self.in_features, self.out_features = self.spec.in_features, self.spec.out_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.a = nn.Parameter(torch.empty(rank, *self.spec.a, **factory))
        self.b = nn.Parameter(torch.empty(rank, *self.spec.b, **factory))
        self.add_bias(bias, device, dtype)

        def identity(size: int) -> Tensor:
            return torch.arange(size, dtype=torch.int32, device=device)

        self.register_buffer("gather_in", identity(self.in_features) if permute_in else None)
        self.register_buffer("gather_out", identity(self.out_features) if permute_out else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose dense weight has the spread of a fresh `nn.Linear`."""
        scale = (1.0 / (math.sqrt(3 * self.in_features * self.spec.rank))) ** 0.5
        nn.init.normal_(self.a, std=scale)
        nn.init.normal_(self.b, std=scale)

    @classmethod
    def from_factors(
        cls,
        a: Tensor,
        b: Tensor,
        perm_in: Tensor | None = None,
        perm_out: Tensor | None = None,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KroneckerLinear:
        """The layer for `weight[perm_out][:, perm_in] ≈ Σ_k a[k] ⊗ b[k]`. Identity permutations are dropped."""
        perm_in, perm_out = drop_identity(perm_in), drop_identity(perm_out)
        layer = cls(
            (a.shape[1], a.shape[2]),
            (b.shape[1], b.shape[2]),
            a.shape[0],
            perm_in is not None,
            perm_out is not None,
            bias is not None,
            device=device,
            dtype=dtype,
        )
        with torch.no_grad():
            layer.a.copy_(a)
            layer.b.copy_(b)
            if layer.gather_in is not None and perm_in is not None:
                layer.gather_in.copy_(perm_in)
            if layer.gather_out is not None and perm_out is not None:
                layer.gather_out.copy_(torch.argsort(perm_out))
        layer.set_bias(bias)
        return layer

    @classmethod
    def from_fit(
        cls,
        fit: Fit,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> KroneckerLinear:
        """The layer that holds what a solver found."""
        return cls.from_factors(fit.a, fit.b, fit.perm_in, fit.perm_out, bias, dtype, device)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        order = None
        if self.may_keep():
            order = self._order(tokens_of(x), rates_for(x), kept=True)
            if order.startswith("dense"):
                return few_rows.linear(x, self.kept(self.dense_weight), self.bias)
        return matrix.apply(x, self.a, self.b, order, self.gather_in, self.gather_out, self.bias)

    def _order(self, tokens: int, rates: Rates, kept: bool) -> matrix.Order:
        """The fastest order without gradients."""
        s, gathers = self.spec, (self.gather_in is not None, self.gather_out is not None)
        return matrix.fastest_order(s.a, s.b, s.rank, tokens, *gathers, rates, kept=kept)

    def kept_shape(self) -> tuple[int, int] | None:
        rates = rates_of(self.a.device.type, self.a.dtype)
        orders = (self._order(tokens, rates, kept=True) for tokens in TOKEN_COUNTS)
        return self.spec.shape if any(order.startswith("dense") for order in orders) else None

    def dense_weight(self) -> Tensor:
        """The weight this layer stands for: (out_features, in_features), in the source's order of features."""
        return matrix.dense_weight(self.a, self.b, self.gather_in, self.gather_out)

    def permute_inputs(self, perm: Tensor) -> None:
        """Reorder the input features in place: the layer then takes `x[..., perm]` where it took x. perm: (in,)."""
        inverse = torch.argsort(perm.to(self.a.device))
        gather = inverse if self.gather_in is None else inverse[self.gather_in.long()]
        self.gather_in = drop_identity(gather.int())
        self.spec = replace(self.spec, permute_in=self.gather_in is not None)

    def permute_outputs(self, perm: Tensor) -> None:
        """Reorder the output features in place, bias included: the layer then returns `y[..., perm]`. perm: (out,)."""
        perm = perm.to(self.a.device)
        gather = perm if self.gather_out is None else self.gather_out[perm]
        self.gather_out = drop_identity(gather.int())
        self.spec = replace(self.spec, permute_out=self.gather_out is not None)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.copy_(self.bias[perm])

    def macs_per_token(self) -> float:
        """Multiply-accumulates per token when many tokens share the call."""
        order = matrix.cheapest_order(self.spec.a, self.spec.b, self.spec.rank, math.inf)
        return matrix.macs(self.spec.a, self.spec.b, self.spec.rank, order, math.inf)

    def to_spec(self) -> dict[str, Any]:
        return {"structure": self.structure, **self.spec.to_dict()}

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KroneckerLinear:
        """An uninitialised-but-valid layer for `spec` (as `to_spec` gives it)."""
        s = KroneckerSpec(**{k: v for k, v in spec.items() if k != "structure"})
        return cls(s.a, s.b, s.rank, s.permute_in, s.permute_out, bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        sides = [side for side, gather in (("in", self.gather_in), ("out", self.gather_out)) if gather is not None]
        permuted = f", permuted: {'+'.join(sides)}" if sides else ""
        return f"{self.in_features} -> {self.out_features}, {self.spec.label()}{permuted}, bias={self.bias is not None}"


def fit(weight: Tensor, spec: KroneckerSpec, seed: int, weighting: Weighting | None) -> Fit:
    """Search permutations on the sides the spec asks for; without any, the nearest sum."""
    if spec.searches_in or spec.searches_out:
        return permuted_kronecker(weight, spec, seed=seed, weighting=weighting)
    return nearest_kronecker(weight, spec, weighting)


def ask(shape: Pair, entry: Mapping[str, Any]) -> KroneckerSpec:
    """`block` (out_b, in_b), `rank` (default 1), `permute`."""
    if entry.get("block") is None:
        raise RecipeError("structure kronecker needs a block: [out_b, in_b], e.g. [4, 2]")
    if entry.get("ratio") is not None:
        raise RecipeError("structure kronecker takes block and rank, not ratio")
    permute = entry.get("permute", "both")
    flags = {"permute_in": permute in ("in", "both"), "permute_out": permute in ("out", "both")}
    return KroneckerSpec.for_weight(shape, entry["block"], entry.get("rank") or 1, **flags)


def sizes(spec: KroneckerSpec) -> list[KroneckerSpec]:
    """All ranks that hold fewer numbers than the matrix."""
    dense, term = spec.out_features * spec.in_features, spec.held_parameters // spec.rank
    return [replace(spec, rank=rank) for rank in range(1, spec.max_rank + 1) if rank * term < dense]


# what a recipe entry may name as `init` in place of the nearest sum: (weight, spec, seed, weighting) -> Fit
INITS: dict[str, Callable[[Tensor, KroneckerSpec, int, Weighting | None], Fit]] = {
    "modified_van_loan": lambda w, s, seed, h: with_equal_entries(fit(w, s, seed, h)),
    "pruning": lambda w, s, _seed, h: pruned_kronecker(w, s, h),
}
