"""What all benchmarks share, and one command for all of them.

    python benchmarks/bench.py layers startup -o results/      # these, each into its own file
    python benchmarks/bench.py --quick all -o somewhere/       # every script on tiny sizes: does it run?
    python benchmarks/layers.py --help                         # one script with its own options

A script makes one `Benchmark` of its docstring, its options and a function that measures. What is here: the common
options, jobs timed in turn (A B A B), medians, figures beside their bars, jobs in a process of their own, and the
result file with command, versions, seed and machine. A file that another machine, another benchmark or other settings
made is replaced only with --overwrite, and so is a full measurement by a --quick one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel
from transformers.utils import logging

from kronfold.base.errors import InputError, KronfoldError, OutputError
from kronfold.base.files import check_output, write_json
from kronfold.base.results import document, machine
from kronfold.ops.cost import rates_path

HERE = Path(__file__).parent
ALL = (
    "data_preparation",
    "eval_speed",
    "glue_table",
    "healing",
    "large_models",
    "layers",
    "model_speed",
    "permutation_search",
    "quality",
    "startup",
)
SHORTEST = 2e-3  # seconds; shorter jobs are repeated within a turn until they last so long


# Figures


def interleaved(
    jobs: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each job, round by round: A B C A B C, so that a machine that slows down does so for all.

    The first `warm_up` calls are not counted: they load libraries, start threads and build what is kept.
    """

    def taken(job: Callable[[], Any], repeats: int = 1) -> float:
        wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            job()
        wait(device)
        return (time.perf_counter() - started) / repeats

    repeats = {}
    for name, job in jobs.items():
        last = [taken(job) for _ in range(max(1, warm_up))][-1]
        # what the very first call of a short job took says little
        repeats[name] = 1 if last >= SHORTEST else math.ceil(SHORTEST / max(taken(job, 2), 1e-7))
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(taken(job, repeats[name]))
    return seconds


