"""Which arithmetic pays on this machine."""

from __future__ import annotations

import torch


def bf16_is_fast(device: torch.device | str) -> bool:
    """Whether autocast to bfloat16 is native on `device`: CPUs with AMX or AVX512-BF16, CUDA from Ampere on.

    Elsewhere bfloat16 is emulated and slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, so asked for with care
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return False
