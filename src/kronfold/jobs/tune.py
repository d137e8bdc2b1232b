"""`kronfold tune`: measure this machine once, so that structured layers choose their order of computing by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from kronfold.base.errors import InputError, suggest
from kronfold.base.results import document
from kronfold.structures import rates

DTYPES = ("float32", "bfloat16", "float16")


def tune(
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    threads: int | None = None,
    *,
    save: bool = True,
    rounds: int = 7,
) -> dict[str, Any]:
    """Measure the rates of `device` for each dtype and save them in the cache directory.

    Args:
        threads: as many as the models will run with; None takes torch's present number.

    Returns the document of kind "tune": `path` (None if not saved), `rows` of `device`, `dtype`, `threads`, `rates`
    (seconds) and `built_in`, the figures used without a measurement.

    Raises InputError for an unknown dtype or a number of threads below 1; OutputError when saving fails.
    """
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is not measured. {suggest(dtype, DTYPES)}")
    if threads is not None and threads < 1:
        raise InputError(f"{threads} threads were asked for; take 1 or more.")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        count = torch.get_num_threads()
        types = [getattr(torch, dtype) for dtype in dtypes]
        found = {rates.key(device, dtype, count): rates.measure_rates(device, dtype, rounds=rounds) for dtype in types}
        if save:
            rates.save_rates(rates.rates_path(), found)
    finally:
        torch.set_num_threads(before)
    rows = [
        {
            "device": name,
            "dtype": dtype,
            "threads": count,
            "rates": asdict(measured),
            "built_in": asdict(rates.built_in(device, getattr(torch, dtype))),
        }
        for (name, dtype, count), measured in found.items()
    ]
    return document("tune", None, path=str(rates.rates_path()) if save else None, rows=rows)
