"""How long `kronfold --help` and `kronfold plan config:gpt2` take, from nothing to the answer.

    python benchmarks/startup.py -o results.json
    python benchmarks/startup.py --imports 20          # what loading costs, module by module

Every run is a fresh process; the first one of each command is warm-up (files come into memory, .pyc files are written).
Medians of wall time count; processor time stands beside it, because on a machine that does other work only that means
much. `python -c "import torch"` and the part of transformers that any model needs are measured in the same run: nothing
that answers a question about a transformers model starts faster than they do.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kronfold.base.errors import KronfoldError
from kronfold.base.files import write_json
from kronfold.base.output import check_output
from kronfold.base.results import document

KRONFOLD = ["-m", "kronfold"]
COMMANDS: dict[str, tuple[list[str], float | None]] = {  # arguments of python, bar in seconds of wall time
    "python": (["-c", "pass"], None),
    "kronfold --help": ([*KRONFOLD, "--help"], 0.4),
    "import torch": (["-c", "import torch"], None),
    "import GPT2LMHeadModel": (["-c", "from transformers import GPT2LMHeadModel"], None),
    "kronfold plan config:gpt2": ([*KRONFOLD, "plan", "config:gpt2"], 2.5),
}


def run(arguments: list[str], threads: int) -> tuple[float, float]:
    """Seconds of one fresh process: wall, processor."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else no run leaves the next one what it compiled
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row per command, the commands in turn so that a busy moment touches all alike."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for round_ in range(rounds + 1):
        for name, (arguments, _) in COMMANDS.items():
            taken = run(arguments, threads)
            if round_:
                seconds[name].append(taken)
    rows = []
    for name, taken in seconds.items():
        wall, processor = (statistics.median(values) for values in zip(*taken, strict=True))
        bar = COMMANDS[name][1]
        rows.append(
            {
                "command": name,
                "wall_seconds": round(wall, 3),
                "processor_seconds": round(processor, 3),
                "slowest_wall_seconds": round(max(wall for wall, _ in taken), 3),
                "bar_wall_seconds": bar,
                "ratio_to_bar": round(wall / bar, 3) if bar else None,
            }
        )
    return rows


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


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="Start-up, seconds (at most the bar: ratio 1 or less)")
    for name in ("command", "wall", "slowest", "processor", "bar", "ratio to bar"):
        shown.add_column(name, justify="left" if name == "command" else "right")
    for row in rows:
        shown.add_row(
            row["command"],
            f"{row['wall_seconds']:.2f}",
            f"{row['slowest_wall_seconds']:.2f}",
            f"{row['processor_seconds']:.2f}",
            f"{row['bar_wall_seconds']}" if row["bar_wall_seconds"] else "",
            f"{row['ratio_to_bar']:.2f}" if row["ratio_to_bar"] else "",
        )
    return shown


def imports_table(name: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"Imports of {name}")
    for column in ("module", "seconds with what it imports", "own"):
        shown.add_column(column, justify="left" if column == "module" else "right")
    for row in rows:
        shown.add_row(row["module"], f"{row['seconds']:.3f}", f"{row['own_seconds']:.3f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=9, help="processes of each command after the warm-up")
    parser.add_argument("--quick", action="store_true", help="one round: does it run at all")
    parser.add_argument("--imports", type=int, default=0, metavar="N", help="also list the N heaviest imports")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of the processes")
    parser.add_argument("-o", "--output", type=Path, help="write every figure as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args()
    try:
        if options.output:
            check_output(options.output, options.overwrite)
        rows = measure(1 if options.quick else options.rounds, options.threads)
        console, heavy = Console(), {}
        console.print(table(rows))
        for name, (arguments, bar) in COMMANDS.items():
            if options.imports and bar:
                heavy[name] = imports(arguments, options.imports)
                console.print(imports_table(name, heavy[name]))
        if options.output:
            write_json(options.output, document("startup", None, threads=options.threads, rows=rows, imports=heavy))
    except KronfoldError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
