"""Which split of a dataset is read, how it is named, and what the record says. `datasets` itself does the loading."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import datasets
import pytest

import pico
from kronfold.base.errors import DataError
from kronfold.data.sources import EVALUATION, documents
from kronfold.evaluate import perplexity
from kronfold.evaluate.texts import open_text

ROWS = {"test": 2, "validation": 3, "train": 4}


def rows_of(split: str, config: str = "default") -> list[str]:
    return [f"{config} {split} {pico.TEXT * (i + 1)}" for i in range(ROWS[split])]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes `owner/name` a dataset with the given splits, in two configs; loaded by the library from local files."""
    load, split_names, builder = datasets.load_dataset, datasets.get_dataset_split_names, datasets.load_dataset_builder

    def make(*splits: str) -> None:
        for config in ("default", "raw"):
            place = tmp_path / "hub" / config
            place.mkdir(parents=True)
            for split in splits:
                lines = (json.dumps({"text": text}) + "\n" for text in rows_of(split, config))
                (place / f"{split}.jsonl").write_text("".join(lines))

        def place_of(name, config):
            if name != "owner/name":
                raise ConnectionError("no route to the hub")
            return str(tmp_path / "hub" / (config or "default"))

        monkeypatch.setattr(
            datasets, "load_dataset", lambda name, config=None, **options: load(place_of(name, config), **options)
        )
        monkeypatch.setattr(
            datasets, "get_dataset_split_names", lambda name, config=None: split_names(place_of(name, config))
        )
        monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config=None: builder(place_of(name, config)))

    return make


@pytest.mark.parametrize(
    ("splits", "source", "read"),
    [
        (("train", "validation", "test"), "owner/name", "default test"),
        (("train", "validation"), "owner/name", "default validation"),
        (("train", "validation", "test"), "owner/name:raw", "raw test"),
        (("train", "validation", "test"), "owner/name@validation", "default validation"),
        (("train", "validation", "test"), "owner/name:raw@train", "raw train"),
        (("train", "validation", "test"), "owner/name:raw:train", "raw train"),
    ],
)
def test_evaluation_reads_the_test_split_unless_another_is_named(hub, splits, source, read) -> None:
    hub(*splits)
    config, split = read.split()
    opened = open_text(source)
    assert list(opened) == rows_of(split, config)
    record = opened.record()
    assert (record["source"], record["split"]) == ("owner/name", split)
    assert record["config"] == (config if ":" in source else None)
    assert record["documents"] == ROWS[split]
    content = b"\xff".join(text.encode() for text in rows_of(split, config))
    assert record["sha256"] == hashlib.sha256(content).hexdigest()
    assert record["complete"]


@pytest.mark.parametrize(
    ("splits", "source", "message"),
    [
        (
            ("train",),
            "owner/name",
            "no split test or validation to measure on. It has: train. Name one: owner/name@train",
        ),
        (("train",), "owner/name:raw", "It has: train. Name one: owner/name:raw@train"),
        (("train", "test"), "owner/name@tst", "no split 'tst'. Did you mean 'test'. Allowed: test, train"),
        (("train", "test"), "owner/name:raw:tset", "Did you mean 'test'.*Name one: owner/name:raw@"),
        (("train",), "owner/name:a:b@c", "is no datasets id. Write ID, ID@SPLIT"),
        (("train",), "owner/name@", "is no datasets id"),
        (("train",), "owner/other", "no route to the hub"),
    ],
)
def test_no_such_split(hub, splits, source, message) -> None:
    hub(*splits)
    with pytest.raises(DataError, match=message):
        open_text(source)


def test_training_reads_the_train_split(hub) -> None:
    hub("train", "test")
    assert list(documents("owner/name")) == rows_of("train")
    assert list(documents("owner/name:raw@test")) == rows_of("test", "raw")


def test_the_revision_is_the_commit_of_the_files(hub, monkeypatch) -> None:
    hub("test")
    commit = "0123456789abcdef" * 2 + "01234567"

    class Builder:
        class config:
            data_files = {"test": [f"hf://datasets/owner/name@{commit}/test.parquet"]}

    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_: Builder)
    assert open_text("owner/name").record()["revision"] == commit


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pico.model_directory(tmp_path_factory.mktemp("splits") / "model", n_layer=1)


def test_every_command_says_what_it_read(hub, model, tmp_path, call) -> None:
    hub("train", "validation", "test")
    code, out, err = call("eval", model, "--text", "owner/name", "--json")
    assert code == 0, err
    assert json.loads(out)["read"]["split"] == "test"
    assert "owner/name, split test, 2 documents" in call("eval", model, "--text", "owner/name")[1]

    student = tmp_path / "student"
    options = ["--recipe", "svd", "--calibration", "owner/name", "--calibration-windows", 2]
    code, out, err = call("compress", model, *options, "-o", student, "--json")
    assert code == 0, err
    assert [read["split"] for read in json.loads(out)["calibration"]["read"]] == ["train"]

    options = ["--teacher", model, "--train-text", "owner/name", "--eval-text", "owner/name:raw@validation"]
    code, out, err = call("heal", student, *options, "--heal-tokens", 128, "-o", tmp_path / "healed", "--json")
    assert code == 0, err
    data = json.loads(out)["data"]
    assert data["heal"]["read"]["split"] == "train"
    assert (data["eval"]["read"]["config"], data["eval"]["read"]["split"]) == ("raw", "validation")
    assert data["eval"]["read"]["documents"] == ROWS["validation"]


def saved(place: Path, *splits: str) -> Path:
    made = {split: datasets.Dataset.from_dict({"text": rows_of(split)}) for split in splits}
    datasets.DatasetDict(made).save_to_disk(str(place))
    return place


def test_a_dataset_saved_to_disk_has_splits(tmp_path: Path) -> None:
    place = saved(tmp_path / "all", "train", "validation", "test")
    assert list(open_text(str(place))) == rows_of("test")
    assert list(documents(str(place))) == rows_of("train")
    chosen = open_text(f"{place}@validation")
    assert list(chosen) == rows_of("validation")
    assert (chosen.record()["source"], chosen.record()["split"]) == ("all", "validation")
    with pytest.raises(DataError, match="no split 'tst'. Did you mean 'test'"):
        open_text(f"{place}@tst")
    with pytest.raises(DataError, match="It has: train"):
        open_text(str(saved(tmp_path / "some", "train")))
    datasets.Dataset.from_dict({"text": ["a fox", None]}).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(DataError, match=r"row 2: 'text' holds null, not text\. 1 of 2 rows"):
        list(open_text(str(tmp_path / "one")))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        open_text(str(tmp_path / "one"))


def test_files_have_no_split_to_guess(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": split}) + "\n")
    found = documents(tmp_path, split=EVALUATION)
    assert list(found) == ["test", "train"]
    record = found.record()
    assert "split" not in record
    assert record["source"] == tmp_path.name
    assert record["files"] == [{"name": "test.jsonl", "bytes": 17}, {"name": "train.jsonl", "bytes": 18}]
    assert str(tmp_path) not in json.dumps(record)


def test_the_hash_of_one_document_is_that_of_its_text(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes("größer\n".encode())
    found = documents(path)
    assert not found.record()["complete"]
    list(found)
    assert found.record()["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    model = pico.gpt2(n_layer=1)
    measured = perplexity.perplexity(model, pico.tokenizer(), pico.TEXT)
    assert measured.read["sha256"] == hashlib.sha256(pico.TEXT.encode()).hexdigest()
