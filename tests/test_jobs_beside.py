"""A planned recipe beside a run: same size, tokens, seed; its checkpoint gives the numbers; a stopped one goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base import results
from kronfold.base.errors import InputError
from kronfold.base.progress import Progress, State
from kronfold.jobs import beside as room
from kronfold.jobs import run as progressive
from kronfold.jobs.run import RunOptions, run
from kronfold.models.cost import cost
from kronfold.report.document import measured


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    place = tmp_path_factory.mktemp("beside")
    model = pico.model_directory(place / "model", n_layer=2, n_embd=16)
    (place / "train.txt").write_text(pico.TEXT * 120)
    (place / "eval.txt").write_text(pico.TEXT * 12)
    auto = {
        "name": "few-windows",
        "auto": {"windows": 8, "window": 32, "gradient_windows": 4},
        "stages": [{"name": "auto", "heal": {"tokens": 1000, "learning_rate": 5e-4, "batch_size": 8}}],
    }
    (place / "auto.yaml").write_text(yaml.safe_dump(auto))
    return RunOptions(
        model=str(model), recipe="tqcompressor", train_text=str(place / "train.txt"), eval_text=str(place / "eval.txt"),
        heal_tokens=3 * 1024, prompt="the quick brown", sample_tokens=8, controls=(), beside=str(place / "auto.yaml"),
        beside_rate=2e-3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    place, heard = tmp_path_factory.mktemp("out") / "result", []
    return place, run(options, place, report=Progress(heard.append)), heard


def test_both_tracks_are_measured_alike_at_one_size(finished):
    place, document, _ = finished
    beside, (stage,) = document["beside"], document["beside"]["stages"]
    assert 0.9 * document["held_parameters"] < beside["held_parameters"] <= document["held_parameters"]
    assert stage["tokens"] == sum(one["tokens"] for one in document["stages"])
    assert stage["learning_rate"] == 2e-3
    assert {one["learning_rate"] for one in document["stages"]} == {5e-4}
    assert stage["before_healing"] != stage["after_healing"]
    assert [sample["who"] for sample in document["samples"]][-2:] == [
        "few-windows, before healing",
        "few-windows, healed",
    ]
    names = [row.who for row in measured(document)]
    assert names[-2:] == ["few-windows, never healed", "few-windows, healed"]
    assert results.read(place / "results.json", "run") == document


def test_its_checkpoint_is_what_was_measured(finished):
    place, document, _ = finished
    assert json.loads((place / "results.json").read_text()) == document
    model = AutoModelForCausalLM.from_pretrained(place / document["beside"]["checkpoint"])
    assert cost(model).held_parameters == document["beside"]["held_parameters"]
    found = kf.perplexity(model, pico.tokenizer(), pico.TEXT * 12)
    assert found.perplexity == pytest.approx(document["beside"]["stages"][0]["after_healing"], rel=1e-6)
    assert not {"beside", "stages", "steps.json"} & {path.name for path in place.iterdir()}


def test_the_run_itself_is_what_it_is_without_company(finished, options, tmp_path):
    _, document, _ = finished
    alone = run(replace(options, beside=None, beside_rate=None), tmp_path / "alone")
    assert "beside" not in alone
    for key in ("perplexity", "held_parameters", "protocol"):
        assert alone[key] == document[key]
    told = ("seconds", "decompose_seconds")
    for one, other in zip(alone["stages"], document["stages"], strict=True):
        assert {key: one[key] for key in one if key not in told} == {
            key: other[key] for key in other if key not in told
        }
    assert alone["samples"] == document["samples"][:-2]


def test_healing_tells_its_tokens(finished):
    heard: list[State] = finished[2]
    told = [state for state in heard if state.step == "heal few-windows"]
    assert told[-1].done == told[-1].total
    assert told[-1].facts["tokens"] == finished[1]["beside"]["stages"][0]["tokens"]
    assert "loss" in told[-1].facts


@pytest.mark.parametrize("where", ["fit", "heal"])
def test_a_stopped_one_goes_on_and_ends_alike(where, finished, options, tmp_path, monkeypatch):
    _, document, _ = finished
    place, calls = tmp_path / "stopped", []
    real_fit, real_heal = room.fit, progressive.heal

    def fit(*arguments, **keywords):
        calls.append("fit")
        if where == "fit" and calls.count("fit") == 1:
            raise KeyboardInterrupt
        return real_fit(*arguments, **keywords)

    def heal(*arguments, **keywords):
        calls.append("heal")
        if where == "heal" and calls.count("heal") == 4:  # three stages, then this track
            raise KeyboardInterrupt
        return real_heal(*arguments, **keywords)

    monkeypatch.setattr(room, "fit", fit)
    monkeypatch.setattr(progressive, "heal", heal)
    with pytest.raises(KeyboardInterrupt):
        run(options, place)
    resumed = run(options, place, resume=True)
    assert calls == (
        ["heal"] * 3 + ["fit", "fit", "heal"] if where == "fit" else ["heal"] * 3 + ["fit", "heal", "heal"]
    )
    for key in ("before_healing", "after_healing", "tokens", "rows"):
        assert resumed["beside"]["stages"][0][key] == document["beside"]["stages"][0][key]
    assert resumed["samples"] == document["samples"]
    one, other = (AutoModelForCausalLM.from_pretrained(path / "few-windows") for path in (place, finished[0]))
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("second", "said"),
    [("svd", "cannot stand beside"), ("tqcompressor", "cannot stand beside"), ("atuo", "Did you mean 'auto'")],
)
def test_what_cannot_stand_beside_is_refused_before_any_work(second, said, options, tmp_path):
    with pytest.raises(InputError, match=said):
        run(replace(options, beside=second), tmp_path / "out")
    assert not list(tmp_path.iterdir())
