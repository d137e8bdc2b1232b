"""How long `kronfold --help` and `kronfold plan config:gpt2` take, from nothing to the answer.

    python benchmarks/startup.py --threads 1 -o startup.json
    python benchmarks/startup.py --imports 20          # what loading costs, module by module

Every run is a fresh process; the first of each command is warm-up (files come into memory, .pyc files are written).
Wall time counts; processor time is in the file, because on a machine that does other work only that means much.
`python -c "import torch"` and the part of transformers that any model needs are measured beside: nothing that answers a
question about a transformers model starts faster than they do.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console

from bench import Benchmark, Run, figure, table

KRONFOLD = ["-m", "kronfold"]
COMMANDS: dict[str, tuple[list[str], float | None]] = {  # arguments of python, bar in seconds of wall time
    "python": (["-c", "pass"], None),
    "kronfold --help": ([*KRONFOLD, "--help"], 0.4),
    "import torch": (["-c", "import torch"], None),
    "import GPT2LMHeadModel": (["-c", "from transformers import GPT2LMHeadModel"], None),
    "kronfold plan config:gpt2": ([*KRONFOLD, "plan", "config:gpt2"], 2.5),
}


def fresh_process(arguments: list[str]) -> tuple[float, float]:
    """Seconds of one fresh process: wall, processor."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else no run leaves the next one what it compiled
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imports(arguments: list[str], count: int) -> list[dict[str, Any]]:
    """The modules that cost most when a command runs: seconds with all they import, and of their own."""
    command = [sys.executable, "-X", "importtime", *arguments]
    told = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).stderr
    found = []
    for line in told.splitlines():
        if line.startswith("import time:") and line.count("|") == 2 and "self" not in line:
            own, whole, name = line.removeprefix("import time:").split("|")
            found.append({"module": name.strip(), "seconds": int(whole) / 1e6, "own_seconds": int(own) / 1e6})
    return sorted(found, key=lambda row: -row["seconds"])[:count]


def measure(run: Run) -> dict[str, Any]:
    quick = run.options.quick
    commands = {name: entry for name, entry in COMMANDS.items() if not quick or name in ("python", "kronfold --help")}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(run.options.rounds + (0 if quick else 1)):
        for name, (arguments, _) in commands.items():
            taken = fresh_process(arguments)
            if turn or quick:
                seconds[name].append(taken)
    rows, heavy = [], {}
    for name, taken in seconds.items():
        wall, processor = (statistics.median(values) for values in zip(*taken, strict=True))
        slowest = max(wall for wall, _ in taken)
        rows.append({"command": name, "wall_seconds": wall, "processor_seconds": processor, "slowest": slowest})
        arguments, bar = commands[name]
        if run.options.imports and bar:
            heavy[name] = imports(arguments, run.options.imports)
            cells = [(one["module"], f"{one['seconds']:.3f}", f"{one['own_seconds']:.3f}") for one in heavy[name]]
            Console().print(table(f"Imports of {name}", ("module", "seconds with what it imports", "own"), cells))
    figures = [figure(f"{row['command']}, s", row["wall_seconds"], commands[row["command"]][1], True) for row in rows]
    return {"figures": figures, "rows": rows, "imports": heavy}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--imports", type=int, default=0, metavar="N", help="also list the N heaviest imports")


BENCHMARK = Benchmark("startup", __doc__ or "", add_options, measure, rounds=9)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
