"""After fitting: let neighbouring layers absorb the gathers of the structured ones, where that changes no function."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from kronfold.export.quantizer import attach
from kronfold.models.absorb import AbsorbReport, absorb, remaining_gathers
from kronfold.models.families import family_of


def absorb_gathers(model: PreTrainedModel, blocks: Iterable[int] | None = None) -> dict[str, Any]:
    """Reorder hidden units and value channels, in place, so that fewer gathers run; logits stay as they are.

    The residual stream is left alone: hidden states between blocks still agree with the teacher's, channel by channel.
    Call it once, after the last stage is fitted: a later stage would search its permutations from another start. Of a
    model without a family record nothing is reordered.

    `blocks`: only these, each once; None for all.

    Returns the `gathers` entry of documents: {"absorbed": how many are gone, "remaining": names, "bytes": theirs}.
    """
    if family_of(model).generic:
        return gathers_of(model)
    report = absorb(model, residual=False, blocks=blocks)
    if report.absorbed:
        attach(model)  # with the specs as they are now
    return report.to_dict()


def gathers_of(model: PreTrainedModel) -> dict[str, Any]:
    """The same entry for a model as it stands: nothing absorbed. Works on the meta device."""
    held = remaining_gathers(model)
    total = sum(gather.bytes for gather in held)
    return AbsorbReport([], held, total, total).to_dict()
