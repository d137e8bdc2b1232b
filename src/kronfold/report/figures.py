"""The three pictures of a run: plotly figures in plain JSON. The page adds the colours of light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kronfold.report import numbers
from kronfold.report.document import Document, matrices, plain_stages

Figure = dict[str, Any]

# One colour per thing on every picture, at least 3:1 against the white and the dark page. Blue, orange and
# teal stay apart for the common types of colour blindness; dash and marker say the same again.
OURS, PLAIN, DENSE, TEACHER = "#2F80ED", "#D9730D", "#0E9384", "#7D8590"
OURS_NAME, PLAIN_NAME, DENSE_NAME = "with permutations", "plain Kronecker", "dense, fine-tuned"


def label(text: Any) -> str:
    """Names go into plotly labels, which read a little HTML: escaped, they show as they are."""
    return html.escape(str(text), quote=False)  # plotly does not decode quotes


def layout(height: int, **more: Any) -> Figure:
    """The look that all pictures share; `height` in CSS pixels."""
    return {
        "height": height,
        "margin": {"l": 64, "r": 16, "t": 44, "b": 56},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        "hoverlabel": {"namelength": -1},
        **more,
    }


def axis(title: str, **more: Any) -> Figure:
    """An axis with a title, without a zero line."""
    return {"title": {"text": title, "standoff": 10}, "automargin": True, "zeroline": False, **more}


def error_figure(results: Document) -> Figure | None:
    """Picture 1: relative error of every replaced matrix, with and without permutations; None without any."""
    rows = [matrix for matrix in matrices(results) if numbers.known(matrix.row.get("relative_error"))]
    if not rows:
        return None
    labels = [label(matrix.label) for matrix in rows]

    def bars(name: str, key: str, colour: str) -> Figure:
        return {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": labels,
            "x": [value if numbers.known(value := matrix.row.get(key)) else None for matrix in rows],
            "marker": {"color": colour},
            "hovertemplate": "%{y}<br>relative error %{x:.4f}",
        }

    data = [bars(OURS_NAME, "relative_error", OURS)]
    if any(numbers.known(matrix.row.get("relative_error_plain")) for matrix in rows):
        data.append(bars(PLAIN_NAME, "relative_error_plain", PLAIN))
    return {
        "data": data,
        "layout": layout(
            118 + len(rows) * (15 + 11 * len(data)),
            barmode="group",
            bargap=0.3,
            showlegend=len(data) > 1,
            xaxis=axis("relative error ‖W − Ŵ‖ / ‖W‖ (unitless)", rangemode="tozero"),
            yaxis={"autorange": "reversed", "automargin": True, "type": "category", "ticksuffix": "  "},
        ),
    }


def perplexity_figure(results: Document) -> Figure | None:
    """Picture 2: perplexity after each compression and each healing, log axis; None without any.

    Every stage has two places on the x axis, its compression (open marker) and its healing (filled marker).
    """
    data = [
        *_stage_trace(OURS_NAME, results["stages"], OURS, "solid", "circle"),
        *_stage_trace(PLAIN_NAME, plain_stages(results), PLAIN, "dot", "square"),
    ]
    if not data:
        return None
    stages = max(results["stages"], plain_stages(results), key=len)
    centres = [2 * index + 0.5 for index in range(len(stages))]
    span = [-0.5, 2 * len(stages) - 0.5]
    data += _level_trace("teacher", results["teacher"], TEACHER, "dash", span)
    data += _level_trace(DENSE_NAME, _dense(results), DENSE, "dashdot", span)
    values, texts, limits = log_ticks([value for trace in data for value in trace["y"] if value])
    protocol = label(results["protocol"].get("name", "unnamed"))
    return {
        "data": data,
        "layout": layout(
            420,
            hovermode="closest",
            xaxis=axis(
                "stage (open: compressed, filled: healed)",
                tickvals=centres,
                ticktext=[label(stage["name"]) for stage in stages],
                range=span,
                showgrid=False,
            ),
            shapes=[_upright(centre + 1) for centre in centres[:-1]],
            yaxis=axis(
                f"perplexity per token ({protocol}), log scale",
                type="log",
                tickvals=values,
                ticktext=texts,
                range=limits,
            ),
        ),
    }


def _stage_trace(name: str, stages: Sequence[Document], colour: str, dash: str, symbol: str) -> list[Figure]:
    values = [stage.get(key) for stage in stages for key in ("before_healing", "after_healing")]
    shown = [value if value is not None and numbers.known(value) and value > 0 else None for value in values]
    if not any(shown):
        return []
    places = [f"{label(stage['name'])}, {when}" for stage in stages for when in ("compressed", "healed")]
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": name,
            "x": list(range(len(shown))),
            "y": shown,
            "text": places,
            "line": {"color": colour, "dash": dash, "width": 2.5},
            "marker": {
                "color": colour,
                "symbol": [f"{symbol}-open", symbol] * len(stages),
                "size": 10,
                "line": {"color": colour, "width": 2},
            },
            "hovertemplate": "%{text}<br>perplexity %{y:,.2f}",
        }
    ]


def _level_trace(name: str, model: Document, colour: str, dash: str, span: list[float]) -> list[Figure]:
    """A horizontal line at the perplexity of a model that has no stages."""
    level = model.get("perplexity")
    if level is None or not numbers.known(level) or level <= 0:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": span,
            "y": [level, level],
            "line": {"color": colour, "dash": dash, "width": 2},
            "hovertemplate": "perplexity %{y:,.2f}",
        }
    ]


def _dense(results: Document) -> Document:
    return results.get("controls", {}).get("dense_finetuned") or {}


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
    ticks = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    inside = [tick for tick in ticks if low <= math.log10(tick) <= high]
    return inside, [f"{tick:,.10g}" if tick < 1e7 else f"{tick:.0e}" for tick in inside], [low, high]


@dataclass(frozen=True)
class _Curve:
    name: str
    colour: str
    dash: str
    points: list[dict[str, Any]]  # tokens counted from the start of the run


def _in_a_row(stages: Iterable[Document]) -> list[dict[str, Any]]:
    """Loss records of all stages with their tokens counted on from stage to stage."""
    start = 0
    points: list[dict[str, Any]] = []
    for stage in stages:
        points += [{**record, "tokens": start + record["tokens"]} for record in stage.get("losses", [])]
        start += stage.get("tokens") or 0
    return points


def loss_figure(results: Document) -> Figure | None:
    """Picture 3: KL to the teacher and cross entropy over the healing tokens; None without loss records."""
    curves = [
        _Curve(OURS_NAME, OURS, "solid", _in_a_row(results["stages"])),
        _Curve(PLAIN_NAME, PLAIN, "dot", _in_a_row(plain_stages(results))),
        _Curve(DENSE_NAME, DENSE, "dashdot", _in_a_row([_dense(results)])),
    ]
    titles = {"kl": "KL to the teacher", "ce": "cross entropy", "loss": "loss"}
    present = [key for key in titles if any(numbers.known(p.get(key)) for c in curves for p in c.points)]
    panels = [key for key in present if key != "loss"] or present
    if not panels:
        return None
    data = [
        trace
        for number, key in enumerate(panels)
        for curve in curves
        if (trace := _loss_trace(curve, key, number, titles[key])) is not None
    ]
    named: set[str] = set()
    for trace in data:  # one legend entry per curve, though it is drawn in every panel
        trace["showlegend"] = trace["name"] not in named
        named.add(trace["name"])
    axes: Figure = {
        "xaxis": axis("healing tokens", rangemode="tozero", tickformat="~s", anchor=_axis_id("y", len(panels) - 1))
    }
    for number, key in enumerate(panels):
        top, bottom = 1 - number / len(panels), 1 - (number + 1) / len(panels)
        gap = 0.06 if number + 1 < len(panels) else 0
        axes["yaxis" + _suffix(number)] = axis(f"{titles[key]}<br>(nats per token)", domain=[bottom + gap, top])
    plot_height, names_height = 220 * len(panels), 20
    arranged = layout(plot_height + 120, hovermode="x", **axes, **_stage_marks(results))
    arranged["margin"]["t"] += names_height
    arranged["legend"]["y"] = 1 + names_height / plot_height  # above the names of the stages
    return {"data": data, "layout": arranged}


def _suffix(number: int) -> str:
    return str(number + 1) if number else ""


def _axis_id(axis: str, number: int) -> str:
    return axis + _suffix(number)


def _loss_trace(curve: _Curve, key: str, panel: int, title: str) -> Figure | None:
    points = [point for point in curve.points if numbers.known(point.get(key))]
    if not points:
        return None
    return {
        "type": "scatter",
        "mode": "lines" if len(points) > 2 else "lines+markers",
        "name": curve.name,
        "legendgroup": curve.name,
        "x": [point["tokens"] for point in points],
        "y": [point[key] for point in points],
        "xaxis": "x",
        "yaxis": _axis_id("y", panel),
        "line": {"color": curve.colour, "dash": curve.dash, "width": 2},
        "hovertemplate": f"{title} %{{y:.3f}} at %{{x:,}} tokens",
    }


def _upright(x: float) -> Figure:
    line = {"color": TEACHER, "width": 1, "dash": "dot"}
    return {"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": line}


def _stage_marks(results: Document) -> Figure:
    """A thin line where each stage begins, with its name at the top."""
    start = 0
    shapes: list[Figure] = []
    notes: list[Figure] = []
    for stage in results["stages"]:
        shapes.append(_upright(start))
        place = {"x": start, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
        notes.append({"text": label(stage["name"]), "showarrow": False, "font": {"size": 11}, **place})
        start += stage.get("tokens") or 0
    return {"shapes": shapes, "annotations": notes}
