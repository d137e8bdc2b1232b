"""Figures as inline SVG: nothing to load or run, sharp on paper, light or dark by the page's own colours.

Draws what `figures` uses of plotly's JSON: lines, markers, horizontal bars, linear, logarithmic and named axes, stacked
panels, a legend, upright lines with names. A chart library in the page would be 3 to 50 times the page's own size.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from markupsafe import Markup

Figure = Mapping[str, Any]

_CHARACTER = 6.4  # CSS pixels; the mean width of a character at 12 pixels, on the wide side
_LINE = 16  # from one line of text to the next
_DASHES = {"dash": "8 5", "dot": "2 4", "dashdot": "9 4 2 4"}


def draw(figure: Figure, width: int, title: str) -> Markup:
    """The figure as one `<svg>` of `width` x the layout's height (CSS pixels), which scales with its box.

    Text of labels may hold `<br>` and character references, nothing else.
    """
    data, layout = figure["data"], figure["layout"]
    names = _categories(figure)
    longest = max([_width(name) for name in names], default=0)
    left = min(longest + 14, 0.5 * width) if names else 68
    entries = [trace for trace in data if trace.get("name") and trace.get("showlegend", True)]
    if layout.get("showlegend") is False:
        entries = []
    legend, top = _legend(entries, width)
    notes = layout.get("annotations", [])
    top += _LINE + 4 if notes else 0
    height, bottom = layout["height"], 52
    box = (left, top + 8, width - 16, height - bottom)
    x, x_ticks = _scale(layout["xaxis"], [v for t in data for v in t["x"] if v is not None], box[0], box[2], names)
    parts = [*legend]
    for key in [key for key in layout if key.startswith("yaxis")]:
        axis, own = layout[key], [trace for trace in data if trace.get("yaxis", "y") == key.replace("axis", "")]
        low, high = axis.get("domain", (0, 1))
        edges = box[3] - low * (box[3] - box[1]), box[3] - high * (box[3] - box[1])
        y, y_ticks = _scale(axis, [v for t in own for v in t["y"] if v is not None], *edges, names)
        parts += _grid(axis, y_ticks, x_ticks if layout["xaxis"].get("showgrid", True) else [], box, edges)
        bars = [trace for trace in own if trace["type"] == "bar"]
        for trace in own:
            if trace["type"] == "bar":
                parts += _bars(trace, bars.index(trace), len(bars), x, y, abs(edges[0] - edges[1]) / max(len(names), 1))
            else:
                parts += _scatter(trace, x, y, box[2])
    for shape in layout.get("shapes", []):
        at = x(shape["x0"])
        parts.append(_path(f"M{at:.1f} {box[1]:.1f}V{box[3]:.1f}", shape["line"]["color"], "dot", 1))
    for note in notes:
        at = x(note["x"])
        parts.append(_text(at, box[1] - 6, note["text"], "end" if at + _width(note["text"]) > width else "start"))
    room = (box[2] - box[0]) / max(len(x_ticks), 1)
    for at, text in x_ticks:
        parts.append(_text(at, box[3] + 18, _shortened(text, room), "middle"))
    said = layout["xaxis"].get("title", {}).get("text", "")
    centre = min((box[0] + box[2]) / 2, max(width - _width(said) / 2, width / 2))
    parts.append(_text(centre, height - 10, _shortened(said, width), "middle"))
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
    )


def _scale(
    axis: Figure, values: list[Any], start: float, end: float, names: list[str]
) -> tuple[Callable[[Any], float], list[tuple[float, str]]]:
    """From a value to its pixel between `start` and `end`, and the ticks as (pixel, text)."""
    if axis.get("type") == "category":
        step = (start - end) / max(len(names), 1)  # the first name stands on top
        places = {name: end + (index + 0.5) * step for index, name in enumerate(names)}
        return places.__getitem__, [(place, name) for name, place in places.items()]
    if axis.get("type") == "log":
        low, high = axis["range"]
    else:
        low, high = axis.get("range") or (min(values, default=0), max(values, default=1))
        if axis.get("rangemode") == "tozero":
            low, high = 0, high * 1.02
        elif "range" not in axis:
            low, high = low - 0.05 * (high - low), high + 0.05 * (high - low)
    if high <= low:
        low, high = low - 0.5, high + 0.5

    def place(value: Any) -> float:
        shown = math.log10(value) if axis.get("type") == "log" else value
        return start + (shown - low) / (high - low) * (end - start)

    if "tickvals" in axis:
        return place, [(place(at), text) for at, text in zip(axis["tickvals"], axis["ticktext"], strict=True)]
    wanted = max(2, abs(end - start) / (90 if end > start else 40))  # upwards only the height of a line is needed
    power = 10.0 ** math.floor(math.log10((high - low) / wanted))
    step = next(power * digit for digit in (1, 2, 5, 10) if (high - low) / (power * digit) <= wanted)
    ticks = [index * step for index in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return place, [(place(tick), _si(tick) if "tickformat" in axis else f"{tick:,.6g}") for tick in ticks]


def _si(value: float) -> str:
    """`150k`, `2.5M`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _categories(figure: Figure) -> list[str]:
    if figure["layout"]["yaxis"].get("type") != "category":
        return []
    return list(dict.fromkeys(name for trace in figure["data"] for name in trace["y"]))


