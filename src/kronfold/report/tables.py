"""Tables for the terminal: what a plan would do, and what a run did. They fit 100 columns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kronfold.report import numbers
from kronfold.report.document import Document, check_document, matrices, measured, plain_stages, short_names
from kronfold.report.plans import budget_tables
from kronfold.report.simple_table import simple_table


def run_summary(results: Document) -> RenderableType:
    """Sizes, perplexity with its controls, stages, matrices and text samples of a run document, for `rich.print`.

    Raises:
        InputError: the document is not a run result of a version this kronfold reads.
    """
    check_document(results, "run")
    parts: list[RenderableType] = []
    if not results.get("complete", True):
        parts.append(Text("This run is not finished; continue it with --resume.", style="bold yellow"))
    parts += [_sizes(results), _controls(results)]
    kept = [stage["layers"] for stage in results["stages"] if stage.get("layers")]
    parts += [Text(f"Blocks kept: {numbers.kept_layers(layers)}") for layers in kept]
    if results.get("gathers"):
        parts.append(Text(gathers_line(results["gathers"]) + "\n"))
    if results["stages"]:
        parts.append(_stages(results))
    if matrices(results):
        parts.append(_matrices(results))
    if results.get("samples"):
        parts.append(_samples(results))
    return Group(*parts)


def _samples(results: Document) -> Table:
    """What each model writes after the same prompt, on as few lines as it takes."""
    table = simple_table("Text samples", ["Model", "Text"], 2)
    for sample in results["samples"]:
        table.add_row(Text(str(sample["who"])), Text(" ".join(str(sample["text"]).split())))
    return table


def _sizes(results: Document) -> Table:
    teacher = results["teacher"]
    table = simple_table(
        f"{escape(str(results['model']))} · {escape(str(results['recipe'].get('name')))}",
        ["", "Teacher", "Compressed", "Of teacher", ""],
        1,
    )
    for title, key in (
        ("Held parameters", "held_parameters"),
        ("Multiply-accumulates per token", "macs_per_token"),
        ("Bytes at fp16", "bytes_fp16"),
    ):
        before, after = teacher.get(key), results.get(key)
        ratio = numbers.share(after, before), numbers.smaller(before, after)
        table.add_row(title, numbers.count(before), numbers.count(after), *ratio)
    if results.get("index_bytes"):
        table.add_row("Bytes of permutations beside it", "", numbers.count(results["index_bytes"]), "", "")
    return table


def _controls(results: Document) -> Table:
    table = simple_table(
        f"Perplexity, protocol {escape(numbers.protocol_short(results['protocol']))}",
        ["Model", "Held parameters", "Tokens trained", "Perplexity", "Excess"],
        1,
    )
    for number, row in enumerate(measured(results)):
        table.add_row(
            row.who,
            numbers.count(row.held_parameters),
            numbers.count(row.tokens),
            numbers.perplexity(row.perplexity),
            numbers.signed_percent(row.excess) if number else "",
            style="bold" if row.ours else None,
        )
    return table


def _stages(results: Document) -> Table:
    table = simple_table("Stages", ["Stage", "Before", "Healed", "Tokens", "Compressing", "Healing"], 1)
    for mark, stages in (("", results["stages"]), (" (plain Kronecker)", plain_stages(results))):
        for stage in stages:
            table.add_row(
                escape(str(stage["name"])) + mark,
                numbers.perplexity(stage.get("before_healing")),
                numbers.perplexity(stage.get("after_healing")),
                numbers.count(stage.get("tokens")),
                numbers.duration(stage.get("decompose_seconds")),
                numbers.duration(stage.get("seconds")),
            )
    return table


def _matrices(results: Document) -> Table:
    table = simple_table("Replaced matrices", ["Matrix", "Structure", "Held", "Relative error", "Plain"], 2)
    for matrix in matrices(results):
        row = matrix.row
        table.add_row(
            escape(matrix.label),
            escape(f"{row['structure']} {numbers.shape(row)}"),
            numbers.count(row["held_parameters"]),
            numbers.error(row.get("relative_error")),
            numbers.error(row.get("relative_error_plain")),
        )
    return table


def plan_table(plan: Document) -> RenderableType:
    """A plan document for `rich.print`: one line per replaced matrix, equal ones of many blocks on one line.

    Raises:
        InputError: the document is not a plan of a version this kronfold reads.
    """
    check_document(plan, "plan")
    if plan.get("budget"):
        return Group(budget_tables(plan), _plan_totals(plan))
    rows: list[Document] = list(plan["rows"])
    short = short_names(row["name"] for row in rows)
    groups: dict[tuple[Any, ...], list[Document]] = {}
    for row in rows:
        key = ("stage", "structure", "held_parameters", "teacher_parameters")
        pattern = re.sub(r"\d+", "#", row["name"], count=1)
        groups.setdefault((*(row.get(k) for k in key), str(row.get("spec")), pattern), []).append(row)
    totals: list[RenderableType] = [_plan_totals(plan)]
    kept: list[RenderableType] = []
    if plan.get("gathers"):
        totals.append(Text(gathers_line(plan["gathers"])))
    if plan.get("layers"):
        kept.append(Text(f"Blocks kept: {numbers.kept_layers(plan['layers'])}"))
    if not rows:
        return Group(*kept, *totals)
    kept += [Text("Names below count the blocks that are left.")] if kept else []
    fitted = any(row.get("relative_error") is not None for row in rows)  # a bare config has no errors to show
    table = simple_table(
        "Plan", ["Matrix", "Rank x A⊗B", "Held", "Teacher", *(["Relative error"] if fitted else [])], 2
    )
    heading = None
    for (stage, structure, *_), members in groups.items():
        if heading != (heading := f"{stage} · {structure}"):
            table.add_row(Text(heading, style="bold"))
        first = members[0]
        table.add_row(
            Text(" " + _joined([short[row["name"]] for row in members])),
            Text(first.get("label") or numbers.spec(first["spec"])),
            numbers.count(sum(row["held_parameters"] for row in members)),
            numbers.count(sum(row["teacher_parameters"] for row in members)),
            *([_error_range([row.get("relative_error") for row in members])] if fitted else []),
        )
    return Group(*kept, table, *totals)


def gathers_line(gathers: Document) -> str:
    """The `gathers` entry of a document in words: how many are absorbed, how many remain, which, and their bytes."""
    names = list(gathers["remaining"])
    absorbed = f"{gathers['absorbed']:,} absorbed by neighbouring layers, " if gathers["absorbed"] else ""
    if not names:
        return f"Gathers: {absorbed}none remain."
    short = short_names(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\d+", "#", name, count=1), []).append(short[name])
    listed = ", ".join(_joined(members) for members in groups.values())
    return f"Gathers: {absorbed}{len(names):,} remain ({gathers['bytes']:,} bytes): {listed}"


def _joined(names: Sequence[str]) -> str:
    """Names that differ in their first number only, as one: `h.{1,3,5}.mlp.c_fc`; long rows with dots."""
    if len(names) == 1:
        return names[0]
    found = [int(match.group()) for name in names if (match := re.search(r"\d+", name))]
    regular = len({b - a for a, b in itertools.pairwise(found)}) == 1
    if len(found) > 6 and regular:
        return re.sub(r"\d+", f"{{{found[0]},{found[1]},…,{found[-1]}}}", names[0], count=1) + f" ×{len(found)}"
    return re.sub(r"\d+", f"{{{','.join(map(str, found))}}}", names[0], count=1)


def _error_range(errors: Sequence[Any]) -> str:
    found = [value for value in errors if numbers.known(value)]
    if not found:
        return numbers.NOT_MEASURED
    low, high = numbers.error(min(found)), numbers.error(max(found))
    return low if low == high else f"{low}–{high}"


def _plan_totals(plan: Document) -> Table:
    table = simple_table("", ["", "Teacher", "Planned", "Of teacher", ""], 1)
    for title, key in (
        ("Held parameters", "held_parameters"),
        ("Multiply-accumulates per token", "macs_per_token"),
        ("Bytes at fp16", "bytes_fp16"),
        ("Bytes at fp32", "bytes_fp32"),
    ):
        before, after = plan.get(f"teacher_{key.removeprefix('held_')}"), plan.get(key)
        ratio = (numbers.share(after, before), numbers.smaller(before, after)) if before else ("", "")
        table.add_row(title, numbers.count(before) if before else "", numbers.count(after), *ratio)
    if plan.get("index_bytes"):
        table.add_row("Bytes of permutations beside it", "", numbers.count(plan["index_bytes"]), "", "")
    return table
