"""What pipelines of several processes share: a model made once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel

from kronfold.base import processes
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
