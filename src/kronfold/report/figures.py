"""The pictures, as data: what is drawn where, in the vocabulary of plotly's JSON, which `svg` draws and plotly reads.

Colours are one per thing on every picture, at least 3:1 against the white and the dark page. Blue, orange, teal and
violet stay apart for the common types of colour blindness; dash and marker say the same again.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from kronfold.report import numbers
from kronfold.report.comparison import Compared, compared, main_text
from kronfold.report.document import Document, control, matrices, own_name, plain_stages

Figure = dict[str, Any]

OURS, PLAIN, DENSE, TEACHER, BESIDE = "#2F80ED", "#D9730D", "#0E9384", "#7D8590", "#9A5BD6"
OURS_NAME, PLAIN_NAME, DENSE_NAME = "with permutations", "plain Kronecker", "dense, fine-tuned"


def label(text: Any) -> str:
    """Names go into labels, which hold a little HTML (`<br>`): escaped, they show as they are."""
    return html.escape(str(text), quote=False)


def _layout(height: int, **more: Any) -> Figure:
    """The look that all pictures share; `height` in CSS pixels."""
    return {"height": height, "legend": {"orientation": "h", "traceorder": "normal"}, **more}


def _axis(title: str, **more: Any) -> Figure:
    return {"title": {"text": title}, "zeroline": False, **more}


def _line(name: str, x: list[Any], y: list[Any], colour: str, dash: str, hover: str = "", **more: Any) -> Figure:
    look = {"line": {"color": colour, "dash": dash, "width": 2}, "hovertemplate": hover}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, **look, **more}


def _positive(value: Any) -> float | None:
    """What a log axis can show of a perplexity, None for anything else."""
    return value if numbers.known(value) and value > 0 else None


def _upright(x: float) -> Figure:
    line = {"color": TEACHER, "width": 1, "dash": "dot"}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _names(results: Document) -> tuple[str, str]:
    """What the two searches are called: with another recipe beside them, by the recipe's name too."""
    own = own_name(results)
    return (label(own), f"{label(own)}, plain Kronecker") if own else (OURS_NAME, PLAIN_NAME)


def error_figure(results: Document) -> Figure | None:
    """Relative error of every replaced matrix, with and without permutations; None without any."""
    rows = [matrix for matrix in matrices(results) if numbers.known(matrix.row.get("relative_error"))]
    if not rows:
        return None
    data = []
    for name, key, colour in ((OURS_NAME, "relative_error", OURS), (PLAIN_NAME, "relative_error_plain", PLAIN)):
        values = [value if numbers.known(value := matrix.row.get(key)) else None for matrix in rows]
        if any(value is not None for value in values):
            hover = "%{y}<br>relative error %{x:.4f}"
            data.append(
                {
                    "type": "bar", "orientation": "h", "name": name, "x": values, "marker": {"color": colour},
                    "y": [label(matrix.label) for matrix in rows], "hovertemplate": hover,
                }
            )  # fmt: skip
    return {
        "data": data,
        "layout": _layout(
            118 + len(rows) * (15 + 11 * len(data)),
            barmode="group",
            showlegend=len(data) > 1,
            xaxis=_axis("relative error ‖W − Ŵ‖ / ‖W‖ (unitless)", rangemode="tozero"),
            yaxis={"autorange": "reversed", "type": "category"},
        ),
    }


def perplexity_figure(results: Document) -> Figure | None:
    """Perplexity after each compression and each healing, log axis; None without any.

    Every stage has two places on the x axis, its compression (open marker) and its healing (filled marker). A track
    beside the run stands where the run has reached the same size: at the last stage.
    """
    ours, plain = _names(results)
    stages = max(results["stages"], plain_stages(results), key=len)
    tracks = [
        (ours, results["stages"], 0, OURS, "solid", "circle"),
        (plain, plain_stages(results), 0, PLAIN, "dot", "square"),
    ]
    if beside := results.get("beside"):
        first = max(0, len(stages) - len(beside["stages"]))
        tracks.append((label(beside["recipe"]["name"]), beside["stages"], first, BESIDE, "solid", "diamond"))
    data = []
    for name, own, first, colour, dash, symbol in tracks:
        shown = [_positive(stage.get(key)) for stage in own for key in ("before_healing", "after_healing")]
        if not any(shown):
            continue
        places = [f"{label(stage['name'])}, {when}" for stage in own for when in ("compressed", "healed")]
        marker = {"color": colour, "symbol": [f"{symbol}-open", symbol] * len(own), "size": 10}
        x = list(range(2 * first, 2 * first + len(shown)))
        trace = _line(name, x, shown, colour, dash, "%{text}<br>perplexity %{y:,.2f}")
        data.append({**trace, "mode": "lines+markers", "text": places, "marker": marker})
    if not data:
        return None
    span = [-0.5, 2 * len(stages) - 0.5]
    levels = [("teacher", results["teacher"], TEACHER, "dash")]
    levels.append((DENSE_NAME, control(results, "dense_finetuned"), DENSE, "dashdot"))
    for name, model, colour, dash in levels:
        if level := _positive(model.get("perplexity")):
            data.append(_line(name, span, [level, level], colour, dash, "perplexity %{y:,.2f}"))
    values, texts, limits = log_ticks([value for trace in data for value in trace["y"] if value])
    title = f"perplexity per token ({label(results['protocol'].get('name', 'unnamed'))}), log scale"
    centres = [2 * index + 0.5 for index in range(len(stages))]
    ticks = {"tickvals": centres, "ticktext": [label(stage["name"]) for stage in stages]}
    return {
        "data": data,
        "layout": _layout(
            420,
            xaxis=_axis("stage (open: compressed, filled: healed)", range=span, showgrid=False, **ticks),
            shapes=[_upright(centre + 1) for centre in centres[:-1]],
            yaxis=_axis(title, type="log", tickvals=values, ticktext=texts, range=limits),
        ),
    }


