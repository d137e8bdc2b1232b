"""Text sources: the same documents whatever the container, and errors that name the place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from kronfold.base.errors import DataError
from kronfold.data.sources import documents

TEXTS = ["first document\nwith two lines", "zweites, größer", "third"]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def jsonl(texts: list[str], column: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, column: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return write(path.with_name(path.name + ".gz"), path.read_bytes())


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_jsonl_gives_a_document_per_row(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"rows{ending}", jsonl(TEXTS) + b"\n")
    assert list(documents(path)) == TEXTS
    assert list(documents(str(path))) == TEXTS


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"words{ending}", b"\xef\xbb\xbf" + "".join(TEXTS).encode())
    assert list(documents(path)) == ["".join(TEXTS)], "kept whole, without the byte order mark"


def test_parquet_plain_and_gz(tmp_path: Path) -> None:
    zipped = write_parquet(tmp_path / "rows.parquet", {"n": [1, 2, 3], "body": TEXTS})
    assert list(documents(tmp_path / "rows.parquet", text_column="body")) == TEXTS
    assert list(documents(zipped, text_column="body")) == TEXTS


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.txt", b"second")
    write(tmp_path / "a.jsonl", jsonl(["first"]))
    write(tmp_path / "deep" / "c.txt.gz", b"third")
    write(tmp_path / "notes.md", b"not a source")
    assert list(documents(tmp_path)) == ["first", "second", "third"]


def test_a_datasets_id_is_loaded_streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return [{"text": text} for text in TEXTS]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for source in ("owner/name", "owner/name:raw", "owner/name:raw:test"):
        assert list(documents(source, split="validation")) == TEXTS
    assert calls == [
        ("owner/name", None, "validation", True),
        ("owner/name", "raw", "validation", True),
        ("owner/name", "raw", "test", True),
    ]


def test_a_datasets_id_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no route to the hub\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"neither an existing path nor a datasets id.*no route to the hub"):
        list(documents("owner/name"))


LATIN = b"a line\n" * 3 + "größer".encode("latin1")
BAD = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\n", "holds no text"),
    "empty.jsonl": (b"", "holds no text"),
    "latin.txt": (LATIN, r"latin.txt is not UTF-8 text: byte 0xf6 at offset 23"),
    "latin.jsonl": (jsonl(["x"]) + b'{"text": "\xf6"}', r"not UTF-8 text: byte 0xf6 at offset 33"),
    "column.jsonl": (jsonl(["x"], "body"), "column.jsonl, line 1 has no column 'text'. Columns found: id, body"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: 'text' holds int, not text"),
    "list.jsonl": (b"[1]\n", "line 1 is a JSON list"),
    "torn.jsonl": (jsonl(["x"]) + b'{"text": "y', "line 2 is not JSON"),
    "words.md": (b"text", r"unknown ending \(.md\).*Allowed: .jsonl, .parquet, .txt"),
    "none": (b"text", r"unknown ending \(no ending\)"),
    "torn.parquet": (b"PAR1 and no more", "not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    with pytest.raises(DataError, match=message):
        list(documents(write(tmp_path / name, content)))


def test_more_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        documents(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="does not exist"):
        documents("missing.jsonl.gz")
    with pytest.raises(DataError, match=r"holds no .txt, .jsonl, .parquet file"):
        documents(tmp_path)
    write_parquet(tmp_path / "rows.parquet", {"n": [1], "body": ["x"]})
    with pytest.raises(DataError, match=r"has no column 'text'\. Columns found: n, body"):
        list(documents(tmp_path / "rows.parquet"))
    torn = gzip.compress(b"words " * 1000)[:-12]
    (tmp_path / "torn.txt.gz").write_bytes(torn)
    with pytest.raises(DataError, match="damaged gzip"):
        list(documents(tmp_path / "torn.txt.gz"))
