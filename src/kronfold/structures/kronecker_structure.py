"""What the rest of the project asks of the Kronecker structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kronfold.base.errors import CheckpointError, RecipeError
from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.fit import Fit
from kronfold.decompose.modified_van_loan import with_equal_entries
from kronfold.decompose.nearest import nearest_kronecker
from kronfold.decompose.permute import permuted_kronecker
from kronfold.decompose.pruned_kronecker import pruned_kronecker
from kronfold.nn.kronecker_linear import KroneckerLinear
from kronfold.ops import kronecker
from kronfold.structures.levels import FactorizedEmbedding
from kronfold.structures.registry import Kind, Structure, Where
from kronfold.structures.spec import Pair
from kronfold.structures.weighting import Weighting

PLANNED_BLOCKS: tuple[Pair, ...] = ((1, 2), (2, 1), (2, 2), (2, 4), (4, 2))


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
        order = kronecker.cheapest_order(spec.a, spec.b, spec.rank, math.inf)
        return kronecker.macs(spec.a, spec.b, spec.rank, order, math.inf)

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
            residual = weight - kronecker.to_dense(fit.a[: spec.rank], fit.b[: spec.rank])
            found.append(0.5 * metric.squared_error(residual))
        return [torch.tensor(found, dtype=torch.float64)]


STRUCTURE = Kronecker()