_LOG_STEPS = (
    (0.4, (1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)),
    (1.3, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)),
    (2.4, (1.0, 2.0, 5.0)),
)


def log_ticks(values: Sequence[float]) -> tuple[list[float], list[str], list[float]]:
    """Readable ticks for positive `values` on a log axis: tick values, their texts, and the range in log10.

    The narrower the span the finer the steps; beyond two decades and a half only powers of ten.
    """
    low, high = math.log10(min(values)), math.log10(max(values))
    margin = max(0.06 * (high - low), 0.08)  # wide enough that a tick falls inside, however equal the values
    low, high = low - margin, high + margin
    span = high - low
    steps = next((steps for limit, steps in _LOG_STEPS if span < limit), (1.0,))
    powers = range(max(math.floor(low), -300), min(math.ceil(high), 307) + 1)  # what a float holds
    ticks = [step * 10.0**power for power in powers for step in steps]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return inside, [f"{tick:,.10g}" if tick < 1e7 else f"{tick:.0e}" for tick in inside], [low, high]


def loss_figure(results: Document) -> Figure | None:
    """KL to the teacher and cross entropy over the healing tokens; None without loss records."""

    def in_a_row(stages: Iterable[Document]) -> list[dict[str, Any]]:
        """Loss records of all stages with their tokens counted on from stage to stage."""
        start, points = 0, []
        for stage in stages:
            points += [{**record, "tokens": start + record["tokens"]} for record in stage.get("losses", [])]
            start += stage.get("tokens") or 0
        return points

    ours, plain = _names(results)
    curves = [
        (ours, OURS, "solid", in_a_row(results["stages"])),
        (plain, PLAIN, "dot", in_a_row(plain_stages(results))),
        (DENSE_NAME, DENSE, "dashdot", in_a_row([control(results, "dense_finetuned")])),
    ]
    if beside := results.get("beside"):
        curves.append((label(beside["recipe"]["name"]), BESIDE, "solid", in_a_row(beside["stages"])))
    titles = {"kl": "KL to the teacher", "ce": "cross entropy", "loss": "loss"}
    present = [key for key in titles if any(numbers.known(p.get(key)) for *_, points in curves for p in points)]
    panels = [key for key in present if key != "loss"] or present
    if not panels:
        return None
    data: list[Figure] = []
    for number, key in enumerate(panels):
        for name, colour, dash, points in curves:
            known = [point for point in points if numbers.known(point.get(key))]
            if not known:
                continue
            named = any(trace["name"] == name for trace in data)  # one legend entry per curve, drawn in every panel
            x, y = [point["tokens"] for point in known], [point[key] for point in known]
            trace = _line(name, x, y, colour, dash, f"{titles[key]} %{{y:.3f}} at %{{x:,}} tokens")
            trace |= {"mode": "lines" if len(known) > 2 else "lines+markers", "legendgroup": name}
            data.append({**trace, "showlegend": not named, "xaxis": "x", "yaxis": f"y{number + 1 if number else ''}"})
    axes: Figure = {"xaxis": _axis("healing tokens", rangemode="tozero", tickformat="~s")}
    for number, key in enumerate(panels):
        top, bottom = 1 - number / len(panels), 1 - (number + 1) / len(panels)
        gap = 0.06 if number + 1 < len(panels) else 0
        domain = [bottom + gap, top]
        axes[f"yaxis{number + 1 if number else ''}"] = _axis(f"{titles[key]}<br>(nats per token)", domain=domain)
    start, shapes, notes = 0, [], []  # a thin line where each stage begins, with its name at the top
    for stage in results["stages"]:
        shapes.append(_upright(start))
        notes.append({"text": label(stage["name"]), "showarrow": False, "x": start, "y": 1, "yref": "paper"})
        start += stage.get("tokens") or 0
    return {"data": data, "layout": _layout(220 * len(panels) + 120, shapes=shapes, annotations=notes, **axes)}


