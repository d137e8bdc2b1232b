"""Prose out of Python sources: what is kept, what falls away, and a split that never moves."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from kronfold.base.errors import DataError, OutputError
from kronfold.data.stdlib import extract_stdlib, paragraphs, split_of, stdlib_documents

CLEANING = {
    "hard-wrapped lines are joined": (
        "Return the first line\nof the file given.\n\nThe file is closed\nafterwards.",
        ["Return the first line of the file given.", "The file is closed afterwards."],
    ),
    "doctests go, with their output": (
        "Add two numbers together.\n\n>>> add(1, 2)\n3\n\nThe order does not matter.",
        ["Add two numbers together.", "The order does not matter."],
    ),
    "a literal block goes, its announcement stays": (
        "Call it in the usual manner::\n\n    result = call(it)\n    print it again now.\n\nThen look at the result.",
        ["Call it in the usual manner.", "Then look at the result."],
    ),
    "a summary gains its capital and its full stop": ("return the name of the file", ["Return the name of the file."]),
    "the tail of something dropped goes": (
        "Return the name of it.\n\nversion of the protocol.",
        ["Return the name of it."],
    ),
    "reST marks go": (
        "See :class:`~a.b.Thing` and ``other`` for *more* details.",
        ["See a.b.Thing and other for more details."],
    ),
    "headings and tables go": (
        "Overview\n========\n\nThis module reads many files.\n\nName    Meaning of it\n+----+----+",
        ["This module reads many files."],
    ),
    "signatures go": ("read(path, mode) -> str\n\nRead a file into memory.", ["Read a file into memory."]),
    "list items become paragraphs": (
        "* The first one is long enough.\n* The second one is too.",
        ["The first one is long enough.", "The second one is too."],
    ),
    "formulas go": (
        "This sentence may well stay here.\n\nX = (a+b)/2; y = [1, 2, 3]; z = {4: 5}.",
        ["This sentence may well stay here."],
    ),
    "unicode stays": ("A naïve café in Zürich, “quoted” here.", ["A naïve café in Zürich, “quoted” here."]),
    "nothing but code": (">>> 1 + 1\n2", []),
    "empty": ("", []),
}

SOURCE = (
    '''"""The module that the test reads."""
# This comment explains the matter
# over two whole lines.
# One short line is left out. '''.rstrip()
    + '''

x = 1  # a comment behind code is never read by us.

# A lonely comment line is not kept.
def function():
    """Return the answer to everything."""

class Thing:
    """Return the answer to everything."""
'''
)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    (root / "package" / "tests").mkdir(parents=True)
    (root / "site-packages").mkdir()
    (root / "module.py").write_text(SOURCE, encoding="utf-8")
    (root / "package" / "sub.py").write_text('"""Another module with words in it."""\n', encoding="utf-8")
    (root / "package" / "broken.py").write_text("def (:\n", encoding="utf-8")
    for place in ("package/tests", "site-packages"):
        (root / place / "hidden.py").write_text('"""This must never appear anywhere at all."""\n', encoding="utf-8")
    return root


@pytest.mark.parametrize("name", CLEANING)
def test_cleaning(name: str) -> None:
    text, expected = CLEANING[name]
    assert paragraphs(text) == expected


def test_documents_are_ordered_named_and_without_repeats(library: Path) -> None:
    found = list(stdlib_documents(library))
    assert found == [
        ("module.py:1", "The module that the test reads."),
        ("module.py:2", "This comment explains the matter over two whole lines. One short line is left out."),
        ("module.py:9", "Return the answer to everything."),
        ("package/sub.py:1", "Another module with words in it."),
    ]


def test_the_running_installation_gives_topics_and_docstrings_of_real_prose() -> None:
    documents = dict(stdlib_documents())
    text = "\n".join(documents.values())
    assert any(name.startswith("topic:") for name in documents)
    assert any(name.startswith("argparse.py:") for name in documents)
    assert not any("site-packages" in name or "/test/" in name for name in documents)
    assert len(text) > 1_000_000
    assert ">>>" not in text
    blocks = [block for document in documents.values() for block in document.split("\n\n")]
    assert len(blocks) == len(set(blocks))


def test_split_follows_the_text_alone() -> None:
    texts = [f"document number {number}" for number in range(4000)]
    held = [text for text in texts if split_of(text, 0.1) == "validation"]
    assert 0.08 < len(held) / len(texts) < 0.12
    assert set(held) <= {text for text in texts if split_of(text, 0.2) == "validation"}, "shares are nested"
    assert split_of("document number 0", 0.0) == "train"


def test_extract_writes_rows_and_a_true_manifest(library: Path, tmp_path: Path) -> None:
    manifest = extract_stdlib(tmp_path / "out", holdout=0.5, root=library)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    texts = []
    for split, entry in manifest["splits"].items():
        content = (tmp_path / "out" / f"{split}.jsonl").read_bytes()
        rows = [json.loads(line) for line in content.splitlines()]
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert len(rows) == entry["documents"]
        assert sum(len(row["text"].encode()) for row in rows) == entry["bytes"]
        assert all(split_of(row["text"], 0.5) == split for row in rows)
        texts += [row["text"] for row in rows]
    assert sorted(texts) == sorted(text for _, text in stdlib_documents(library))
    assert extract_stdlib(tmp_path / "again", holdout=0.5, root=library) == manifest


def test_extract_refuses(library: Path, tmp_path: Path) -> None:
    extract_stdlib(tmp_path / "out", root=library)
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        extract_stdlib(tmp_path / "out", root=library)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before
    with pytest.raises(DataError, match="holdout is 1"):
        extract_stdlib(tmp_path / "new", holdout=1.0, root=library)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No documentation prose"):
        extract_stdlib(tmp_path / "new", root=tmp_path / "empty")
    assert not (tmp_path / "new").exists()
