"""The `kronfold` command."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated

import typer

from kronfold import __version__
from kronfold.base import processes
from kronfold.base.errors import InputError, Interrupted, KronfoldError
from kronfold.cli import compression, measuring, preparation
from kronfold.cli.terminal import err, interrupted_line, interruptible

app = typer.Typer(
    name="kronfold",
    help="Make GPT-style language models smaller, heal them, compare the ways to do it, load the result anywhere.",
    epilog="Add --debug to any command to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"kronfold {__version__}")
        raise typer.Exit


_TOGETHER = ("demo", "heal", "run", "eval")  # commands that several processes do together


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the whole program."""
    command = context.invoked_subcommand
    if processes.count() > 1 and command not in _TOGETHER:
        raise InputError(
            f"kronfold {command} runs in one process and {processes.count()} were started. Start it without the "
            f"launcher; {', '.join(_TOGETHER)} share their work."
        )


for room in (compression, measuring, preparation):
    room.add_to(app)


def _no_news(record: logging.LogRecord) -> bool:
    """accelerate loads DeepSpeed, where it is installed, with every model saved; without a GPU it then says so."""
    return "Setting accelerator to CPU" not in record.getMessage()


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 something given cannot be used, 1 a fault of kronfold's own,
    130 after Ctrl-C, 143 after SIGTERM.

    Of several processes only the main one prints; of an error, only the process that met it first.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    logging.getLogger("DeepSpeed").addFilter(_no_news)
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with _silent_unless_main(debug), interruptible():
            app(arguments)  # ends in SystemExit: 0 when done, 2 for words it does not understand
        return
    except SystemExit as end:
        if not end.code:
            processes.stop()
        elif not processes.is_main():
            processes.hold_on()  # the main process met the same, and says so
        raise
    except Interrupted as stop:
        if debug:
            traceback.print_exc()
        if processes.is_main():
            err.print(interrupted_line(stop, arguments), highlight=False, markup=False, soft_wrap=True)
        sys.exit(128 + stop.signal)
    except KronfoldError as error:
        text, code = f"Error: {error}", error.exit_code
        if debug:
            traceback.print_exc()
    except Exception as error:
        text, code = (
            (
                f"Internal error: {type(error).__name__}: {error}\nThis is a fault of kronfold, not of yours. "
                "Run the command again with --debug and report what it prints."
            ),
            1,
        )
        if debug:
            traceback.print_exc()
    if processes.speaks_for_all():
        err.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


@contextlib.contextmanager
def _silent_unless_main(debug: bool) -> Iterator[None]:
    """Results, progress and warnings would otherwise come once from every process."""
    if processes.is_main() or debug:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield
