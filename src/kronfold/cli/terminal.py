"""What all commands share: results on stdout, everything else on stderr, progress bars with ETA."""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from kronfold.base import processes
from kronfold.base.errors import Interrupted
from kronfold.base.progress import Progress, State
from kronfold.report import numbers

out = Console()
err = Console(stderr=True)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A directory, a hub id, a .gguf file, config:NAME, or demo.", show_default=False
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="A directory, a hub id, a .gguf file, config:NAME, or demo.", show_default=False
    ),
]
Cache = Annotated[
    bool, typer.Option(help="Keep calibration statistics in $KRONFOLD_CACHE (~/.cache/kronfold) for the next budget.")
]
Output = Annotated[str | None, typer.Option("--output", "-o", help="Where the result goes.", show_default=False)]
RecipeName = Annotated[str, typer.Option("--recipe", "-r", help="Name of a shipped recipe, or a YAML file.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; auto takes CUDA if there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, float16 or bfloat16 of the saved weights; default: as in MODEL.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
MicroBatch = Annotated[
    int | None,
    typer.Option(help="The most windows a process takes at once; changes memory only.", show_default=False),
]
Train = Annotated[bool, typer.Option("--train", help="Also what healing takes: memory per device, tokens, steps.")]
HealTokens = Annotated[
    int | None,
    typer.Option(help="Healing budget over all stages; default: the recipe's own.", show_default=False),
]
BatchSize = Annotated[
    int | None,
    typer.Option(help="With --train: windows per step, over all processes; default: the recipe's.", show_default=False),
]
BlockSize = Annotated[int | None, typer.Option(help="Training window in tokens.", show_default=False)]
Processes = Annotated[int, typer.Option(help="With --train: processes, one for each device.")]
Precision = Annotated[str, typer.Option(help="With --train: bf16 or fp32 matrix products.")]
Sharded = Annotated[bool, typer.Option("--sharded", help="With --train: the student split over the processes (FSDP2).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]
Calibration = Annotated[
    list[str] | None,
    typer.Option(help="Text to fit the layers to, like what the model will read; may be repeated.", show_default=False),
]
CalibrationWindows = Annotated[
    int | None, typer.Option(help="Windows of calibration text; default: the recipe's (128).", show_default=False)
]
Structures = Annotated[
    str | None,
    typer.Option(help="What the planner may choose: low_rank, kronecker; comma-separated.", show_default=False),
]
TargetParams = Annotated[str | None, typer.Option(help="Budget in held parameters, e.g. 81M.", show_default=False)]
TargetRatio = Annotated[
    float | None, typer.Option(help="Budget as a share of the held parameters, e.g. 0.65.", show_default=False)
]
TargetMacs = Annotated[
    str | None, typer.Option(help="Budget in multiply-accumulates per token, e.g. 60M.", show_default=False)
]
TargetBytes = Annotated[str | None, typer.Option(help="Budget in bytes in fp16, e.g. 160MB.", show_default=False)]
Text = Annotated[
    str,
    typer.Option(
        help=".txt, .jsonl or .parquet (also .gz, .zst), a directory of them, or a datasets id: ID, ID:CONFIG@SPLIT."
    ),
]
TextColumnName = Annotated[
    str,
    typer.Option(
        "--text-column", help="Column of the text in rows; several, comma-separated: the first that a row has."
    ),
]
MaxBadRows = Annotated[
    str | None,
    typer.Option(
        metavar="N|N%",
        help="Rows without text that are skipped at most; default: 100 or 1%, whichever is more, and below half.",
        show_default=False,
    ),
]


def emit(document: dict[str, Any], as_json: bool, *readable: Any) -> None:
    """Print a result: the document as JSON, or the readable renderables."""
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        return
    for item in readable:
        out.print(item)


def say(text: str) -> None:
    """A line for the person watching; never part of the result."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


LOG_EVERY = 30.0  # seconds between two lines about one step, where there is no terminal


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yields a `Progress` that shows one bar on stderr, with elapsed time and time left.

    Where stderr is no terminal, each step is announced by one line, and followed by another every 30 s. What libraries
    print on stdout meanwhile (DeepSpeed logs there) goes to stderr: stdout is for results.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if not err.is_terminal:
            yield Progress(log_lines())
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=err, transient=True) as bars:
            yield Progress(one_bar(bars))


def one_bar(bars: Bars) -> Callable[[State], None]:
    """Shows a step as the one task of `bars`; the next step takes its place."""
    shown: dict[str, Any] = {"task": None}

    def show(state: State) -> None:
        if state.first:
            if shown["task"] is not None:
                bars.remove_task(shown["task"])
            shown["task"] = bars.add_task(state.step, total=state.total)
        item = [str(state.facts["item"])] if "item" in state.facts else []
        said = " ".join([state.step, *item])
        bars.update(
            shown["task"], description=", ".join([said, *_told(state)]), completed=state.done, total=state.total
        )

    return show


def log_lines(clock: Callable[[], float] = time.monotonic) -> Callable[[State], None]:
    """Prints a line when a step begins, and one every `LOG_EVERY` seconds of it: done, loss, tokens/s, time left."""
    last: dict[str, Any] = {"step": None, "at": 0.0}

    def show(state: State) -> None:
        now = clock()
        if state.first and state.step != last["step"]:
            say(f"{state.step} ...")
            last.update(step=state.step, at=now)
        elif now - last["at"] >= LOG_EVERY:
            left = [f"{numbers.duration(state.left)} left"] if state.left else []
            say(", ".join([f"{state.step}: {state.done:,} of {state.total:,}", *_told(state), *left]))
            last["at"] = now

    return show


def _told(state: State) -> list[str]:
    """Loss and tokens per second in words, where they are known."""
    loss, pace = state.facts.get("loss"), state.tokens_per_second
    return [*([] if loss is None else [f"loss {loss:.3f}"]), *([] if pace is None else [f"{pace:,.0f} tokens/s"])]


def budget(params: str | None, ratio: float | None, macs: str | None, bytes_: str | None) -> Any:
    """The budget asked for, or None. Raises InputError for more than one, or one that is no number."""
    if params is None and ratio is None and macs is None and bytes_ is None:
        return None
    from kronfold.planner.budget import Budget

    return Budget.parse(params, ratio, macs, bytes_)


def reading(text_column: str, max_bad_rows: str | None) -> Any:
    """How text sources are read. Raises InputError."""
    from kronfold.data.bad_rows import Reading

    return Reading(text_column, max_bad_rows)


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """`value` if it is allowed. Raises InputError with the nearest names."""
    from kronfold.base.errors import InputError, suggest

    if value not in allowed:
        raise InputError(f"{option} {value!r} is unknown. {suggest(value, allowed)}")
    return value


def calibration_or_own(texts: list[str] | None) -> list[str]:
    """The given texts; without any, the prose that ships with the package, and a line that says so."""
    if texts:
        return texts
    from kronfold import assets

    say("No --calibration text: fitting to the documentation prose inside the package. Text like yours fits better.")
    return [str(assets.heal_text())]


def planner_changes(
    windows: int | None, structures: str | None, sequential: bool | None = None, adapt: bool | None = None
) -> dict[str, Any]:
    """Fields of a recipe's `auto` entry that the command changes; adapting is done in sequence."""
    changes = {
        "windows": windows,
        "structures": structures.split(",") if structures else None,
        "sequential": True if adapt and sequential is None else sequential,
        "adapt": adapt,
    }
    return {key: value for key, value in changes.items() if value is not None}


def named_values(pairs: list[str] | None, option: str) -> dict[str, Any]:
    """`["hidden=1", "teacher_layers=[0, 2]"]` as a dict; values are read as YAML. Raises InputError for other forms."""
    import yaml

    from kronfold.base.errors import InputError

    found: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not (name and equals and value):
            raise InputError(f"{option} {pair!r} must be NAME=VALUE, such as {option} hidden=1.")
        if name in found:
            raise InputError(f"{option} names {name!r} twice; give it once.")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"{option} {pair!r}: {value!r} cannot be read as a number, word or [list].") from error
    return found


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM become `Interrupted`, once; a second one ends the process at once, and loses nothing more."""

    def stop(number: int, _frame: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise Interrupted(number)

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    if threading.current_thread() is not threading.main_thread():
        heard = []
    before = {number: signal.getsignal(number) for number in heard}
    try:
        for number in heard:
            signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupted_line(stop: Interrupted, arguments: Sequence[str]) -> str:
    """What is kept of a command that was ended from outside, and how to go on."""
    what = "Interrupted" if stop.signal == signal.SIGINT else f"Ended by {signal.Signals(stop.signal).name}"
    if stop.kept is None:
        return f"{what}. Nothing is kept of this command; what was there before it is unchanged."
    again = [argument for argument in arguments if argument != "--resume"]
    command = shlex.join(["kronfold", *again, "--resume"])
    if processes.count() > 1:
        command += " (under the same launcher)"
    return f"{what}. What is done so far is kept in {stop.kept}; go on with: {command}"


def prepare(device: str = "cpu", seed: int | None = None) -> str:
    """Quieten the libraries, set the seed, and resolve the device. Raises InputError for one that is not there."""
    import torch
    from transformers import set_seed
    from transformers.utils import logging

    from kronfold.base.errors import InputError

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    processes.start(device)
    if seed is not None:
        set_seed(seed)
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in device:
        raise InputError(f"Device {device!r}: choose one GPU with CUDA_VISIBLE_DEVICES and give --device cuda.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"Device {device!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}. Try --device cpu."
        ) from error
    return device


def resolve_model(name: str) -> str:
    """`demo` means the model that ships inside the package; anything else is passed on."""
    if name != "demo":
        return name
    from kronfold.assets import teacher_path

    return str(teacher_path())
