"""How a causal model is run to be measured: logits only where a number is read from them, batches shared out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from kronfold.base import processes
from kronfold.base.errors import InputError
from kronfold.distill.pairs import check_head

T = TypeVar("T")


def split_head(model: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """The model as two functions, token ids to states and states to logits, so that only targets get logits.

    A model that does more to its logits than apply its head (scales or caps them) is taken in one piece.
    """

    def forward(part: Any, inputs: torch.Tensor) -> Any:
        return part(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)

    try:
        check_head(model)
    except InputError:
        return lambda inputs: forward(model, inputs).logits, lambda logits: logits
    return lambda inputs: forward(model.base_model, inputs).last_hidden_state, model.get_output_embeddings()


def in_turn(
    batches: Sequence[Sequence[Any]],
    measure: Callable[[Any], T],
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """`measure` of each batch, in order, on every process; of several processes each does every n-th batch.

    `progress(done, total)`, in items of the batches, is called by the main process alone.
    """
    count, total, done = processes.count(), sum(map(len, batches)), 0
    own = []
    for start in range(0, len(batches), count):
        share = batches[start : start + count]  # one batch for each process, the last time perhaps fewer
        if processes.index() < len(share):
            own.append(measure(share[processes.index()]))
        done += sum(map(len, share))
        if progress and processes.is_main():
            progress(done, total)
    by_process = processes.gather(own)
    return [by_process[i % count][i // count] for i in range(len(batches))]
