"""Result documents: what 0.2 and 0.3 wrote reads; whatever is broken in one is our own error, naming file and key."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kronfold.base import results
from kronfold.base.errors import InputError, KronfoldError
from kronfold.base.results.kinds import KINDS
from kronfold.report.comparison import comparison_table, markdown
from kronfold.report.page import render, render_comparison
from kronfold.report.plans import plan_table
from kronfold.report.tables import run_summary
from report_examples import beside_document, run_document

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "v0.3"
OURS = [
    *sorted(GOLDEN.glob("*.json")),
    ROOT / "src/kronfold/assets/teacher/results.json",
    *sorted((ROOT / "benchmarks/results").glob("*.json")),
]


def _kind(path: Path) -> str:
    return str(json.loads(path.read_text()).get("schema") or "").removeprefix("kronfold/")


@pytest.mark.parametrize("path", [path for path in OURS if _kind(path) in KINDS], ids=lambda path: path.name)
def test_what_older_versions_wrote_reads_whole(path):
    assert results.read(path, _kind(path)) == json.loads(path.read_text())


def test_the_fixtures_are_found():
    assert {"run", "compare", "plan", "pretrain"} <= {_kind(path) for path in OURS}


def show(document: dict[str, Any], kind: str) -> None:
    """Everything that is drawn of a document."""
    console = Console(file=open("/dev/null", "w"), width=100)  # noqa: SIM115
    if kind == "run":
        console.print(run_summary(document))
        render(document)
    elif kind == "compare":
        console.print(comparison_table(document))
        markdown(document)
        render_comparison(document)
    else:
        console.print(plan_table(document))


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every key of a document; of a list its first entry only, the others are alike."""
    if place:
        yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*place, key))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*place, 0))


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    for part in place:
        document = document[part]
    return document


def _small(document: Any) -> Any:
    """Lists cut to two entries: the same keys, faster."""
    if isinstance(document, dict):
        return {key: _small(value) for key, value in document.items()}
    return [_small(value) for value in document[:2]] if isinstance(document, list) else document


EXAMPLES = {
    "run": beside_document(),
    "run of 0.3": json.loads((GOLDEN / "run.json").read_text()),
    "compare": json.loads((GOLDEN / "compare.json").read_text()),
    "plan": json.loads((GOLDEN / "plan.json").read_text()),
}
_GONE = object()


@pytest.mark.parametrize("name", EXAMPLES)
def test_any_one_damage_is_shown_or_refused_by_name(name, tmp_path):
    """Every key in turn is lost or replaced by something of another kind: an InputError naming the file, or a page."""
    kind, whole = name.split()[0], _small(EXAMPLES[name])
    path, chance = tmp_path / "damaged.json", random.Random(5)
    refused = 0
    for place in _places(whole):
        for value in chance.sample([_GONE, None, "x", "", -1, 0, 1.5, True, [], {}, [1], {"x": 1}], 2):
            document = copy.deepcopy(whole)
            holder = _at(document, place[:-1])
            if value is _GONE:
                del holder[place[-1]]
            else:
                holder[place[-1]] = value
            path.write_text(json.dumps(document))
            try:
                found = results.read(path, kind)
            except InputError as error:
                assert str(path) in str(error), (place, value)  # noqa: PT017
                refused += 1
                continue
            show(found, kind)
    assert refused > 50


KEYS = [
    ("run", ("teacher", "perplexity"), "76.1", "teacher.perplexity"),
    ("run", ("stages", 1, "rows", 0, "held_parameters"), 1.5, "stages.1.rows.0.held_parameters"),
    ("run", ("stages", 0, "name"), _GONE, "stages.0.name is missing"),
    ("run", ("stages",), _GONE, "lacks stages"),
    ("run", ("controls", "dense_finetuned", "losses"), {}, "controls.dense_finetuned.losses"),
    ("compare", ("rows", 0, "tokens_per_second"), 0, "rows.0.tokens_per_second"),
    ("compare", ("rows", 0, "perplexities"), {"other": 2.0}, "rows.0.perplexities: lacks the teacher's texts valid"),
    ("compare", ("rows", 0, "lambada"), _GONE, "rows.0.lambada: is missing"),
    ("plan", ("rows", 0, "teacher_parameters"), None, "rows.0.teacher_parameters"),
    ("plan", ("budget",), {"amount": 3}, "budget.unit is missing"),
]


@pytest.mark.parametrize(("kind", "place", "value", "said"), KEYS)
def test_the_key_is_named(kind, place, value, said, tmp_path):
    document = copy.deepcopy(EXAMPLES[kind])
    holder = _at(document, place[:-1])
    if value is _GONE:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    with pytest.raises(InputError) as error:
        results.read(path, kind)
    assert said in str(error.value)
    assert f"kronfold {kind}" in str(error.value)  # the next step


