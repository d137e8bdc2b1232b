"""For every site a curve: what it would hold as this or that structure, against how much the loss would rise.

The predicted rise is the second-order one, ½ tr(G D H Dᵀ) in nats per token with D = W − Ŵ, H the second moment of the
inputs and G that of the loss gradient at the outputs (see `decompose.weighting`). It is exact in the limit of small
errors and adds up over sites as long as their errors do not interact; what it is good for is comparing sites.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError, RecipeError, suggest
from kronfold.base.files import explain_write_errors, write_json
from kronfold.base.specs import GroupedEmbeddingSpec, LowRankSpec, Pair
from kronfold.decompose.grouped_embedding import group_energies
from kronfold.decompose.low_rank import tail_energies
from kronfold.decompose.weighting import Weighting
from kronfold.models.calibrate import fingerprint
from kronfold.models.finite import check_finite
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.statistics import Statistics
from kronfold.planner.allocate import Options
from kronfold.structures.kronecker import KroneckerSpec, matrix, nearest_kronecker

Unit = Literal["params", "macs", "bytes"]
STRUCTURE_CHOICES = ("low_rank", "kronecker")
KRONECKER_BLOCKS: tuple[Pair, ...] = ((1, 2), (2, 1), (2, 2), (2, 4), (4, 2))
GROUP_SHARES = (1 / 48, 1 / 24, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)  # cumulated shares of the vocabulary
FP16_BYTES, INDEX_BYTES = 2, 4


@dataclass
class SiteCurve:
    """One site, or one token group of an embedding.

    Attributes:
        site: its name. group: (first token place, number of tokens) for a group of an embedding, else None.
        shape: (out, in) of the site; of the group for a group. tied: an embedding whose head reads it.
        energies: (min(shape) + 1,) predicted loss increase of low rank at every rank, nats; None without low rank.
        kronecker: [(b, rank, predicted loss increase)] of the Kronecker shapes.
    """

    site: str
    shape: Pair
    group: tuple[int, int] | None = None
    tied: bool = False
    energies: Tensor | None = None
    kronecker: tuple[tuple[Pair, int, float], ...] = ()

    @property
    def key(self) -> str:
        return self.site if self.group is None else f"{self.site}[{self.group[0]}:{sum(self.group)}]"

    def options(self, unit: Unit) -> tuple[Options, list[Any]]:
        """What the site may become: costs and losses, and beside them the specs (None: it stays dense).

        For a group of an embedding the spec is its rank.
        """
        specs: list[Any] = [None if self.group is None else self.shape[1]]
        costs, losses = [self.dense_cost(unit)], [0.0]
        if self.energies is not None:
            top = min(self.shape)  # at the full rank nothing is saved, so that is the dense option
            ranks = np.arange(1, top)
            specs += [int(r) if self.group else LowRankSpec(*self.shape, int(r)) for r in ranks]
            costs += [self._low_rank_cost(int(r), unit) for r in ranks]
            losses += self.energies[1:top].tolist()
        for b, rank, loss in self.kronecker:
            spec = KroneckerSpec.for_weight(self.shape, b, rank, permute_in=False, permute_out=False)
            specs.append(spec)
            costs.append(_kronecker_cost(spec, unit))
            losses.append(loss)
        return Options(np.array(costs, dtype=np.float64), np.array(losses, dtype=np.float64)), specs

    def dense_cost(self, unit: Unit) -> float:
        """Cost of the site as it is. Looking a row up costs no multiplication; making a logit does."""
        numbers = float(self.shape[0] * self.shape[1])
        if unit == "bytes":
            return FP16_BYTES * numbers
        return numbers * self.tied if unit == "macs" and self.group else numbers

    def place_cost(self, unit: Unit) -> float:
        """What a group adds to the cost of an embedding once that is held in groups, whatever its rank: the places of
        its tokens."""
        return float(INDEX_BYTES * self.shape[0]) if self.group and unit == "bytes" else 0.0

    def _low_rank_cost(self, rank: int, unit: Unit) -> float:
        size, width = self.shape
        held = float(rank * (size + width - rank))
        if unit == "bytes":
            return FP16_BYTES * held + INDEX_BYTES * (width if self.group else size)
        if unit == "macs" and self.group:
            return rank * (width - rank) * (1.0 + self.tied) + size * rank * self.tied
        return held


def _kronecker_cost(spec: KroneckerSpec, unit: Unit) -> float:
    if unit == "macs":
        order = matrix.cheapest_order(spec.a, spec.b, spec.rank, float("inf"))
        return matrix.macs(spec.a, spec.b, spec.rank, order, float("inf"))
    return float(spec.held_parameters * (FP16_BYTES if unit == "bytes" else 1))


def sensitivity(
    model: PreTrainedModel,
    statistics: Statistics,
    structures: Sequence[str] = ("low_rank",),
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[SiteCurve]:
    """Curves of all dense sites of `model`, in model order; an embedding gives one per group of tokens.

    Args:
        statistics: of this very model, with gradients.
        structures: which of `STRUCTURE_CHOICES` sites may become.

    Raises:
        RecipeError: an unknown structure, or statistics without gradients. DataError: statistics of another model.
    """
    unknown = [name for name in structures if name not in STRUCTURE_CHOICES]
    if unknown or not structures:
        raise RecipeError(
            f"The planner cannot choose {unknown or 'among no structures'}. "
            f"{suggest(str(unknown[0]) if unknown else '', STRUCTURE_CHOICES)}"
        )
    if not statistics.gradient_tokens:
        raise RecipeError(
            "These statistics hold no gradients, so errors of different sites cannot be compared. Calibrate with "
            "gradient_windows above 0."
        )
    statistics.check_model(fingerprint(model))
    views = [view for view in sites(model).values() if view.is_dense]
    curves: list[SiteCurve] = []
    for i, view in enumerate(views):
        if progress:
            progress(f"sensitivity {view.name}", i, len(views))
        if view.kind == "embedding":
            curves += _embedding_curves(view, statistics)
        else:
            curves.append(_linear_curve(view, statistics.weighting(view), structures))
    if progress:
        progress("sensitivity", len(views), len(views))
    return curves


def _linear_curve(view: LinearView, weighting: Weighting, structures: Sequence[str]) -> SiteCurve:
    weighting = weighting.checked(view.shape)
    weight = view.weight().double().cpu()
    curve = SiteCurve(view.name, view.shape)
    if "low_rank" in structures:
        curve.energies = 0.5 * tail_energies(weight, weighting)
    if "kronecker" in structures:
        curve.kronecker = tuple(_kronecker_points(weight, weighting))
    return curve


def _kronecker_points(weight: Tensor, weighting: Weighting) -> list[tuple[Pair, int, float]]:
    """Plain nearest sums of every rank that saves numbers, scored by the weighted error."""
    points = []
    shape = (weight.shape[0], weight.shape[1])
    for b in KRONECKER_BLOCKS:
        if shape[0] % b[0] or shape[1] % b[1]:
            continue
        full = KroneckerSpec.for_weight(shape, b, 1)
        fit = nearest_kronecker(weight, KroneckerSpec.for_weight(shape, b, full.max_rank))
        for rank in range(1, full.max_rank):
            residual = weight - matrix.to_dense(fit.a[:rank], fit.b[:rank])
            if rank * full.held_parameters < weight.numel():
                points.append((b, rank, 0.5 * weighting.squared_error(residual)))
    return points


def _embedding_curves(view: LinearView, statistics: Statistics) -> list[SiteCurve]:
    sizes = group_sizes(*view.shape)
    curves, start = [], 0
    for size, energies in zip(sizes, group_energies(view.weight(), sizes, statistics.weighting(view)), strict=True):
        shape = (size, view.shape[1])
        curves.append(SiteCurve(view.name, shape, (start, size), statistics.tied, 0.5 * energies))
        start += size
    return curves


def group_sizes(vocabulary: int, width: int = 1) -> list[int]:
    """Tokens per group, most frequent first; groups of frequent tokens are smaller, for they matter one by one.

    None is smaller than `width` (unless the vocabulary is): such a group could not keep its full rank.
    """
    edges = [0]
    for share in GROUP_SHARES:
        edge = round(share * vocabulary)
        if edge - edges[-1] >= width and (vocabulary - edge >= width or edge == vocabulary):
            edges.append(edge)
    edges = edges if edges[-1] == vocabulary else [*edges, vocabulary]
    return [stop - start for start, stop in pairwise(edges)]


def save_curves(curves: Sequence[SiteCurve], path: str | Path) -> None:
    """Write curves as `PATH.json` and `PATH.safetensors`. Raises OutputError, NotFiniteError."""
    energies = {str(i): curve.energies.contiguous() for i, curve in enumerate(curves) if curve.energies is not None}
    check_finite(energies.items(), what="The sensitivity curves")
    with explain_write_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(energies, f"{path}.safetensors")
    rows = [
        {"site": c.site, "shape": c.shape, "group": c.group, "tied": c.tied, "kronecker": c.kronecker} for c in curves
    ]
    write_json(f"{path}.json", {"schema": "kronfold/curves", "curves": rows})


def load_curves(path: str | Path) -> list[SiteCurve]:
    """Curves that `save_curves` wrote. Raises CheckpointError when they cannot be read."""
    try:
        rows = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))["curves"]
        energies = load_file(f"{path}.safetensors")
        return [
            SiteCurve(
                row["site"],
                tuple(row["shape"]),
                tuple(row["group"]) if row["group"] else None,
                row["tied"],
                energies.get(str(i)),
                tuple((tuple(b), rank, loss) for b, rank, loss in row["kronecker"]),
            )
            for i, row in enumerate(rows)
        ]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no sensitivity curves ({error}). Delete it and plan again.") from error


def embedding_spec(curves: Sequence[SiteCurve], ranks: Sequence[int]) -> GroupedEmbeddingSpec | None:
    """The spec of an embedding from the ranks of its groups; neighbours of equal rank become one group.

    None when every group keeps its full rank.
    """
    width = curves[0].shape[1]
    if all(rank == width for rank in ranks):
        return None
    sizes: list[int] = []
    merged: list[int] = []
    for curve, rank in zip(curves, ranks, strict=True):
        if merged and merged[-1] == rank == width:
            sizes[-1] += curve.shape[0]
        else:
            sizes.append(curve.shape[0])
            merged.append(rank)
    return GroupedEmbeddingSpec(tuple(sizes), tuple(merged), width)
