"""`kronfold eval` beyond one text: the suite in one pass equals its parts; what is missing is said first."""

from __future__ import annotations

import json
import re

import pytest

import pico
from kronfold.base.errors import InputError
from kronfold.evaluate.lambada import lambada
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.texts import named_texts
from kronfold.jobs import evaluate as evaluation
from kronfold.models.load import load_model, load_tokenizer

PASSAGES = ["the quick brown fox jumps over the lazy dog", "the fox", "the dog sleeps under the old brown tree"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pico.model_directory(tmp_path_factory.mktemp("suite") / "model", n_layer=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    (place / "one.txt").write_text(pico.TEXT * 20)
    (place / "two.txt").write_text("the lazy fox . " * 40)
    (place / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    return place


@pytest.mark.parametrize("protocol", ["sliding", "paper"])
def test_the_suite_is_its_parts(model, files, tmp_path, call, protocol, monkeypatch) -> None:
    loads = []
    monkeypatch.setattr(evaluation, "load_model", lambda *a, **k: loads.append(a) or load_model(*a, **k))
    given = ["--suite", "lm", "--text", f"first={files / 'one.txt'}", "--text", files / "two.txt"]
    given += ["--lambada", files / "lambada.jsonl", "--protocol", protocol]
    code, out, _ = call("eval", model, *given, "--json", "-o", tmp_path / "out.json")
    document = json.loads(out)
    assert code == 0
    assert document == json.loads((tmp_path / "out.json").read_text())
    assert len(loads) == 1
    subject, tokenizer = load_model(model), load_tokenizer(model)
    assert list(document["texts"]) == ["first", "two"]
    for name, path in (("first", files / "one.txt"), ("two", files / "two.txt")):
        alone = perplexity(subject, tokenizer, path, protocol).to_dict()
        assert document["texts"][name] == {"source": path.name, **json.loads(json.dumps(alone))}
    alone = lambada(subject, tokenizer, files / "lambada.jsonl").to_dict()
    assert document["lambada"] == {"source": "lambada.jsonl", **alone}
    assert document["schema"] == "kronfold/eval-suite"
    shown = call("eval", model, *given)[1]
    for words in ("first", "two", "LAMBADA", "3 passages", f"{document['texts']['two']['perplexity']:.2f}", protocol):
        assert words in shown


def test_names_of_texts(tmp_path) -> None:
    (tmp_path / "a=b.txt").write_text("the fox")
    assert named_texts(["x=some/y.txt", "wiki.test.txt.gz"]) == {
        "x": "some/y.txt",
        "wiki": "wiki.test.txt.gz",
    }
    assert named_texts([str(tmp_path / "a=b.txt")]) == {"a=b": str(tmp_path / "a=b.txt")}
    with pytest.raises(InputError, match="Two texts are called 'x': a and b"):
        named_texts(["x=a", "x=b"])
    with pytest.raises(InputError, match="write NAME=PATH"):
        named_texts(["=a"])


BAD = {
    "nothing to measure on": ([], "given no text. Give one --eval-text, or several with --suite lm"),
    "two texts": (["--text", "{one}", "--text", "{two}"], "given 2 texts"),
    "no such suite": (["--suite", "ml"], "Unknown suite 'ml'.*Allowed: lm"),
    "suite without texts": (["--suite", "lm", "--lambada", "{lambada}"], "Give one or more texts .--text NAME=PATH"),
    "suite without LAMBADA": (["--suite", "lm", "--text", "a={one}"], "Give LAMBADA's passages .--lambada"),
    "suite without anything": (["--suite", "lm"], "one or more texts .* and LAMBADA's passages"),
    "no such passages": (["--suite", "lm", "--text", "a={one}", "--lambada", "{none}.jsonl"], "does not exist"),
    "passages in one text": (["--suite", "lm", "--text", "a={one}", "--lambada", "{two}"], "is one text"),
    "no such protocol": (
        ["--suite", "lm", "--text", "a={one}", "--lambada", "{lambada}", "--protocol", "papr"],
        "Did you mean 'paper'",
    ),
    "LAMBADA alone": (["--text", "{one}", "--lambada", "{lambada}"], "add --suite lm"),
    "suite and tasks": (["--suite", "lm", "--tasks", "arc_easy"], "two measurements"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(model, files, tmp_path, call, case, monkeypatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded before what was given was checked")

    monkeypatch.setattr(evaluation, "load_model", never)
    places = {"one": files / "one.txt", "two": files / "two.txt", "lambada": files / "lambada.jsonl"}
    arguments, message = BAD[case]
    code, out, err = call("eval", model, *(a.format(**places, none=files / "none") for a in arguments))
    assert code == 2
    assert out == ""
    assert re.search(message, " ".join(err.split())), err


def test_tasks_of_lm_eval(model, call, monkeypatch) -> None:
    asked = []

    def scores(subject, tokenizer, tasks, **options):
        asked.append((subject.config.model_type, list(tasks), options["include"]))
        return {"version": "0.4", "results": {"arc_easy": {"alias": "arc_easy", "acc,none": 0.25}}}

    monkeypatch.setattr(evaluation, "harness", scores)
    code, out, _ = call("eval", model, "--tasks", "arc_easy", "--task-files", "here", "--json")
    assert code == 0
    assert json.loads(out)["results"]["arc_easy"]["acc,none"] == 0.25
    assert asked == [("gpt2", ["arc_easy"], "here")]
    assert "0.2500" in call("eval", model, "--tasks", "arc_easy")[1]
