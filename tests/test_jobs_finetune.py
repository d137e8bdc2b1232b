"""`kronfold finetune`: files in, the best classifier out; resumed runs are the same runs; faults come first."""

from __future__ import annotations

import json
import random
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import kronfold as kf
import pico
from kronfold.base.errors import InputError
from kronfold.data.glue import TASKS, read_tsv
from kronfold.distill import ObjectiveConfig
from kronfold.jobs import finetune as pipeline
from kronfold.jobs.finetune import FineTuneOptions, finetune
from kronfold.models.load import load_classifier, load_model
from kronfold.models.place import read_specs
from kronfold.options.finetune import FineTuneConfig

WORDS = [word for word in dict.fromkeys(pico.TEXT.split()) if word not in (".", "fox")]
FAST = ["--epochs", 2, "--learning-rate", 5e-3, "--batch-size", 16, "--device", "cpu"]


def sentences(path, count: int, seed: int, header: str = "sentence\tlabel"):
    """Sentences of known words; those with a fox have label 1."""
    draw, lines = random.Random(seed), [header]
    for index in range(count):
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 9))]
        if index % 2:
            words[draw.randrange(len(words))] = "fox"
        lines.append(f"{' '.join(words)}\t{index % 2}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("task")
    return sentences(place / "train.tsv", 120, 0), sentences(place / "dev.tsv", 40, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A structured model: factorised embedding, Kronecker layers."""
    place = tmp_path_factory.mktemp("finetune") / "model"
    kf.compress(pico.gpt2(n_layer=2), "tqcompressor").save_pretrained(place)
    pico.tokenizer().save_pretrained(place)
    return place


def given(files) -> list:
    return ["--task", "sst2", "--train-file", files[0], "--dev-file", files[1]]


def test_from_files_to_a_classifier_and_on_to_its_student(model, files, tmp_path, call) -> None:
    out = tmp_path / "tuned"
    code, printed, err = call(
        "finetune", model, *given(files), *FAST, "--epochs", 5, "--seeds", "0,1", "-o", out, "--json"
    )
    assert code == 0, err
    document = json.loads(printed)
    assert document == json.loads((out / "results.json").read_text())
    assert document["schema"] == "kronfold/finetune"
    assert not (tmp_path / "tuned.partial").exists()
    best = [one["best"]["accuracy"] for one in document["seeds"]]
    assert max(best) >= 0.95
    assert [one["seed"] for one in document["seeds"]] == [0, 1]
    for one in document["seeds"]:
        scores = [epoch["score"] for epoch in one["epochs"]]
        assert one["best_epoch"] == 1 + scores.index(max(scores))
        assert one["last"] == one["epochs"][-1]["dev"]
    assert document["summary"]["accuracy"]["mean"] == pytest.approx(sum(best) / 2)
    assert document["summary"]["accuracy"]["std"] == pytest.approx(abs(best[0] - best[1]) / 2**0.5)
    assert document["saved_seed"] == best.index(max(best))
    assert document["data"]["train"]["examples"] == 120

    # What was saved is the model of that score, for plain transformers; its layers are structured still.
    saved = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.pad_token_id == saved.config.pad_token_id == 0
    assert saved.config.id2label == {0: "negative", 1: "positive"}
    dev = read_tsv(files[1], TASKS["sst2"])
    batch = tokenizer([text for (text,) in dev.texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        said = saved(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert (said == torch.tensor(dev.labels)).float().mean().item() == pytest.approx(max(best))
    kept = {name: spec for name, spec in read_specs(load_model(model)).items() if name != "lm_head"}
    assert read_specs(saved) == kept
    assert kept

    code, printed, err = call(
        "finetune", model, *given(files), *FAST, "--teacher", out, "--method", "intermediate",
        "--method-option", "hidden=0.1", "--temperature", 3, "-o", tmp_path / "student",
    )  # fmt: skip
    assert code == 0, err
    taught = json.loads((tmp_path / "student" / "results.json").read_text())
    assert taught["teacher"]["dev"] == {"accuracy": pytest.approx(max(best))}
    assert taught["settings"]["objective"]["method"] == "intermediate"
    assert set(taught["seeds"][0]["epochs"][0]["losses"]) == {"loss", "kl", "ce", "hidden"}
    for words in ("Best epoch", "accuracy", "teacher", f"{100 * max(best):.2f}"):
        assert words in printed


def options(model, files, **changes) -> FineTuneOptions:
    settings = FineTuneConfig(epochs=2, batch_size=16, learning_rate=2e-3)
    base = {"model": str(model), "task": "sst2", "train_file": str(files[0]), "dev_files": (str(files[1]),)}
    return FineTuneOptions(
        **{**base, "settings": settings, "seeds": (0, 1), "device": "cpu", "output": "out", **changes}
    )


def without_times(document: dict) -> dict:
    seeds = [{key: value for key, value in one.items() if key != "seconds"} for one in document["seeds"]]
    return {**document, "seeds": seeds, "seconds": None, "created": None}


def weights(place) -> dict:
    return dict(AutoModelForSequenceClassification.from_pretrained(place).state_dict())


def test_a_resumed_run_is_the_same_run(model, files, tmp_path) -> None:
    whole = finetune(options(model, files, output=tmp_path / "whole"))
    trained = []

    def stop(what, done, total):
        trained.append(what)
        if what == "fine-tune (seed 1)" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(options(model, files, output=tmp_path / "cut"), report=stop)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(InputError, match=r"unfinished run lies in .*cut\.partial.*--resume"):
        finetune(options(model, files, output=tmp_path / "cut"))
    with pytest.raises(InputError, match=r"other options \(options\)"):
        finetune(options(model, files, max_length=9, output=tmp_path / "cut", resume=True))
    trained.clear()
    resumed = finetune(
        options(model, files, output=tmp_path / "cut", resume=True), report=lambda *seen: trained.append(seen[0])
    )
    assert set(trained) == {"fine-tune (seed 1)"}
    assert without_times(resumed) == without_times(whole)
    cut, straight = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.equal(cut[name], straight[name]) for name in straight)
    assert not (tmp_path / "cut.partial").exists()


def test_mnli_has_two_dev_sets(tmp_path) -> None:
    place = pico.model_directory(tmp_path / "model", n_layer=1)
    header = "premise\thypothesis\tlabel\n"
    labels = ("entailment", "neutral", "contradiction")
    body = "".join(f"the fox\t{word}\t{labels[i % 3]}\n" for i, word in enumerate(WORDS))
    paths = []
    for name in ("train", "matched", "mismatched"):
        paths.append(tmp_path / f"{name}.tsv")
        paths[-1].write_text(header + body)
    chosen = options(
        place, paths, task="mnli", dev_files=tuple(map(str, paths[1:])), seeds=(3,), output=tmp_path / "out"
    )
    found = finetune(chosen)
    one = found["seeds"][0]
    assert set(found["summary"]) == {"accuracy_matched", "accuracy_mismatched"}
    assert one["best"]["accuracy_matched"] == one["best"]["accuracy_mismatched"] == pytest.approx(one["score"])
    assert found["summary"]["accuracy_matched"]["std"] is None


def test_regression_learns_a_number(tmp_path) -> None:
    """stsb: the score is 4 where the second text holds a fox, else 1."""
    place = pico.model_directory(tmp_path / "model", n_layer=1)
    draw, paths = random.Random(0), []
    for name, count in (("train", 160), ("dev", 40)):
        lines = ["sentence1\tsentence2\tscore"]
        for index in range(count):
            words = [draw.choice(WORDS) for _ in range(4)]
            words[draw.randrange(4)] = "fox" if index % 2 else "the"
            lines.append(f"the dog\t{' '.join(words)}\t{4 if index % 2 else 1}")
        paths.append(tmp_path / f"{name}.tsv")
        paths[-1].write_text("\n".join(lines))
    settings = FineTuneConfig(epochs=6, batch_size=16, learning_rate=5e-3)
    found = finetune(options(place, paths, task="stsb", settings=settings, seeds=(0,), output=tmp_path / "out"))
    assert found["summary"]["pearson"]["mean"] > 0.9
    assert "label_mse" in found["seeds"][0]["epochs"][0]["losses"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 1


BAD = {
    "no such task": (["--task", "colla"], "Unknown task 'colla'. Did you mean 'cola'"),
    "no such file": (["--train-file", "none.tsv"], "no file none.tsv"),
    "columns that are not there": (["--columns", "text,label"], "no column 'text'.*Columns found: sentence, label"),
    "train without dev": (["--dev-file"], "--train-file was given without --dev-file"),
    "two dev files": (["--dev-file", "{dev}", "--dev-file", "{dev}"], "has 1 dev set.s., 2 were given"),
    "seeds": (["--seeds", "0,one"], "give whole numbers"),
    "a seed twice": (["--seeds", "1,1"], "each once"),
    "epochs": (["--epochs", "0"], r"epochs: .*given: 0"),
    "method without teacher": (["--method", "intermediate"], "give --teacher too"),
    "no such method": (["--teacher", "{model}", "--method", "intermediat"], "Did you mean 'intermediate'"),
    "no such option": (["--teacher", "{model}", "--method-option", "hiden=1"], "hiden"),
    "teacher of no task": (["--teacher", "{model}"], "is no classifier with 2 output.*Fine-tune it on the task first"),
    "output exists": (["-o", "{model}"], "exists already"),
    "nothing to resume": (["--resume"], "nothing to resume"),
    "no such dtype": (["--dtype", "int4"], "Allowed: float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_faults_come_before_training(model, files, tmp_path, call, monkeypatch, case) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(pipeline, "fine_tune", never)
    changes, message = BAD[case]
    changes = [entry.format(model=model, dev=files[1]) for entry in changes]
    base = {"--task": ["sst2"], "--train-file": [files[0]], "--dev-file": [files[1]], "-o": [tmp_path / "out"]}
    if changes[0] in base:
        del base[changes[0]]
    arguments = [part for name, values in base.items() for part in (name, *values)]
    arguments += changes if len(changes) > 1 or changes == ["--resume"] else []
    code, out, err = call("finetune", model, *arguments, "--device", "cpu")
    assert code == 2, err
    assert out == ""
    assert re.search(message, " ".join(err.split())), err
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_vocabulary(model, files, tmp_path) -> None:
    torch.manual_seed(0)
    load_classifier(pico.model_directory(tmp_path / "base", vocab_size=90), 2, pad=0).save_pretrained(
        tmp_path / "other"
    )
    settings = FineTuneConfig(objective=ObjectiveConfig(kl=1.0, ce=1.0))
    with pytest.raises(InputError, match="101 tokens and the teacher 90"):
        finetune(options(model, files, teacher=str(tmp_path / "other"), settings=settings, output=tmp_path / "out"))
    assert not (tmp_path / "out.partial").exists()


def test_one_label_teaches_nothing(model, tmp_path) -> None:
    path = tmp_path / "train.tsv"
    path.write_text("sentence\tlabel\nthe fox\t1\nthe dog\t1\n")
    with pytest.raises(InputError, match="has one label only"):
        finetune(options(model, (path, path), output=tmp_path / "out"))


def test_without_files_the_data_set_is_asked(model, files, tmp_path, monkeypatch) -> None:
    from kronfold.data import glue

    asked = []

    def rows(name, task, split):
        asked.append((name, task.name, split))
        return read_tsv(files[split != "train"], task)

    monkeypatch.setattr(glue, "read_dataset", rows)
    chosen = options(model, files, train_file=None, dev_files=(), seeds=(0,), settings=FineTuneConfig(epochs=1))
    chosen = chosen.model_copy(update={"output": str(tmp_path / "out")})
    assert finetune(chosen)["data"]["dev"]["dev"]["examples"] == 40
    assert asked == [("nyu-mll/glue", "sst2", "train"), ("nyu-mll/glue", "sst2", "validation")]
