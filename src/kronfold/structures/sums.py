"""A weight as a sum of structured weights of different kinds or shapes, fitted by backfitting.

Each term in turn is fitted to what the others leave: block coordinate descent on the (weighted) error, which never
rises with terms that their solvers fit exactly (backfitting, Friedman and Stuetzle 1981; for low rank plus a
structured rest cf. Zhou and Tao 2011, GoDec). A local optimum, and it depends on the order of the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kronfold.base.errors import InputError, RecipeError, ShapeError, suggest
from kronfold.structures.layer import StructuredLinear
from kronfold.structures.registry import STRUCTURES, Kind, Structure
from kronfold.structures.spec import Pair
from kronfold.structures.weighting import Weighting, check_weight

SWEEPS = 10
TOLERANCE = 1e-3  # relative fall of the error in a sweep below which no other follows
FitTerm = Callable[[Tensor, Any, Weighting | None], Any]


@dataclass(frozen=True)
class SumSpec:
    """`W ≈ W_1 + W_2 + ...`, each term a structured matrix of its own kind and shape.

    Args:
        terms: typed specs of linear structures (no sums), two or more, all of one weight's shape.

    Raises:
        ShapeError: fewer than two terms, a sum among them, or terms of different shapes.
    """

    structure: ClassVar[str] = "sum"
    terms: Sequence[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        if len(self.terms) < 2 or any(isinstance(term, SumSpec) for term in self.terms):
            raise ShapeError(
                f"A sum has two or more terms, none of them a sum; got {[term.structure for term in self.terms]}. "
                "Ask for a single structure directly."
            )
        shapes = [term.shape for term in self.terms]
        if len(set(shapes)) > 1:
            raise ShapeError(f"The terms of a sum must describe one shape (out_features, in_features); got {shapes}.")

    @property
    def shape(self) -> Pair:
        return self.terms[0].shape

    @property
    def held_parameters(self) -> int:
        return sum(term.held_parameters for term in self.terms)

    @property
    def index_count(self) -> int:
        """Stored integers of all terms (int32 each)."""
        return sum(term.index_count for term in self.terms)

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless a weight of `shape` (out, in) is what every term describes."""
        for term in self.terms:
            term.check_weight(shape)

    def to_dict(self) -> dict[str, Any]:
        return {"terms": [{"structure": term.structure, **term.to_dict()} for term in self.terms]}

    def label(self) -> str:
        """Short text for tables, e.g. `rank 120 of 576 + 1 x (288, 288)⊗(2, 2)`."""
        return " + ".join(term.label() for term in self.terms)


@dataclass
class SumFit:
    """`weight ≈ Σ terms`.

    Attributes:
        spec: the specs of the terms. terms: what the solvers returned, one for each (`to_dense`).
        relative_error: as `Weighting.relative_error`, unitless; the plain Frobenius one without a weighting.
        history: relative errors once every term was fitted, then after each sweep; never rising, the last is
            `relative_error`.
    """

    spec: SumSpec
    terms: list[Any]
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """(out_features, in_features), float64."""
        return torch.stack([term.to_dense() for term in self.terms]).sum(0)


def sum_fit(
    weight: Tensor,
    spec: SumSpec,
    fits: Sequence[FitTerm],
    weighting: Weighting | None = None,
    sweeps: int = SWEEPS,
) -> SumFit:
    """Terms in the order given, then sweeps over all of them until the error falls by less than 0.1 %.

    A term is replaced only where that lowers the weighted error, so solvers that only search do no harm.

    Args:
        weight: (out_features, in_features), any floating dtype; worked on in float64 on the CPU.
        fits: for each term its solver: (weight, term's spec, weighting or None) -> fit.
        weighting: H and G, handed to the solvers; None is the plain Frobenius norm.
        sweeps: the most sweeps after the first fits.

    Raises:
        ShapeError, InputError: the weight or the statistics do not fit the spec, or are not finite; the first terms
            give the weight exactly and leave nothing to the next.
    """
    weight = check_weight(weight, spec).double()
    metric = (weighting or Weighting()).checked(spec.shape)
    given = None if weighting is None else metric
    terms, residual = _first_fits(weight, spec, fits, given)
    total = metric.squared_error(weight)
    error = metric.squared_error(residual)
    history = [(error / total) ** 0.5]
    for _ in range(sweeps):
        before = error
        for i, (term_spec, fit_term) in enumerate(zip(spec.terms, fits, strict=True)):
            target = residual + terms[i].to_dense()
            if not target.any():
                continue
            found = fit_term(target, term_spec, given)
            left = target - found.to_dense()
            found_error = metric.squared_error(left)
            if found_error < error:
                terms[i], residual, error = found, left, found_error
        history.append((error / total) ** 0.5)
        if before**0.5 - error**0.5 <= TOLERANCE * before**0.5:
            break
    return SumFit(spec, terms, history[-1], history)


