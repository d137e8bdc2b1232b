"""The structures there are: name -> spec, module, solver. A new structure is one nn file, one decompose file, one line.

`dense`, `fused`, `factorized_embedding` and `tied_head` are containers that specs of a whole model
may name; only entries with a `fit` can be asked for in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from kronfold.base.errors import RecipeError, suggest
from kronfold.base.registry import Registry
from kronfold.base.specs import GroupedEmbeddingSpec, LowRankSpec, Pair, SumSpec
from kronfold.base.tensor_train import TensorTrainSpec
from kronfold.decompose.grouped_embedding import grouped_embedding
from kronfold.decompose.low_rank import nearest_low_rank
from kronfold.decompose.sum_fit import FitTerm, SumFit, sum_fit
from kronfold.decompose.tensor_train import tensor_train
from kronfold.decompose.weighting import Weighting
from kronfold.nn import GroupedEmbedding, LowRankLinear, SumLinear, TensorTrainEmbedding
from kronfold.nn.structured import StructuredLinear
from kronfold.structures import kronecker


@dataclass(frozen=True)
class Structure:
    """Attributes:
    spec: class of its spec, or a function that makes one from the entries of its dict form. module: class of its layer.
    fit: (weight (out, in), spec, seed, weighting or None) -> the solver's result (`relative_error`, `to_dense`).
    ask: (shape of the weight, what a recipe entry says) -> spec. Raises RecipeError or ShapeError.
    embedding: class of its module, where it replaces an embedding and not a linear layer.
    inits: what a recipe entry may name as `init` in place of `fit` -> a solver like `fit`.
    sizes: (spec) -> the same structure and shape at every size it comes in, ascending by numbers held, below dense;
        None for one that comes in one size only.
    """

    spec: Any = None
    module: type[StructuredLinear] | None = None
    fit: Callable[[Tensor, Any, int, Weighting | None], Any] | None = None
    ask: Callable[[Pair, Mapping[str, Any]], Any] | None = None
    embedding: type[GroupedEmbedding] | type[TensorTrainEmbedding] | None = None
    inits: Mapping[str, Callable[[Tensor, Any, int, Weighting | None], Any]] = field(default_factory=dict)
    sizes: Callable[[Any], list[Any]] | None = None

    def read_spec(self, spec: Mapping[str, Any]) -> Any:
        """The typed spec from its dict form (keys `structure`, ...)."""
        assert self.spec is not None
        return self.spec(**{key: value for key, value in spec.items() if key != "structure"})


def low_rank_sizes(spec: LowRankSpec) -> list[LowRankSpec]:
    """All ranks below the full one."""
    return [replace(spec, rank=rank) for rank in range(1, max(2, min(spec.shape)))]


def grouped_sizes(spec: GroupedEmbeddingSpec) -> list[GroupedEmbeddingSpec]:
    """Every group at the same share of its rank, in steps of one rank of the largest."""
    largest = max(spec.ranks)
    shares = [rank / largest for rank in range(1, spec.embedding_dim)]
    found = [
        tuple(
            max(1, min(round(rank * share), spec.embedding_dim, size))
            for rank, size in zip(spec.ranks, spec.sizes, strict=True)
        )
        for share in shares
    ]
    return [replace(spec, ranks=ranks) for ranks in dict.fromkeys(found)]


def ask_low_rank(shape: Pair, entry: Mapping[str, Any]) -> LowRankSpec:
    """`rank`, or `ratio`: the share of the weight's numbers that is kept."""
    if entry.get("block") is not None:
        raise RecipeError("structure low_rank takes rank or ratio, not block")
    if (entry.get("rank") is None) == (entry.get("ratio") is None):
        raise RecipeError("structure low_rank needs either rank: N or ratio: R (the share of numbers kept)")
    if entry.get("rank") is not None:
        return LowRankSpec(shape[0], shape[1], entry["rank"])
    return LowRankSpec.for_ratio(shape, entry["ratio"])


def ask_grouped(shape: Pair, entry: Mapping[str, Any]) -> GroupedEmbeddingSpec:
    """One group (a plain low-rank embedding) of `rank` or `ratio`; groups by frequency come from the planner."""
    found = ask_low_rank(shape, entry)
    return GroupedEmbeddingSpec((shape[0],), (found.rank,), shape[1])


