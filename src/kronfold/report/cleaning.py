"""The table of a cleaning run: what each filter took away."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from kronfold.report.simple_table import simple_table


def cleaning_table(manifest: dict[str, Any]) -> Table:
    """Documents, words and lines dropped per filter, in the order of action, and what is left, of a clean manifest."""
    table = simple_table("Cleaning", ["Filter", "Documents dropped", "Words dropped", "Lines dropped", "Repaired"], 1)
    for entry in manifest["filters"]:
        lines = sum(entry.get("lines_dropped", {}).values())
        table.add_row(
            entry["filter"],
            f"{entry['documents_in'] - entry['documents_out']:,}",
            f"{entry['words_in'] - entry['words_out']:,}",
            f"{lines:,}" if "lines_dropped" in entry else "",
            f"{entry['documents_changed']:,}" if "documents_changed" in entry else "",
        )
    found, left = manifest["input"], manifest["output"]
    table.caption = (
        f"{left['documents']:,} of {found['documents']:,} documents and "
        f"{left['words']:,} of {found['words']:,} words are left."
    )
    return table