def _grid(
    axis: Figure, y_ticks: list[tuple[float, str]], x_ticks: list[tuple[float, str]], box: Any, edges: Any
) -> list[str]:
    left, _, right, _ = box
    named = axis.get("type") == "category"
    parts = [] if named else [f'<path class="grid" d="M{left:.1f} {at:.1f}H{right:.1f}"/>' for at, _ in y_ticks]
    parts += [f'<path class="grid" d="M{at:.1f} {edges[0]:.1f}V{edges[1]:.1f}"/>' for at, _ in x_ticks]
    parts.append(f'<path class="grid" d="M{left:.1f} {edges[0]:.1f}H{right:.1f}"/>')
    last = math.inf  # ticks of a log axis crowd where the picture is low: one that touches the last is left out
    for at, text in sorted(y_ticks, reverse=True):
        if named or last - at >= 13:
            last = at
            parts.append(_text(left - 8, at + 4, _shortened(text, left - 10), "end"))
    lines = axis.get("title", {}).get("text", "").split("<br>")
    middle = (edges[0] + edges[1]) / 2
    for index, line in enumerate(lines):
        place = f'transform="translate({12 + 14 * index} {middle:.1f}) rotate(-90)"'
        shown = _escaped(_shortened(line, abs(edges[0] - edges[1])))
        parts.append(f'<text {place} text-anchor="middle">{shown}</text>')
    return parts


def _scatter(trace: Figure, x: Callable[[Any], float], y: Callable[[Any], float], right: float) -> list[str]:
    points = [
        None if a is None or b is None else (x(a), y(b)) for a, b in zip(trace["x"], trace["y"], strict=True)
    ]  # fmt: skip
    parts = []
    if "lines" in trace["mode"]:
        steps = [
            f"{'L' if before and index else 'M'}{now[0]:.1f} {now[1]:.1f}"
            for index, (before, now) in enumerate(pairwise([None, *points]))
            if now
        ]
        line = trace["line"]
        said = _said(trace, 0) if trace["mode"] == "lines" else ""  # else the markers say it
        parts.append(_path("".join(steps), line["color"], line.get("dash", "solid"), line["width"], said))
    if "markers" in trace["mode"]:
        marker = trace.get("marker") or {"color": trace["line"]["color"], "symbol": "circle", "size": 7}
        symbols = marker["symbol"] if isinstance(marker["symbol"], list) else [marker["symbol"]] * len(points)
        for index, (point, symbol) in enumerate(zip(points, symbols, strict=True)):
            if point:
                parts.append(_marker(*point, symbol, marker["color"], marker["size"] / 2, _said(trace, index)))
    if "text" in trace["mode"]:
        for point, text in zip(points, trace["text"], strict=True):
            if point:
                beside = point[0] + 9 + _width(text) < right + 14
                parts.append(_text(point[0] + (9 if beside else -9), point[1] + 4, text, "start" if beside else "end"))
    return parts


