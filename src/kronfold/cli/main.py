"""The `kronfold` command."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from kronfold import __version__
from kronfold.base.errors import KronfoldError
from kronfold.cli import comparison, compression, conversion, finetuning, inspection, preparation
from kronfold.cli.terminal import err

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


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options of the whole program."""


for room in (compression, comparison, inspection, finetuning, conversion, preparation):
    room.add_to(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line. Exit codes: 0 done, 2 something given cannot be used, 1 a fault of kronfold's own."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        app(arguments)  # ends in SystemExit: 0 when done, 2 for words it does not understand
        return
    except KronfoldError as error:
        _complain(f"Error: {error}", debug)
        code = error.exit_code
    except Exception as error:
        _complain(
            f"Internal error: {type(error).__name__}: {error}\nThis is a fault of kronfold, not of yours. "
            "Run the command again with --debug and report what it prints.",
            debug,
        )
        code = 1
    sys.exit(code)


def _complain(text: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    err.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
