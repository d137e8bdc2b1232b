"""Rows that are the lines of one text: the same text gives the same number whatever it comes in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import pico
from kronfold.base.errors import InputError
from kronfold.data.tokenizer import train_tokenizer
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.texts import lines_of_one_text

WIKI = (
    " \n = The fox = \n \n The quick fox jumps . It is brown . \n \n = = Its dog = = \n \n"
    " The dog sleeps , and the fox jumps over it . \n The file ends here . \n"
)
PLAIN = "The fox\n\nThe quick fox jumps.\n\nIt is brown,\nand so is the dog.\n\nThe end of it.\n\nNothing follows.\n"


@pytest.fixture(scope="module")
def reader():
    return train_tokenizer([WIKI, PLAIN], 320)


@pytest.fixture(scope="module")
def model():
    return pico.gpt2(vocab_size=320, n_positions=16, n_layer=1)


def as_the_hub_has_it(text: str) -> list[str]:
    return [line if line.strip() else "" for line in text.splitlines(keepends=True)]


CUTS = {
    "the hub's rows": as_the_hub_has_it,
    "lines with their ends": lambda text: text.splitlines(keepends=True),
    "lines without": lambda text: text.split("\n"),
    "lines without, the last end dropped": lambda text: text.split("\n")[:-1],
}


@pytest.mark.parametrize("protocol", ["sliding", "paper"])
@pytest.mark.parametrize("text", [WIKI, PLAIN], ids=["wiki", "plain"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_container_changes_no_number(model, reader, tmp_path: Path, text: str, cut: str, protocol: str) -> None:
    rows = CUTS[cut](text)
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "rows.parquet")
    expected = perplexity(model, reader, tmp_path / "text.txt", protocol)
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        found = perplexity(model, reader, tmp_path / name, protocol)
        assert found == expected
        assert found.read["sha256"] == expected.read["sha256"]
        assert found.read["rows_joined"][name]["rows"] == len(rows)
    assert perplexity(model, reader, rows, protocol) == expected
    if protocol == "sliding":
        (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
        assert perplexity(model, reader, tmp_path / "one.jsonl") == expected
        assert perplexity(model, reader, text) == expected


DOCUMENTS = {
    "whole documents": [WIKI, PLAIN],
    "sentences, one a row": ["The fox jumps.", "It is brown.", "The end."] * 4,
    "one blank among many": ["The fox jumps.", *["It is brown."] * 40, ""],
    "a few rows": ["The file is read.", "", "It ends."],
    "one row": ["The fox jumps.\n"],
    "some end in a newline": ["a\n", "b", "c\n", "d"],
    "nothing": [],
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_stay_documents(kind: str) -> None:
    assert lines_of_one_text(DOCUMENTS[kind]) is None


def test_files_of_one_line_are_documents(model, reader, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text("The fox jumps .\n")
    found = perplexity(model, reader, tmp_path)
    assert (found.read["documents"], found.read["rows_joined"]) == (3, None)
    assert found == perplexity(model, reader, ["The fox jumps .\n"] * 3, rows="documents")
    assert found != perplexity(model, reader, ["The fox jumps .\n"] * 3)


def test_each_file_of_rows_is_a_text_of_its_own(model, reader, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": row}) + "\n" for row in CUTS["lines without"](WIKI))
        )
    found = perplexity(model, reader, tmp_path)
    assert found == perplexity(model, reader, [WIKI, WIKI])
    assert list(found.read["rows_joined"]) == ["a.jsonl", "b.jsonl"]


def test_rows_can_be_said_to_be_lines_or_documents(model, reader, tmp_path: Path, call) -> None:
    rows = [line for line in PLAIN.split("\n") if line]
    joined = "\n".join(rows) + "\n"
    assert perplexity(model, reader, rows) != perplexity(model, reader, joined)
    assert perplexity(model, reader, rows, rows="lines") == perplexity(model, reader, joined)
    wiki = as_the_hub_has_it(WIKI)
    assert perplexity(model, reader, wiki, rows="documents") != perplexity(model, reader, wiki)
    with pytest.raises(InputError, match="rows is 'line'. Did you mean 'lines'"):
        perplexity(model, reader, rows, rows="line")

    place = pico.model_directory(tmp_path / "model", n_layer=1)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in wiki))
    asked = ["eval", place, "--text", tmp_path / "rows.jsonl", "--json"]
    read = [json.loads(call(*asked, *more)[1])["read"] for more in ([], ["--rows", "documents"])]
    assert [entry["documents"] for entry in read] == [1, len(wiki)]
    assert read[0]["rows_joined"] == {"rows.jsonl": {"rows": len(wiki), "line_ends": "kept"}}
    assert f"{len(wiki)} rows of rows.jsonl are its lines" in " ".join(call(*asked[:-1])[1].split())
