"""A token embedding whose rows are tensor trains, each token by itself (TensorGPT, arXiv 2307.00526).

A row seen as a tensor is split by truncated SVDs from its first dimension on (TT-SVD: Oseledets, "Tensor-train
decomposition", 2011, algorithm 1). With two cores that is the best approximation, with N within sqrt(N - 1) of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kronfold.base.errors import RecipeError, ShapeError
from kronfold.structures.layer import StructuredEmbedding
from kronfold.structures.registry import Kind, Structure
from kronfold.structures.spec import Pair, divisors
from kronfold.structures.weighting import Weighting, check_weight

CHUNK_NUMBERS = 1 << 22  # numbers of dense rows worked on at a time, for fitting as for logits


def balanced_factors(width: int, count: int) -> tuple[int, ...]:
    """`width` as a product of `count` factors above 1, as equal as they can be, ascending: 768 in 3 is (8, 8, 12).

    Raises ShapeError when it has fewer prime factors than that.
    """
    found = _factorisations(width, count, 2)
    if not found:
        raise ShapeError(f"Width {width} is no product of {count} factors above 1; ask for fewer cores.")
    return min(found, key=lambda factors: (sum(factors), factors))


def _factorisations(width: int, count: int, least: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(width,)] if width >= least else []
    return [
        (first, *rest)
        for first in divisors(width)
        if first >= least and first**count <= width
        for rest in _factorisations(width // first, count - 1, first)
    ]


@dataclass(frozen=True)
class TensorTrainSpec:
    """An embedding (V, embedding_dim): each row, seen as a tensor of shape `dims`, is a tensor train of its own.

    Row v at (i_1, ..., i_N) is `G_1[v, :, i_1] G_2[v, :, i_2] ... G_N[v, :, i_N]`, core k being
    (ranks[k-1], dims[k], ranks[k]) with outer ranks 1 (Oseledets 2011; TensorGPT, arXiv 2307.00526).

    Args:
        num_embeddings: V. dims: their product is the width. ranks: between neighbouring cores, one fewer than dims.

    Raises:
        ShapeError: sizes below 1, unequal numbers, a rank above what its two cores can use.
    """

    structure: ClassVar[str] = "tensor_train"
    num_embeddings: int
    dims: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(int(n) for n in self.dims))
        object.__setattr__(self, "ranks", tuple(int(n) for n in self.ranks))
        if len(self.dims) < 2 or len(self.ranks) != len(self.dims) - 1:
            raise ShapeError(
                f"Tensor train: dims {list(self.dims)} and ranks {list(self.ranks)}; give two dims or more, and one "
                "rank between each two of them."
            )
        if min(self.num_embeddings, *self.dims, *self.ranks) < 1:
            raise ShapeError(f"Tensor train: dims {list(self.dims)}, ranks {list(self.ranks)}: all must be at least 1.")
        for left, size, right in self.core_shapes:
            if right > left * size or left > size * right:
                raise ShapeError(
                    f"Tensor train: a core of {size} between ranks {left} and {right} cannot use them; neither may be "
                    f"more than {size} times the other."
                )

    @classmethod
    def for_ratio(cls, shape: Pair, ratio: float, cores: int = 2) -> TensorTrainSpec:
        """The spec of `cores` balanced dims with the highest ranks, kept equal as far as that goes, that hold at most
        `ratio` of the dense numbers. Raises ShapeError when even ranks of 1 hold more."""
        if not 0 < ratio <= 1:
            raise ShapeError(f"ratio {ratio} must lie in (0, 1]: the share of the embedding's numbers that is kept.")
        dims = balanced_factors(shape[1], cores)
        found = cls(shape[0], dims, (1,) * (cores - 1))
        budget = ratio * shape[0] * shape[1]
        if found.held_parameters > budget:
            raise ShapeError(
                f"Tensor trains over {list(dims)} hold at least {sum(dims)} numbers a token, "
                f"{sum(dims) / shape[1]:.3f} of {shape[1]}; ratio {ratio} is below that."
            )
        while (larger := found.raised(budget)) is not None:
            found = larger
        return found

    def raised(self, budget: float) -> TensorTrainSpec | None:
        """With one rank raised by 1, the lowest that can be within the budget; None when none can."""
        for bond in sorted(range(len(self.ranks)), key=lambda k: self.ranks[k]):
            ranks = tuple(rank + (k == bond) for k, rank in enumerate(self.ranks))
            try:
                larger = TensorTrainSpec(self.num_embeddings, self.dims, ranks)
            except ShapeError:
                continue
            if larger.held_parameters <= budget:
                return larger
        return None

    @property
    def core_shapes(self) -> list[tuple[int, int, int]]:
        """(rank before, size, rank after) of each core of a token."""
        bonds = (1, *self.ranks, 1)
        return [(bonds[k], size, bonds[k + 1]) for k, size in enumerate(self.dims)]

    @property
    def embedding_dim(self) -> int:
        return math.prod(self.dims)

    @property
    def shape(self) -> Pair:
        return (self.num_embeddings, self.embedding_dim)

    @property
    def held_parameters(self) -> int:
        """V times the sum of the core sizes."""
        return self.num_embeddings * sum(math.prod(core) for core in self.core_shapes)

    @property
    def index_count(self) -> int:
        return 0

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates to make one row from its cores, from the first core on."""
        done, total = self.dims[0], 0
        for before, size, after in self.core_shapes[1:]:
            total += done * before * size * after
            done *= size
        return total

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless an embedding of `shape` (V, width) is what this spec describes."""
        if tuple(shape) != self.shape:
            raise ShapeError(
                f"Tensor train describes an embedding {self.shape} (tokens, width), but the weight is {tuple(shape)}."
            )

    def to_dict(self) -> dict[str, Any]:
        return {"num_embeddings": self.num_embeddings, "dims": list(self.dims), "ranks": list(self.ranks)}

    def label(self) -> str:
        """Short text for tables, e.g. `rows 8x8x12, ranks 3, 4`."""
        return f"rows {'x'.join(map(str, self.dims))}, ranks {', '.join(map(str, self.ranks))}"


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


class TensorTrainEmbedding(StructuredEmbedding):
    """Row v is the tensor train of the cores `cores.k[v]`, read as a vector.

    Args:
        num_embeddings: V. dims: the shape a row is seen as. ranks: between the cores.

    Parameters: `cores.k` (V, rank before, dims[k], rank after).

    Raises:
        ShapeError: as `TensorTrainSpec`.

    Source: TensorGPT, arXiv 2307.00526: each token's row is decomposed by itself.
    """

    def __init__(
        self,
        num_embeddings: int,
        dims: Sequence[int],
        ranks: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = TensorTrainSpec(num_embeddings, tuple(dims), tuple(ranks))
        self.num_embeddings, self.embedding_dim = self.spec.shape
        self.cores: Sequence[nn.Parameter] = nn.ParameterList(  # type: ignore[assignment]
            nn.Parameter(torch.empty(num_embeddings, *core, device=device, dtype=dtype))
            for core in self.spec.core_shapes
        )
        # the variance of a row's entries is the product of the cores' variances and of the ranks summed over
        spread = (0.02 / math.sqrt(math.prod(ranks))) ** (1 / len(self.spec.dims))
        for core in self.cores:
            nn.init.normal_(core, std=spread)

    def _rows(self, cores: Sequence[Tensor]) -> Tensor:
        """Rows of n tokens from their cores (n, before, size, after): (n, embedding_dim)."""
        rows = cores[0].flatten(1, 2)
        for core in cores[1:]:
            rows = torch.bmm(rows, core.flatten(2)).reshape(rows.shape[0], -1, core.shape[3])
        return rows.flatten(1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) integers; returns (..., embedding_dim)."""
        own = [F.embedding(ids.flatten(), core.flatten(1)).unflatten(1, core.shape[1:]) for core in self.cores]
        return self._rows(own).reshape(*ids.shape, self.embedding_dim)

    def _chunks(self) -> Iterator[list[Tensor]]:
        """The cores of a few tokens at a time."""
        size = max(1, CHUNK_NUMBERS // self.embedding_dim)
        return (list(cores) for cores in zip(*(core.split(size) for core in self.cores), strict=True))

    def _logits(self, hidden: Tensor, *cores: Tensor) -> Tensor:
        return F.linear(hidden, self._rows(cores))

    def project(self, hidden: Tensor) -> Tensor:
        """`hidden · Eᵀ`: (..., embedding_dim) -> (..., V). Dense rows are made a chunk at a time, and made again for
        gradients, so that no dense E stands in memory."""
        if self.num_embeddings * self.embedding_dim <= CHUNK_NUMBERS:
            return self._logits(hidden, *self.cores)
        if not torch.is_grad_enabled():
            return torch.cat([self._logits(hidden, *cores) for cores in self._chunks()], dim=-1)
        made = [checkpoint(self._logits, hidden, *cores, use_reentrant=False) for cores in self._chunks()]
        return torch.cat(made, dim=-1)

    def dense_weight(self) -> Tensor:
        """E, (V, embedding_dim)."""
        return torch.cat([self._rows(cores) for cores in self._chunks()])

    def macs_per_token(self) -> float:
        """Multiply-accumulates to expand one looked-up row."""
        return float(self.spec.macs_per_token)

    def head_macs(self) -> float:
        """Multiply-accumulates of the logits of one token when many share the call; each call also makes the rows
        anew, V times `spec.macs_per_token`."""
        return float(self.num_embeddings * self.embedding_dim)

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TensorTrainEmbedding:
        """A module of the right shapes for `spec` (as `to_spec` gives it)."""
        return cls(spec["num_embeddings"], spec["dims"], spec["ranks"], device, dtype)

    @classmethod
    def from_fit(cls, fit: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
        """`fit`: a a `TensorTrainFit`."""
        new = cls(fit.spec.num_embeddings, fit.spec.dims, fit.spec.ranks, device, dtype)
        with torch.no_grad():
            for core, found in zip(new.cores, fit.cores, strict=True):
                core.copy_(found)
        return new

    def to_spec(self) -> dict[str, Any]:
        return {"structure": "tensor_train", **self.spec.to_dict()}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dims {self.spec.dims}, ranks {self.spec.ranks}"


class TensorTrain(Structure):
    name = "tensor_train"
    spec = TensorTrainSpec
    layer = TensorTrainEmbedding
    replaces = ("embedding",)
    takes = ("ratio", "cores")
    may_be_term = False

    def ask(self, shape: Pair, entry: Mapping[str, Any], kind: Kind) -> TensorTrainSpec:
        """`ratio`, and `cores` (default 2): how many dimensions a row is split into."""
        if extra := [key for key in ("block", "rank") if entry.get(key) is not None]:
            raise RecipeError(f"structure tensor_train takes ratio and cores, not {', '.join(extra)}")
        if entry.get("ratio") is None:
            raise RecipeError(
                "structure tensor_train needs ratio: R (the share of the embedding's numbers that is kept)"
            )
        return TensorTrainSpec.for_ratio(shape, entry["ratio"], entry.get("cores") or 2)

    def sizes(self, spec: TensorTrainSpec) -> list[TensorTrainSpec]:
        """From ranks of 1 up, the lowest rank raised first."""
        dense = spec.num_embeddings * spec.embedding_dim
        found = [replace(spec, ranks=(1,) * len(spec.ranks))]
        while (larger := found[-1].raised(dense - 1)) is not None:
            found.append(larger)
        return found

    def fit(
        self,
        weight: Tensor,
        spec: TensorTrainSpec,
        seed: int = 0,
        weighting: Weighting | None = None,
        init: str | None = None,
    ) -> TensorTrainFit:
        return tensor_train(weight, spec, weighting)


STRUCTURE = TensorTrain()