def tensor_train_sizes(spec: TensorTrainSpec) -> list[TensorTrainSpec]:
    """From ranks of 1 up, the lowest rank raised first."""
    dense = spec.num_embeddings * spec.embedding_dim
    found = [replace(spec, ranks=(1,) * len(spec.ranks))]
    while (larger := found[-1].raised(dense - 1)) is not None:
        found.append(larger)
    return found


def ask_tensor_train(shape: Pair, entry: Mapping[str, Any]) -> TensorTrainSpec:
    """`ratio`, and `cores` (default 2): how many dimensions a row is split into."""
    if extra := [key for key in ("block", "rank") if entry.get(key) is not None]:
        raise RecipeError(f"structure tensor_train takes ratio and cores, not {', '.join(extra)}")
    if entry.get("ratio") is None:
        raise RecipeError("structure tensor_train needs ratio: R (the share of the embedding's numbers that is kept)")
    return TensorTrainSpec.for_ratio(shape, entry["ratio"], entry.get("cores") or 2)


def fit_sum(weight: Tensor, spec: SumSpec, seed: int, weighting: Weighting | None) -> SumFit:
    """Backfitting through the solvers of the terms."""

    def solver(structure: str) -> FitTerm:
        fit = STRUCTURES.get(structure).fit
        assert fit is not None
        return lambda target, term, metric: fit(target, term, seed, metric)

    return sum_fit(weight, spec, [solver(term.structure) for term in spec.terms], weighting)


def ask_sum(shape: Pair, entry: Mapping[str, Any]) -> SumSpec:
    """`terms`: a list of what recipe entries say of single structures."""
    if not entry.get("terms"):
        raise RecipeError("structure sum needs terms: a list such as [{structure: low_rank, ratio: 0.3}, ...]")
    if extra := [key for key in ("block", "rank", "ratio") if entry.get(key) is not None]:
        raise RecipeError(f"structure sum takes only terms; say {', '.join(extra)} inside them")
    return SumSpec([_plain(_asked(shape, term)) for term in entry["terms"]])


def _asked(shape: Pair, entry: Mapping[str, Any]) -> Any:
    ask = _term(entry).ask
    assert ask is not None
    return ask(shape, entry)


def _term(entry: Mapping[str, Any]) -> Structure:
    name = entry["structure"]
    structure = STRUCTURES.get(name)
    if structure.module is None or structure.ask is None or name == "sum":
        allowed = [n for n in STRUCTURES if STRUCTURES.get(n).module and n != "sum"]
        raise RecipeError(f"structure {name!r} cannot be a term of a sum. {suggest(name, allowed)}")
    return structure


def _plain(spec: Any) -> Any:
    """A Kronecker spec without the permutations that can change nothing: what its layer will hold."""
    if not isinstance(spec, kronecker.KroneckerSpec):
        return spec
    return replace(spec, permute_in=spec.searches_in, permute_out=spec.searches_out)


def read_sum(terms: Sequence[Mapping[str, Any]]) -> SumSpec:
    """The typed spec of a sum from the dict forms of its terms."""
    return SumSpec([_term(term).read_spec(term) for term in terms])


STRUCTURES: Registry[Structure] = Registry("structure")
STRUCTURES.register(
    "kronecker",
    Structure(
        kronecker.KroneckerSpec,
        kronecker.KroneckerLinear,
        kronecker.fit,
        kronecker.ask,
        inits=kronecker.INITS,
        sizes=kronecker.sizes,
    ),
)
STRUCTURES.register(
    "low_rank",
    Structure(
        LowRankSpec,
        LowRankLinear,
        lambda w, s, _seed, h: nearest_low_rank(w, s, h),
        ask_low_rank,
        sizes=low_rank_sizes,
    ),
)
STRUCTURES.register(
    "grouped_embedding",
    Structure(
        GroupedEmbeddingSpec,
        None,
        lambda w, s, _seed, h: grouped_embedding(w, s, h),
        ask_grouped,
        embedding=GroupedEmbedding,
        sizes=grouped_sizes,
    ),
)
STRUCTURES.register(
    "tensor_train",
    Structure(
        TensorTrainSpec,
        None,
        lambda w, s, _seed, h: tensor_train(w, s, h),
        ask_tensor_train,
        embedding=TensorTrainEmbedding,
        sizes=tensor_train_sizes,
    ),
)
STRUCTURES.register("sum", Structure(read_sum, SumLinear, fit_sum, ask_sum))
for container in ("dense", "fused", "factorized_embedding", "tied_head"):
    STRUCTURES.register(container, Structure())
