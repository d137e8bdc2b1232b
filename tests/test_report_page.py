"""The HTML report: complete, self-contained, safe with any text, honest about what is missing."""

from __future__ import annotations

import copy
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import plotly.graph_objects as go
import pytest
from rich.console import Console

from kronfold.base.errors import InputError, OutputError
from kronfold.report import figures, numbers, svg
from kronfold.report.page import render, render_comparison, write_report
from kronfold.report.tables import run_summary
from report_examples import HTML, bare_document, beside_document, run_document, unfinished_document

DOCUMENTS = {"full": run_document, "bare": bare_document, "unfinished": unfinished_document}
ROLES = {
    "ours": figures.OURS,
    "plain": figures.PLAIN,
    "dense": figures.DENSE,
    "teacher": figures.TEACHER,
    "beside": figures.BESIDE,
}


class Page(HTMLParser):
    """Every tag with its attributes, ids, the visible text, and the two JSON islands."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: set[str | None] = set()
        self.texts: list[str] = []
        self.islands: dict[str, Any] = {}
        self._inside, self._id = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append((tag, found))
        self.ids.add(found.get("id"))
        self._inside, self._id = tag, found.get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and self._id in ("results", "figures"):
            self.islands[self._id] = json.loads(data)
        elif self._inside not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {name: Page(render(make())) for name, make in DOCUMENTS.items()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_page_carries_the_exact_document(pages, name):
    assert pages[name].islands["results"] == DOCUMENTS[name]()


def test_every_quoted_number_is_visible(pages):
    document, text = run_document(), pages["full"].text
    searches = [document["stages"], document["controls"]["plain_kronecker"]["stages"]]
    shown = [f"{document[key]:,}" for key in ("held_parameters", "macs_per_token", "bytes_fp16", "index_bytes")]
    shown += [f"{document['teacher'][key]:,}" for key in ("held_parameters", "macs_per_token")]
    shown += ["27.31", "25.87", "6.9 MB", "1,901,337", "48,211", "ab" * 32, "cd" * 32, "1234", "3 min 23 s"]
    for stages in searches:
        for stage in stages:
            shown += [
                f"{stage['before_healing']:.2f}",
                f"{stage['after_healing']:.2f}",
                f"{stage['tokens']:,}",
            ]
            shown += [
                f"{stage['held_parameters']:,}",
                f"{stage['seconds']} s",
                f"{stage['decompose_seconds']} s",
            ]
    for stage in document["stages"]:
        for row in stage["rows"]:
            shown += [row["name"], f"{row['relative_error']:.4f}", f"{row['relative_error_plain']:.4f}"]
            shown += [f"{row['held_parameters']:,}", f"{row['teacher_parameters']:,}"]
    shown += [
        *document["versions"].values(),
        "x86_64",
        document["command"],
        "sliding (window 256, stride 128)",
    ]
    assert [number for number in shown if number not in text] == []


def test_excess_perplexity_is_ratio_to_teacher_minus_one(pages):
    rows = {"38.42": 38.42 / 27.31 - 1, "25.87": 25.87 / 27.31 - 1, "64.05": 64.05 / 27.31 - 1}
    for perplexity, excess in rows.items():
        assert f"{perplexity} {numbers.signed_percent(excess)}" in pages["full"].text
    assert numbers.signed_percent(25.87 / 27.31 - 1) == "−5.3 %"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_loaded_from_anywhere(pages, name):
    for tag, attributes in pages[name].tags:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
    policy = dict(pages[name].tags)["meta"]  # the last <meta> wins in this dict and it is the policy
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert policy["content"].startswith("default-src 'none'")
    assert "http" not in policy["content"]


def test_a_page_is_small_and_runs_no_library():
    page = render(run_document())
    assert len(page.encode()) < 300_000  # the bar is 1.5 MB, with any chart library it would be above 1 MB
    assert "plotly" not in page.lower()


SECTIONS = [
    (
        "full",
        {"controls", "figure-perplexity", "figure-errors", "figure-losses", "stages", "matrices", "samples"},
        set(),
    ),
    ("bare", {"controls", "figure-perplexity", "figure-errors", "matrices"}, {"figure-losses", "samples"}),
    ("unfinished", {"controls", "figure-perplexity", "figure-losses", "stages"}, {"samples"}),
]


@pytest.mark.parametrize(("name", "present", "absent"), SECTIONS)
def test_sections_follow_the_data(pages, name, present, absent):
    assert present <= pages[name].ids
    assert not absent & pages[name].ids


def test_a_run_without_stages_shows_the_teacher_only():
    document = bare_document() | {"stages": [], "complete": False}
    page = Page(render(document))
    assert page.islands["figures"] == {}
    assert not {"stages", "matrices", "figure-errors"} & page.ids
    assert "Dense teacher 27.31" in page.text
    assert "Perplexity, healed –" in page.text


def test_controls_are_named_only_when_they_were_run(pages):
    for words in ("fine-tuned on the same data", "Plain Kronecker, healed"):
        assert words in pages["full"].text
        assert words not in pages["bare"].text


def test_an_unfinished_run_says_so(pages):
    assert "This run is not finished" in pages["unfinished"].text
    assert "not finished" not in pages["full"].text
    assert "after stage 1, 2,785,152 held parameters" in pages["unfinished"].text
    assert "Compressed, before healing (stage 2) 97.62" in pages["unfinished"].text


def test_before_healing_of_a_later_stage_is_not_sold_as_unhealed(pages):
    assert "Compressed, before healing (stage 3) 64.05" in pages["full"].text
    single = bare_document()
    single["stages"] = single["stages"][:1]
    assert "Compressed, before healing 212.40" in Page(render(single)).text


def _with_html() -> dict[str, Any]:
    document = run_document()
    document["model"] = document["command"] = document["recipe"]["name"] = document["recipe"]["description"] = HTML
    document["protocol"]["name"] = document["data"]["heal"]["source"] = HTML
    for sample in document["samples"]:
        sample.update(who=HTML, prompt=HTML, text="</script>" + HTML)
    for stage in document["stages"]:
        stage["name"] = HTML
        for row in stage["rows"]:
            row["name"] = row["structure"] = HTML
            row["spec"] = {HTML: HTML}
    return document


def test_text_of_the_document_is_never_markup():
    text = render(_with_html())
    assert HTML not in text
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 3  # two JSON islands, the download link
    assert "b" not in tags
    assert HTML in page.text
    assert page.islands["results"] == _with_html()
    drawn = page.islands["figures"]  # plotly reads some HTML in labels, so they are escaped once more
    assert drawn["perplexity"]["layout"]["xaxis"]["ticktext"] == [html.escape(HTML, quote=False)] * 3
    assert "<b>" not in json.dumps(drawn)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_are_valid_plotly(pages, name):
    for figure in pages[name].islands["figures"].values():
        go.Figure(figure)  # raises on any property that plotly does not know
        axes = [axis for key, axis in figure["layout"].items() if key in ("xaxis", "yaxis", "yaxis2")]
        assert any(axis.get("title", {}).get("text") for axis in axes)
        assert figure["data"]


def test_error_bars_hold_both_errors_of_every_matrix(pages):
    with_permutations, plain = pages["full"].islands["figures"]["errors"]["data"]
    rows = [row for stage in run_document()["stages"] for row in stage["rows"]]
    assert with_permutations["x"] == [row["relative_error"] for row in rows]
    assert plain["x"] == [row["relative_error_plain"] for row in rows]
    assert len(set(plain["y"])) == len(rows)  # wte is replaced twice and must not share a bar
    assert [trace["name"] for trace in pages["bare"].islands["figures"]["errors"]["data"]] == ["with permutations"]


def test_perplexity_picture_has_both_searches_and_the_dense_levels(pages):
    figure = pages["full"].islands["figures"]["perplexity"]
    lines = {trace["name"]: trace["y"] for trace in figure["data"]}
    assert lines["with permutations"] == [212.4, 34.11, 97.62, 36.87, 64.05, 38.42]
    assert lines["teacher"] == [27.31, 27.31]
    assert set(lines) == {"with permutations", "plain Kronecker", "teacher", "dense, fine-tuned"}
    assert figure["layout"]["yaxis"]["type"] == "log"
    assert "sliding" in figure["layout"]["yaxis"]["title"]["text"]


def test_loss_curves_run_on_over_the_stages(pages):
    figure = pages["full"].islands["figures"]["losses"]
    ours = next(trace for trace in figure["data"] if trace["name"] == "with permutations")
    stages = run_document()["stages"]
    expected = [409_600 * i + record["tokens"] for i, stage in enumerate(stages) for record in stage["losses"]]
    assert ours["x"] == expected
    assert ours["y"] == [record["kl"] for stage in stages for record in stage["losses"]]
    dense = [trace["yaxis"] for trace in figure["data"] if trace["name"] == "dense, fine-tuned"]
    assert dense == ["y2"]  # it has no teacher signal, so cross entropy only


def test_values_that_overflowed_are_shown_as_not_measured():
    document = run_document()
    document["stages"][0]["before_healing"] = float("inf")
    document["stages"][1]["losses"][0]["kl"] = float("nan")
    page = Page(render(document))
    assert page.islands["figures"]["perplexity"]["data"][0]["y"][0] is None
    assert page.islands["results"]["stages"][1]["losses"][0]["kl"] is None


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([30.0, 210.0], ["30", "50", "70", "100", "150", "200"]),
        ([20.0, 1500.0], ["20", "50", "100", "200", "500", "1,000"]),
        ([20.0, 3e8], ["10", "100", "1,000", "10,000", "100,000", "1,000,000", "1e+07", "1e+08"]),
        ([27.0, 27.0], ["25", "30"]),
    ],
)
def test_log_ticks_are_round_and_inside(values, ticks):
    found, texts, (low, high) = figures.log_ticks(values)
    assert 10**low < min(values) <= max(values) < 10**high
    assert texts == ticks
    assert all(10**low <= tick <= 10**high for tick in found)


def _contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2.1 between two sRGB colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("role", ROLES)
def test_lines_stand_out_on_the_white_and_on_the_dark_page(role):
    panels = re.findall(r"--panel: (#\w{6})", render(bare_document()))
    assert len(set(panels)) == 2
    assert min(_contrast(ROLES[role], panel) for panel in panels) >= 3.0


BAD = [
    ({"schema": "kronfold/eval"}, "schema 'kronfold/eval'.*reads 'kronfold/run'"),
    ({"schema": None}, "schema None"),
    ({"schema_version": 2}, "schema_version 2.*Upgrade kronfold"),
    ({"schema_version": "1"}, "schema_version '1'.*results.json"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_another_schema_is_refused_and_nothing_is_written(tmp_path, change, message):
    path = tmp_path / "report.html"
    path.write_text("before")
    with pytest.raises(InputError, match=message):
        write_report(run_document() | change, path)
    assert path.read_text() == "before"


def test_missing_keys_are_all_named():
    document = run_document()
    del document["teacher"], document["stages"]
    with pytest.raises(InputError, match="lacks teacher, stages"):
        render(document)
    with pytest.raises(InputError, match="JSON object, but this is a list"):
        render([document])


def test_write_report_writes_one_file(tmp_path):
    document = run_document()
    untouched = copy.deepcopy(document)
    path = write_report(document, tmp_path / "deep" / "report.html")
    assert path.read_text(encoding="utf-8") == render(document)
    assert list(path.parent.iterdir()) == [path]
    assert document == untouched


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(OutputError, match="Could not write"):
        write_report(run_document(), tmp_path / "file" / "report.html")
    assert (tmp_path / "file").read_text() == "before"


def test_the_room_imports_no_torch():
    code = "import sys, kronfold.report.page, kronfold.report.tables; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


class Tables(HTMLParser):
    """The open tags around every table."""

    VOID = ("meta", "br", "img", "hr", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.boxes: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.boxes.append(self.open[-1][1])
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1][0] == tag
        self.open.pop()


GOLDEN = Path(__file__).parent / "golden" / "v0.3"
PAGES = {
    "a run": lambda: render(run_document()),
    "a run with a second track": lambda: render(beside_document()),
    "a run of 0.3": lambda: render(json.loads((GOLDEN / "run.json").read_text())),
    "a comparison of 0.3": lambda: render_comparison(json.loads((GOLDEN / "compare.json").read_text())),
}


@pytest.mark.parametrize("name", PAGES)
def test_every_table_stands_in_a_box_that_scrolls_with_an_edge(name):
    page = PAGES[name]()
    boxes = Tables(page).boxes
    assert len(boxes) == page.count("<table") >= 1
    for box in boxes:  # reached by keyboard and named for those who do not see it
        assert (box["class"], box["tabindex"], box["role"]) == ("scroll", "0", "region")
        assert box["aria-label"]
    (rule,) = re.findall(r"\n\.scroll \{(.*?)\}", page, re.S)
    assert "overflow-x: auto" in rule
    assert "border: 1px solid" in rule
    assert rule.count("var(--shadow)") == 2


@pytest.mark.parametrize("name", PAGES)
def test_a_page_stays_far_below_its_limit(name):
    assert len(PAGES[name]().encode()) < 300_000  # the bar is 1,500,000


@pytest.mark.parametrize("width", [1040, 380])
@pytest.mark.parametrize("name", PAGES)
def test_pictures_stay_inside_their_frame(name, width):
    """Points, bars, lines and texts: what is drawn lies within the picture, at the width of a laptop and of a phone."""
    for text, figure in Page(PAGES[name]()).islands["figures"].items():
        picture = ElementTree.fromstring(svg.draw(figure, width, text))
        _, _, wide, high = map(float, picture.attrib["viewBox"].split())
        assert (wide, high) == (width, figure["layout"]["height"])
        for one in picture.iter():
            if one.tag == "text" and "transform" not in one.attrib:
                room = 6 * len(one.text or "")
                left = float(one.attrib["x"]) - {"start": 0, "middle": room / 2, "end": room}[one.attrib["text-anchor"]]
                assert -8 <= left <= left + room <= wide + 20, one.text
            for key, limit in (("cx", wide), ("cy", high), ("x", wide), ("y", high)):
                assert 0 <= float(one.attrib.get(key, 0)) <= limit
            if one.tag == "rect":
                assert float(one.attrib["x"]) + float(one.attrib["width"]) <= wide


def test_points_stand_where_their_values_say():
    """A log axis by hand: equal ratios are equal distances, and the ticks agree with the points."""
    figure = {
        "data": [
            {
                "type": "scatter", "mode": "lines+markers", "name": "one", "x": [0, 1, 2], "y": [10.0, None, 1000.0],
                "line": {"color": "#111111", "width": 2}, "hovertemplate": "perplexity %{y:,.2f}",
                "marker": {"color": "#111111", "symbol": "circle", "size": 8},
            }
        ],
        "layout": {
            "height": 300, "xaxis": {"range": [0, 2]},
            "yaxis": {"type": "log", "range": [0, 4], "tickvals": [1, 10, 100, 1000, 10000], "ticktext": list("abcde")},
        },
    }  # fmt: skip
    picture = ElementTree.fromstring(svg.draw(figure, 500, "t"))
    circles = [one for one in picture.iter("circle") if one.find("title") is not None]
    assert [one.find("title").text for one in circles] == ["perplexity 10.00", "perplexity 1,000.00"]
    ticks = {one.text: float(one.attrib["y"]) - 4 for one in picture.iter("text") if one.text in tuple("abcde")}
    assert [float(one.attrib["cy"]) for one in circles] == pytest.approx([ticks["b"], ticks["d"]], abs=0.11)
    assert ticks["a"] - ticks["b"] == pytest.approx(ticks["b"] - ticks["c"], abs=0.11)
    line = next(one for one in picture.iter("path") if one.attrib.get("stroke") == "#111111" and "M" in one.attrib["d"])
    assert "L" not in line.attrib["d"]  # nothing was measured in the middle, so nothing joins the ends


def test_a_second_track_stands_in_the_same_table_and_picture():
    page = Page(render(beside_document()))
    for row in (
        "Dense, fine-tuned on the same data 25.87 −5.3 % 3,473,280 100.0 % 1,228,800 2e-4",
        "tqcompressor, healed 38.42 +40.7 % 2,145,408 61.8 % 1,228,800 5e-4",
        "tqcompressor without permutations, healed 44.95",
        "auto, never healed 29.44 +7.8 % 2,145,001 61.8 % 0 –",
        "auto, healed 28.13 +3.0 % 2,145,001 61.8 % 1,228,800 1e-4",
        "Two ways to the same size",
        "auto at the same size 28.13",
    ):
        assert row in page.text
    drawn = {trace["name"]: trace for trace in page.islands["figures"]["perplexity"]["data"]}
    assert drawn["auto"]["x"] == [4, 5]  # beside the last of three stages, where the size is the same
    assert drawn["auto"]["y"] == [29.44, 28.13]
    assert {"tqcompressor", "tqcompressor, plain Kronecker", "teacher", "dense, fine-tuned"} <= set(drawn)
    assert {"auto, before healing", "auto, healed"} <= {sample["who"] for sample in beside_document()["samples"]}
    assert "Two ways" not in Page(render(run_document())).text
    assert "Learning rate" not in Page(render(run_document())).text  # documents of 0.3 do not say it


def test_the_summary_of_a_second_track_says_every_rate():
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(run_summary(beside_document()))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    for who, *cells in (
        ("Dense, fine-tuned", "2e-4", "25.87"),
        ("tqcompressor, healed", "5e-4", "38.42"),
        ("auto, healed", "1e-4", "28.13", "+3.0 %"),
        ("auto, never healed", "29.44", "+7.8 %"),
    ):
        assert any(who in line and all(cell in line for cell in cells) for line in lines), who
