"""A model in parts that are held in memory one after the other: what stands outside the blocks, then every block.

The model itself lives on the meta device; the tensors of one part are put in, worked on, and taken out again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


# Run a model block by block over many windows, so that only one block's work is in memory at a time.


Capture = Callable[[Tensor], None]


class _Enough(Exception):
    """The forward pass has gone as far as was wanted."""


class BlockStream:
    """Hidden states of all windows in front of the current block.

    Args:
        model: a causal language model; its blocks are called as the model itself calls them, with the same arguments.
        windows: (n, window) token ids. batch: windows per call; must divide n.

    Attributes:
        hidden: list of (batch, window, width), the input of the next block.
    """

    def __init__(self, model: PreTrainedModel, windows: Tensor, batch: int = 1) -> None:
        if not len(windows) or batch < 1 or len(windows) % batch:
            raise InputError(f"A batch of {batch} windows does not divide {len(windows)} windows.")
        self.blocks: Sequence[nn.Module] = list(model.get_submodule(family_of(model).blocks).children())
        self.model = model
        self.windows = windows
        self.batch = batch
        self._arguments = self._arguments_of_blocks()
        self.hidden: list[Tensor] = []

    @torch.no_grad()
    def start(self) -> None:
        """Fill `hidden` with what enters the first block, from the model's present embedding."""
        self.hidden = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.hidden.append((args[0] if args else kwargs["hidden_states"]).detach())
            raise _Enough

        for ids in self.windows.split(self.batch):
            self._run_model(ids, [self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)])

    def _arguments_of_blocks(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the model hands to each block besides hidden states (masks, rotary angles): equal for every batch."""
        found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            found.append((args[1:], rest))

        with torch.no_grad():
            handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in self.blocks]
            self._run_model(self.windows[: self.batch], handles)
        return found

    def _run_model(self, ids: Tensor, handles: list[Any]) -> None:
        try:
            self.model.base_model(input_ids=ids.to(self.model.device), use_cache=False)  # without the head
        except _Enough:
            pass
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def inputs_of(self, block: nn.Module, index: int, layer: nn.Module) -> Iterator[Tensor]:
        """For each batch the input (batch·window, in) of `layer` inside `block`, run no further than there.

        Raises InputError for a layer that the block does not run.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.append(args[0].detach().flatten(0, -2))
            raise _Enough

        handle = layer.register_forward_pre_hook(keep)
        try:
            for hidden in self.hidden:
                try:
                    self.call(block, index, hidden)
                except _Enough:
                    yield seen.pop()
                else:
                    raise InputError(f"Block {index} does not run its layer {type(layer).__name__}; leave it dense.")
        finally:
            handle.remove()

    @torch.no_grad()
    def rest_of(self, block: nn.Module, index: int, layer: nn.Module) -> Iterator[Tensor]:
        """For each batch what `block` gives without the share of its `layer`, which it adds last: (tokens, width)."""
        seen: list[Tensor] = []
        for hidden in self.hidden:
            handle = layer.register_forward_hook(lambda _module, _args, output: seen.append(output))
            try:
                out = self.call(block, index, hidden)
            finally:
                handle.remove()
            yield (out - seen.pop()).flatten(0, -2)

    @torch.no_grad()
    def advance(self, block: nn.Module, index: int) -> None:
        """Replace `hidden` by what `block` makes of it."""
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = self.call(block, index, hidden)

    def call(self, block: nn.Module, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._arguments[index]
        out = block(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def twin(self) -> BlockStream:
        """A second stream over the same windows whose hidden states part from these."""
        other = copy.copy(self)
        other.hidden = list(self.hidden)
        return other
