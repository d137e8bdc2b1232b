"""The drawn share: included in larger ones, independent of order, of the size it should have."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from kronfold.base.errors import DataError, InputError, OutputError
from kronfold.data.sample import is_drawn, sample
from kronfold.data.sources import documents

TEXTS = [f"document number {index} of the lot" for index in range(5000)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sample") / "in.jsonl", TEXTS)


@pytest.mark.parametrize("fraction", [0.031, 0.25, 0.5])
def test_share_is_binomial(fraction):
    for seed in range(8):
        count = sum(is_drawn(text, fraction, seed) for text in TEXTS)
        deviation = math.sqrt(len(TEXTS) * fraction * (1 - fraction))
        assert abs(count - len(TEXTS) * fraction) < 4 * deviation


def test_smaller_shares_lie_in_larger_ones_and_seeds_are_independent():
    drawn = {p: {text for text in TEXTS if is_drawn(text, p, 0)} for p in (0.03, 0.1, 0.5, 1.0)}
    assert drawn[0.03] < drawn[0.1] < drawn[0.5] < drawn[1.0] == set(TEXTS)
    other = {text for text in TEXTS if is_drawn(text, 0.5, 1)}
    both = len(other & drawn[0.5])  # a quarter of all, were they drawn independently
    assert abs(both - len(TEXTS) / 4) < 4 * math.sqrt(len(TEXTS) * 3 / 16)


def test_order_and_files_do_not_matter(source, tmp_path):
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "a.jsonl", shuffled[:1700])
    write(tmp_path / "parts" / "b.jsonl", shuffled[1700:])
    one = sample(source, tmp_path / "one", 0.1, seed=5)
    two = sample(tmp_path / "parts", tmp_path / "two", 0.1, seed=5, format="parquet", shard_megabytes=0.001)
    assert sorted(documents(tmp_path / "one")) == sorted(documents(tmp_path / "two"))
    assert list(documents(tmp_path / "one")) == [text for text in TEXTS if is_drawn(text, 0.1, 5)]
    assert len(two["output"]["files"]) > 5
    assert one["output"]["documents"] == two["output"]["documents"] == len(list(documents(tmp_path / "one")))


def test_manifest_and_equal_bytes(source, tmp_path):
    found = sample(source, tmp_path / "a", 0.031)
    again = sample(source, tmp_path / "b", 0.031)
    assert found["output"] == again["output"]
    assert json.loads((tmp_path / "a" / "manifest.json").read_text()) == found
    assert found["input"]["documents"] == len(TEXTS)
    assert found["input"]["words"] == 6 * len(TEXTS)
    assert found["output"]["characters"] == sum(map(len, documents(tmp_path / "a")))
    assert found["share"]["documents"] == found["output"]["documents"] / len(TEXTS)
    assert found["settings"]["fraction"] == 0.031
    assert len(found["input"]["files"][0]["sha256"]) == 64


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"fraction": 0}, InputError, r"fraction 0 must lie in \(0, 1\]"),
        ({"fraction": 1.5}, InputError, "fraction 1.5"),
        ({"seed": -1}, InputError, "seed -1"),
        ({"format": "parket"}, InputError, "Did you mean 'parquet'"),
        ({"shard_megabytes": 0}, InputError, "above 0"),
        ({"fraction": 1e-9}, DataError, "None of the 5000 documents"),
        ({"text_column": "body"}, DataError, "Columns found: text"),
    ],
)
def test_bad_input_leaves_nothing(source, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        sample(source, tmp_path / "out", **{"fraction": 0.5, **changes})
    assert not list(tmp_path.iterdir())


def test_output_taken(source, tmp_path):
    sample(source, tmp_path / "out", 0.01)
    with pytest.raises(OutputError, match="exists already"):
        sample(source, tmp_path / "out", 0.01)
    sample(source, tmp_path / "out", 0.02, overwrite=True)


def test_command_line(source, tmp_path, call):
    code, out, _ = call("data", "sample", source, "--fraction", "0.1", "--seed", "2", "-o", tmp_path / "out", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["seed"] == 2
    assert list(documents(tmp_path / "out")) == [text for text in TEXTS if is_drawn(text, 0.1, 2)]
