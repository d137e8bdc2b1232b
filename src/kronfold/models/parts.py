"""A model in parts that are held in memory one after the other: what stands outside the blocks, then every block.

The model itself lives on the meta device; the tensors of one part are put in, worked on, and taken out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.models.families import Family, family_of
from kronfold.models.linear_view import is_tied

OUTSIDE, HEAD = "outside", "head"


@dataclass(frozen=True)
class Parts:
    """Attributes:
    names: of the parts: `outside` (embeddings, norms, a head that is tied), `block 0` and so on, `head` (one that is
        not tied, which may be as large as the embedding).
    """

    names: tuple[str, ...]
    family: Family
    own_head: str | None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Parts:
        """The parts of a model as it stands. Raises InputError for one whose parts share tensors."""
        family = family_of(model)
        own_head = None if is_tied(model, family) else family.head
        depth = len(list(model.get_submodule(family.blocks).children()))
        blocks = tuple(f"block {index}" for index in range(depth))
        found = cls((OUTSIDE, *blocks, *((HEAD,) if own_head else ())), family, own_head)
        first: dict[int, str] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            other = first.setdefault(id(tensor), name)
            if found.part_of(other) != found.part_of(name):
                raise InputError(
                    f"{other} and {name} are one tensor, so this model cannot be worked on block by block. Compress it "
                    "whole (without --stream)."
                )
        return found

    def part_of(self, name: str) -> str:
        """The part that a module, tensor or site of this dotted name belongs to."""
        block = self.family.block_index(name)
        if block is not None:
            return f"block {block}"
        in_head = self.own_head is not None and (name + ".").startswith(self.own_head + ".")
        return HEAD if in_head else OUTSIDE

    def block_of(self, part: str) -> int | None:
        """0-based index of the block that a part is, None for one outside the blocks."""
        return int(part.split()[1]) if part.startswith("block ") else None

    def tensors(self, model: PreTrainedModel, part: str) -> dict[str, Tensor]:
        """Parameters and stored buffers of one part by name, each tied tensor once."""
        distinct: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if self.part_of(name) == part:
                distinct.setdefault(id(tensor), (name, tensor))
        return dict(distinct.values())

    def empty(self, model: PreTrainedModel, part: str) -> None:
        """Put the tensors of a part back on the meta device, in place."""
        held = self.tensors(model, part)
        put_tensors(model, {name: torch.empty_like(tensor, device="meta") for name, tensor in held.items()})


def put_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters and buffers of a model by name, in place; what is tied stays tied."""
    state = model.state_dict(keep_vars=True)
    places: dict[int, list[str]] = {}
    for name, old in state.items():
        places.setdefault(id(old), []).append(name)
    for name, tensor in tensors.items():
        old = state[name]
        new = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        for place in places[id(old)]:
            owner, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(owner), leaf, new)
