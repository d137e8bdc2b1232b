"""Fit a sum of structured matrices by backfitting: each term in turn is fitted to what the others leave.

Block coordinate descent on the (weighted) error: with terms that their solvers fit exactly the error never rises
(backfitting, Friedman and Stuetzle 1981; for low rank plus a structured rest cf. Zhou and Tao 2011, GoDec). A local
optimum, and it depends on the order of the terms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kronfold.base.errors import InputError
from kronfold.base.specs import SumSpec
from kronfold.decompose.weighting import Weighting, check_weight

SWEEPS = 10
TOLERANCE = 1e-3  # relative fall of the error in a sweep below which no other follows
FitTerm = Callable[[Tensor, Any, Weighting | None], Any]


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
