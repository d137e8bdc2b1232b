"""Terminal tables of the measuring commands: suites, tasks of lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from kronfold.report import numbers
from kronfold.report.document import Document
from kronfold.report.simple_table import simple_table


def suite_table(found: Document) -> RenderableType:
    """One row per text, one for LAMBADA, and under them how each was measured."""
    title = f"{escape(str(found['model']))}, {numbers.count(found['held_parameters'])} held parameters"
    table = simple_table(title, ["Text", "Perplexity", "Per word", "Accuracy", "Counted"], 1)
    for name, one in found["texts"].items():
        perplexities = numbers.perplexity(one["perplexity"]), numbers.perplexity(one["perplexity_per_word"])
        table.add_row(Text(name), *perplexities, "", f"{numbers.count(one['tokens'])} tokens")
    words = found["lambada"]
    accuracy = f"{100 * words['accuracy']:.2f} ± {100 * words['accuracy_stderr']:.2f} %"
    # A target of LAMBADA is a word, of one or more tokens: its perplexity is per word.
    perplexity = numbers.perplexity(words["perplexity"])
    table.add_row("LAMBADA, last word", "", perplexity, accuracy, f"{numbers.count(words['passages'])} passages")
    protocols = [numbers.protocol(one["protocol"]) for one in found["texts"].values()]
    said = [f"texts: {one}" for one in dict.fromkeys(_without_counts(text) for text in protocols)]
    context = words["protocol"]["model_context"]
    cut = f"; {words['truncated']:,} passages cut to the context of {context:,}" if words["truncated"] else ""
    said.append(f"LAMBADA: {words['protocol']['name']}, version {words['protocol']['version']}{cut}")
    return Group(table, Text("\n".join(said), style="dim"))


def _without_counts(protocol: str) -> str:
    """A protocol in words without the number of windows, which differs from text to text."""
    kept = [part for part in protocol.rstrip(")").split(", ") if not part.startswith(("windows ", "note none"))]
    return ", ".join(kept) + ")"


def task_table(results: Mapping[str, Mapping[str, Any]], title: str) -> RenderableType:
    """lm-eval's scores, one row per task and metric."""
    table = simple_table(escape(title), ["Task", "Metric", "Value"], 2)
    for task, scores in results.items():
        for key, value in scores.items():
            metric, comma, _ = key.partition(",")
            if comma and numbers.known(value) and not metric.endswith("_stderr"):
                table.add_row(Text(task), Text(metric), f"{value:.4f}")
    return table


def finetune_table(found: Document) -> RenderableType:
    """One row per seed, then mean and standard deviation; the teacher's numbers under them."""
    metrics = list(found["summary"])
    title = (
        f"{escape(str(found['model']))} on {found['task']}, {numbers.count(found['held_parameters'])} held parameters"
    )
    table = simple_table(title, ["Seed", "Best epoch", *metrics, "Seconds"], 1)
    for one in found["seeds"]:
        values = [_points(one["best"][metric]) for metric in metrics]
        mark = " *" if one["seed"] == found["saved_seed"] else ""
        table.add_row(f"{one['seed']}{mark}", str(one["best_epoch"]), *values, f"{one['seconds']:.1f}")
    if len(found["seeds"]) > 1:
        means = [f"{_points(one['mean'])} ± {_points(one['std'])}" for one in found["summary"].values()]
        table.add_row("mean ± std", "", *means, "")
    if found["teacher"]:
        table.add_row("teacher", "", *(_points(found["teacher"]["dev"][metric]) for metric in metrics), "")
    said = "Dev set, in percent; best epoch by the dev set itself. *: the model saved."
    return Group(table, Text(said, style="dim"))


def _points(value: Any) -> str:
    return f"{100 * value:.2f}" if numbers.known(value) else numbers.NOT_MEASURED
