"""Several linear maps of one input whose outputs stand side by side, as GPT-2's c_attn holds q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class FusedLinear(nn.Module):
    """`y = [part_1(x), part_2(x), ...]` along the last axis; stock attention code that splits y stays untouched.

    Args:
        parts: name -> layer (structured, or a dense `nn.Linear`), in the order of their outputs. Names become
            submodules, so the state dict reads `c_attn.q.a`, `c_attn.k.a`, ...
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.part_names = tuple(parts)
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {name: self.get_submodule(name) for name in self.part_names}

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in_features); returns (..., sum of the parts' out_features)."""
        return torch.cat([part(x) for part in self.parts.values()], dim=-1)

    def to_spec(self) -> dict[str, Any]:
        parts = {}
        for name, part in self.parts.items():
            dense = {"structure": "dense", "out_features": getattr(part, "out_features", None)}
            parts[name] = dense if isinstance(part, nn.Linear) else part.to_spec()  # type: ignore[operator]
        return {"structure": "fused", "parts": parts}
