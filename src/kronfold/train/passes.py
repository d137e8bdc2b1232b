"""One forward pass of a student or teacher, with the signals that the method asked for and nothing more."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedModel

from kronfold.distill import Signals
from kronfold.distill.attention import run_with_attention


def observed(
    model: PreTrainedModel, call: Callable[..., Any], hidden: bool, layers: Collection[int]
) -> tuple[Any, Signals]:
    """(output, signals) of `call`, which runs `model` (perhaps inside a wrapper) and passes on keyword arguments."""

    def run(**more: Any) -> Any:
        return call(**more, **({"output_hidden_states": True} if hidden else {}))

    out, attentions = run_with_attention(model, run, layers)
    return out, Signals(tuple(out.hidden_states) if hidden else (), attentions)
