"""A causal model as two functions, so that logits are worked out only where a number is read from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kronfold.base.errors import InputError
from kronfold.distill.pairs import check_head


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
