"""A comparison as a table: for the terminal, as Markdown, and the rows that the page shows."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from kronfold.base import results
from kronfold.report import numbers
from kronfold.report.document import Document
from kronfold.report.tables import simple_table


@dataclass(frozen=True)
class Compared:
    """One line: a recipe, or one of the two dense controls. Seconds, perplexities per token, excess unitless.

    Attributes:
        speed: tokens per second of generation over the teacher's, measured beside it. size: the recipe's `size` entry.
    """

    who: str
    entry: Document
    before: float | None
    after: float | None
    excess: float | None
    speed: float | None
    size: Document | None = None

    @property
    def is_control(self) -> bool:
        return self.size is None


def compared(document: Document) -> list[Compared]:
    """Teacher, fine-tuned teacher, then the recipes, best first. Raises InputError for any other document."""
    results.check(document, "compare")
    main = main_text(document)
    teacher, dense = document["teacher"], document["controls"]["dense_finetuned"]
    base = teacher["perplexities"][main]
    after = dense["perplexities"][main]
    controls = [
        Compared("dense teacher", teacher, None, base, None, 1.0),
        Compared("dense, fine-tuned", dense, base, after, after / base - 1, 1.0),
    ]
    rows = [
        Compared(
            row["recipe"],
            row,
            row["perplexity_before"],
            row["perplexity_after"],
            row["excess_perplexity"],
            row["tokens_per_second"] / row["teacher_tokens_per_second"],
            row["size"],
        )
        for row in document["rows"]
    ]
    return controls + sorted(rows, key=lambda row: row.after or 0.0)


def main_text(document: Document) -> str:
    """The text on which models are measured before healing too."""
    return next(iter(document["teacher"]["perplexities"]))


def columns(document: Document) -> list[str]:
    """Titles of the full table."""
    main, *others = document["teacher"]["perplexities"]
    lambada = ["LAMBADA accuracy", "LAMBADA perplexity"] if document["teacher"].get("lambada") else []
    return [
        "Model", "Held parameters", "Of teacher", "fp16", "MACs per token", f"{main} before", f"{main} healed",
        "Excess", *(f"{text} healed" for text in others), *lambada, "Decompose", "Heal", "Generation",
    ]  # fmt: skip


def cells(document: Document, row: Compared) -> list[str]:
    """The line of the full table, under `columns`."""
    teacher, entry = document["teacher"], row.entry
    others = list(teacher["perplexities"])[1:]
    passages = entry.get("lambada")
    asked = bool(teacher.get("lambada"))
    lambada = [f"{passages['accuracy']:.2%}", numbers.perplexity(passages["perplexity"])] if asked and passages else []
    times = entry.get("decompose_seconds"), entry.get("heal_seconds")
    speed = "" if row.is_control else f"{row.speed:.2f} x"
    return [
        row.who,
        numbers.count(entry["held_parameters"]) + _mark(row),
        numbers.share(entry["held_parameters"], teacher["held_parameters"]),
        numbers.size(entry["bytes_fp16"]),
        numbers.count(entry["macs_per_token"]),
        "" if row.is_control else numbers.perplexity(row.before),
        numbers.perplexity(row.after),
        "" if row.excess is None else numbers.signed_percent(row.excess),
        *(numbers.perplexity(entry["perplexities"][text]) for text in others),
        *lambada,
        *("" if seconds is None else numbers.duration(seconds) for seconds in times),
        speed,
    ]


def notes(document: Document) -> list[str]:
    """What a reader must know: how it was measured, and what was turned to reach the size."""
    rows = compared(document)
    tokens = max((row.entry.get("heal_tokens") or 0 for row in rows), default=0)
    target = document.get("target")
    size = "Every recipe at its own size. "
    if target:
        size = f"Size asked for: {numbers.count(target['held_parameters'])} held parameters ({target['ratio']:.0%}). "
    own = "each its own" if document["objective"] == "own" else "the same for all"
    lines = [
        f"{size}Healing: {numbers.count(tokens)} tokens each, seed "
        f"{document.get('seed')}, objective {own}. Perplexity: {numbers.protocol(document['protocol'])}. "
        "Generation: tokens per second over the teacher's, greedy, batch 1, measured beside it."
    ]
    for row in rows:
        if row.size and row.size["note"] != "its own size":
            mark = "" if row.size["reached"] else "¹ "
            lines.append(f"{mark}{row.who}: {row.size['note']}")
    if not document["complete"]:
        lines.append("Not finished: rows are missing; continue with --resume.")
    return lines


def markdown(document: Document) -> str:
    """The full table as Markdown, with its notes."""
    titles = columns(document)
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join(["---", *["---:"] * (len(titles) - 1)]) + "|"]
    lines += ["| " + " | ".join(cells(document, row)) + " |" for row in compared(document)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(document))]) + "\n"


def comparison_table(document: Document) -> RenderableType:
    """What fits a terminal: size, perplexity before and after, LAMBADA, speed; the files hold the rest."""
    main, *others = document["teacher"]["perplexities"]
    protocol = numbers.protocol_short(document["protocol"])
    lambada = ["LAMBADA"] if document["teacher"].get("lambada") else []
    table = simple_table(
        f"{escape(str(document['model']))} · perplexity on {escape(main)}, {escape(protocol)}",
        ["Model", "Held", "Before", "Healed", "Excess", *map(escape, others), *lambada, "Speed"],
        1,
    )
    table.collapse_padding, table.show_edge = True, False  # eight columns: names stay whole at 80 characters
    for row in compared(document):
        texts = [numbers.perplexity(row.entry["perplexities"][text]) for text in others]
        passages = [f"{row.entry['lambada']['accuracy']:.1%}"] if lambada else []
        table.add_row(
            escape(row.who),
            numbers.count(row.entry["held_parameters"]) + _mark(row),
            "" if row.is_control else numbers.perplexity(row.before),
            numbers.perplexity(row.after),
            "" if row.excess is None else numbers.signed_percent(row.excess),
            *texts,
            *passages,
            "" if row.is_control else f"{row.speed:.2f} x",
            style="dim" if row.is_control else None,
        )
    return Group(table, Text(), *(Text(note) for note in notes(document)))


def _mark(row: Compared) -> str:
    """Points at the note that says why a size is not the one asked for."""
    return "" if row.size is None or row.size["reached"] else " ¹"


def facts(document: Document) -> list[tuple[str, str]]:
    """How it was measured, as (name, text) pairs; what the document does not say is left out."""
    data = document["data"]
    found = [
        ("Command", document.get("command")),
        ("Healing text", f"{data['heal'].get('source')}, {numbers.count(data['heal'].get('tokens'))} tokens"),
        ("Healing text, SHA-256", data["heal"].get("sha256")),
        ("Evaluation texts", ", ".join(f"{name} ({source})" for name, source in data["eval"].items())),
        ("Perplexity protocol", numbers.protocol(document["protocol"])),
        ("LAMBADA", data.get("lambada")),
        ("Seed", None if document.get("seed") is None else str(document["seed"])),
        ("Total time", numbers.duration(document["total_seconds"])),
        ("Versions", numbers.pairs(document.get("versions", {}))),
        ("Machine", numbers.pairs(document.get("machine", {}))),
        ("Written", document.get("created")),
    ]
    return [(name, text) for name, text in found if text]
