"""One self-contained HTML page of a run or a comparison: no network, no other file; for a laptop, a phone and paper."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from kronfold.base import results
from kronfold.base.files import write_text
from kronfold.report import figures, numbers, svg
from kronfold.report.comparison import cells, columns, compared, facts, markdown, notes
from kronfold.report.document import (
    Document,
    excess_perplexity,
    last_index,
    matrices,
    measured,
    own_name,
    plain_stages,
)

HTML, MARKDOWN = "report.html", "table.md"
SPREAD = 1.15  # sizes that differ by less lie on top of each other in a picture
_WIDE, _NARROW = 1040, 380  # CSS pixels a picture is drawn for; the page shows the one that fits
_FILTERS = ("count", "perplexity", "share", "signed_percent", "error", "size", "duration", "shape", "rate")


def write_report(document: Document, path: str | Path) -> Path:
    """Write the HTML report of a run document to `path` (atomic, replaces a file there); returns the path.

    Raises:
        InputError: the document is not a run result of a version this kronfold reads.
        OutputError: the place cannot be written.
    """
    page = render(document)
    write_text(path, page)
    return Path(path)


def write_comparison(document: Document, directory: str | Path) -> None:
    """Write `report.html` and `table.md` of a comparison into `directory`, each atomically.

    Raises InputError for another document, OutputError when the place cannot be written.
    """
    page, table = render_comparison(document), markdown(document)
    write_text(Path(directory) / HTML, page)
    write_text(Path(directory) / MARKDOWN, table)


def render(document: Document) -> str:
    """The HTML of a run's report, all text of the document escaped. Raises InputError like `write_report`."""
    results.check(document, "run")
    pictures = [
        (
            "perplexity",
            figures.perplexity_figure(document),
            "Perplexity through the stages",
            "Each stage compresses (perplexity rises) and heals (it falls). Lower is better; the aim is the "
            "teacher's line." + (_BESIDE_PICTURE if document.get("beside") else ""),
        ),
        (
            "errors",
            figures.error_figure(document),
            "Relative error per matrix",
            "What is lost when a matrix is replaced, before any healing. Shorter bars are better; the "
            "gap between the two bars of a matrix is what its permutations gain at equal parameters.",
        ),
        (
            "losses",
            figures.loss_figure(document),
            "Loss while healing",
            "Tokens are counted from the first stage on; dotted lines mark where a stage begins. A jump "
            "there is the next compression.",
        ),
    ]
    tracks = [("with permutations", stage) for stage in document["stages"]]
    tracks += [("plain Kronecker", stage) for stage in plain_stages(document)]
    replaced = matrices(document)
    if beside := document.get("beside"):
        who = beside["recipe"]["name"]
        tracks += [(f"{who}, beside it", stage) for stage in beside["stages"]]
        rows = {**document, "stages": [{**stage, "name": who} for stage in beside["stages"]]}
        replaced += matrices(rows)
    samples: dict[str, list[tuple[str, str]]] = {}  # by prompt, in the order given
    for sample in document.get("samples", []):
        prompt = sample.get("prompt", "")
        samples.setdefault(prompt, []).append((sample["who"], sample["text"].removeprefix(prompt)))
    measurements = measured(document)
    return render_page(
        "report.html.j2",
        document,
        [(name, figure, title, text) for name, figure, title, text in pictures if figure is not None],
        recipe=document["recipe"],
        beside=beside,
        intro=introduction(document),
        title=f"{document['model']} · {document['recipe'].get('name', 'recipe')}",
        complete=document.get("complete", True),
        cards=_cards(document),
        measured=measurements,
        rated=any(row.learning_rate for row in measurements),
        stages=tracks,
        matrices=replaced,
        plain=any(numbers.known(matrix.row.get("relative_error_plain")) for matrix in replaced),
        samples=list(samples.items()),
        facts=_facts(document),
    )


_BESIDE_PICTURE = (
    " The recipe beside it has one stage and stands where the other has reached the same size: at the last one."
)


def introduction(document: Document) -> str | None:
    """What a run with a second track shows and why, in words; None for any other run."""
    beside = document.get("beside")
    if not beside:
        return None
    own, other = own_name(document), beside["recipe"]["name"]
    share = numbers.share(document["held_parameters"], document["teacher"].get("held_parameters"))
    tokens = numbers.count(sum(stage.get("tokens") or 0 for stage in document["stages"]))
    return (
        f"Two ways to the same size, {share} of the teacher: {own}, a published recipe of fixed shapes, with its "
        f"controls; and {other}, which plans and fits every matrix to data. Both heal on the same {tokens} tokens with "
        "the same seed and are measured by the same protocol. The controls tell the recipe's merit from the data's."
    )


