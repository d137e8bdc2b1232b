"""What every structured linear layer can do; the rest of the project relies on nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class StructuredLinear(nn.Module, ABC):
    """A linear map (in_features -> out_features) held in fewer numbers than its dense weight.

    A class adds its parameters, `forward`, and the verbs below; `from_fit` takes what its solver returns.

    Attributes:
        structure: the name in specs and recipes. spec: the typed spec of this layer.
    """

    structure: ClassVar[str]
    spec: Any
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def add_bias(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        """Hold a zero bias of out_features numbers, or none."""
        value = nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", value)

    def set_bias(self, bias: Tensor | None) -> None:
        """Copy the numbers of `bias` (out_features,) where the layer holds one."""
        if self.bias is not None and bias is not None:
            with torch.no_grad():
                self.bias.copy_(bias)

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The weight this layer stands for: (out_features, in_features), in the source's order of features."""

    @abstractmethod
    def macs_per_token(self) -> float:
        """Multiply-accumulates per token when many tokens share the call."""

    @abstractmethod
    def to_spec(self) -> dict[str, Any]:
        """The layer's spec as checkpoints carry it, `structure` included."""

    @classmethod
    @abstractmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StructuredLinear:
        """A layer of the right shapes for `spec` (as `to_spec` gives it), its numbers still to be read."""

    @classmethod
    @abstractmethod
    def from_fit(
        cls,
        fit: Any,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StructuredLinear:
        """The layer that holds what a solver found."""
