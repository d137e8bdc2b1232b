"""What pipelines of several processes share: a model made once, and a batch split over all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from kronfold.base import processes
from kronfold.base.errors import InputError
from kronfold.export.checkpoint import write_model
from kronfold.models.load import load_model

T = TypeVar("T")


def made_once(
    make: Callable[[], tuple[PreTrainedModel, T]], place: Path, tokenizer: Any, device: str
) -> tuple[PreTrainedModel, T]:
    """(model, facts) of `make` on every process; only the main one makes them, the others read the model from `place`.

    A permutation search on all at once would share the same cores, and machines of different kinds may round
    differently and so choose different permutations; a file is equal for all. `place`, which all must see, is gone
    afterwards.
    """
    if processes.count() == 1:
        return make()
    own: list[PreTrainedModel] = []

    def work() -> T:
        model, facts = make()
        write_model(model, tokenizer, place)
        own.append(model)
        return facts

    facts = processes.on_main(work)
    model = own[0] if own else load_model(place, device=device)
    processes.barrier()  # all have read it
    processes.on_main(lambda: shutil.rmtree(place))
    return model, facts


def split_batch(batch: int, micro_batch: int | None) -> tuple[int, int]:
    """(blocks per process and micro-batch, micro-batches per step) of steps over `batch` blocks in all.

    `micro_batch`: the most blocks a process takes through the models at once; None for its whole share.
    Raises InputError when the batch cannot be split into equal parts.
    """
    count = processes.count()
    if batch % count:
        fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise InputError(
            f"A batch of {batch} blocks cannot be shared equally by {count} processes. Start a number of them that "
            f"divides it ({fitting}), or choose a batch size that is a multiple of {count}."
        )
    share = batch // count
    if micro_batch is None or micro_batch >= share:
        return share, 1
    if micro_batch < 1 or share % micro_batch:
        raise InputError(
            f"A micro-batch of {micro_batch} does not divide the {share} blocks that each of {count} process(es) takes "
            f"per step. Choose one of {', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}."
        )
    return micro_batch, share // micro_batch
