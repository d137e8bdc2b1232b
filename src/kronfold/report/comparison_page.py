"""The page of a comparison: the size-quality picture, the full table, how it was measured."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from kronfold.base.files import write_text
from kronfold.report import numbers
from kronfold.report.comparison import Compared, cells, columns, compared, main_text, markdown, notes
from kronfold.report.document import Document
from kronfold.report.figures import DENSE, OURS, PLAIN, TEACHER, axis, label, layout, log_ticks
from kronfold.report.page import render_page

HTML, MARKDOWN = "report.html", "table.md"
SPREAD = 1.15  # sizes that differ by less lie on top of each other in a picture


def write_comparison(results: Document, directory: str | Path) -> None:
    """Write `report.html` and `table.md` of a comparison into `directory`, each atomically.

    Raises InputError for another document, OutputError when the place cannot be written.
    """
    write_text(Path(directory) / HTML, render_comparison(results))
    write_text(Path(directory) / MARKDOWN, markdown(results))


def render_comparison(results: Document) -> str:
    """The HTML page, all text of the document escaped. Raises InputError for another document."""
    rows = compared(results)
    target = results.get("target")
    lead = "each brought to its own size and healed on the same tokens."
    if target:
        lead = f"each brought to {numbers.count(target['held_parameters'])} held parameters, healed on the same tokens."
    return render_page(
        "comparison.html.j2",
        results,
        _pictures(results),
        title=f"{results['model']} · comparison",
        lead=lead,
        columns=columns(results),
        lines=[(row, cells(results, row)) for row in rows],
        notes=notes(results),
        facts=_facts(results),
    )


def _pictures(results: Document) -> list[tuple[str, dict[str, Any], str, str]]:
    """What healing did to each recipe; and size against quality where sizes differ enough to tell apart."""
    found = [
        (
            "healing",
            healing_figure(results),
            "Perplexity before and after healing",
            "Further left is better. A thin line joins what a model was before healing (open) and after (filled); the "
            "dense teacher is the line to reach.",
        )
    ]
    sizes = [row["held_parameters"] for row in results["rows"]]
    if max(sizes) > SPREAD * min(sizes):
        text = "Lower is better, further left is smaller. Each recipe before healing (open) and after (filled)."
        found.append(("size", size_figure(results), "Size and quality", text))
    return found


def healing_figure(results: Document) -> dict[str, Any]:
    """One line per recipe, best on top: perplexity (log) before and after healing, its size beside the name."""
    rows = compared(results)
    teacher, dense, recipes = rows[0], rows[1], rows[2:]
    names = [f"{label(row.who)} · {row.entry['held_parameters'] / 1e6:,.3g}M" for row in recipes]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "x": [_shown(row.before), _shown(row.after)], "y": [name, name],
            "line": {"color": TEACHER, "width": 1}, "showlegend": False, "hoverinfo": "skip",
        }
        for name, row in zip(names, recipes, strict=True)
    ]  # fmt: skip
    for title, key, colour, symbol in (
        ("before healing", "before", PLAIN, "circle-open"),
        ("healed", "after", OURS, "circle"),
    ):
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": title, "y": names,
                "x": [_shown(getattr(row, key)) for row in recipes],
                "marker": {"color": colour, "symbol": symbol, "size": 10},
                "hovertemplate": "%{y}, " + title + "<br>perplexity %{x:,.2f}<extra></extra>",
            }
        )  # fmt: skip
    for one, colour, dash in ((teacher, TEACHER, "dash"), (dense, DENSE, "dashdot")):
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": one.who, "x": [one.after] * 2, "y": [names[0], names[-1]],
                "line": {"color": colour, "dash": dash, "width": 2}, "hovertemplate": f"{one.who} %{{x:,.2f}}",
            }
        )  # fmt: skip
    values, texts, limits = log_ticks([value for trace in data for value in trace["x"] if value])
    title = f"perplexity per token on {label(main_text(results))} ({label(results['protocol']['name'])}), log scale"
    return {
        "data": data,
        "layout": layout(
            150 + 34 * len(recipes),
            hovermode="closest",
            xaxis=axis(title, type="log", tickvals=values, ticktext=texts, range=limits),
            yaxis={"autorange": "reversed", "automargin": True, "type": "category", "ticksuffix": "  "},
        ),
    }


def size_figure(results: Document) -> dict[str, Any]:
    """Held parameters against perplexity (log), every recipe before and after healing."""
    rows = compared(results)
    recipes = [row for row in rows if not row.is_control]
    teacher, dense = rows[0], rows[1]
    sizes = [row.entry["held_parameters"] for row in rows]
    data = [_joined(row) for row in recipes]
    data += [
        _points("before healing", recipes, "before", PLAIN, "circle-open", False),
        _points("healed", recipes, "after", OURS, "circle", True),
        _points(dense.who, [dense], "after", DENSE, "diamond", False),
    ]
    span = [min(sizes) * 0.97, max(sizes) * 1.03]
    data.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "dense teacher",
            "x": span,
            "y": [teacher.after, teacher.after],
            "line": {"color": TEACHER, "dash": "dash", "width": 2},
            "hovertemplate": "dense teacher %{y:,.2f}",
        }
    )
    values, texts, limits = log_ticks([value for trace in data for value in trace["y"] if value])
    title = f"perplexity per token on {label(main_text(results))} ({label(results['protocol']['name'])}), log scale"
    return {
        "data": data,
        "layout": layout(
            520,
            hovermode="closest",
            xaxis=axis("held parameters", tickformat=".3s", range=span),
            yaxis=axis(title, type="log", tickvals=values, ticktext=texts, range=limits),
        ),
    }


def _joined(row: Compared) -> dict[str, Any]:
    x = row.entry["held_parameters"]
    line = {"color": TEACHER, "width": 1}
    return {
        "type": "scatter", "mode": "lines", "x": [x, x], "y": [_shown(row.before), _shown(row.after)],
        "line": line, "showlegend": False, "hoverinfo": "skip",
    }  # fmt: skip


def _points(name: str, rows: list[Compared], key: str, colour: str, symbol: str, named: bool) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers+text" if named else "markers",
        "name": label(name),
        "x": [row.entry["held_parameters"] for row in rows],
        "y": [_shown(getattr(row, key)) for row in rows],
        "text": [label(row.who) for row in rows],
        "textposition": "middle right",
        "marker": {"color": colour, "symbol": symbol, "size": 9},
        "hovertemplate": "%{text}, "
        + label(name)
        + "<br>%{x:,} held parameters<br>perplexity %{y:,.2f}<extra></extra>",
    }


def _shown(value: Any) -> float | None:
    return value if numbers.known(value) and value > 0 and math.isfinite(math.log(value)) else None


def _facts(results: Document) -> list[tuple[str, str]]:
    data = results["data"]
    texts = ", ".join(f"{name} ({source})" for name, source in data["eval"].items())
    facts = [
        ("Command", results["command"]),
        ("Healing text", f"{data['heal']['source']}, {numbers.count(data['heal']['tokens'])} tokens"),
        ("Healing text, SHA-256", data["heal"]["sha256"]),
        ("Evaluation texts", texts),
        ("Perplexity protocol", numbers.protocol(results["protocol"])),
        ("LAMBADA", data["lambada"]),
        ("Seed", str(results["seed"])),
        ("Total time", numbers.duration(results["total_seconds"])),
        ("Versions", numbers.pairs(results["versions"])),
        ("Machine", numbers.pairs(results["machine"])),
        ("Written", results["created"]),
    ]
    return [(name, text) for name, text in facts if text]
