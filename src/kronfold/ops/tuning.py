"""Measuring what the parts of a layer's arithmetic cost here, in a few seconds, and saving it for `ops/cost.py`."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from kronfold.base.files import write_json
from kronfold.ops.cost import FORMAT_VERSION, Rates, forget, read_rates
from kronfold.ops.few_rows import mix
from kronfold.ops.permutation import permuted

COPIES = 16  # weights in turn, more than most caches hold: in a model every layer reads one of its own
SHORTEST = 1e-16  # seconds; what noise leaves below is no rate


def measure_rates(device: str, dtype: torch.dtype, *, rounds: int = 7, tokens: int = 512, width: int = 768) -> Rates:
    """The rates of this machine for a device and dtype, with the threads torch uses now.

    Args:
        rounds: interleaved rounds, whose median counts, after one of warm-up. tokens, width: the shapes measured are
            those of a layer (width, width) and (4·width, width).

    Raises RuntimeError as torch does for a device that is not there or a dtype it cannot multiply.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, square, tall = random(tokens, width), random(width, width), random(4 * width, width)
    one, two = random(1, width), random(2, width)
    weights = itertools.cycle([tall, *(random(4 * width, width) for _ in range(COPIES - 1))])
    tiny, few, half = random(1, 8), random(8, 8), width // 2
    pairs, terms = x.view(tokens, 2, half), random(width, 4, half)
    small, wide = random(1, 2), random(8, 4)
    features = torch.randperm(width, generator=generator).to(device, torch.int32)
    rows = torch.randperm(4 * width, generator=generator).to(device, torch.int32)
    jobs: dict[str, Callable[[], object]] = {
        "launch": lambda: torch.nn.functional.linear(tiny, few),
        "product": lambda: torch.nn.functional.linear(x, square),
        "read": lambda: torch.nn.functional.linear(one, next(weights)),
        "few": lambda: next(weights) @ two.t(),
        "gather": lambda: permuted(x, features),
        "row": lambda: permuted(tall, rows, 0),
        "copy": lambda: x.view(tokens, half, 2).transpose(1, 2).contiguous(),
        "mix": lambda: mix(small, pairs),
        "build": lambda: mix(wide, terms),
    }
    with torch.no_grad():
        took = interleaved(jobs, device, rounds)
    launch = took["launch"]
    left = {name: max(seconds - launch, 0.0) for name, seconds in took.items()}
    mac = left["product"] / (tokens * width * width)
    found = {
        "mac": mac,
        "read": left["read"] / tall.numel() - mac,
        "gather": left["gather"] / x.numel(),
        "row": left["row"] / tall.numel(),
        "copy": left["copy"] / x.numel(),
        "mix": (left["mix"] + left["build"]) / (1.5 * x.numel() + 3 * terms.numel()),
        "launch": launch,
        "few": left["few"] / tall.numel(),
    }
    return Rates(**{name: max(value, SHORTEST) for name, value in found.items()})


def interleaved(jobs: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Median seconds of each job over `rounds` rounds in which all take turns; short jobs are repeated in a turn.

    The first calls of a job are not counted: they load libraries, start threads and build what is kept.
    """
    repeats = {}
    for name, job in jobs.items():
        _seconds(job, device, 2)
        repeats[name] = max(1, int(2e-3 / max(_seconds(job, device, 2), 1e-7)))
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            times[name].append(_seconds(job, device, repeats[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _seconds(job: Callable[[], object], device: str, repeats: int) -> float:
    """Seconds of one run, over `repeats` in a row."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        job()
    wait()
    return (time.perf_counter() - started) / repeats


def save_rates(path: Path, measured: Mapping[tuple[str, str, int], Rates]) -> None:
    """Write measurements by `cost.key`; those of other devices, dtypes and numbers of threads stay.

    Raises OutputError.
    """
    rows = [
        {"device": device, "dtype": dtype, "threads": threads, "rates": asdict(rates)}
        for (device, dtype, threads), rates in {**read_rates(path), **measured}.items()
    ]
    write_json(path, {"format_version": FORMAT_VERSION, "unit": "seconds", "rows": rows})
    forget()
