"""Reorder the channels on one side of a layer, whatever kind of layer it is.

Everywhere: channel i of the new order is channel `perm[i]` of the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronfold.base.errors import InputError
from kronfold.models.linear_view import does_more, in_features, out_features
from kronfold.nn import FusedLinear, TiedHead


@dataclass(frozen=True)
class Port:
    """One side of a layer.

    Attributes:
        name: dotted name of the layer. layer: the module: linear, structured, an embedding (its columns are its
            outputs), or a norm with weights.
        side: which of its channels: those it reads or those it gives.
        start, size: the channels concerned, as in a fused layer that holds several weights.
    """

    name: str
    layer: nn.Module
    side: Literal["in", "out"]
    start: int
    size: int

    @property
    def holds_gather(self) -> bool:
        """Reordering this side costs an index buffer, which the layer has or would get."""
        return hasattr(self._gatherer(), self._gather_name())

    @property
    def gather(self) -> Tensor | None:
        """The gather the layer holds on this side: int64 (size,), or None for the identity."""
        found = getattr(self._gatherer(), self._gather_name(), None)
        return None if found is None else found.long()

    def gather_after(self, perm: Tensor) -> Tensor:
        """The gather this side would hold once reordered by `perm`."""
        own = self.gather
        if self.side == "out":
            return perm if own is None else own[perm]
        inverse = torch.argsort(perm)
        return inverse if own is None else inverse[own]

    def undoing(self) -> Tensor | None:
        """The reordering after which this side needs no gather; None when it has none."""
        if self.gather is None:
            return None
        return torch.argsort(self.gather) if self.side == "out" else self.gather

    def _gatherer(self) -> nn.Module:
        levels = getattr(self.layer, "levels", None)
        return levels[0] if levels is not None and len(levels) else self.layer  # type: ignore[arg-type]

    def _gather_name(self) -> str:
        return "gather" if self._gatherer() is not self.layer else f"gather_{self.side}"

    @property
    def fault(self) -> str | None:
        """Why this side cannot be reordered, None when it can."""
        kind = type(self.layer).__name__
        if does_more(self.layer):
            return f"{self.name}: {kind} does more than multiply by its weight"
        if isinstance(self.layer, nn.Linear | Conv1D | nn.Embedding | TiedHead):
            return None
        if hasattr(self.layer, f"permute_{self.side}puts"):
            return None
        if _is_norm(self.layer, self.size):
            return None
        return f"{self.name}: the {self.side}puts of {kind} cannot be reordered"

    def permute(self, perm: Tensor) -> None:
        """Reorder in place. perm: int64 (size,)."""
        layer = self.layer
        if isinstance(layer, TiedHead):
            return  # reads the embedding, which is reordered itself
        if isinstance(layer, nn.Embedding):
            _reorder(layer.weight, perm, 1, self.start)
        elif isinstance(layer, nn.Linear | Conv1D):
            _reorder(layer.weight, perm, (self.side == "in") != isinstance(layer, Conv1D), self.start)
            if self.side == "out" and layer.bias is not None:
                _reorder(layer.bias, perm, 0, self.start)
        elif _is_norm(layer, self.size):
            for vector in layer.parameters(recurse=False):
                _reorder(vector, perm, 0, self.start)
        else:
            getattr(layer, f"permute_{self.side}puts")(perm)


def _is_norm(layer: nn.Module, size: int) -> bool:
    shapes = {tuple(p.shape) for p in layer.parameters()}
    return "Norm" in type(layer).__name__ and shapes <= {(size,)}


def _reorder(stored: Tensor, perm: Tensor, axis: int, start: int) -> None:
    with torch.no_grad():
        part = stored.narrow(int(axis), start, perm.numel())
        part.copy_(part.index_select(int(axis), perm.to(stored.device)))


def readers(model: PreTrainedModel, name: str) -> list[Port]:
    """The input side of a linear layer; one port per part of a fused structured one."""
    layer = model.get_submodule(name)
    if isinstance(layer, FusedLinear):
        return [Port(f"{name}.{key}", part, "in", 0, in_features(part)) for key, part in layer.parts.items()]
    return [Port(name, layer, "in", 0, in_features(layer))]


def writer(model: PreTrainedModel, name: str, part: str | None = None, parts: tuple[str, ...] = ()) -> Port:
    """The output side of a linear layer, or of one part of a fused one with these `parts`."""
    layer = model.get_submodule(name)
    if part is None:
        return Port(name, layer, "out", 0, out_features(layer))
    if isinstance(layer, FusedLinear):
        own = layer.parts[part]
        return Port(f"{name}.{part}", own, "out", 0, out_features(own))
    width = out_features(layer) // len(parts)
    return Port(f"{name}.{part}", layer, "out", parts.index(part) * width, width)


def check_ports(ports: list[Port]) -> None:
    """Raise InputError, all faults at once, unless every port can be reordered."""
    faults = [port.fault for port in ports if port.fault]
    if faults:
        raise InputError("These channels cannot be reordered, the model is unchanged:\n  " + "\n  ".join(faults))
