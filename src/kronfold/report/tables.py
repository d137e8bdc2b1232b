"""What commands print: a run with its controls, suites of measurements, fine-tunings, cleanings. Fits 100 columns."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kronfold.base import results
from kronfold.report import numbers
from kronfold.report.document import Document, matrices, measured, plain_stages, short_names


def simple_table(title: str, columns: Sequence[str], numeric_from: int) -> Table:
    """The one look of all tables: light; columns from `numeric_from` on hold numbers and never wrap."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        number = index >= numeric_from
        table.add_column(name, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def run_summary(run: Document) -> RenderableType:
    """Sizes, perplexity with its controls, stages, matrices and text samples of a run document, for `rich.print`.

    Raises:
        InputError: the document is not a run result of a version this kronfold reads.
    """
    results.check(run, "run")
    parts: list[RenderableType] = []
    if not run.get("complete", True):
        parts.append(Text("This run is not finished; continue it with --resume.", style="bold yellow"))
    parts += [_sizes(run), _controls(run)]
    kept = [stage["layers"] for stage in run["stages"] if stage.get("layers")]
    parts += [Text(f"Blocks kept: {numbers.kept_layers(layers)}") for layers in kept]
    if run.get("gathers"):
        parts.append(Text(gathers_line(run["gathers"]) + "\n"))
    if run["stages"]:
        parts.append(_stages(run))
    if found := matrices(run):
        table = simple_table("Replaced matrices", ["Matrix", "Structure", "Held", "Relative error", "Plain"], 2)
        for matrix in found:
            row = matrix.row
            table.add_row(
                escape(matrix.label),
                escape(f"{row['structure']} {numbers.shape(row)}"),
                numbers.count(row["held_parameters"]),
                numbers.error(row.get("relative_error")),
                numbers.error(row.get("relative_error_plain")),
            )
        parts.append(table)
    if run.get("samples"):  # on as few lines as it takes
        table = simple_table("Text samples", ["Model", "Text"], 2)
        for sample in run["samples"]:
            table.add_row(Text(str(sample["who"])), Text(" ".join(str(sample["text"]).split())))
        parts.append(table)
    return Group(*parts)


def _sizes(run: Document) -> Table:
    teacher = run["teacher"]
    table = simple_table(
        f"{escape(str(run['model']))} · {escape(str(run['recipe'].get('name')))}",
        ["", "Teacher", "Compressed", "Of teacher", ""],
        1,
    )
    for title, key in (
        ("Held parameters", "held_parameters"),
        ("Multiply-accumulates per token", "macs_per_token"),
        ("Bytes at fp16", "bytes_fp16"),
    ):
        before, after = teacher.get(key), run.get(key)
        ratio = numbers.share(after, before), numbers.smaller(before, after)
        table.add_row(title, numbers.count(before), numbers.count(after), *ratio)
    if run.get("index_bytes"):
        table.add_row("Bytes of permutations beside it", "", numbers.count(run["index_bytes"]), "", "")
    return table


def _controls(run: Document) -> Table:
    rows = measured(run)
    rated = any(row.learning_rate for row in rows)  # documents of 0.3 do not say
    table = simple_table(
        f"Perplexity, protocol {escape(numbers.protocol_short(run['protocol']))}",
        ["Model", "Held", "Tokens trained", *(["Rate"] if rated else []), "Perplexity", "Excess"],
        1,
    )
    for number, row in enumerate(rows):
        table.add_row(
            escape(row.who),
            numbers.count(row.held_parameters),
            numbers.count(row.tokens),
            *([numbers.rate(row.learning_rate)] if rated else []),
            numbers.perplexity(row.perplexity),
            numbers.signed_percent(row.excess) if number else "",
            style="bold" if row.ours else None,
        )
    return table


def _stages(run: Document) -> Table:
    table = simple_table("Stages", ["Stage", "Before", "Healed", "Tokens", "Compressing", "Healing"], 1)
    tracks = [("", run["stages"]), (" (plain Kronecker)", plain_stages(run))]
    for mark, stages in [*tracks, *([(" (beside)", run["beside"]["stages"])] if run.get("beside") else [])]:
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
    listed = ", ".join(joined(members) for members in groups.values())
    return f"Gathers: {absorbed}{len(names):,} remain ({gathers['bytes']:,} bytes): {listed}"


def joined(names: Sequence[str]) -> str:
    """Names that differ in their first number only, as one: `h.{1,3,5}.mlp.c_fc`; long rows with dots."""
    if len(names) == 1:
        return names[0]
    found = [int(match.group()) for name in names if (match := re.search(r"\d+", name))]
    regular = len({b - a for a, b in itertools.pairwise(found)}) == 1
    if len(found) > 6 and regular:
        return re.sub(r"\d+", f"{{{found[0]},{found[1]},…,{found[-1]}}}", names[0], count=1) + f" ×{len(found)}"
    return re.sub(r"\d+", f"{{{','.join(map(str, found))}}}", names[0], count=1)


def suite_table(found: Document) -> RenderableType:
    """One row per text, one for LAMBADA, and under them how each was measured."""
    title = f"{escape(str(found['model']))}, {numbers.count(found['held_parameters'])} held parameters"
    table = simple_table(title, ["Text", "Perplexity", "Per word", "Accuracy", "Counted"], 1)
    said = []
    for name, one in found["texts"].items():
        perplexities = numbers.perplexity(one["perplexity"]), numbers.perplexity(one["perplexity_per_word"])
        table.add_row(Text(name), *perplexities, "", f"{numbers.count(one['tokens'])} tokens")
        parts = numbers.protocol(one["protocol"]).rstrip(")").split(", ")
        # without the number of windows, which differs from text to text
        kept = ", ".join(part for part in parts if not part.startswith(("windows ", "note none")))
        said.append(f"texts: {kept})")
    words = found["lambada"]
    accuracy = f"{100 * words['accuracy']:.2f} ± {100 * words['accuracy_stderr']:.2f} %"
    # A target of LAMBADA is a word, of one or more tokens: its perplexity is per word.
    perplexity = numbers.perplexity(words["perplexity"])
    table.add_row("LAMBADA, last word", "", perplexity, accuracy, f"{numbers.count(words['passages'])} passages")
    context = words["protocol"]["model_context"]
    cut = f"; {words['truncated']:,} passages cut to the context of {context:,}" if words["truncated"] else ""
    said.append(f"LAMBADA: {words['protocol']['name']}, version {words['protocol']['version']}{cut}")
    return Group(table, Text("\n".join(dict.fromkeys(said)), style="dim"))


def task_table(scores_of: Mapping[str, Mapping[str, Any]], title: str) -> RenderableType:
    """lm-eval's scores, one row per task and metric."""
    table = simple_table(escape(title), ["Task", "Metric", "Value"], 2)
    for task, scores in scores_of.items():
        for key, value in scores.items():
            metric, comma, _ = key.partition(",")
            if comma and numbers.known(value) and not metric.endswith("_stderr"):
                table.add_row(Text(task), Text(metric), f"{value:.4f}")
    return table


def finetune_table(found: Document) -> RenderableType:
    """One row per seed, then mean and standard deviation; the teacher's numbers under them."""

    def points(value: Any) -> str:
        return f"{100 * value:.2f}" if numbers.known(value) else numbers.NOT_MEASURED

    metrics = list(found["summary"])
    title = (
        f"{escape(str(found['model']))} on {found['task']}, {numbers.count(found['held_parameters'])} held parameters"
    )
    table = simple_table(title, ["Seed", "Best epoch", *metrics, "Seconds"], 1)
    for one in found["seeds"]:
        mark = " *" if one["seed"] == found["saved_seed"] else ""
        values = [points(one["best"][metric]) for metric in metrics]
        table.add_row(f"{one['seed']}{mark}", str(one["best_epoch"]), *values, f"{one['seconds']:.1f}")
    if len(found["seeds"]) > 1:
        means = [f"{points(one['mean'])} ± {points(one['std'])}" for one in found["summary"].values()]
        table.add_row("mean ± std", "", *means, "")
    if found["teacher"]:
        table.add_row("teacher", "", *(points(found["teacher"]["dev"][metric]) for metric in metrics), "")
    said = "Dev set, in percent; best epoch by the dev set itself. *: the model saved."
    return Group(table, Text(said, style="dim"))


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
