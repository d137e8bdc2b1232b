"""Keeping built weights between calls in inference: memory for time, on request."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from kronfold.nn.structured import StructuredLinear


def dense_cache_bytes(model: nn.Module) -> int:
    """Bytes that `cache_dense` may take for `model` at most, in the dtype it has now; nothing is changed.

    Only layers that would be faster with a kept weight for some number of tokens count: the dense weight of a
    Kronecker layer, the output factor of a low-rank one. Works on the meta device.
    """
    return sum(out * columns * next(layer.parameters()).element_size() for layer, (out, columns) in _keepers(model))


def cache_dense(model: nn.Module, on: bool = True) -> int:
    """Let the structured layers of `model` keep the weights they build, for faster inference; or let them free these.

    A weight is built when a call first wants it, and used in eval mode without gradients only. `model.train()`, a move
    to another device or dtype and every change of a parameter free it; it is never saved. Results agree with those
    without the cache up to rounding. Compiled models (`torch.compile`) run as without it.

    Args:
        on: False frees what is kept and builds weights for each call again.

    Returns:
        The bytes it may take at most (`dense_cache_bytes`), 0 when switched off.
    """
    layers = [module for module in model.modules() if isinstance(module, StructuredLinear)]
    for layer in layers:
        layer.keep(False)
    if not on:
        return 0
    for layer, _ in _keepers(model):
        layer.keep()
    return dense_cache_bytes(model)


def _keepers(model: nn.Module) -> Iterator[tuple[StructuredLinear, tuple[int, int]]]:
    for module in model.modules():
        if isinstance(module, StructuredLinear) and (shape := module.kept_shape()) is not None:
            yield module, shape
