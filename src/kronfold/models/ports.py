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
from kronfold.structures.layer import Structured, parts_of


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
        return self._gather_place() is not None

    @property
    def gather(self) -> Tensor | None:
        """The gather the layer holds on this side: int64 (size,), or None for the identity."""
        held = self._gather_place()
        found = None if held is None else getattr(*held)
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

    def _gather_place(self) -> tuple[nn.Module, str] | None:
        return self.layer.gather_place(self.side) if isinstance(self.layer, Structured) else None

    @property
    def fault(self) -> str | None:
        """Why this side cannot be reordered, None when it can."""
        kind = type(self.layer).__name__
        if does_more(self.layer):
            return f"{self.name}: {kind} does more than multiply by its weight"
        if isinstance(self.layer, nn.Linear | Conv1D | nn.Embedding):
            return None
        if hasattr(self.layer, f"permute_{self.side}puts"):
            return None
        if _is_norm(self.layer, self.size):
            return None
        return f"{self.name}: the {self.side}puts of {kind} cannot be reordered"

    def permute(self, perm: Tensor) -> None:
        """Reorder in place. perm: int64 (size,)."""
        layer = self.layer
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
    if parts := parts_of(layer):
        return [Port(f"{name}.{key}", part, "in", 0, in_features(part)) for key, part in parts.items()]
    return [Port(name, layer, "in", 0, in_features(layer))]


def writer(model: PreTrainedModel, name: str, part: str | None = None, parts: tuple[str, ...] = ()) -> Port:
    """The output side of a linear layer, or of one part of a fused one with these `parts`."""
    layer = model.get_submodule(name)
    if part is None:
        return Port(name, layer, "out", 0, out_features(layer))
    if own := parts_of(layer).get(part):
        return Port(f"{name}.{part}", own, "out", 0, out_features(own))
    width = out_features(layer) // len(parts)
    return Port(f"{name}.{part}", layer, "out", parts.index(part) * width, width)


def check_ports(ports: list[Port]) -> None:
    """Raise InputError, all faults at once, unless every port can be reordered."""
    faults = [port.fault for port in ports if port.fault]
    if faults:
        raise InputError("These channels cannot be reordered, the model is unchanged:\n  " + "\n  ".join(faults))