@pytest.mark.parametrize(
    ("number", "said"),
    [("NaN", "no finite"), ("-Infinity", "no finite"), ("1e999", "no finite"), ("1" + 40 * "0", "64 bits")],
)
@pytest.mark.parametrize("key", ["total_seconds", "an_unknown_key"])
def test_numbers_that_json_does_not_have_are_named(number, said, key, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(run_document() | {key: {"deep": [1]}}).replace('{"deep": [1]}', number))
    with pytest.raises(InputError, match=rf"results.json.*{key}.*{said}"):
        results.read(path, "run")


NO_DOCUMENT = [
    (b"{", "cannot be read"), (b"", "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), (b"[1, 2]", "a list"),
    (b"3", "an? int"), (b"[" * 100_000, "nested too deeply"), (b'{"a":' * 3000 + b"1" + b"}" * 3000, "results.json"),
    (b'{"schema": "kronfold/run", "schema_version": true}', "schema_version True"),
    (b'{"schema": ["kronfold/run"], "schema_version": 1}', "has schema"),
    (b"1" * 10_000, "cannot be read|int"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "said"), NO_DOCUMENT, ids=range(len(NO_DOCUMENT)))
def test_what_is_no_document_is_refused(content, said, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"(?s)results.json.*({said})"):
        results.read(path, "run")


def test_a_file_that_is_far_too_large_is_not_even_read(tmp_path):
    path = tmp_path / "results.json"
    with open(path, "wb") as file:
        file.truncate(results.LARGEST_FILE + 1)  # a hole, no bytes on the disk
    with pytest.raises(InputError, match=r"results.json is no result file: it has 64,000,001 bytes"):
        results.read(path, "run")
    with pytest.raises(InputError, match=r"missing.json cannot be read"):
        results.read(tmp_path / "missing.json", "run", "compare")
    with pytest.raises(InputError, match="cannot be read"):
        results.read(tmp_path, "run")


def test_keys_that_this_version_does_not_know_are_kept(tmp_path):
    document = run_document() | {"of_tomorrow": {"a": [1, None]}}
    document["stages"][0]["rows"][0]["storage"] = "int4"
    path = tmp_path / "results.json"
    path.write_text(json.dumps(document))
    assert results.read(path, "run") == document


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nothing_that_is_not_finite_is_written(value):
    with pytest.raises(KronfoldError, match=r"result of tune.*rows.0.rates.add is (nan|-?inf)") as error:
        results.document("tune", None, path=None, rows=[_rates() | {"rates": {"add": value}}])
    assert not isinstance(error.value, InputError)  # nobody gave anything wrong
    with pytest.raises(KronfoldError, match=r"some.1 is"):
        results.document("of-a-benchmark", 3, some=[1.0, value])


def _rates() -> dict[str, Any]:
    return {"device": "cpu", "dtype": "float32", "threads": 2, "rates": {"add": 1e-9}, "built_in": {"add": 1e-9}}


def test_a_document_is_headed_and_checked_when_it_is_made():
    made = results.document("tune", None, path=None, rows=[_rates()])
    assert (made["schema"], made["schema_version"]) == ("kronfold/tune", results.SCHEMA_VERSION)
    assert list(made)[:6] == ["schema", "schema_version", "created", "seed", "versions", "machine"]
    with pytest.raises(KronfoldError, match=r"it lacks rows"):
        results.document("tune", None, path=None)
    with pytest.raises(KronfoldError, match=r"seed"):
        results.document("tune", "0", path=None, rows=[_rates()])


def test_the_command_names_the_file_and_the_key(call, tmp_path):
    document = json.loads((GOLDEN / "run.json").read_text())
    document["stages"][0]["after_healing"] = "88"
    (tmp_path / "damaged.json").write_text(json.dumps(document))
    code, out, err = call("report", tmp_path / "damaged.json", "-o", tmp_path / "page.html")
    assert (code, out) == (2, "")
    assert "damaged.json" in err
    assert "stages.0.after_healing" in err
    assert not (tmp_path / "page.html").exists()
    for name in ("run.json", "compare.json"):
        code, out, _ = call("report", GOLDEN / name, "-o", tmp_path / name, "--json")
        assert code == 0
        assert json.loads(out) == json.loads((GOLDEN / name).read_text())
    code, _, err = call("report", GOLDEN / "plan.json", "-o", tmp_path / "plan.html")
    assert code == 2
    assert "kronfold/plan" in err
    assert "kronfold compare" in err