def _bars(
    trace: Figure, index: int, count: int, x: Callable[[Any], float], y: Callable[[Any], float], row: float
) -> list[str]:
    thick = 0.7 * row / count
    parts = []
    for number, (value, name) in enumerate(zip(trace["x"], trace["y"], strict=True)):
        if value is not None:
            top = y(name) - 0.35 * row + index * thick
            size = f'x="{x(0):.1f}" y="{top:.1f}" width="{x(value) - x(0):.1f}" height="{max(thick - 1, 1):.1f}"'
            parts.append(f'<rect {size} fill="{trace["marker"]["color"]}">{_said(trace, number)}</rect>')
    return parts


def _legend(entries: list[Figure], width: int) -> tuple[list[str], float]:
    """The legend's parts in rows from the top, and where they end."""
    parts, at, top = [], 0.0, 14
    for trace in entries:
        wide = 34 + _width(trace["name"]) + 14
        if at and at + wide > width:
            at, top = 0, top + _LINE + 2
        colour = trace["line"]["color"] if "line" in trace else trace["marker"]["color"]
        if trace["type"] == "bar":
            parts.append(f'<rect x="{at + 6:.1f}" y="{top - 9}" width="18" height="10" fill="{colour}"/>')
        if "lines" in trace.get("mode", ""):
            parts.append(_path(f"M{at:.1f} {top - 4}h28", colour, trace["line"].get("dash", "solid"), 2))
        if "marker" in trace and trace["type"] == "scatter":
            symbol = trace["marker"]["symbol"]
            symbol = symbol[-1] if isinstance(symbol, list) else symbol
            parts.append(_marker(at + 14, top - 4, symbol, colour, 5))
        parts.append(_text(at + 34, top, trace["name"]))
        at += wide
    return parts, top if entries else 0


def _marker(x: float, y: float, symbol: str, colour: str, r: float, said: str = "") -> str:
    fill = f'class="open" stroke="{colour}" stroke-width="2"' if symbol.endswith("-open") else f'fill="{colour}"'
    shape = symbol.removesuffix("-open")
    if shape == "square":
        return f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}" {fill}>{said}</rect>'
    if shape == "diamond":
        r *= 1.3
        d = f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z"
        return f'<path d="{d}" {fill}>{said}</path>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}" {fill}>{said}</circle>'


def _path(d: str, colour: str, dash: str, width: float, said: str = "") -> str:
    dashes = f' stroke-dasharray="{_DASHES[dash]}"' if dash in _DASHES else ""
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}>{said}</path>'


def _said(trace: Figure, index: int) -> str:
    """What a browser shows over a point, from the trace's `hovertemplate`."""
    template = trace.get("hovertemplate", "").replace("<extra></extra>", "").replace("<br>", "\n")
    if not template or (trace.get("mode") == "lines" and "%{x" in template and "%{y" in template):
        return ""  # a curve has no one point to speak of

    def value(match: re.Match[str]) -> str:
        found = trace[match[1]][index]
        return format(found, match[2] or "") if not isinstance(found, str) else found

    return f"<title>{_escaped(re.sub(r'%{(x|y|text)(?::([^}]*))?}', value, template))}</title>"


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{_escaped(text)}</text>'


def _escaped(text: str) -> str:
    return html.escape(html.unescape(text), quote=False)


def _width(text: str) -> float:
    return len(html.unescape(text)) * _CHARACTER


def _shortened(text: str, room: float) -> str:
    plain, most = html.unescape(text), max(4, int(room / _CHARACTER))
    return html.escape(plain if len(plain) <= most else plain[: most - 1] + "…", quote=False)
