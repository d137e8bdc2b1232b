"""Asked before any training: do student and teacher fit, and may a head be applied apart from its model?"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel | None = None, block: int | None = None) -> None:
    """Raises InputError with every reason why `student` cannot learn from `teacher` on blocks of `block` tokens.

    Reasons: vocabularies of different size, a block longer than a model's positions, tensors shared by both.
    """
    faults = []
    if teacher is not None:
        sizes = _vocabulary(student), _vocabulary(teacher)
        if sizes[0] != sizes[1]:
            faults.append(
                f"the student predicts {sizes[0]:,} tokens and the teacher {sizes[1]:,}. Distillation compares "
                "them token by token, so take a teacher with the student's tokenizer; if one "
                f"vocabulary is only padded, cut it first with model.resize_token_embeddings({min(sizes)})"
            )
        shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
        if shared:
            faults.append(
                f"they share {len(shared)} tensors, so training the student would change its teacher; "
                "pass copy.deepcopy(model) as the student"
            )
    for role, model in (("student", student), ("teacher", teacher)):
        positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if block is not None and positions is not None and block > positions:
            faults.append(
                f"blocks of {block:,} tokens are longer than the {positions:,} positions of the {role}; "
                f"pack the text into blocks of at most {positions:,}"
            )
    if faults:
        raise InputError("Student and teacher do not fit: " + "; ".join(faults) + ".")


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises InputError unless the head applied to the last hidden state is all there is to the logits.

    Models that scale or cap their logits after the head would be trained on the wrong distribution. One
    forward pass over three tokens; the model is left in the mode it was in.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise InputError(
            f"{type(model).__name__} has no language-model head to heal; load it with AutoModelForCausalLM instead."
        )
    training = model.training
    model.eval()
    try:
        tokens = torch.zeros(1, 3, dtype=torch.long, device=model.device)
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        apart = head(out.hidden_states[-1])
    finally:
        model.train(training)
    # The same numbers through the same head; only a different batching of the product may round differently.
    if not torch.allclose(apart.float(), out.logits.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
        raise InputError(
            f"The logits of {type(model).__name__} are not its head applied to its last hidden state (the "
            "model scales or caps them afterwards), so its losses cannot be computed in chunks; this model "
            "family is not supported."
        )


def _vocabulary(model: PreTrainedModel) -> int:
    """Width of the logits, from the head where it says so (padding counts), else from the config."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or model.config.vocab_size)
