"""What the speed benchmarks share: jobs timed in turn, figures beside their bars, options, the result file."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kronfold.base.errors import InputError
from kronfold.base.files import write_json
from kronfold.base.output import check_output
from kronfold.base.results import document


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that all of them have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, help="torch threads; default: as many as torch takes")
    made.add_argument("--quick", action="store_true", help="tiny sizes: shows that the script runs, no more")
    made.add_argument("--rounds", type=int, help="how often each job is timed")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("-o", "--output", type=Path, help="write everything as JSON")
    made.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    return made


def prepare(options: argparse.Namespace) -> None:
    """Threads, seed, and whether output and device can be used. Raises InputError, OutputError."""
    if options.output:
        check_output(options.output, options.overwrite)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here. Try --device cpu.")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleaved(
    jobs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each job, round by round: A B C A B C, so that a machine that slows down does so for all."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(warm_up + rounds):
        for name, job in jobs.items():
            wait(device)
            start = time.perf_counter()
            job()
            wait(device)
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def figure(what: str, value: float, bar: float | None = None, at_most: bool = False) -> dict[str, Any]:
    """One measured figure; `ratio_to_bar` is 1 or above where the bar is met, whichever side is the good one."""
    row: dict[str, Any] = {"what": what, "value": value}
    if bar is not None:
        ratio = float("inf") if at_most and value == 0 else (bar / value if at_most else value / bar)
        row |= {"bar": bar, "sense": "at most" if at_most else "at least", "ratio_to_bar": min(ratio, 1e12)}
    return row


def table(title: str, figures: Sequence[Mapping[str, Any]]) -> Table:
    shown = Table(title=title)
    for name in ("figure", "measured", "bar", "ratio to bar"):
        shown.add_column(name, justify="left" if name == "figure" else "right")
    for row in figures:
        bar, ratio = ("", "") if "bar" not in row else (f"{row['sense']} {row['bar']:g}", f"{row['ratio_to_bar']:.3g}")
        shown.add_row(row["what"], f"{row['value']:.4g}", bar, ratio)
    return shown


def finish(name: str, options: argparse.Namespace, figures: Sequence[Mapping[str, Any]], **content: Any) -> None:
    """Print the table and write the file."""
    console = Console(width=120)
    console.print(table(name, figures))
    if options.quick:
        console.print("--quick: these figures mean nothing, they show that the script runs.")
    if not options.output:
        return
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    facts = {"device": device, "threads": torch.get_num_threads(), "quick": options.quick}
    write_json(options.output, document(name, options.seed, **facts, figures=list(figures), **content))
