"""Truncation as a stage of a recipe: planned, counted, saved, carried out, resumed; and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, GPT2Config

import kronfold as kf
import pico
from kronfold.base.errors import RecipeError
from kronfold.jobs import run as progressive
from kronfold.jobs.compress import compress_to
from kronfold.jobs.run import RunOptions, run
from kronfold.models.cost import cost
from kronfold.models.truncate import truncate
from kronfold.options import read
from kronfold.planner.plan import Plan, diff
from kronfold.planner.planning import check_plan
from kronfold.planner.recipe import Recipe
from kronfold.report.page import render
from kronfold.report.plans import diff_table, plan_table
from kronfold.report.tables import run_summary

FFN = {"modules": "role:mlp_in", "blocks": "odd", "block": [4, 2], "rank": 2}


def recipe(first=None, *later) -> Recipe:
    first = {"name": "truncate", "layers": "alt", **(first or {})}
    return read(Recipe, {"name": "mine", "stages": [first, *later]}, "Recipe mine")


def shown(renderable) -> str:
    console = Console(width=110, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


HELD = {"distilgpt2": 81_912_576, "short-study-alt": 81_912_576, "short-study-6b": 81_912_576,
        "short-study-6t": 81_912_576, "short-study-3b3t": 81_912_576, "short-study-3l": 60_648_960}  # fmt: skip


@pytest.mark.parametrize(("name", "held"), HELD.items())
def test_shipped_counts_on_gpt2(name, held):
    made = kf.plan(GPT2Config(), name)
    assert made.held_parameters == held
    # 7,077,888 multiply-accumulates a block, and the head
    assert made.cost.macs_per_token == len(made.layers.kept) * 7_077_888 + 50257 * 768
    assert not made.rows


def test_plan_says_what_is_kept_and_survives_a_file(tmp_path):
    mine = recipe({"compress": [FFN]})
    made = kf.plan(pico.config(n_layer=8), mine)
    assert made.layers.kept == (0, 2, 4, 6)
    # names count the blocks that are left
    assert [row.name for row in made.rows] == [f"transformer.h.{i}.mlp.c_fc" for i in (1, 3)]
    made.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["layers"] == {"kept": [0, 2, 4, 6], "depth": 8, "strategy": "alt"}
    again = Plan.load(tmp_path / "plan.json")
    assert again == made
    assert check_plan(again, pico.config(n_layer=8)) == made.cost
    assert "4 of 8 (alt), number 0, 2, 4, 6" in shown(plan_table(document))
    student = kf.compress(pico.gpt2(n_layer=8), made)
    assert sum(p.numel() for p in student.parameters()) == made.held_parameters


def test_plans_differ_in_the_blocks_they_keep():
    whole, half = (kf.plan(pico.config(), recipe({"layers": keep})) for keep in ([0, 1, 2, 3], "6t"))
    document = diff(whole, half)
    assert document["b"]["layers"]["kept"] == [2, 3]
    assert "2 of 4 (6t), number 2, 3" in shown(diff_table(document))


def test_an_edited_plan_is_counted_anew_and_checked(teacher, tmp_path):
    made = kf.plan(teacher, recipe(), errors=False)
    made.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())

    def edited(**changes):
        content = {**document, "layers": {**document["layers"], **changes}}
        (tmp_path / "plan.json").write_text(json.dumps(content))
        return Plan.load(tmp_path / "plan.json")

    held = cost(truncate(teacher, [1, 2, 3])).held_parameters
    assert check_plan(edited(kept=[1, 2, 3]), teacher).held_parameters == held
    for changes, message in (
        ({"kept": [4]}, r"Blocks \[4\]"), ({"kept": []}, "no block"), ({"depth": 12}, "12 blocks; this one has 4"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            kf.compress(teacher, edited(**changes))


def test_compress_truncates_then_fits(teacher):
    student = kf.compress(teacher, recipe({"layers": [1, 3], "compress": [FFN]}))
    expected = kf.compress(truncate(teacher, [1, 3]), recipe({"layers": [0, 1], "compress": [FFN]}))
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in student.state_dict().items())
    assert teacher.config.n_layer == 4


def test_compress_alone_gives_a_plain_model(teacher):
    student = kf.compress(teacher, "distilgpt2")
    ids = pico.ids(teacher)
    assert torch.equal(student(ids).logits, truncate(teacher, [0, 3])(ids).logits)
    assert not hasattr(student.config, "quantization_config")


def test_statistics_are_of_the_blocks_that_are_left(teacher):
    mine = recipe({"layers": [1, 3], "compress": [{"modules": "role:mlp_in", "structure": "low_rank", "ratio": 0.5}]})
    windows = pico.ids(teacher, 4, 32)
    student = kf.compress(teacher, mine, windows)
    both = recipe({**mine.stages[0].model_dump(), "layers": [0, 1]})
    expected = kf.compress(truncate(teacher, [1, 3]), both, windows)
    ids = pico.ids(teacher)
    assert torch.equal(student(ids).logits, expected(ids).logits)


def test_compress_to_a_directory(tmp_path):
    model = pico.model_directory(tmp_path / "model")
    document = compress_to(str(model), tmp_path / "out", "short-study-3b3t")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert document["layers"]["kept"] == [0, 3]
    assert document["held_parameters"] == cost(student).held_parameters
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    teacher = AutoModelForCausalLM.from_pretrained(model)
    ids = pico.ids(teacher)
    assert torch.equal(student(ids).logits, truncate(teacher, [0, 3])(ids).logits)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    model = pico.model_directory(place / "model", n_layer=4, n_embd=16)
    (place / "train.txt").write_text(pico.TEXT * 80)
    (place / "eval.txt").write_text(pico.TEXT * 12)
    heal = {"tokens": 1000, "objective": {"ce": 1.0, "kl": 0.0}}
    mine = recipe({"heal": heal}, {"name": "ffn", "compress": [FFN], "heal": heal})
    return RunOptions(
        model=str(model), recipe=mine, train_text=str(place / "train.txt"), eval_text=str(place / "eval.txt"),
        heal_tokens=2 * 2048,
    )  # fmt: skip


def test_a_run_of_stages_resumed(options, tmp_path, monkeypatch):
    document = run(options, tmp_path / "whole")
    first, second = document["stages"]
    assert first["layers"]["kept"] == [0, 2]
    assert first["rows"] == []
    assert "layers" not in second
    assert first["after_healing"] < first["before_healing"]
    assert [row["name"] for row in second["rows"]] == ["transformer.h.1.mlp.c_fc"]
    assert set(document["controls"]) == {"compressed_unhealed", "dense_finetuned", "plain_kronecker"}
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert student.config.n_layer == 2
    assert cost(student).held_parameters == document["held_parameters"]
    assert document["controls"]["compressed_unhealed"]["held_parameters"] == document["held_parameters"]
    assert "2 of 4 (alt)" in shown(run_summary(document))
    assert "2 of 4 (alt)" in render(document)

    real, calls = progressive.heal, []

    def stops(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(progressive, "heal", stops)
    with pytest.raises(KeyboardInterrupt):
        run(options, tmp_path / "stopped")
    resumed = run(options, tmp_path / "stopped", resume=True)
    assert resumed["perplexity"] == document["perplexity"]


def test_nothing_to_permute_means_no_plain_control(options, tmp_path):
    mine = recipe({"heal": {"tokens": 1000}})
    document = run(RunOptions(**{**vars(options), "recipe": mine, "heal_tokens": 2048}), tmp_path / "one")
    assert set(document["controls"]) == {"compressed_unhealed", "dense_finetuned"}
    assert render(document)


@pytest.mark.parametrize(
    ("first", "later", "message"),
    [
        ({"layers": "altt"}, (), "stage truncate, layers: Unknown truncation strategy 'altt'.*'alt'"),
        ({"layers": []}, (), "keeps no block"),
        ({"layers": [0, 4]}, (), r"Blocks \[4\] are not in this model; it has blocks 0 to 3"),
        ({"layer_count": 9}, (), "cannot keep 9 of 4"),
        ({"layers": "alt", "compress": [{**FFN, "blocks": [3]}]}, (), r"blocks \[3\].*0 to 1"),
        ({"layers": None, "layer_count": 2, "compress": [FFN]}, (), "give `layers: alt`"),
        ({}, ({"name": "again", "layers": "alt"},), "layers belong to the first stage"),
        ({"layers": None}, (), "every stage needs compress entries"),
    ],
)
def test_refusals(first, later, message):
    with pytest.raises(RecipeError, match=message):
        kf.plan(pico.config(), recipe(first, *later))


@pytest.mark.parametrize(
    ("name", "terms"), [("distilgpt2", {"kl", "cosine", "ce"}), ("kngpt2", {"embedding", "attention", "hidden", "ce"})]
)
def test_shipped_recipes_heal_by_their_papers_losses(options, tmp_path, name, terms):
    settings = {**vars(options), "recipe": name, "heal_tokens": 8 * 2048, "controls": ()}
    document = run(RunOptions(**settings), tmp_path / "out")
    (stage,) = document["stages"]
    assert terms <= set(stage["losses"][0])
    assert stage["after_healing"] < stage["before_healing"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(student.config, "kept_layers", None) == ([0, 3] if name == "distilgpt2" else None)
