"""The one look of all terminal tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table


def simple_table(title: str, columns: Sequence[str], numeric_from: int) -> Table:
    """A light table; columns from `numeric_from` on hold numbers and never wrap."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        number = index >= numeric_from
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table
