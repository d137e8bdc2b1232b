"""What is lost when a teacher is cut down to its k likeliest tokens and one bucket for all the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.data.packing import TokenBlocks
from kronfold.distill.losses import TopK, bucketed_kl, top_k
from kronfold.distill.pairs import check_pair


@torch.no_grad()
def bucket_bias(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    ks: Sequence[int],
    *,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """For every k, means over all positions of `blocks`; both models in eval mode.

    Returns rows of:
        top_k.
        kl: the full divergence, T² KL(teacher ‖ student), nats per token.
        bucketed: over the k + 1 outcomes. bias: bucketed / kl - 1, never above 0.
        stored: as bucketed, with the teacher in float16, as on disk.
        tail_mass: what the teacher gives to all but its k likeliest tokens.
        gradient_error: ‖g_k - g‖ / ‖g‖ over all positions, of the gradients by the student's logits.
    """
    check_pair(student, teacher, blocks.ids.shape[1])
    sums = torch.zeros(len(ks), 6, dtype=torch.float64)
    for index in range(len(blocks)):
        ids = blocks[index]["input_ids"][None]
        mine, other = (m(input_ids=ids.to(m.device), use_cache=False).logits[0].float() for m in (student, teacher))
        for row, k in enumerate(ks):
            sums[row] += _sums(mine, other.to(mine.device), k, temperature).cpu()
        progress(index + 1, len(blocks))
    sums[:, :4] /= blocks.tokens
    rows = []
    for k, (kl, bucketed, stored, tail, difference, whole) in zip(ks, sums.tolist(), strict=True):
        rows.append(
            {
                "top_k": k,
                "kl": kl,
                "bucketed": bucketed,
                "stored": stored,
                "bias": bucketed / kl - 1 if kl else 0.0,
                "tail_mass": tail,
                "gradient_error": (difference / whole) ** 0.5 if whole else 0.0,
            }
        )
    return rows


def _sums(student: Tensor, teacher: Tensor, k: int, temperature: float) -> Tensor:
    """Over the tokens of one block, float64: the three divergences, the tail mass, ‖g_k - g‖², ‖g‖²."""
    mine, other = (torch.log_softmax(logits / temperature, -1) for logits in (student, teacher))
    kept = top_k(teacher, k, temperature)
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        bucketed = temperature**2 * bucketed_kl(logits, kept, temperature).sum()
    (gradient,) = torch.autograd.grad(bucketed, logits)
    true = temperature * (mine.exp() - other.exp())
    rounded = TopK(kept.ids, kept.log_probs.half())
    parts = (
        temperature**2 * (other.exp() * (other - mine)).sum(),
        bucketed.detach(),
        temperature**2 * bucketed_kl(student, rounded, temperature).sum(),
        kept.log_probs[:, -1].exp().sum(),
        (gradient - true).square().sum(),
        true.square().sum(),
    )
    return torch.stack([part.double() for part in parts])