def render_comparison(document: Document) -> str:
    """The HTML page of a comparison, all text of the document escaped. Raises InputError for another document."""
    rows, target = compared(document), document.get("target")
    size = f"{numbers.count(target['held_parameters'])} held parameters," if target else "its own size and"
    pictures = [
        (
            "healing",
            figures.healing_figure(document),
            "Perplexity before and after healing",
            "Further left is better. A thin line joins what a model was before healing (open) and after (filled); the "
            "dense teacher is the line to reach.",
        )
    ]
    sizes = [row["held_parameters"] for row in document["rows"]]
    if max(sizes) > SPREAD * min(sizes):  # else they cannot be told apart
        text = "Lower is better, further left is smaller. Each recipe before healing (open) and after (filled)."
        pictures.append(("size", figures.size_figure(document), "Size and quality", text))
    return render_page(
        "comparison.html.j2",
        document,
        pictures,
        title=f"{document['model']} · comparison",
        lead=f"each brought to {size} healed on the same tokens.",
        columns=columns(document),
        lines=[(row, cells(document, row)) for row in rows],
        notes=notes(document),
        facts=facts(document),
    )


def render_page(
    template: str, document: Document, pictures: list[tuple[str, dict[str, Any], str, str]], **content: Any
) -> str:
    """One self-contained page from a template that extends `base.html.j2`; the document travels in it.

    Args:
        pictures: (name, figure as data, heading, how to read it).
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kronfold.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(numbers, name) for name in _FILTERS}
    drawn = [
        (name, title, text, svg.draw(figure, _WIDE, title), svg.draw(figure, _NARROW, title))
        for name, figure, title, text in pictures
    ]
    return environment.get_template(template).render(
        results=document,
        figures=drawn,
        figures_json=_script_json({name: figure for name, figure, _, _ in pictures}),
        results_json=_script_json(document),
        **content,
    )


def _script_json(document: Any) -> Markup:
    """JSON that is safe inside a <script> element; numbers that JSON does not have (NaN, inf) become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return value if not isinstance(value, float) or numbers.known(value) else None

    text = json.dumps(finite(document), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _cards(document: Document) -> list[tuple[str, str, list[str]]]:
    """Headline numbers: title, the number, and lines that say against what."""
    teacher, stages = document["teacher"], document["stages"]
    cards = []
    for title, key, show, more in (
        ("Held parameters", "held_parameters", numbers.count, []),
        ("MACs per token", "macs_per_token", numbers.count, ["multiply-accumulates of one forward pass"]),
        ("Size at fp16", "bytes_fp16", numbers.size, [f"{numbers.count(document.get('bytes_fp16'))} bytes"]),
    ):
        before, after = teacher.get(key), document.get(key)
        ratio = f"{numbers.share(after, before)}, {numbers.smaller(before, after)}"
        cards.append((title, show(after), [f"teacher {show(before)}", ratio, *more]))
    if document.get("index_bytes"):
        cards[-1][2].append(f"+ {numbers.count(document['index_bytes'])} bytes of permutations")
    lines = [f"teacher {numbers.perplexity(teacher.get('perplexity'))}"]
    healed, value = last_index(stages, "after_healing"), None
    if healed is not None:
        value = stages[healed]["after_healing"]
        excess = excess_perplexity(document, value)
        lines += [f"excess {numbers.signed_percent(excess)}"] if excess is not None else []
        if not document.get("complete", True):
            held = numbers.count(stages[healed].get("held_parameters"))
            lines.append(f"after stage {healed + 1}, {held} held parameters")
    if beside := document.get("beside"):
        found = beside["stages"][-1].get("after_healing")
        lines.append(f"{beside['recipe']['name']} at the same size {numbers.perplexity(found)}")
    lines.append(f"protocol {numbers.protocol_short(document['protocol'])}")
    return [*cards, ("Perplexity, healed", numbers.perplexity(value), lines)]


def _facts(document: Document) -> list[tuple[str, str]]:
    """How it was measured, as (name, text) pairs; what the document does not say is left out."""
    recipe = document["recipe"]
    found = [
        ("Command", document.get("command")),
        ("Model", document["model"]),
        ("Recipe", ": ".join(filter(None, (recipe.get("name"), recipe.get("description"))))),
        *(("Blocks kept", numbers.kept_layers(stage["layers"])) for stage in document["stages"] if stage.get("layers")),
        ("Perplexity protocol", numbers.protocol(document["protocol"])),
    ]
    data = document.get("data") or {}
    for name, key in (("Healing text", "heal"), ("Evaluation text", "eval")):
        if source := data.get(key):
            found.append((name, f"{source.get('source')}, {numbers.count(source.get('tokens'))} tokens"))
            found.append((f"{name}, SHA-256", source.get("sha256")))
    seed, total = document.get("seed"), document.get("total_seconds")
    found += [
        ("Seed", None if seed is None else str(seed)),
        ("Total time", None if total is None else numbers.duration(total)),
        ("Versions", numbers.pairs(document.get("versions", {}))),
        ("Machine", numbers.pairs(document.get("machine", {}))),
        ("Written", document.get("created")),
    ]
    return [(name, text) for name, text in found if text]
