"""One self-contained HTML page of a run: no network, no other file; for a laptop, a phone and paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from kronfold.base.files import write_text
from kronfold.report import numbers
from kronfold.report.document import (
    Document,
    check_document,
    excess_perplexity,
    last_index,
    matrices,
    measured,
    plain_stages,
)
from kronfold.report.figures import error_figure, loss_figure, perplexity_figure


def write_report(results: Document, path: str | Path) -> Path:
    """Write the HTML report of a run document to `path` (atomic, replaces a file there); returns the path.

    Raises:
        InputError: the document is not a run result of a version this kronfold reads.
        OutputError: the place cannot be written.
    """
    page = render(results)
    write_text(path, page)
    return Path(path)


def render(results: Document) -> str:
    """The HTML of the report, all text of the document escaped. Raises InputError like `write_report`."""
    check_document(results, "run")
    return render_page(
        "report.html.j2",
        results,
        _figures(results),
        recipe=results["recipe"],
        title=f"{results['model']} · {results['recipe'].get('name', 'recipe')}",
        complete=results.get("complete", True),
        cards=_cards(results),
        measured=measured(results),
        stages=_stage_rows(results),
        matrices=matrices(results),
        samples=_samples(results),
        facts=_facts(results),
    )


def render_page(
    template: str, results: Document, figures: list[tuple[str, dict[str, Any], str, str]], **content: Any
) -> str:
    """One self-contained page from a template that extends `base.html.j2`; the document travels in it.

    Args:
        figures: (name, plotly figure in plain JSON, heading, how to read it).
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kronfold.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(numbers, name) for name in _FILTERS}
    return environment.get_template(template).render(
        results=results,
        figures=figures,
        plotly=Markup(get_plotlyjs()) if figures else "",  # the library's own text, meant to be inlined
        figures_json=_script_json({name: figure for name, figure, _, _ in figures}),
        results_json=_script_json(results),
        **content,
    )


_FILTERS = ("count", "perplexity", "share", "signed_percent", "error", "size", "duration", "shape")


def _script_json(document: Any) -> Markup:
    """JSON that is safe inside a <script> element; numbers that JSON does not have (NaN, inf) become null."""
    text = json.dumps(_finite(document), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or numbers.known(value) else None


def _cards(results: Document) -> list[tuple[str, str, list[str]]]:
    """Headline numbers: title, the number, and lines that say against what."""
    teacher = results["teacher"]

    def against(key: str, show: Any, *more: str) -> list[str]:
        before, after = teacher.get(key), results.get(key)
        return [
            f"teacher {show(before)}",
            f"{numbers.share(after, before)}, {numbers.smaller(before, after)}",
            *more,
        ]

    held, macs, stored = (
        results.get("held_parameters"),
        results.get("macs_per_token"),
        results.get("bytes_fp16"),
    )
    index = f"+ {numbers.count(results['index_bytes'])} bytes of permutations" if results.get("index_bytes") else ""
    cards = [
        ("Held parameters", numbers.count(held), against("held_parameters", numbers.count)),
        (
            "MACs per token",
            numbers.count(macs),
            against("macs_per_token", numbers.count, "multiply-accumulates of one forward pass"),
        ),
        (
            "Size at fp16",
            numbers.size(stored),
            against("bytes_fp16", numbers.size, f"{numbers.count(stored)} bytes", *([index] if index else [])),
        ),
    ]
    return [*cards, _perplexity_card(results)]


def _perplexity_card(results: Document) -> tuple[str, str, list[str]]:
    healed = last_index(results["stages"], "after_healing")
    lines = [f"teacher {numbers.perplexity(results['teacher'].get('perplexity'))}"]
    value = None
    if healed is not None:
        stage = results["stages"][healed]
        value = stage["after_healing"]
        excess = excess_perplexity(results, value)
        lines += [f"excess {numbers.signed_percent(excess)}"] if excess is not None else []
        if not results.get("complete", True):
            lines.append(f"after stage {healed + 1}, {numbers.count(stage.get('held_parameters'))} held parameters")
    lines.append(f"protocol {numbers.protocol_short(results['protocol'])}")
    return "Perplexity, healed", numbers.perplexity(value), lines


def _figures(results: Document) -> list[tuple[str, dict[str, Any], str, str]]:
    """The pictures there is data for: name, plotly figure, heading, and how to read it."""
    candidates = [
        (
            "perplexity",
            perplexity_figure(results),
            "Perplexity through the stages",
            "Each stage compresses (perplexity rises) and heals (it falls). Lower is better; the aim is the "
            "teacher's line.",
        ),
        (
            "errors",
            error_figure(results),
            "Relative error per matrix",
            "What is lost when a matrix is replaced, before any healing. Shorter bars are better; the "
            "gap between the two bars of a matrix is what its permutations gain at equal parameters.",
        ),
        (
            "losses",
            loss_figure(results),
            "Loss while healing",
            "Tokens are counted from the first stage on; dotted lines mark where a stage begins. A jump "
            "there is the next compression.",
        ),
    ]
    return [(name, figure, title, text) for name, figure, title, text in candidates if figure is not None]


def _stage_rows(results: Document) -> list[tuple[str, Document]]:
    """All stages with the search they belong to; the control only when it was run."""
    ours = [("with permutations", stage) for stage in results["stages"]]
    return ours + [("plain Kronecker", stage) for stage in plain_stages(results)]


def _samples(results: Document) -> list[tuple[str, list[tuple[str, str]]]]:
    """Samples grouped by prompt, in the order given: prompt, then (who, continuation) pairs."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for sample in results.get("samples", []):
        prompt = sample.get("prompt", "")
        groups.setdefault(prompt, []).append((sample["who"], sample["text"].removeprefix(prompt)))
    return list(groups.items())


def _facts(results: Document) -> list[tuple[str, str]]:
    """How it was measured, as (name, text) pairs; what the document does not say is left out."""
    facts = [
        ("Command", results.get("command")),
        ("Model", results["model"]),
        (
            "Recipe",
            ": ".join(filter(None, (results["recipe"].get("name"), results["recipe"].get("description")))),
        ),
        *(("Blocks kept", numbers.kept_layers(stage["layers"])) for stage in results["stages"] if stage.get("layers")),
        ("Perplexity protocol", numbers.protocol(results["protocol"])),
    ]
    for name, key in (("Healing text", "heal"), ("Evaluation text", "eval")):
        if source := results.get("data", {}).get(key):
            facts.append((name, f"{source.get('source')}, {numbers.count(source.get('tokens'))} tokens"))
            facts.append((f"{name}, SHA-256", source.get("sha256")))
    seed, total = results.get("seed"), results.get("total_seconds")
    facts += [
        ("Seed", None if seed is None else str(seed)),
        ("Total time", None if total is None else numbers.duration(total)),
        ("Versions", numbers.pairs(results.get("versions", {}))),
        ("Machine", numbers.pairs(results.get("machine", {}))),
        ("Written", results.get("created")),
    ]
    return [(name, text) for name, text in facts if text]