def healing_figure(results: Document) -> Figure:
    """One line per recipe, best on top: perplexity (log) before and after healing, its size beside the name."""
    rows = compared(results)
    teacher, dense, recipes = rows[0], rows[1], rows[2:]
    names = [f"{label(row.who)} · {row.entry['held_parameters'] / 1e6:,.3g}M" for row in recipes]
    quiet: Figure = {"showlegend": False, "hoverinfo": "skip"}
    data = [
        _line("", [_positive(row.before), _positive(row.after)], [name, name], TEACHER, "solid", **quiet)
        for name, row in zip(names, recipes, strict=True)
    ]
    for trace in data:
        trace["line"]["width"] = 1
    for title, key, colour, symbol in (
        ("before healing", "before", PLAIN, "circle-open"),
        ("healed", "after", OURS, "circle"),
    ):
        data.append(
            {
                "type": "scatter", "mode": "markers", "name": title, "y": names,
                "x": [_positive(getattr(row, key)) for row in recipes],
                "marker": {"color": colour, "symbol": symbol, "size": 10},
                "hovertemplate": "%{y}, " + title + "<br>perplexity %{x:,.2f}<extra></extra>",
            }
        )  # fmt: skip
    for one, colour, dash in ((teacher, TEACHER, "dash"), (dense, DENSE, "dashdot")):
        ends = [names[0], names[-1]]
        data.append(_line(one.who, [one.after] * 2, ends, colour, dash, f"{one.who} %{{x:,.2f}}"))
    values, texts, limits = log_ticks([value for trace in data for value in trace["x"] if value])
    axis = _axis(_perplexity_title(results), type="log", tickvals=values, ticktext=texts, range=limits)
    height = 150 + 34 * len(recipes)
    yaxis = {"autorange": "reversed", "type": "category"}
    return {"data": data, "layout": _layout(height, xaxis=axis, yaxis=yaxis)}


def size_figure(results: Document) -> Figure:
    """Held parameters against perplexity (log), every recipe before and after healing."""
    rows = compared(results)
    teacher, dense, recipes = rows[0], rows[1], [row for row in rows if not row.is_control]

    def points(name: str, rows: list[Compared], key: str, colour: str, symbol: str, mode: str = "markers") -> Figure:
        hover = "%{text}, " + label(name) + "<br>%{x:,} held parameters<br>perplexity %{y:,.2f}<extra></extra>"
        return {
            "type": "scatter", "mode": mode, "name": label(name), "text": [label(row.who) for row in rows],
            "x": [row.entry["held_parameters"] for row in rows], "y": [_positive(getattr(row, key)) for row in rows],
            "textposition": "middle right", "marker": {"color": colour, "symbol": symbol, "size": 9},
            "hovertemplate": hover,
        }  # fmt: skip

    quiet: Figure = {"showlegend": False, "hoverinfo": "skip"}
    data = []
    for row in recipes:
        x = row.entry["held_parameters"]
        data.append(_line("", [x, x], [_positive(row.before), _positive(row.after)], TEACHER, "solid", **quiet))
        data[-1]["line"]["width"] = 1
    data += [
        points("before healing", recipes, "before", PLAIN, "circle-open"),
        points("healed", recipes, "after", OURS, "circle", "markers+text"),
        points(dense.who, [dense], "after", DENSE, "diamond"),
    ]
    sizes = [row.entry["held_parameters"] for row in rows]
    span = [min(sizes) * 0.97, max(sizes) * 1.03]
    data.append(_line("dense teacher", span, [teacher.after] * 2, TEACHER, "dash", "dense teacher %{y:,.2f}"))
    values, texts, limits = log_ticks([value for trace in data for value in trace["y"] if value])
    return {
        "data": data,
        "layout": _layout(
            520,
            xaxis=_axis("held parameters", tickformat=".3s", range=span),
            yaxis=_axis(_perplexity_title(results), type="log", tickvals=values, ticktext=texts, range=limits),
        ),
    }


def _perplexity_title(results: Document) -> str:
    name = label(results["protocol"].get("name", "unnamed"))
    return f"perplexity per token on {label(main_text(results))} ({name}), log scale"