def wait(device: str) -> None:
    """Until the device has done all it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def figure(what: str, value: float, bar: float | None = None, at_most: bool = False) -> dict[str, Any]:
    """One measured figure; `ratio_to_bar` is 1 or above where the bar is met, whichever side is the good one."""
    row: dict[str, Any] = {"what": what, "value": value}
    if bar is not None:
        ratio = float("inf") if at_most and value == 0 else (bar / value if at_most else value / bar)
        row |= {"bar": bar, "sense": "at most" if at_most else "at least", "ratio_to_bar": min(ratio, 1e12)}
    return row


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> Table:
    """The first `words` columns are words, the others numbers and stand to the right."""
    shown = Table(title=title)
    for index, name in enumerate(columns):
        shown.add_column(name, justify="left" if index < words else "right")
    for row in rows:
        shown.add_row(*row)
    return shown


def resident(key: str = "VmHWM") -> int:
    """Bytes of memory of this process, files mapped into it included: VmHWM (peak) or VmRSS (now).

    Where there is no /proc, the peak for both. (Not ru_maxrss on Linux: a new process starts from the peak of the one
    that started it.)
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(f"{key}:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


# What is measured


def gpt2(quick: bool, seed: int, **changes: Any) -> PreTrainedModel:
    """GPT-2 small's shapes with random weights; with `quick` two blocks of width 64 and a vocabulary of 1,000."""
    tiny = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 1000, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(GPT2Config(**{**(tiny if quick else {}), **changes})).eval()


@contextlib.contextmanager
def own_cache() -> Iterator[Path]:
    """A temporary directory, with an empty cache in it: what lies in the user's own must not count, nor be changed."""
    with tempfile.TemporaryDirectory(prefix="kronfold-bench-") as place, environment(KRONFOLD_CACHE=f"{place}/cache"):
        yield Path(place)


@contextlib.contextmanager
def environment(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# One benchmark


@dataclass
class Run:
    """One run of a benchmark.

    Attributes:
        options: what the command line said.
        processes: whether `child` may start one.
        earlier: content of the result file that this run goes on with; empty where it begins one.
    """

    benchmark: Benchmark
    options: argparse.Namespace
    arguments: Sequence[str]
    processes: bool = True
    earlier: dict[str, Any] = field(default_factory=dict)

    def save(self, content: Mapping[str, Any]) -> None:
        """Write the result file, if one was asked for; may be called after every row."""
        if self.options.output:
            write_json(self.options.output, {**self.header(), **content})

    def header(self) -> dict[str, Any]:
        """What every result file begins with."""
        shown = [without_folders(word) for word in self.arguments]
        rates = "measured on this machine" if rates_path().is_file() else "built-in"
        return document(
            "benchmark",
            self.options.seed,
            benchmark=self.benchmark.name,
            command=shlex.join(["python", f"benchmarks/{self.benchmark.name}.py", *shown]),
            revision=revision(),
            threads=torch.get_num_threads(),
            quick=self.options.quick,
            rates=rates,
            settings=settings(self.options),
        ) | {"machine": this_machine(self.options.device)}

    def child(self, job: str, *words: object) -> dict[str, Any]:
        """What `children[job](options, *words)` gives in a process of its own, so that its peak memory is its own."""
        if not self.processes:
            return self.benchmark.children[job](self.options, *map(str, words))
        command = [sys.executable, str(HERE / f"{self.benchmark.name}.py"), *self.arguments]
        command += ["--threads", str(torch.get_num_threads()), "--child", job, *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise KronfoldError(f"Job {job!r} of {self.benchmark.name} ended with exit code {done.returncode}.")
        return json.loads(done.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Benchmark:
    """A script: its docstring, a function that adds its options, one that measures, and jobs for `Run.child`.

    `measure(run)` returns the content of the result file, of which `figures` are shown as a table. `quick`: what the
    options are with --quick, whatever was asked; `rounds`: the default without it. `continues`: rows are taken over
    from `run.earlier`; options named in `selects` only say which rows, the others must be the same.
    """

    name: str
    about: str
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[Run], dict[str, Any]]
    quick: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 5
    children: Mapping[str, Callable[..., dict[str, Any]]] = field(default_factory=dict)
    continues: bool = False
    selects: tuple[str, ...] = ()

    def main(self, arguments: Sequence[str] | None = None, processes: bool = True) -> int:
        """Run it; returns the exit code (0 done, 2 something given cannot be used, 1 another fault)."""
        arguments = list(sys.argv[1:] if arguments is None else arguments)
        made = parser(self.about)
        made.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
        self.add_options(made)
        options = made.parse_args(arguments)
        if options.quick:
            vars(options).update(self.quick)
        if options.rounds is None:
            options.rounds = 1 if options.quick else self.rounds
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        threads = torch.get_num_threads()
        run = Run(self, options, arguments, processes)
        try:
            prepare(options)
            if options.child:
                job, *words = options.child
                print(json.dumps(self.children[job](options, *words)))
                return 0
            run.earlier = check_result(run) if options.output else {}
            content = self.measure(run)
            run.save(content)
        except KronfoldError as error:
            print(f"Error: {error}", file=sys.stderr)
            return error.exit_code
        finally:
            torch.set_num_threads(threads)
        self.show(content.get("figures", ()), options.quick)
        return 0

    def show(self, figures: Sequence[Mapping[str, Any]], quick: bool) -> None:
        cells = []
        for row in figures:
            bar = f"{row['sense']} {row['bar']:g}" if "bar" in row else ""
            ratio = f"{row['ratio_to_bar']:.3g}{'' if row['ratio_to_bar'] >= 1 else ' !'}" if "bar" in row else ""
            cells.append((row["what"], f"{row['value']:,.4g}", bar, ratio))
        console = Console(width=None if sys.stdout.isatty() else 120)
        if cells:
            console.print(table(self.name, ("figure", "measured", "bar", "ratio to bar"), cells))
        barred = [row["ratio_to_bar"] for row in figures if "bar" in row]
        if barred:
            reached = sum(ratio >= 1 for ratio in barred)
            console.print(f"{reached} of {len(barred)} figures reach their bar; the others are marked with !")
        if quick:
            console.print("--quick: these figures mean nothing, they show that the script runs.")


def parser(about: str) -> argparse.ArgumentParser:
    """With the options that all have."""
    made = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes, no other files needed: shows that it runs")
    made.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    made.add_argument("--threads", type=int, help="torch threads; default: as many as torch takes")
    made.add_argument("--rounds", type=int, help="how often each job is timed; default: the script's own")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("-o", "--output", type=Path, help="write everything as JSON")
    made.add_argument("--overwrite", action="store_true", help="replace any result that is there")
    return made


def prepare(options: argparse.Namespace) -> None:
    """Device, threads, seed. Raises InputError."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here. Try --device cpu.")
    for name in ("threads", "rounds"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: give 1 or more.")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they go into the result file."""
    left_out = ("output", "overwrite", "child", "quick", "threads", "seed")

    def shown(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [shown(one) for one in value]
        return without_folders(str(value)) if isinstance(value, str | Path) else value

    return {name: shown(value) for name, value in vars(options).items() if name not in left_out}


def without_folders(word: str) -> str:
    """Of an absolute path, or of NAME=PATH or --option=PATH, the last part: where files lie is nobody's business."""
    name, equals, place = word.rpartition("=")
    return name + equals + (Path(place).name if Path(place).is_absolute() else place)


def check_result(run: Run) -> dict[str, Any]:
    """What stands in the result file, if this run goes on with it; else nothing. Raises OutputError: it may not be
    replaced unasked."""
    options, path = run.options, check_output(run.options.output, allow_existing=True)
    if path.is_dir():
        raise OutputError(f"-o {path} is a directory. Give the name of a JSON file.")
    if options.overwrite or not path.exists():
        return {}
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = None
    here, ours = this_machine(options.device), run.benchmark
    if not isinstance(there, dict) or there.get("benchmark") != ours.name or "machine" not in there:
        fault = f"is no result of this benchmark ({ours.name}), or one of 0.3"
    elif same_machine(there["machine"]) != same_machine(here):
        fault = f"was measured on another machine: {same_machine(there['machine'])}; this one: {same_machine(here)}"
    elif options.quick and not there.get("quick"):
        fault = "holds a full measurement, and this one is --quick"
    elif ours.continues:
        wanted, found = settings(options) | {"seed": options.seed}, there.get("settings", {})
        wanted |= {"quick": options.quick, "threads": torch.get_num_threads()}
        found = {**found, **{key: there.get(key) for key in ("seed", "quick", "threads")}}
        differ = [key for key in wanted if key not in ours.selects and found.get(key) != wanted[key]]
        if not differ:
            return there
        fault = f"was measured with other settings ({', '.join(differ)})"
    else:
        return {}
    raise OutputError(f"{path} {fault}. Choose another -o, or pass --overwrite to replace it.")


def this_machine(device: str) -> dict[str, Any]:
    """Operating system, processor, cores, memory in GB, and the GPU where one is used."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(errors="replace").splitlines() if described.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = {**machine(), "processor": names[0] if names else platform.processor() or platform.machine()}
    if "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gb"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9)
    return found | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {})


def same_machine(found: Mapping[str, Any]) -> str:
    """The part of `this_machine` by which two results are of one machine, to compare and to read."""
    return ", ".join(str(found.get(key, "?")) for key in ("system", "processor", "cores")) + (
        f" cores, {found['gpu']}" if "gpu" in found else " cores"
    )


def revision() -> str | None:
    """Git revision of this checkout, with -dirty where files differ from it; None outside one."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# All of them


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of this file; returns the exit code."""
    made = parser(__doc__ or "")
    made.add_argument("names", nargs="+", choices=("all", *ALL), metavar="NAME", help=f"all, or of {', '.join(ALL)}")
    options = made.parse_args(arguments)
    names = ALL if "all" in options.names else tuple(dict.fromkeys(options.names))
    common = ["--device", options.device, "--seed", str(options.seed)]
    common += [f"--{flag}" for flag in ("quick", "overwrite") if getattr(options, flag)]
    for name in ("threads", "rounds"):
        common += [f"--{name}", str(getattr(options, name))] if getattr(options, name) else []
    codes = {}
    for name in names:
        own = [*common, *(["-o", str(options.output / f"{name}.json")] if options.output else [])]
        print(f"\n{name}", file=sys.stderr, flush=True)
        if options.quick:  # all in this process: loading the libraries takes longer than what is run
            codes[name] = importlib.import_module(name).BENCHMARK.main(own, processes=False)
        else:
            codes[name] = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *own], check=False).returncode
    if failed := [name for name, code in codes.items() if code]:
        print(f"\nFailed: {', '.join(failed)}", file=sys.stderr)
    return max(codes.values())


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(importlib.import_module("bench").main())  # the module that the scripts import, not a second copy of it
