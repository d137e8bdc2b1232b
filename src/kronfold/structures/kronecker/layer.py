"""The layer that holds a permuted sum of Kronecker products, what a recipe entry asks of it, and how it is fitted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfold.base.errors import CheckpointError, RecipeError
from kronfold.structures.kronecker import matrix
from kronfold.structures.kronecker.matrix import Fit, KroneckerSpec
from kronfold.structures.kronecker.permutations import permuted_kronecker
from kronfold.structures.kronecker.van_loan import nearest_kronecker, pruned_kronecker, with_equal_entries
from kronfold.structures.layer import TOKEN_COUNTS, StructuredLinear, plain_weight, product, product_weight
from kronfold.structures.levels import FactorizedEmbedding
from kronfold.structures.permutations import drop_identity
from kronfold.structures.rates import Rates, linear, rates_for, rates_of, tokens_of
from kronfold.structures.registry import Kind, Structure, Where
from kronfold.structures.spec import Pair
from kronfold.structures.weighting import Weighting

PLANNED_BLOCKS: tuple[Pair, ...] = ((1, 2), (2, 1), (2, 2), (2, 4), (4, 2))


class KroneckerLinear(StructuredLinear):
    """`y = P_outᵀ (Σ_k A_k ⊗ B_k) P_in x + bias`, never forming the dense weight unless that is the cheapest way.

    Args:
        a: (out_a, in_a), shape of each A_k. b: (out_b, in_b), shape of each B_k. rank: number of terms.
        permute_in: hold a gather for the input features. permute_out: the same for the output features.
        bias: hold a bias of out_a·out_b numbers.

    Module: `a`, an `nn.Linear` (in_a -> rank·out_a) whose weight is the A_k one below the other; it may be replaced (an
    adapter, a quantised layer). Parameters: `b` (rank, out_b, in_b), which mixes few numbers at a time and is no plain
    product, `bias` (out,) or None.
    Buffers (int32): `gather_in` (in,): A and B see `x[..., gather_in]`; `gather_out` (out,): the layer returns
    `y[..., gather_out]` of what they give. None where the side is not permuted.

    Raises:
        ShapeError: impossible sizes or rank.
    """

    structure = "kronecker"
    a: nn.Linear
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
        self.a = product(self.spec.a[1], rank * self.spec.a[0], device, dtype)
        self.b = nn.Parameter(torch.empty(rank, *self.spec.b, device=device, dtype=dtype))
        self.add_bias(bias, device, dtype)

        def identity(size: int) -> Tensor:
            return torch.arange(size, dtype=torch.int32, device=device)

        self.register_buffer("gather_in", identity(self.in_features) if permute_in else None)
        self.register_buffer("gather_out", identity(self.out_features) if permute_out else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random factors whose dense weight has the spread of a fresh `nn.Linear`."""
        scale = (1.0 / (math.sqrt(3 * self.in_features * self.spec.rank))) ** 0.5
        nn.init.normal_(self.a.weight, std=scale)
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
            layer.a.weight.copy_(a.flatten(0, 1))
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
        a = plain_weight(self._modules["a"])  # an attribute of a module is slow to read
        if a is None:
            return matrix.apply_a_first(x, self.a, self.b, self.gather_in, self.gather_out, self.bias)
        order = None
        if self.may_keep():
            order = self._order(tokens_of(x), rates_for(x), kept=True)
            if order.startswith("dense"):
                return linear(x, self.kept(self.dense_weight), self.bias)
        a = a.view(self.spec.rank, *self.spec.a)
        return matrix.apply(x, a, self.b, order, self.gather_in, self.gather_out, self.bias)

    def factor_a(self) -> Tensor:
        """The A_k as (rank, out_a, in_a)."""
        return product_weight(self.a, self.spec.a[1]).reshape(self.spec.rank, *self.spec.a)

    def _order(self, tokens: int, rates: Rates, kept: bool) -> matrix.Order:
        """The fastest order without gradients."""
        s, gathers = self.spec, (self.gather_in is not None, self.gather_out is not None)
        return matrix.fastest_order(s.a, s.b, s.rank, tokens, *gathers, rates, kept=kept)

    def kept_shape(self) -> tuple[int, int] | None:
        if plain_weight(self.a) is None:
            return None
        rates = rates_of(self.b.device.type, self.b.dtype)
        orders = (self._order(tokens, rates, kept=True) for tokens in TOKEN_COUNTS)
        return self.spec.shape if any(order.startswith("dense") for order in orders) else None

    def dense_weight(self) -> Tensor:
        """The weight this layer stands for: (out_features, in_features), in the source's order of features."""
        return matrix.dense_weight(self.factor_a(), self.b, self.gather_in, self.gather_out)

    def permute_inputs(self, perm: Tensor) -> None:
        """Reorder the input features in place: the layer then takes `x[..., perm]` where it took x. perm: (in,)."""
        inverse = torch.argsort(perm.to(self.b.device))
        gather = inverse if self.gather_in is None else inverse[self.gather_in.long()]
        self.gather_in = drop_identity(gather.int())
        self.spec = replace(self.spec, permute_in=self.gather_in is not None)

    def permute_outputs(self, perm: Tensor) -> None:
        """Reorder the output features in place, bias included: the layer then returns `y[..., perm]`. perm: (out,)."""
        perm = perm.to(self.b.device)
        gather = perm if self.gather_out is None else self.gather_out[perm]
        self.gather_out = drop_identity(gather.int())
        self.spec = replace(self.spec, permute_out=self.gather_out is not None)
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
    ) -> KroneckerLinear:
        """An uninitialised-but-valid layer for `spec` (as `to_spec` gives it)."""
        s = KroneckerSpec(**{k: v for k, v in spec.items() if k != "structure"})
        return cls(s.a, s.b, s.rank, s.permute_in, s.permute_out, bias, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        sides = [side for side, gather in (("in", self.gather_in), ("out", self.gather_out)) if gather is not None]
        permuted = f", permuted: {'+'.join(sides)}" if sides else ""
        return f"{self.in_features} -> {self.out_features}, {self.spec.label()}{permuted}, bias={self.bias is not None}"


class Kronecker(Structure):
    """In an embedding it is one more level of a factorised one, with one row per token (block (1, n))."""

    name = "kronecker"
    spec = KroneckerSpec
    layer = KroneckerLinear
    replaces = ("linear", "embedding")
    takes = ("block", "rank", "permute", "init")
    inits = ("van_loan", "modified_van_loan", "pruning")
    goes_inside = True
    planned = ("linear",)

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        super().check_entry(entry)
        if entry.get("init") == "pruning" and entry.get("permute", "both") != "none":
            raise RecipeError("init pruning keeps entries by their place and permutes nothing; say `permute: none`")

    def ask(self, shape: Pair, entry: Mapping[str, Any], kind: Kind) -> KroneckerSpec:
        """`block` (out_b, in_b), `rank` (default 1), `permute` (default both sides)."""
        if entry.get("block") is None:
            raise RecipeError("structure kronecker needs a block: [out_b, in_b], e.g. [4, 2]")
        if entry.get("ratio") is not None:
            raise RecipeError("structure kronecker takes block and rank, not ratio")
        permute = entry.get("permute", "both")
        flags = {"permute_in": permute in ("in", "both"), "permute_out": permute in ("out", "both")}
        spec = KroneckerSpec.for_weight(shape, entry["block"], entry.get("rank") or 1, **flags)
        self._check_rows(spec, kind)
        return replace(spec, permute_out=False) if kind == "embedding" else spec

    def check_site(self, spec: KroneckerSpec, kind: Kind, shape: Pair, inside: bool = False) -> None:
        super().check_site(spec, kind, shape, inside)
        self._check_rows(spec, kind)

    def _check_rows(self, spec: KroneckerSpec, kind: Kind) -> None:
        if kind == "embedding" and spec.b[0] != 1:
            raise RecipeError(
                f"an embedding keeps one row per token: block {list(spec.b)} must be [1, n], e.g. [1, {spec.b[1]}]"
            )

    def held(self, spec: KroneckerSpec) -> KroneckerSpec:
        """Without the permutations that can change nothing."""
        return replace(spec, permute_in=spec.searches_in, permute_out=spec.searches_out)

    def plain(self, spec: KroneckerSpec) -> KroneckerSpec:
        return replace(spec, permute_in=False, permute_out=False)

    def sizes(self, spec: KroneckerSpec) -> list[KroneckerSpec]:
        """All ranks that hold fewer numbers than the matrix."""
        dense, term = spec.out_features * spec.in_features, spec.held_parameters // spec.rank
        return [replace(spec, rank=rank) for rank in range(1, spec.max_rank + 1) if rank * term < dense]

    def macs(self, spec: KroneckerSpec) -> float:
        order = matrix.cheapest_order(spec.a, spec.b, spec.rank, math.inf)
        return matrix.macs(spec.a, spec.b, spec.rank, order, math.inf)

    def fit(
        self,
        weight: Tensor,
        spec: KroneckerSpec,
        seed: int = 0,
        weighting: Weighting | None = None,
        init: str | None = None,
    ) -> Fit:
        """Search permutations on the sides the spec asks for; without any, the nearest sum. `init`: as in recipes."""
        if init == "pruning":
            return pruned_kronecker(weight, spec, weighting)
        if spec.searches_in or spec.searches_out:
            fit = permuted_kronecker(weight, spec, seed=seed, weighting=weighting)
        else:
            fit = nearest_kronecker(weight, spec, weighting)
        return with_equal_entries(fit) if init == "modified_van_loan" else fit

    def weighting(self, spec: KroneckerSpec, weighting: Weighting) -> Weighting:
        """Blocks of several rows are fitted without a full output moment.

        With it every step over the A's is a run of conjugate gradients on the whole weight: 7 to 20 times the time,
        for a gain in perplexity that was never measured.
        """
        full = weighting.outputs is not None and weighting.outputs.dim() == 2
        return replace(weighting, outputs=None) if spec.b[0] > 1 and full else weighting

    def check_place(self, where: Where) -> None:
        """In a checkpoint a Kronecker structure is a linear layer; an embedding is one in levels."""
        super().check_place(where)
        if where.kind != "linear":
            raise CheckpointError(f"{self.name} needs a linear layer, found {type(where.present).__name__}")

    def empty(self, spec: KroneckerSpec, where: Where) -> nn.Module:
        if where.kind == "embedding":
            return FactorizedEmbedding.of(where.present).with_empty_level(spec.b[1], spec.rank, spec.permute_in)
        return super().empty(spec, where)

    def from_fit(self, fit: Fit, where: Where, bias: Tensor | None) -> nn.Module:
        if where.kind == "embedding":
            return FactorizedEmbedding.of(where.present).add_level(fit.b[:, 0, :], fit.perm_in, fit.a)
        return super().from_fit(fit, where, bias)

    def choices(self, shape: Pair, kind: Kind) -> list[KroneckerSpec]:
        """Plain sums of every rank that saves numbers, block by block."""
        blocks = [b for b in PLANNED_BLOCKS if shape[0] % b[0] == 0 and shape[1] % b[1] == 0]
        full = [KroneckerSpec.for_weight(shape, b, 1, permute_in=False, permute_out=False) for b in blocks]
        return [
            replace(spec, rank=rank)
            for spec in full
            for rank in range(1, spec.max_rank)
            if rank * spec.held_parameters < shape[0] * shape[1]
        ]

    def losses(self, weight: Tensor, weighting: Weighting, kind: Kind) -> list[Tensor]:
        """Of the plain nearest sums, scored by the weighted error: one fit a block gives every rank."""
        shape, weight = (weight.shape[0], weight.shape[1]), weight.detach().double().cpu()
        metric, fits, found = weighting.checked(shape), dict[Pair, Fit](), []
        for spec in self.choices(shape, kind):
            if spec.b not in fits:
                fits[spec.b] = nearest_kronecker(weight, replace(spec, rank=spec.max_rank))
            fit = fits[spec.b]
            residual = weight - matrix.to_dense(fit.a[: spec.rank], fit.b[: spec.rank])
            found.append(0.5 * metric.squared_error(residual))
        return [torch.tensor(found, dtype=torch.float64)]


STRUCTURE = Kronecker()
