"""Terminal tables for plans that met a budget, and for the difference of two plans."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from kronfold.report import numbers
from kronfold.report.document import Document, check_document
from kronfold.report.simple_table import simple_table

SHOWN_REASONS = 5
UNITS = {"params": "held parameters", "macs": "multiply-accumulates per token", "bytes": "bytes at fp16"}


def budget_tables(plan: Document) -> RenderableType:
    """What a budget was spent on: one line per kind of matrix, then the choices that cost most, then the totals."""
    kinds: dict[str, list[Document]] = {}
    for row in plan["rows"]:
        kinds.setdefault(_kind(row["name"]), []).append(row)
    dense: dict[str, int] = {}
    for name in plan["budget"]["left_dense"]:
        dense[_kind(name)] = dense.get(_kind(name), 0) + 1
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
            f"{held / teacher:.1%}" if rows else "",
            f"{sum(row['predicted_loss'] for row in rows):.4f}" if rows else "",
        )
    return Group(table, _reasons(plan["rows"]), _budget_line(plan["budget"]))


def _kind(name: str) -> str:
    """`model.layers.3.mlp.up_proj` and its like in other blocks: `mlp.up_proj`."""
    return re.sub(r"^.*?\.\d+\.", "", name)


def _structures(rows: Sequence[Document]) -> str:
    found: dict[str, list[str]] = {}
    for row in rows:
        rank = row["spec"].get("rank")
        found.setdefault(row["structure"], []).append("" if rank is None else str(rank))
    said = []
    for structure, ranks in found.items():
        counts = sorted({int(rank) for rank in ranks if rank})
        if len(rows) == 1 or not counts:
            said.append(structure if len(rows) > 1 else f"{structure}, {rows[0]['label']}")
        else:
            span = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
            said.append(f"{structure}, rank {span}")
    return "; ".join(said) or "dense"


def _reasons(rows: Sequence[Document]) -> Table:
    worst = sorted(rows, key=lambda row: -row["predicted_loss"])[:SHOWN_REASONS]
    table = simple_table("Where the loss is spent (all rows: --json)", ["Matrix", "Choice", "Why"], 3)
    for row in worst:
        table.add_row(Text(row["name"]), Text(str(row["label"])), Text(str(row.get("why", ""))))
    return table


def _budget_line(budget: Document) -> Text:
    said = (
        f"Budget {budget['amount']:,.0f} {UNITS[budget['unit']]}, met by {budget['met_by']:,.0f} (floor "
        f"{budget['floor']:,.0f}). Predicted loss increase {budget['predicted_loss']:.4f} nats per token, within "
        f"{budget['optimality_gap']:.1e} of the best choice for these predictions."
    )
    return Text(said)


def diff_table(document: Document) -> RenderableType:
    """The difference of two plans: totals, then every weight they treat differently."""
    check_document(document, "plan-diff")
    totals = simple_table("Plans compared", ["", "A", "B"], 1)
    for title, key in (
        ("Recipe", "recipe"),
        ("Held parameters", "held_parameters"),
        ("Multiply-accumulates per token", "macs_per_token"),
        ("Bytes at fp16", "bytes_fp16"),
        ("Predicted loss (nats)", "predicted_loss"),
    ):
        totals.add_row(title, *(_shown(document[side][key]) for side in ("a", "b")))
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


def _shown(value: object) -> str:
    if isinstance(value, int):
        return numbers.count(value)
    return f"{value:.4f}" if isinstance(value, float) else str(value or "")


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
