"""Run a model block by block over many windows, so that only one block's work is in memory at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.models.families import family_of

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
