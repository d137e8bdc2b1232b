"""Comparison on a pico model: equal sizes and tokens, saved checkpoints give the numbers, a stopped one goes on."""

from __future__ import annotations

import gzip
import io
import json
import re
from dataclasses import replace

import pytest
import torch
import yaml
from rich.console import Console
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base.errors import InputError, KronfoldError, OutputError
from kronfold.evaluate.lambada import lambada
from kronfold.evaluate.samples import generation_speed
from kronfold.jobs import compare as room
from kronfold.jobs.compare import CompareOptions, compare
from kronfold.planner.budget import Budget
from kronfold.planner.recipe import load_recipe
from kronfold.planner.sizing import TOLERANCE
from kronfold.report import numbers
from kronfold.report.comparison import columns, compared, comparison_table, markdown
from kronfold.report.page import render_comparison, write_comparison

TOKENS = 3 * 2048
ROLES = ["role:mlp_in", "role:mlp_out", "role:attention_in", "role:embedding"]
ENTRY = {"modules": ROLES, "structure": "low_rank", "ratio": 0.5}
LOW_RANK = {"name": "low-rank", "stages": [{"name": "all", "compress": [ENTRY]}]}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    place = tmp_path_factory.mktemp("compare")
    model = pico.model_directory(place / "model", n_layer=2)
    (place / "train.txt").write_text(pico.TEXT * 450)
    (place / "valid.txt").write_text(pico.TEXT * 12)
    (place / "test.txt").write_text(pico.TEXT[20:] * 9)
    (place / "low_rank.yaml").write_text(yaml.safe_dump(LOW_RANK))
    with gzip.open(place / "lambada.jsonl.gz", "wt") as file:
        words = pico.TEXT.split()
        file.writelines(json.dumps({"text": " ".join(words[i : i + 9])}) + "\n" for i in range(8))
    return CompareOptions(
        model=str(model), recipes=["tqcompressor", str(place / "low_rank.yaml")], train_text=str(place / "train.txt"),
        eval_texts={"valid": str(place / "valid.txt"), "test": str(place / "test.txt")}, heal_tokens=TOKENS,
        lambada=str(place / "lambada.jsonl.gz"), budget=Budget("params", ratio=0.7), cache=str(place / "cache"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    place = tmp_path_factory.mktemp("out") / "result"
    return place, compare(options, place, finish=write_comparison)


def test_equal_sizes_and_tokens(finished, options):
    _, document = finished
    assert document["complete"]
    assert [row["recipe"] for row in document["rows"]] == ["tqcompressor", "low-rank"]
    whole = document["teacher"]["held_parameters"]
    for row in document["rows"]:
        assert row["size"]["reached"] == (abs(row["held_parameters"] - 0.7 * whole) <= TOLERANCE * 0.7 * whole)
        assert row["held_parameters"] <= 0.7 * whole
        assert row["perplexity_after"] < row["perplexity_before"]
        assert row["excess_perplexity"] == row["perplexity_after"] / document["teacher"]["perplexities"]["valid"] - 1
        assert row["tokens_per_second"] > 0
    assert document["rows"][1]["size"]["reached"]  # ranks come in fine steps even on a pico model
    dense = document["controls"]["dense_finetuned"]
    assert {row["heal_tokens"] for row in document["rows"]} >= {dense["heal_tokens"]}
    assert dense["held_parameters"] == whole
    assert list(document["teacher"]["perplexities"]) == ["valid", "test"]
    read = document["data"]["read"]
    assert {name: entry["source"] for name, entry in read["eval"].items()} == {"valid": "valid.txt", "test": "test.txt"}
    assert (read["lambada"]["source"], read["lambada"]["documents"]) == ("lambada.jsonl.gz", 8)
    assert document["data"]["heal"]["read"]["source"] == "train.txt"


@pytest.mark.parametrize("which", [0, 1])
def test_the_saved_checkpoints_give_the_numbers(finished, options, which):
    place, document = finished
    row = document["rows"][which]
    model = AutoModelForCausalLM.from_pretrained(place / row["checkpoint"]).eval()
    assert sum(p.numel() for p in model.parameters()) == row["held_parameters"]
    for name, source in options.eval_texts.items():
        with open(source) as file:
            found = kf.perplexity(model, pico.tokenizer(), file.read())
        assert found.perplexity == pytest.approx(row["perplexities"][name], rel=1e-6)
    passages = lambada(model, pico.tokenizer(), options.lambada)
    assert passages.perplexity == pytest.approx(row["lambada"]["perplexity"], rel=1e-6)
    assert passages.passages == row["lambada"]["passages"] == 8


def test_a_stopped_comparison_goes_on_and_grows(finished, options, tmp_path, monkeypatch):
    whole = finished[1]
    place = tmp_path / "out"

    class Stop(Exception):
        pass

    def stop(document, _place):
        raise Stop

    with pytest.raises(Stop):
        compare(replace(options, recipes=options.recipes[:1]), place, finish=stop)
    so_far = json.loads((tmp_path / "out.partial" / "result" / "results.json").read_text())
    assert so_far["rows"][0]["recipe"] == "tqcompressor"
    with pytest.raises(OutputError, match="unfinished run.*--resume"):
        compare(options, place)
    carried_out = []
    stages = room.run_stages
    monkeypatch.setattr(
        room, "run_stages", lambda run, *rest: carried_out.append(run.recipe.name) or stages(run, *rest)
    )
    fits = []
    monkeypatch.setattr(room, "_before", lambda *a: fits.append(a[-1]) or {"perplexity": 1.0, "seconds": 0.0})
    document = compare(options, place, resume=True)
    assert carried_out == ["tqcompressor", "low-rank"]
    assert fits == ["low-rank"]  # what was measured already is not measured again
    assert [row["perplexity_after"] for row in document["rows"]] == [row["perplexity_after"] for row in whole["rows"]]
    with pytest.raises(InputError, match="heal_tokens"):
        compare(replace(options, heal_tokens=TOKENS * 2), place, resume=True)


def test_each_at_its_own_size_planned_and_with_one_objective(options, tmp_path):
    recipes = ["auto", options.recipes[1]]
    asked = replace(options, recipes=recipes, budget=None, objective="same", lambada=None)
    document = compare(asked, tmp_path / "out")
    assert document["target"] is None
    assert [row["size"]["note"] for row in document["rows"]] == ["its own size"] * 2
    assert document["rows"][0]["objective"] == document["rows"][1]["objective"]
    assert document["rows"][0]["objective"][0]["kl"] == 1.0
    assert document["rows"][0]["calibration"]["windows"] > 0
    assert "lambada" not in document["rows"][0]
    assert "LAMBADA" not in markdown(document)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipes": ["tqcompresor"]}, "tqcompressor"),
        ({"recipes": ["tqcompressor", "tqcompressor"]}, "named twice"),
        ({"recipes": []}, "at least one recipe"),
        ({"protocol": "slidng"}, "sliding"),
        ({"heal_tokens": 0}, "at least 2"),
        ({"budget": Budget("macs", 1e4)}, "held parameters"),
        ({"budget": Budget("params", 1e9)}, "not below"),
        ({"eval_texts": {"a": "nowhere.txt"}}, "nowhere.txt"),
        ({"lambada": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"train_text": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_bad_input_before_any_work(options, tmp_path, changes, words):
    with pytest.raises(KronfoldError, match=words):
        compare(replace(options, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_does_not_fit_is_named_before_any_work(options, tmp_path):
    odd = {"name": "odd", "stages": [{"name": "x", "compress": [{"modules": ["role:mlp_in"], "block": [7, 1]}]}]}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump(odd))
    with pytest.raises(KronfoldError, match="(?s)odd.*does not divide"):
        compare(replace(options, recipes=["tqcompressor", str(tmp_path / "odd.yaml")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_objective_that_no_method_knows_is_named_before_any_work(options, tmp_path):
    heal = {"tokens": 2048, "objective": {"method": "raill"}}
    stage = {"name": "all", "compress": [ENTRY], "heal": heal}
    (tmp_path / "odd.yaml").write_text(yaml.safe_dump({"name": "odd", "stages": [stage]}))
    with pytest.raises(KronfoldError, match="(?s)raill.*rail"):
        compare(replace(options, recipes=["tqcompressor", str(tmp_path / "odd.yaml")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_planned_recipe_is_calibrated_as_it_asks_and_equal_ones_once(options, tmp_path, monkeypatch):
    recipe = load_recipe("auto").model_dump(mode="json", exclude_none=True)
    names = []
    for name, windows in (("few", 3), ("more", 5), ("same", 3)):
        auto = {**recipe["auto"], "windows": windows, "gradient_windows": 2}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**recipe, "name": name, "auto": auto}))
        names.append(str(tmp_path / f"{name}.yaml"))
    measured = []
    calibrate = room.calibrate_on

    def count(*args, **named):
        measured.append(args[3].windows)
        return calibrate(*args, **named)

    monkeypatch.setattr(room, "calibrate_on", count)
    document = compare(replace(options, recipes=names, lambada=None), tmp_path / "out")
    assert measured == [3, 5]
    assert [row["calibration"]["windows"] for row in document["rows"]] == [3, 5, 3]
    assert document["rows"][0]["perplexity_before"] == document["rows"][2]["perplexity_before"]


def _pictures(page: str) -> list[str]:
    return list(json.loads(re.search(r'id="figures">(.*?)</script>', page)[1]))


def test_table_and_page(finished):
    place, document = finished
    rows = compared(document)
    assert [row.who for row in rows[:2]] == ["dense teacher", "dense, fine-tuned"]
    assert [row.after for row in rows[2:]] == sorted(row["perplexity_after"] for row in document["rows"])
    table = (place / "table.md").read_text()
    assert table == markdown(document)
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 2 + len(document["rows"])
    assert {line.count("|") for line in lines} == {len(columns(document)) + 1}
    page = (place / "report.html").read_text()
    assert page == render_comparison(document)
    assert "low-rank" in page
    assert "http-equiv" in page
    assert _pictures(page) == ["healing"]  # equal sizes would lie on top of each other
    smaller = {**document["rows"][0], "held_parameters": document["rows"][1]["held_parameters"] // 2}
    assert _pictures(render_comparison({**document, "rows": [smaller, document["rows"][1]]})) == ["healing", "size"]
    hostile = render_comparison({**document, "model": "<script>alert(1)</script>"})
    assert "<script>alert" not in hostile


def test_the_terminal_table_is_whole_at_80_columns(finished):
    _, document = finished
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison_table(document))
    text = console.export_text()
    for row in document["rows"]:
        line = next(line for line in text.splitlines() if line.strip().startswith(row["recipe"]))
        assert f"{row['held_parameters']:,}" in line
        assert numbers.perplexity(row["perplexity_after"]) in line
        assert numbers.signed_percent(row["excess_perplexity"]) in line
        assert f"{row['lambada']['accuracy']:.1%}" in line


def test_generation_speed_is_interleaved_and_bounded():
    model = pico.gpt2(n_layer=2)
    found = generation_speed({"a": model, "b": model}, torch.zeros(1, 4, dtype=torch.long), new_tokens=4, rounds=2)
    assert found.keys() == {"a", "b"}
    assert all(value > 0 for value in found.values())
    with pytest.raises(InputError, match="context of 64 of a"):
        generation_speed({"a": model}, torch.zeros(1, 60, dtype=torch.long), new_tokens=8)
