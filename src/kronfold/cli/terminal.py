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
from typing import Any

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
from kronfold.options.shared import ReadsText, SizeBudget
from kronfold.report import numbers

out = Console()
err = Console(stderr=True)


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


def budget(options: SizeBudget) -> Any:
    """The budget asked for, or None. Raises InputError for more than one, or one that is no number."""
    targets = options.targets()
    if not targets:
        return None
    from kronfold.planner.budget import Budget

    return Budget.parse(*(targets.get(unit) for unit in ("params", "ratio", "macs", "bytes")))


def reading(options: ReadsText) -> Any:
    """How text sources are read. Raises InputError."""
    from kronfold.data.bad_rows import Reading

    return Reading.of(options)


def calibration_or_own(texts: list[str]) -> list[str]:
    """The given texts; without any, the prose that ships with the package, and a line that says so."""
    if texts:
        return texts
    from kronfold import assets

    say("No --calibration text: fitting to the documentation prose inside the package. Text like yours fits better.")
    return [str(assets.heal_text())]


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
    from transformers import set_seed
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    processes.start(device)
    if seed is not None:
        set_seed(seed)
    return processes.usable(device)


def resolve_model(name: str) -> str:
    """`demo` means the model that ships inside the package; anything else is passed on."""
    if name != "demo":
        return name
    from kronfold.assets import teacher_path

    return str(teacher_path())
