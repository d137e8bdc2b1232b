"""The whole job on a pico model: numbers agree with what is saved, a stopped run goes on, nothing is half-written."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base.errors import InputError, OutputError
from kronfold.fit.fit import gathers_of
from kronfold.jobs import run as progressive
from kronfold.jobs.run import RunOptions, check_controls, run
from kronfold.models.cost import cost


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    model = pico.model_directory(place / "model", n_layer=2, n_embd=16)
    (place / "train.txt").write_text(pico.TEXT * 80)
    (place / "eval.txt").write_text(pico.TEXT * 12)
    return RunOptions(
        model=str(model), recipe="tqcompressor", train_text=str(place / "train.txt"), eval_text=str(place / "eval.txt"),
        heal_tokens=3 * 2048, prompt="the quick brown", sample_tokens=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    place = tmp_path_factory.mktemp("out") / "result"
    return place, run(options, place)


def test_document(finished):
    _, document = finished
    assert document["complete"]
    assert [stage["name"] for stage in document["stages"]] == ["embedding", "ffn", "embedding-again"]
    for stage in document["stages"]:
        assert stage["after_healing"] < stage["before_healing"]
        assert stage["tokens"] == 2048
    controls = document["controls"]
    assert controls["dense_finetuned"]["tokens"] == sum(stage["tokens"] for stage in document["stages"])
    assert controls["dense_finetuned"]["held_parameters"] == document["teacher"]["held_parameters"]
    assert controls["plain_kronecker"]["held_parameters"] == document["held_parameters"]
    assert document["held_parameters"] < document["teacher"]["held_parameters"]
    for row, plain in zip(document["stages"][1]["rows"], controls["plain_kronecker"]["stages"][1]["rows"], strict=True):
        assert row["relative_error"] <= row["relative_error_plain"]
        assert plain["relative_error"] == plain["relative_error_plain"]
    assert document["samples"][0]["who"] == "teacher"
    assert all(entry["text"].startswith("the quick brown") for entry in document["samples"])


def test_the_document_says_what_was_read(finished, options):
    data = finished[1]["data"]
    measured, trained = data["eval"]["read"], data["heal"]["read"]
    text = (pico.TEXT * 12).encode()
    assert (measured["source"], measured["documents"], measured["complete"]) == ("eval.txt", 1, True)
    assert (measured["bytes"], measured["sha256"]) == (len(text), hashlib.sha256(text).hexdigest())
    assert trained["files"] == [{"name": "train.txt", "bytes": 80 * len(pico.TEXT)}]
    assert str(Path(options.eval_text).parent) not in json.dumps(data)


def test_the_checkpoint_is_what_was_measured(finished, options):
    place, document = finished
    assert json.loads((place / "results.json").read_text()) == document
    model = AutoModelForCausalLM.from_pretrained(place)
    assert cost(model).held_parameters == document["held_parameters"]
    assert gathers_of(model) == {**document["gathers"], "absorbed": 0}
    assert document["gathers"]["absorbed"] > 0
    assert document["gathers"]["bytes"] == cost(model).index_bytes
    found = kf.perplexity(model, pico.tokenizer(), (pico.TEXT * 12))
    assert found.perplexity == pytest.approx(document["perplexity"], rel=1e-6)
    assert document["perplexity"] == pytest.approx(document["stages"][-1]["after_healing"], rel=1e-6)
    names = {path.name for path in place.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "results.json", "plan.json"} <= names
    assert not {"stages", "plain", "job.json", "lock"} & names
    assert not place.with_name("result.partial").exists()


def test_equal_seeds_give_equal_runs(finished, options, tmp_path):
    _, document = finished
    again = run(RunOptions(**{**vars(options), "controls": ()}), tmp_path / "again")
    assert again["perplexity"] == document["perplexity"]
    assert set(again["controls"]) == {"compressed_unhealed"}


def test_a_stopped_run_goes_on_and_ends_alike(finished, options, tmp_path, monkeypatch):
    _, document = finished
    place = tmp_path / "stopped"
    real, calls = progressive.heal, []

    def stops(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    monkeypatch.setattr(progressive, "heal", stops)
    with pytest.raises(KeyboardInterrupt):
        run(options, place)
    assert not place.exists()
    with pytest.raises(OutputError, match="unfinished run.*--resume"):
        run(options, place)
    with pytest.raises(InputError, match="other options \\(seed\\)"):
        run(RunOptions(**{**vars(options), "seed": 1}), place, resume=True)
    resumed = run(options, place, resume=True)
    assert len(calls) == 2 + 8  # of the 9 healings (3 stages, 3 dense, 3 plain) the finished one was not repeated
    assert resumed["perplexity"] == document["perplexity"]
    for control in ("dense_finetuned", "compressed_unhealed"):
        assert resumed["controls"][control]["perplexity"] == document["controls"][control]["perplexity"]


def test_nothing_to_resume(options, tmp_path):
    with pytest.raises(InputError, match="nothing to resume"):
        run(options, tmp_path / "none", resume=True)


def test_output_is_checked_first(options, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(options, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_controls_by_name():
    assert check_controls(["plain", "dense"]) == ("dense", "plain")
    with pytest.raises(InputError, match="Unknown control sparse"):
        check_controls(["sparse"])


def test_compress_leaves_the_model_alone(teacher):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = kf.compress(teacher, "tqcompressor")
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert teacher.config.tie_word_embeddings
    assert not hasattr(teacher.config, "quantization_config")
    with pytest.raises(InputError, match="pass tokenizer="):
        kf.compress(teacher, "tqcompressor", calibration="text")


def test_compress_is_deterministic(teacher, students):
    again = kf.compress(teacher, "tqcompressor")
    expected = students["tqcompressor"].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())
