"""Fit an embedding whose tokens are grouped by how often they are used.

The error of row v counts in proportion to the frequency f_v of its token, both where the row is looked up and where it
makes a logit; along the columns it counts by a metric M. Within a group of rank r the optimum is the truncated SVD of
`diag(f)^{1/2} E R`, with M = R Rᵀ (block-wise weighted low rank: GroupReduce, Chen et al. 2018, arXiv 1806.06950,
section 3.2, with a column metric added).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kronfold.base.errors import InputError, ShapeError
from kronfold.base.specs import GroupedEmbeddingSpec
from kronfold.decompose.low_rank import pivoted
from kronfold.decompose.weighting import Weighting, check_weight, root

Group = tuple[Tensor, Tensor, Tensor]


@dataclass
class GroupedEmbeddingFit:
    """Attributes:
    position: (V,) int64, the place of each token in the groups' order.
    groups: per group rows (size, rank), mix (rank, width - rank), gather (width,), as `EmbeddingGroup` holds them.
    relative_error: `sqrt(Σ_v f_v ΔᵀMΔ / Σ_v f_v eᵀMe)`, unitless.
    """

    spec: GroupedEmbeddingSpec
    position: Tensor
    groups: list[Group]
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """(V, width), float64."""
        blocks = [torch.cat([rows, rows @ mix], dim=1)[:, gather] for rows, mix, gather in self.groups]
        return torch.cat(blocks)[self.position]


def grouped_embedding(
    weight: Tensor, spec: GroupedEmbeddingSpec, weighting: Weighting | None = None
) -> GroupedEmbeddingFit:
    """The optimum for each group; groups are runs of tokens in falling order of frequency.

    Args:
        weight: (V, width), any floating dtype; worked on in float64 on the CPU.
        weighting: `outputs` (V,) the token frequencies f (any scale), `inputs` (width, width) the metric M;
            None stands for equal frequencies (then tokens keep their order) or the identity.

    Raises:
        ShapeError, InputError: the weight or the statistics do not fit the spec, or are not finite.
    """
    weight = check_weight(weight, spec).double()
    frequencies, metric = _checked(weighting or Weighting(), spec.shape)
    right_root, right_inverse = root(metric)
    groups, lost, total = [], 0.0, 0.0
    order = by_frequency(frequencies)
    for tokens, rank in zip(order.split(list(spec.sizes)), spec.ranks, strict=True):
        whitened = frequencies[tokens].sqrt()[:, None] * weight[tokens] @ right_root
        total += float(whitened.square().sum())
        if rank == spec.embedding_dim:  # dense, and exact
            groups.append((weight[tokens], weight.new_zeros(rank, 0), torch.arange(rank)))
            continue
        basis = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:]
        groups.append(_factors(weight[tokens], basis, right_root, right_inverse))
        lost += float((whitened - whitened @ basis @ basis.T).square().sum())
    error = (lost / total) ** 0.5
    return GroupedEmbeddingFit(spec, torch.argsort(order), groups, error, [error])


def _factors(rows: Tensor, basis: Tensor, right_root: Tensor, right_inverse: Tensor) -> Group:
    """Rows (size, width) of one group in the subspace `basis` (width, rank) of the whitened columns, by some of their
    own columns."""
    left, right = rows @ right_root @ basis, basis.T @ right_inverse
    # E_gᵀ = rightᵀ leftᵀ by rows of its own, which are columns of E_g.
    columns, mix, gather = pivoted(right.T.contiguous(), left.T)
    return columns.T, mix.T, gather


def group_energies(weight: Tensor, sizes: Sequence[int], weighting: Weighting) -> list[Tensor]:
    """For each group the weighted squared error at every rank 0 .. width: (width + 1,) float64, falling to 0."""
    weight = weight.detach().double()
    frequencies, metric = _checked(weighting, (weight.shape[0], weight.shape[1]))
    right_root = root(metric)[0]
    curves = []
    for tokens in by_frequency(frequencies).split(list(sizes)):
        whitened = frequencies[tokens].sqrt()[:, None] * weight[tokens] @ right_root
        energies = torch.linalg.eigvalsh(whitened.T @ whitened).clamp_min(0)
        curves.append(torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)]))
    return curves


def by_frequency(frequencies: Tensor) -> Tensor:
    """Token ids from the most to the least frequent; equal ones keep their order."""
    return torch.argsort(frequencies, descending=True, stable=True)


def _checked(weighting: Weighting, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    frequencies = weighting.outputs
    if frequencies is None:
        frequencies = torch.ones(shape[0], dtype=torch.float64)
    if tuple(frequencies.shape) != (shape[0],):
        raise ShapeError(
            f"Token frequencies {tuple(frequencies.shape)} do not fit an embedding of {shape[0]} tokens. "
            "Were the statistics taken with another tokenizer or model?"
        )
    frequencies = frequencies.detach().to("cpu", torch.float64)
    if not torch.isfinite(frequencies).all() or bool((frequencies < 0).any()) or not frequencies.any():
        raise InputError(
            f"The token frequencies of {shape[0]} tokens hold NaN, infinite or negative numbers, or are all zero. "
            "Count the tokens of the calibration text again; a token that never occurs has frequency 0."
        )
    # A token that was never seen still counts a little, or its row would be free to become anything.
    frequencies = frequencies.clamp_min(1e-6 * float(frequencies.mean()))
    metric = replace(weighting, outputs=None).checked(shape).inputs
    return frequencies, torch.eye(shape[1], dtype=torch.float64) if metric is None else metric
