"""Are all numbers finite? Asked where weights are read, trained and written, one tensor after the other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import NotFiniteError

_SHOWN = 4


def not_finite(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> list[str]:
    """A sentence for every tensor that is not finite, or would not be in `dtype`; empty when all is well.

    A cast keeps the order of numbers, and the smallest and largest of a tensor with a NaN in it are NaN. So these two,
    cast, tell about all of them: one pass over a tensor as it stands, and no copy of it.
    """
    faults = []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or tensor.numel() == 0:
            continue
        values = tensor.detach()
        values = values.float() if values.element_size() == 1 else values  # float8 has no minimum
        extremes = torch.stack(torch.aminmax(values))
        kept = extremes.to(dtype or extremes.dtype)
        if not kept.isfinite().all():
            faults.append(f"{name}: {_described(values, extremes, kept)}")
    return faults


def _described(values: Tensor, extremes: Tensor, kept: Tensor) -> str:
    bad = int((~values.isfinite()).sum())
    if bad:
        return f"{bad:,} of {values.numel():,} numbers are NaN or infinite"
    kind, end = str(kept.dtype).removeprefix("torch."), torch.finfo(kept.dtype).max
    over = int((~values.to(kept.dtype).isfinite()).sum())
    return (
        f"{over:,} of {values.numel():,} numbers become infinite in {kind}; "
        f"the largest is {float(extremes.abs().max()):.4g}, and {kind} ends at {end:,.6g}"
    )


def listed(faults: list[str]) -> str:
    """The first faults, indented one a line, and how many more there are."""
    more = f"\n  … and {len(faults) - _SHOWN} more tensors" if len(faults) > _SHOWN else ""
    return "\n  ".join(["", *faults[:_SHOWN]]) + more


def check_finite(
    model: PreTrainedModel | Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None, what: str = "The weights"
) -> None:
    """Raise NotFiniteError unless all floating-point tensors are finite, and stay so in `dtype`; nothing is changed.

    Args:
        model: a model, or named tensors.
        dtype: of the file to be written; None: as they are.
        what: what they are, for the message.
    """
    faults = not_finite(_tensors(model) if isinstance(model, torch.nn.Module) else model, dtype)
    if not faults:
        return
    if all("become infinite" in fault for fault in faults):
        kind = str(dtype).removeprefix("torch.")
        wider = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
        raise NotFiniteError(
            f"{what} do not fit {kind}, so they were not written:{listed(faults)}\nUse --dtype {wider}."
        )
    raise NotFiniteError(
        f"{what} are not finite, so they were not written:{listed(faults)}\nThe model was damaged before: get the "
        "checkpoint it was made from again, or train it again with a lower learning rate."
    )


def _tensors(model: torch.nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters, a tied one once, and buffers with a NaN: infinities and the like are masks there, and meant."""
    yield from model.named_parameters()
    kept = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in kept and buffer.is_floating_point() and buffer.isnan().any():
            yield name, buffer
