"""Fills pages of the docs from the code: option classes, commands. mkdocs calls it (`hooks` in mkdocs.yml).

A page says `{{ options kronfold.options.healing:HealConfig }}` or `{{ commands }}` where the tables shall stand.
"""

from __future__ import annotations

import importlib
import re
from typing import Any, get_args

MARK = re.compile(r"^\{\{ (\w+)(?: ([\w.:]+))? \}\}$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for every page."""
    return MARK.sub(lambda found: {"options": _options, "commands": _commands}[found[1]](found[2]), markdown)


def _options(path: str) -> str:
    """One table of a pydantic class: field, type, default, help."""
    from kronfold.options import fields_of

    module, name = path.split(":")
    cls = getattr(importlib.import_module(module), name)
    rows = ["| name | type | default | what it says |", "|---|---|---|---|"]
    for field, about in fields_of(cls).items():
        default = "required" if about.is_required() else f"`{about.get_default(call_default_factory=True)!r}`"
        if len(default) > 60:
            default = "see the class"
        rows.append(f"| `{field}` | {_type(about.annotation)} | {default} | {_cell(about.description or '')} |")
    return "\n".join(rows)


def _type(annotation: Any) -> str:
    if args := get_args(annotation):
        return _cell(" or ".join(dict.fromkeys(_type(arg) for arg in args if arg is not type(None))))
    return getattr(annotation, "__name__", str(annotation))


def _commands(_: str | None) -> str:
    """Every command with its options, as --help groups them."""
    import typer

    from kronfold.cli.main import app

    group: Any = typer.main.get_command(app)
    parts = []
    for name, command in _leaves(group, ()):
        parts += [f"## kronfold {name}", "", (command.help or "").strip(), ""]
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            if parameter.name == "help" or getattr(parameter, "hidden", False):
                continue
            argument = parameter.param_type_name == "argument"
            words = [parameter.metavar] if argument else [*parameter.opts, *parameter.secondary_opts]
            spelling = ", ".join(f"`{word}`" for word in words)
            shown = f" Default: `{parameter.default}`." if parameter.default and parameter.show_default else ""
            shown = " Default: `0`." if parameter.default == 0 and parameter.default is not False else shown
            panel = parameter.rich_help_panel or "Arguments"
            text = _cell(getattr(parameter, "help", None) or "")
            panels.setdefault(panel, []).append(f"| {spelling} | {text}{shown} |")
        for panel, rows in panels.items():
            parts += [f"| {panel} | |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def _leaves(command: Any, words: tuple[str, ...]) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        return [(" ".join(words), command)]
    return [leaf for name, child in children.items() for leaf in _leaves(child, (*words, name))]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
