"""A linear layer whose weight is a sum of structured weights of different kinds or shapes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kronfold.base.errors import ShapeError, suggest
from kronfold.base.specs import SumSpec
from kronfold.nn.structured import StructuredLinear


def term_class(structure: str) -> type[StructuredLinear]:
    """The structured layer of that name which may be a term. Raises ShapeError with the names there are."""
    classes = {cls.structure: cls for cls in StructuredLinear.__subclasses__() if cls is not SumLinear}
    if structure not in classes:
        raise ShapeError(f"Structure {structure!r} cannot be a term of a sum. {suggest(structure, classes)}")
    return classes[structure]


class SumLinear(StructuredLinear):
    """`y = W_1 x + W_2 x + ... + bias`; every term sees the same input.

    Args:
        terms: structured layers without bias, of equal sizes. bias: hold a bias.

    Parameters: those of the terms (`terms.0.pivots`, `terms.1.a`, ...), `bias` (out,) or None.

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
        return {"structure": self.structure, "terms": [term.to_spec() for term in self.terms]}

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> SumLinear:
        terms = [term_class(term["structure"]).from_spec(term, False, device, dtype) for term in spec["terms"]]
        return cls(terms, bias, device, dtype)

    @classmethod
    def from_fit(
        cls,
        fit: Any,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SumLinear:
        """`fit`: a `kronfold.decompose.sum_fit.SumFit`."""
        pairs = zip(fit.spec.terms, fit.terms, strict=True)
        terms = [term_class(spec.structure).from_fit(term, None, dtype, device) for spec, term in pairs]
        layer = cls(terms, bias is not None, device, dtype)
        layer.set_bias(bias)
        return layer

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"