def _first_fits(
    weight: Tensor, spec: SumSpec, fits: Sequence[FitTerm], weighting: Weighting | None
) -> tuple[list[Any], Tensor]:
    """Each term fitted to what the ones before it leave, and what all of them leave."""
    residual, terms = weight, []
    for i, (term_spec, fit_term) in enumerate(zip(spec.terms, fits, strict=True)):
        if not residual.any():
            raise InputError(
                f"The first {i} terms of the sum give the weight {tuple(weight.shape)} exactly; nothing is left for "
                f"term {i} ({term_spec.label()}). Leave it out, or make the others smaller."
            )
        terms.append(fit_term(residual, term_spec, weighting))
        residual = residual - terms[-1].to_dense()
    return terms, residual


def term_structure(name: str) -> Structure:
    """The structure of that name whose layers may be terms. Raises ShapeError with the names there are."""
    if name not in STRUCTURES or not STRUCTURES.get(name).may_be_term or STRUCTURES.get(name).spec is None:
        allowed = [n for n in STRUCTURES if STRUCTURES.get(n).may_be_term and STRUCTURES.get(n).spec is not None]
        raise ShapeError(f"structure {name!r} cannot be a term of a sum. {suggest(name, allowed)}")
    return STRUCTURES.get(name)


class SumLinear(StructuredLinear):
    """`y = W_1 x + W_2 x + ... + bias`; every term sees the same input.

    Args:
        terms: structured layers without bias, of equal sizes. bias: hold a bias.

    Parameters: those of the terms (`terms.0.pivots.weight`, `terms.1.b`, ...), `bias` (out,) or None.

    Raises:
        ShapeError: fewer than two terms, terms of different sizes, or a term with a bias of its own.
    """

    structure = "sum"

    def __init__(
        self,
        terms: Iterable[StructuredLinear],
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        parts = list(terms)
        if any(term.bias is not None for term in parts):
            raise ShapeError("A term of a sum holds no bias of its own; give the bias to the sum.")
        self.spec = SumSpec([term.spec for term in parts])
        self.out_features, self.in_features = self.spec.shape
        self.terms: Iterable[StructuredLinear] = nn.ModuleList(parts)  # type: ignore[assignment]
        self.add_bias(bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., out_features)."""
        y = sum(term(x) for term in self.terms)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> Tensor:
        return torch.stack([term.dense_weight() for term in self.terms]).sum(0)

    def macs_per_token(self) -> float:
        return sum(term.macs_per_token() for term in self.terms)

    def to_spec(self) -> dict[str, Any]:
        """From the terms, of which a neighbour may have taken a gather over."""
        return {"structure": self.structure, "terms": [term.to_spec() for term in self.terms]}

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SumLinear:
        terms = [
            term_structure(term["structure"]).layer.from_spec(term, False, device, dtype) for term in spec["terms"]
        ]
        return cls(terms, bias, device, dtype)

    @classmethod
    def from_fit(
        cls,
        fit: Any,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SumLinear:
        """`fit`: a a `SumFit`."""
        pairs = zip(fit.spec.terms, fit.terms, strict=True)
        terms = [term_structure(spec.structure).layer.from_fit(term, None, dtype, device) for spec, term in pairs]
        layer = cls(terms, bias is not None, device, dtype)
        layer.set_bias(bias)
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


class Sum(Structure):
    name = "sum"
    layer = SumLinear
    spec = SumSpec
    takes = ("terms",)
    may_be_term = False

    def ask(self, shape: Pair, entry: Mapping[str, Any], kind: Kind) -> SumSpec:
        """`terms`: a list of what recipe entries say of single structures."""
        if not entry.get("terms"):
            raise RecipeError("structure sum needs terms: a list such as [{structure: low_rank, ratio: 0.3}, ...]")
        if extra := [key for key in ("block", "rank", "ratio") if entry.get(key) is not None]:
            raise RecipeError(f"structure sum takes only terms; say {', '.join(extra)} inside them")
        pairs = [(term_structure(term["structure"]), term) for term in entry["terms"]]
        return SumSpec([structure.held(structure.ask(shape, term, kind)) for structure, term in pairs])

    def read_spec(self, content: Mapping[str, Any]) -> SumSpec:
        return SumSpec([term_structure(term["structure"]).read_spec(term) for term in content["terms"]])

    def macs(self, spec: SumSpec) -> float:
        return sum(term_structure(term.structure).macs(term) for term in spec.terms)

    def fit(
        self, weight: Tensor, spec: SumSpec, seed: int = 0, weighting: Weighting | None = None, init: str | None = None
    ) -> SumFit:
        """Backfitting through the solvers of the terms."""

        def solver(structure: Structure) -> FitTerm:
            return lambda target, term, metric: structure.fit(target, term, seed, metric)

        return sum_fit(weight, spec, [solver(term_structure(term.structure)) for term in spec.terms], weighting)


STRUCTURE = Sum()
