"""Tensor trains of the rows of an embedding, each row by itself (TensorGPT, arXiv 2307.00526).

A row seen as a tensor is split by truncated SVDs from its first dimension on (TT-SVD: Oseledets, "Tensor-train
decomposition", 2011, algorithm 1). With two cores that is the best approximation, with N within sqrt(N - 1) of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kronfold.base.tensor_train import TensorTrainSpec
from kronfold.decompose.weighting import Weighting, check_weight

CHUNK_NUMBERS = 1 << 22  # float64 numbers of rows decomposed at a time (32 MiB)


@dataclass
class TensorTrainFit:
    """Attributes:
    cores: per dimension (V, rank before, size, rank after), float64; all but the last have orthonormal columns.
    relative_error: ‖E − Ê‖ / ‖E‖, Frobenius (weighted, if a weighting was given), unitless.
    """

    spec: TensorTrainSpec
    cores: list[Tensor]
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """(V, width), float64."""
        rows = self.cores[0].flatten(1, 2)
        for core in self.cores[1:]:
            rows = (rows @ core.flatten(2)).reshape(rows.shape[0], -1, core.shape[3])
        return rows.flatten(1)


def tensor_train(weight: Tensor, spec: TensorTrainSpec, weighting: Weighting | None = None) -> TensorTrainFit:
    """TT-SVD of every row.

    Args:
        weight: (V, width), any floating dtype; worked on in float64 on the CPU.
        weighting: only for the error that is reported: rows are fitted by themselves, whatever their tokens' frequency.

    Raises:
        ShapeError, InputError: the weight does not fit the spec or is not finite; the statistics do not fit.
    """
    weight = check_weight(weight, spec)
    weighting = (weighting or Weighting()).checked(spec.shape)
    step = max(1, CHUNK_NUMBERS // spec.embedding_dim)
    parts = [_of_rows(rows.double(), spec) for rows in weight.split(step)]
    fit = TensorTrainFit(spec, [torch.cat(cores) for cores in zip(*parts, strict=True)], 0.0)
    fit.relative_error = weighting.relative_error(weight.double(), fit.to_dense())
    fit.history = [fit.relative_error]
    return fit


def _of_rows(rows: Tensor, spec: TensorTrainSpec) -> list[Tensor]:
    """Cores of rows (n, width), each (n, before, size, after)."""
    cores, rest = [], rows
    for before, size, after in spec.core_shapes[:-1]:
        left, values, right = torch.linalg.svd(rest.reshape(rows.shape[0], before * size, -1), full_matrices=False)
        cores.append(left[..., :after].reshape(-1, before, size, after))
        rest = values[:, :after, None] * right[:, :after]
    return [*cores, rest.reshape(-1, *spec.core_shapes[-1])]
