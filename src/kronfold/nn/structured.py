"""What every structured linear layer can do; the rest of the project relies on nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from typing_extensions import Self

TOKEN_COUNTS = tuple(4**power for power in range(9))  # calls of 1 to 65,536 tokens, where a layer asks what it would do


class StructuredLinear(nn.Module, ABC):
    """A linear map (in_features -> out_features) held in fewer numbers than its dense weight.

    A class adds its parameters, `forward`, and the verbs below; `from_fit` takes what its solver returns.

    Attributes:
        structure: the name in specs and recipes. spec: the typed spec of this layer.

    A layer may keep a weight it built between calls (`keep`), in eval mode without gradients. What is kept is no part
    of the state dict, and is built anew when a parameter or buffer was changed in place or replaced. Changes through
    `.data` go unnoticed, as they do everywhere in PyTorch.
    """

    structure: ClassVar[str]
    spec: Any
    in_features: int
    out_features: int
    bias: nn.Parameter | None
    _keeps = False
    _kept: tuple[list[tuple[Tensor, int, int]], Tensor] | None = None

    def kept_shape(self) -> tuple[int, int] | None:
        """Shape of the weight that `keep` would hold; None where no number of tokens would be faster with it."""
        return None

    def keep(self, on: bool = True) -> None:
        """Keep a weight built for a call for the next one, or no more. It is built when a call first wants it."""
        self._keeps, self._kept = on, None

    def may_keep(self) -> bool:
        """Whether this call may use and leave a kept weight. Compiled code may not: it cannot see that one is stale."""
        return self._keeps and not self.training and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def kept(self, build: Callable[[], Tensor]) -> Tensor:
        """The kept weight, by `build` where there is none or it is stale."""
        held = [tensor for tensor in (*self._parameters.values(), *self._buffers.values()) if tensor is not None]
        if any(tensor.is_inference() for tensor in held):  # their changes are not counted
            return build()
        state = [(tensor, tensor._version, tensor.data_ptr()) for tensor in held]
        if self._kept is None or not _same_state(self._kept[0], state):
            self._kept = (state, build())
        return self._kept[1]

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`; training frees what is kept."""
        if mode:
            self._kept = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._kept = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

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


def _same_state(old: list[tuple[Tensor, int, int]], new: list[tuple[Tensor, int, int]]) -> bool:
    """The same tensors, with the same storage, unchanged."""
    pairs = zip(old, new, strict=False)
    return len(old) == len(new) and all(a[0] is b[0] and a[1:] == b[1:] for a, b in pairs)
