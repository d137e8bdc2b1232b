"""What is wrong with text files: rows without text are skipped, counted and limited; all else is an error of ours."""

from __future__ import annotations

import gzip
import json
import random
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

import pico
from kronfold.base.errors import DataError, InputError
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import draw_windows, pack
from kronfold.data.sources import documents
from kronfold.data.tokenizer import train_tokenizer

GOOD = [f"document {i}" for i in range(8)]


def write_rows(path: Path, *more: bytes, good: int = len(GOOD)) -> Path:
    lines = [json.dumps({"text": text}).encode() for text in (GOOD * good)[:good]]
    path.write_bytes(b"\n".join([*lines, *more]) + b"\n")
    return path


BAD_ROWS = {
    "null": (b'{"text": null}', "null", "line 9: 'text' holds null, not text"),
    "no text": (b'{"body": "x"}', "column missing", "line 9 has no column 'text'. Columns found: body"),
    "a number": (b'{"text": 3}', "not text", "line 9: 'text' holds int"),
    "a list": (b'["text"]', "not an object", "line 9 is a JSON list"),
    "no JSON": (b'{"text": "y', "not JSON", "line 9 is not JSON"),
    "a huge number": (b'{"text": ' + b"1" * 5000 + b"}", "not JSON", "line 9 is not JSON"),
    "deep": (b"[" * 100_000, "not JSON", "line 9 is JSON nested too deeply"),
    "latin-1": (b'{"text": "gr\xf6\xdfer"}', "not UTF-8", "line 9: .*looks like Latin-1"),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_row_without_text_is_skipped_and_counted(tmp_path: Path, kind: str) -> None:
    row, why, message = BAD_ROWS[kind]
    path = write_rows(tmp_path / "rows.jsonl", row, b'{"text": "last"}')
    found = documents(path)
    assert list(found) == [*GOOD, "last"]
    record = found.record()
    assert (record["skipped_rows"], record["skipped_for"]) == (1, {why: 1})
    assert record["first_skipped"].startswith(("rows.jsonl, line 9", "line 9: rows.jsonl"))
    assert str(tmp_path) not in json.dumps(record)
    with pytest.raises(DataError, match=message):
        list(documents(path, max_bad_rows=0))


def test_parquet_rows_are_skipped_and_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": [*GOOD, None, "last"]}), path)
    found = documents(path)
    assert list(found) == [*GOOD, "last"]
    assert found.record()["first_skipped"] == "rows.parquet, row 9: 'text' holds null, not text."
    broken = pyarrow.StringArray.from_buffers(
        3, pyarrow.py_buffer(b"\x00\0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0"), pyarrow.py_buffer(b"a\xffb")
    )
    parquet.write_table(pyarrow.table({"text": broken}), path)
    found = documents(path)
    assert list(found) == ["a", "b"]
    assert found.record()["skipped_for"] == {"not UTF-8": 1}
    words = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"text": words}), path)
    assert list(documents(path)) == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("good", "bad", "limit", "fails"),
    [
        (98, 2, 2, False),
        (98, 2, "1", True),
        (98, 2, "2%", False),
        (98, 2, "1.5 %", True),
        (3, 2, None, False),
        (2, 2, None, True),  # half
        (101, 100, None, False),
        (300, 101, None, True),  # above 100 rows and 1 %
        (20_000, 150, None, False),  # below 1 %
        (0, 3, 3, True),  # no text at all
    ],
)
def test_limits(tmp_path: Path, good: int, bad: int, limit, fails: bool) -> None:
    path = write_rows(tmp_path / "rows.jsonl", *[b'{"text": null}'] * bad, good=good)
    found = documents(path, max_bad_rows=limit)
    if fails:
        with pytest.raises(DataError, match=r"rows.jsonl, line \d+: 'text' holds null|holds no text"):
            list(found)
    else:
        assert len(list(found)) == good
        assert found.record()["skipped_rows"] == bad


@pytest.mark.parametrize("limit", ["-1", "a few", "101%", "1e3", "", "%", "9" * 30])
def test_limits_that_are_none(limit: str) -> None:
    with pytest.raises(InputError, match="neither a number of rows such as 20 nor a share such as 1%"):
        Reading(max_bad_rows=limit)
    with pytest.raises(InputError, match="names no column"):
        Reading(text_column="a,,b")


