"""Plans for the terminal: what would become of every matrix, what a budget was spent on, how two plans differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kronfold.base import results
from kronfold.report import numbers
from kronfold.report.document import Document, short_names
from kronfold.report.tables import gathers_line, joined, simple_table

SHOWN_REASONS = 5
UNITS = {"params": "held parameters", "macs": "multiply-accumulates per token", "bytes": "bytes at fp16"}


def plan_table(plan: Document) -> RenderableType:
    """A plan document for `rich.print`: one line per replaced matrix, equal ones of many blocks on one line.

    Raises:
        InputError: the document is not a plan of a version this kronfold reads.
    """
    results.check(plan, "plan")
    totals: list[RenderableType] = [_totals(plan)]
    if plan.get("budget"):
        return Group(_spent(plan), *totals)
    rows: list[Document] = list(plan["rows"])
    short = short_names(row["name"] for row in rows)
    groups: dict[tuple[Any, ...], list[Document]] = {}
    for row in rows:
        key = ("stage", "structure", "held_parameters", "teacher_parameters")
        pattern = re.sub(r"\d+", "#", row["name"], count=1)
        groups.setdefault((*(row.get(k) for k in key), str(row.get("spec")), pattern), []).append(row)
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
        errors = [row["relative_error"] for row in members if numbers.known(row.get("relative_error"))]
        span = [numbers.error(min(errors)), numbers.error(max(errors))] if errors else [numbers.NOT_MEASURED]
        table.add_row(
            Text(" " + joined([short[row["name"]] for row in members])),
            Text(first.get("label") or numbers.spec(first["spec"])),
            numbers.count(sum(row["held_parameters"] for row in members)),
            numbers.count(sum(row["teacher_parameters"] for row in members)),
            *(["–".join(dict.fromkeys(span))] if fitted else []),
        )
    return Group(*kept, table, *totals)


def _spent(plan: Document) -> RenderableType:
    """What a budget was spent on: one line per kind of matrix, then the choices that cost most, then the totals."""

    def kind_of(name: str) -> str:
        """`model.layers.3.mlp.up_proj` and its like in other blocks: `mlp.up_proj`."""
        return re.sub(r"^.*?\.\d+\.", "", name)

    kinds: dict[str, list[Document]] = {}
    for row in plan["rows"]:
        kinds.setdefault(kind_of(row["name"]), []).append(row)
    budget, dense = plan["budget"], dict[str, int]()
    for name in budget.get("left_dense", []):
        dense[kind_of(name)] = dense.get(kind_of(name), 0) + 1
    table = simple_table(
        "Plan, by kind of matrix", ["Matrix", "Structure", "Changed", "Dense", "Kept", "Loss (nats)"], 2
    )
    for kind in [*kinds, *(kind for kind in dense if kind not in kinds)]:
        rows = kinds.get(kind, [])
        held, teacher = (sum(row[key] for row in rows) for key in ("held_parameters", "teacher_parameters"))
        table.add_row(
            Text(kind),
            Text(_structures(rows)),
            numbers.count(len(rows)),
            numbers.count(dense.get(kind, 0)),
            f"{held / teacher:.1%}" if teacher else "",
            f"{sum(row['predicted_loss'] for row in rows):.4f}" if rows else "",
        )
    reasons = simple_table("Where the loss is spent (all rows: --json)", ["Matrix", "Choice", "Why"], 3)
    for row in sorted(plan["rows"], key=lambda row: -row["predicted_loss"])[:SHOWN_REASONS]:
        reasons.add_row(Text(row["name"]), Text(str(row.get("label"))), Text(str(row.get("why", ""))))
    said = (
        f"Budget {budget['amount']:,.0f} {UNITS.get(budget['unit'], budget['unit'])}, met by {budget['met_by']:,.0f} "
        f"(floor {budget['floor']:,.0f}). Predicted loss increase {budget['predicted_loss']:.4f} nats per token, "
        f"within {budget['optimality_gap']:.1e} of the best choice for these predictions."
    )
    return Group(table, reasons, Text(said))


def _structures(rows: Sequence[Document]) -> str:
    """What the rows of one kind become: `low_rank, rank 20 to 88; kronecker`."""
    found: dict[str, set[int]] = {}
    for row in rows:
        rank = row["spec"].get("rank")
        found.setdefault(row["structure"], set()).update([rank] if isinstance(rank, int) and rank else [])
    said = []
    for structure, ranks in found.items():
        if structure == "kronecker" or not ranks:
            said.append(structure if len(rows) > 1 else f"{structure}, {rows[0].get('label')}")
        else:
            span = f"{min(ranks)} to {max(ranks)}" if len(ranks) > 1 else str(*ranks)
            said.append(f"{structure}, rank {span}")
    return "; ".join(said) or "dense"


def _totals(plan: Document) -> Table:
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


def diff_table(document: Document) -> RenderableType:
    """The difference of two plans: totals, then every weight they treat differently. Raises InputError."""
    results.check(document, "plan-diff")
    totals = simple_table("Plans compared", ["", "A", "B"], 1)
    for title, key in (
        ("Recipe", "recipe"),
        ("Held parameters", "held_parameters"),
        ("Multiply-accumulates per token", "macs_per_token"),
        ("Bytes at fp16", "bytes_fp16"),
        ("Predicted loss (nats)", "predicted_loss"),
    ):
        cells = []
        for side in ("a", "b"):
            value = document[side].get(key)
            whole = numbers.count(value) if isinstance(value, int) else str(value or "")
            cells.append(f"{value:.4f}" if isinstance(value, float) else whole)
        totals.add_row(title, *cells)
    for side in ("a", "b"):
        if layers := document[side].get("layers"):
            kept = numbers.kept_layers(layers)
            totals.add_row(f"Blocks kept by {side.upper()}", *([kept, ""] if side == "a" else ["", kept]))
    if not document["rows"]:
        return Group(totals, Text(f"The plans agree in all {document['equal_rows']} rows."))
    table = simple_table(
        f"{len(document['rows'])} weights differ, {document['equal_rows']} do not",
        ["Matrix", "A", "B", "Held A", "Held B"],
        3,
    )
    for row in document["rows"]:
        held = (numbers.count(row[f"{side}_held_parameters"]) for side in ("a", "b"))
        table.add_row(Text(row["name"]), Text(row["a_label"]), Text(row["b_label"]), *held)
    return Group(totals, table)


_PARTS = {
    "weights": "weights of the student, fp32",
    "gradients": "their gradients",
    "optimiser": "AdamW's two moments",
    "buckets": "DDP's buckets of gradients",
    "gathered": "what FSDP2 gathers for a moment",
    "copies": "bf16 copies of the weights",
    "teacher": "the teacher",
    "activations": "activations of a micro-batch",
    "logits": "logits of a chunk, and their gradient",
}


def training_table(training: Document) -> RenderableType:
    """Memory per device by what it is for, then tokens and steps (the `training` entry of a plan)."""
    processes = training["processes"]
    how = "sharded (FSDP2)" if training["sharded"] else "a copy in each (DDP)" if processes > 1 else "one device"
    table = simple_table(f"Healing on {processes} device(s), {how}, {training['precision']}", ["Per device", "Size"], 1)
    for name, size in training["memory"].items():
        if size:
            table.add_row(Text(_PARTS[name]), numbers.size(size))
    table.add_row(Text("in all", style="bold"), numbers.size(training["memory_per_device"]))
    said = (
        f"Each step {training['tokens_per_step']:,} tokens: {training['batch']} blocks of {training['block']:,}, "
        f"{training['micro_batch']} at once in each process, {training['accumulate']} time(s). "
        f"{training['steps']:,} steps for {training['tokens']:,} tokens."
    )
    return Group(table, Text(said))