def test_half_a_surrogate_pair_becomes_the_replacement_character(tmp_path: Path) -> None:
    texts = [r"lone \ud83d here", r"whole \ud83d\ude00", r"\udc00\udc00", "plain"]
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    found = documents(tmp_path / "rows.jsonl")
    assert list(found) == ["lone \ufffd here", "whole \U0001f600", "\ufffd\ufffd", "plain"]
    assert found.record()["replaced_surrogates"] == 3
    reader = train_tokenizer(GOOD, 300)
    assert pack(["a \ud83d b" * 9], reader, 4).ids.tolist() == pack(["a \ufffd b" * 9], reader, 4).ids.tolist()


def test_commands_take_text_with_faults(tmp_path: Path, call, tiny_model) -> None:
    rows = [json.dumps({"content": pico.TEXT * 8})] * 9 + ['{"content": "the \\ud83d fox"}', '{"content": null}', "[1]"]
    (tmp_path / "web.jsonl").write_text("\n".join(rows) + "\n")
    web, column = tmp_path / "web.jsonl", ["--text-column", "content"]
    code, out, err = call("eval", tiny_model, "--text", web, *column, "--json")
    assert code == 0, err
    read = json.loads(out)["read"]
    assert (read["skipped_rows"], read["replaced_surrogates"]) == (2, 1)
    assert "2 rows without text skipped (web.jsonl, line 11" in " ".join(
        call("eval", tiny_model, "--text", web, *column)[1].split()
    )
    for given in ([], ["--text-column", "body"], [*column, "--max-bad-rows", "1"]):
        code, out, err = call("eval", tiny_model, "--text", web, *given, "--json")
        assert (code, out) == (2, "")
        assert "web.jsonl, line" in err.replace("\n", " ")
    options = ["--recipe", "svd", "--calibration", web, "--calibration-windows", 2, *column]
    code, out, err = call("compress", tiny_model, *options, "-o", tmp_path / "small", "--json")
    assert code == 0, err
    assert json.loads(out)["calibration"]["read"][0]["skipped_rows"] == 2
    code, out, err = call("plan", tiny_model, "--recipe", "auto", *options[2:], "--target-ratio", 0.9, "--json")
    assert code == 0, err
    code, out, err = call(
        "teach", tiny_model, "--train-text", web, "--tokens", 64, *column, "-o", tmp_path / "t", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["read"]["documents"] >= 1
    heal = ["heal", tmp_path / "small", "--teacher", tiny_model, "--train-text", web, "--eval-text", web]
    code, out, err = call(*heal, "--heal-tokens", 128, *column, "-o", tmp_path / "healed", "--json")
    assert code == 0, err
    assert json.loads(out)["data"]["eval"]["read"]["skipped_rows"] == 2
    code, out, err = call("data", "sample", web, "--fraction", 1, *column, "-o", tmp_path / "share", "--json")
    assert code == 0, err
    found = json.loads(out)["input"]
    assert (found["source"], found["read"]["skipped_rows"]) == ("web.jsonl", 2)
    assert "the \ufffd fox" in list(documents(tmp_path / "share"))


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return pico.model_directory(tmp_path_factory.mktemp("faults") / "model", n_layer=1)


def test_the_first_column_that_a_row_has(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n{"text": "two", "content": "x"}\n{"text": "three"}\n')
    assert list(documents(tmp_path / "a.jsonl", text_column="text,content")) == ["one", "two", "three"]
    parquet.write_table(pyarrow.table({"content": ["four"]}), tmp_path / "b.parquet")
    assert list(documents(tmp_path, text_column="text,content")) == ["one", "two", "three", "four"]


def test_what_is_no_text_of_a_directory_is_left_alone(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    for name in ("._a.jsonl", ".DS_Store", ".hidden.txt", ".cache/b.txt", "__MACOSX/a.jsonl", "deep/.git/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07 not text \xff")
    (tmp_path / "deep" / "b.txt").write_text("more")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    found = documents(tmp_path)
    assert list(found) == [*GOOD, "more"]
    assert [file["name"] for file in found.record()["files"]] == ["a.jsonl", "deep/b.txt"]
    hidden = tmp_path / ".cache"  # named itself, it is meant
    (hidden / "b.txt").write_text("said")
    assert list(documents(hidden)) == ["said"]


def test_endings_in_any_case(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl").read_bytes()
    (tmp_path / "A.TXT").write_text("words")
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(rows))
    zstd(tmp_path / "c.jsonl.zst", rows)
    zstd(tmp_path / "D.Txt.Zst", b"words", b" and more")
    parquet.write_table(pyarrow.table({"text": GOOD}), tmp_path / "E.Parquet")
    zstd(tmp_path / "f.parquet.zst", (tmp_path / "E.Parquet").read_bytes())
    for name, texts in {
        "A.TXT": ["words"],
        "B.JSONL.GZ": GOOD,
        "c.jsonl.zst": GOOD,
        "D.Txt.Zst": ["words and more"],
        "E.Parquet": GOOD,
        "f.parquet.zst": GOOD,
    }.items():
        assert list(documents(tmp_path / name)) == texts, name
        assert list(documents(str(tmp_path / name))) == texts
    with pytest.raises(DataError, match="missing.TXT.ZST does not exist"):
        documents("missing.TXT.ZST")


def zstd(path: Path, *frames: bytes) -> None:
    with open(path, "wb") as file:
        for frame in frames:
            sink = pyarrow.BufferOutputStream()
            with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
                stream.write(frame)
            file.write(sink.getvalue().to_pybytes())


ENCODED = {
    "UTF-16 with its mark": ("größer\n" * 9, "utf-16", "byte order mark of UTF-16. Convert it first: iconv -f UTF-16 "),
    "UTF-32 with its mark": ("größer\n" * 9, "utf-32", "byte order mark of UTF-32"),
    "UTF-16, little end first": ("a line\n" * 9, "utf-16-le", "as in UTF-16LE. Convert it first: iconv -f UTF-16LE -t"),
    "UTF-16, big end first": ("a line\n" * 9, "utf-16-be", "as in UTF-16BE"),
    "Latin-1": ("größer\n" * 9, "latin-1", r"looks like Latin-1 .* iconv -f LATIN1 -t UTF-8"),
    "Windows-1252": ("“größer”\n" * 9, "cp1252", "looks like Windows-1252.*iconv -f WINDOWS-1252 -t UTF-8"),
    "zeros": ("\0" * 500, "ascii", "is no text: 500 of its first 500 bytes are zero"),
}


@pytest.mark.parametrize("kind", ENCODED)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".txt.gz"])
def test_the_encoding_is_named(tmp_path: Path, kind: str, ending: str) -> None:
    text, codec, message = ENCODED[kind]
    path = tmp_path / f"words{ending}"
    if ending == ".jsonl" and kind != "zeros":
        text = "".join(f'{{"text": "{line}"}}\n' for line in text.splitlines())
    content = text.encode(codec)
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    with pytest.raises(DataError, match=message):
        list(documents(path))


def test_a_character_cut_off_is_no_other_encoding(tmp_path: Path) -> None:
    (tmp_path / "cut.txt").write_bytes("a line\nö".encode()[:-1])
    with pytest.raises(DataError, match=r"byte 0xc3 at offset 7\. The text ends in the middle of a character"):
        list(documents(tmp_path / "cut.txt"))
    far = b"x" * (3 << 20) + "ö".encode()
    (tmp_path / "far.txt").write_bytes(far + b"\xff" + far)
    with pytest.raises(DataError, match=f"byte 0xff at offset {len(far):,}"):
        list(documents(tmp_path / "far.txt"))


def test_damaged_files_end_in_our_own_errors(tmp_path: Path) -> None:
    """Cut and flipped at seeded places; whatever is read of them must be text or a DataError."""
    rows = write_rows(tmp_path / "rows.jsonl", good=300).read_bytes()
    parquet.write_table(pyarrow.table({"text": GOOD * 40}), tmp_path / "rows.parquet")
    zstd(tmp_path / "rows.jsonl.zst", rows)
    whole = {
        "rows.jsonl": rows,
        "rows.jsonl.gz": gzip.compress(rows),
        "rows.jsonl.zst": (tmp_path / "rows.jsonl.zst").read_bytes(),
        "rows.parquet": (tmp_path / "rows.parquet").read_bytes(),
        "rows.parquet.gz": gzip.compress((tmp_path / "rows.parquet").read_bytes()),
    }
    chooser = random.Random(0)
    for name, content in whole.items():
        refused = 0
        for trial in range(60):
            damaged = bytearray(content)
            place = chooser.randrange(len(content))
            if trial % 2:
                del damaged[place:]
            else:
                damaged[place] ^= 1 << chooser.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            try:
                assert all(isinstance(text, str) for text in documents(tmp_path / name))
            except DataError:
                refused += 1
        assert refused == 0 if name == "rows.jsonl" else refused >= 25, name  # one row of 300 may be skipped


@pytest.mark.parametrize(
    ("values", "message"),
    [([1, 2], "column 'text' holds int64, not text"), ([["a"], ["b"]], "column 'text' holds list<.*>, not text")],
)
def test_a_parquet_column_of_another_type(tmp_path: Path, values, message: str) -> None:
    parquet.write_table(pyarrow.table({"text": values, "body": ["x", "y"]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=f"rows.parquet: {message}.*--text-column"):
        list(documents(tmp_path / "rows.parquet"))


def bomb(path: Path, piece: bytes, gigabytes: int, head: bytes = b"") -> Path:
    """A gzip file of many equal members: small on disk, gigabytes unfolded, made in a moment."""
    member = gzip.compress(piece * ((16 << 20) // len(piece)), 9)
    path.write_bytes(gzip.compress(head) + member * (64 * gigabytes))
    assert path.stat().st_size < 8e6
    return path


BOMBS = {
    "words.txt.gz": (b"the quick brown fox ", b""),
    "letters.txt.gz": (b"a", b""),
    "rows.jsonl.gz": (b'{"text": "the quick brown fox jumps over the lazy dog"}\n', b""),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_unfolds_to_gigabytes_is_read_as_far_as_it_is_wanted(tmp_path: Path, name: str) -> None:
    piece, head = BOMBS[name]
    path = bomb(tmp_path / name, piece, 2, head)
    reader = train_tokenizer(GOOD, 300)
    started = time.monotonic()
    found = documents(path)
    blocks = pack(found, reader, 64, max_tokens=2048)
    windows, read = draw_windows([path], reader, count=2, window=32)
    assert time.monotonic() - started < 10
    assert (blocks.tokens, windows.shape) == (2048, (2, 32))
    assert not found.record()["complete"]
    assert found.record()["bytes"] < 1 << 24
    assert read[0]["source"] == name


def test_bombs_that_give_no_text_are_refused_at_once(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(DataError, match="is no text"):
        list(documents(bomb(tmp_path / "zeros.txt.gz", b"\0", 4)))
    with pytest.raises(DataError, match="not a readable parquet file: unpacked, it does not begin as one"):
        list(documents(bomb(tmp_path / "zeros.parquet.gz", b"\0", 4)))
    with pytest.raises(DataError, match="line 1 is longer than"):
        list(documents(bomb(tmp_path / "row.jsonl.gz", b"a", 1, head=b'{"text": "')))
    assert time.monotonic() - started < 10


def test_pieces_do_not_depend_on_how_a_text_comes(tmp_path: Path) -> None:
    """A .txt file read in parts gives the tokens of the same text in one string."""
    chooser = random.Random(1)
    words = ["fox", "größer", "1,234", "don't", "\n\n", "x" * 70, "the", "\t"]
    text = " ".join(chooser.choice(words) for _ in range(250_000))
    assert len(text) > 2 << 20
    (tmp_path / "long.txt").write_bytes(text.encode())
    reader = train_tokenizer([text[:20_000]], 400)
    found = pack(documents(tmp_path / "long.txt"), reader, 128)
    assert found.sha256 == pack([text], reader, 128).sha256
    few = pack(documents(tmp_path / "long.txt"), reader, 128, max_tokens=128 * 50)
    assert few.ids.tolist() == found.ids[:50].tolist()
