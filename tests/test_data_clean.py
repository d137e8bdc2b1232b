"""Cleaning against planted faults: what went in dirty is known by hand, so is every count of the manifest."""

from __future__ import annotations

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

import kronfold.data.clean as clean_room
from kronfold.base.errors import CheckpointError, DataError, InputError, OutputError, RecipeError
from kronfold.data import clean_settings
from kronfold.data.clean import clean
from kronfold.data.clean_blocks import has_html, short_study_key
from kronfold.data.shards import spool
from kronfold.data.sources import documents

STOP_WORDS = ("the", "of", "and", "to", "with", "that", "be", "have")


def prose(seed: int, sentences: int = 9) -> str:
    """Paragraphs of made-up words that every filter keeps: stop words among them, full stops, hardly a repeat."""
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choice("bdfgklmnprstv") + draw.choice("aeiou") for _ in range(draw.randint(2, 3)))

    def sentence() -> str:
        words = [draw.choice(STOP_WORDS) if draw.random() < 0.2 else word() for _ in range(14)]
        return " ".join(words).capitalize() + "."

    told = [sentence() for _ in range(sentences)]
    return "\n\n".join(" ".join(told[i : i + 3]) for i in range(0, sentences, 3))


CLEAN = [prose(seed) for seed in range(1, 13)]
MOJIBAKE = prose(50) + " A cafÃ© stood there."
REPAIRED = prose(50) + " A café stood there."
HTML_LINES = prose(51) + "\n<div class='ad'>Buy now</div>\nClick <a href=\"x\">here</a>\n5 < 6 and <unk> stay."
WITHOUT_HTML = prose(51) + "\n5 < 6 and <unk> stay."
ONLY_HTML = "<p>nothing</p>\n<br/>"
SHORT = prose(60, sentences=3)  # 42 words; Gopher's quality rules ask for 50
REPEATS = "\n".join(["The same line of the list and that is all there is to be seen with it."] * 12)
COOKIES = prose(52) + "\nThis site uses cookies and has a privacy policy."
NEAR = " ".join([*CLEAN[3].split(" ")[:40], "altered", *CLEAN[3].split(" ")[41:]])  # one word of 120
SAME_KEY = CLEAN[4].replace(". ", "; ", 1)  # differs in punctuation only


def dirty() -> list[str]:
    """12 clean documents, 8 faults of all kinds, and repeats of clean ones."""
    return [*CLEAN, MOJIBAKE, HTML_LINES, ONLY_HTML, SHORT, REPEATS, COOKIES, "   ", CLEAN[0], CLEAN[0], NEAR, SAME_KEY]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def cleaned(tmp_path_factory):
    """(manifest, output directory) of the dirty documents under the default filters, in several shards."""
    place = tmp_path_factory.mktemp("clean")
    source = write(place / "web.jsonl", dirty())
    return clean(source, place / "out", shard_megabytes=0.004), place / "out"


def by_filter(manifest: dict) -> dict[str, dict]:
    return {entry["filter"]: entry for entry in manifest["filters"]}


def test_exactly_the_planted_faults_go(cleaned):
    manifest, output = cleaned
    kept = list(documents(output))
    near = {CLEAN[3], NEAR}
    assert len(near & set(kept)) == 1  # of a near-duplicate cluster one stays, whichever
    expected = [*CLEAN[:3], *CLEAN[4:], REPAIRED, WITHOUT_HTML, prose(52)]
    assert [text for text in kept if text not in near] == expected
    assert manifest["output"]["documents"] == len(kept) == 15
    assert manifest["input"]["shards"] > 2


def test_counts_of_the_manifest_are_the_hand_counts(cleaned):
    manifest, output = cleaned
    found = by_filter(manifest)
    dropped = {name: entry["documents_in"] - entry["documents_out"] for name, entry in found.items()}
    assert dropped == {
        "unicode": 0, "html": 1, "boilerplate": 0, "repetition": 1, "quality": 1, "empty": 0,
        "exact": 2, "key": 1, "minhash": 1,
    }  # fmt: skip
    assert found["unicode"]["documents_changed"] == 1
    assert found["html"]["lines_dropped"] == {"html": 4}
    assert found["html"]["documents_dropped_for"] == {"only_html": 1}
    assert found["boilerplate"]["lines_dropped"] == {"policy": 1}
    assert found["quality"]["documents_dropped_for"] == {"gopher_short_doc": 1}
    assert manifest["input"]["documents"] == len(dirty()) - 1
    assert manifest["input"]["blank"] == 1
    assert manifest["input"]["characters"] == sum(len(text) for text in dirty() if text.strip())
    assert manifest["input"]["words"] == sum(len(text.split()) for text in dirty())
    assert manifest["output"]["words"] == sum(len(text.split()) for text in documents(output))
    for before, after in zip(manifest["filters"], manifest["filters"][1:], strict=False):
        for unit in ("documents", "characters", "words"):
            assert after[f"{unit}_in"] == before[f"{unit}_out"] <= before[f"{unit}_in"]


def test_examples_show_what_went(cleaned):
    found = by_filter(cleaned[0])
    assert [row["text"] for row in found["html"]["examples"]] == [
        "<div class='ad'>Buy now</div>", 'Click <a href="x">here</a>', "<p>nothing</p> <br/>",
    ]  # fmt: skip
    assert [row["id"] for row in found["exact"]["examples"]] == ["19", "20"]
    assert found["quality"]["examples"] == [{"id": "15", "text": SHORT[:159] + "…"}]
    assert found["minhash"]["examples"][0]["id"] in ("3", "21")


def test_hashes_and_header_of_the_manifest(cleaned):
    import hashlib

    manifest, output = cleaned
    assert json.loads((output / "manifest.json").read_text()) == manifest
    for entry in manifest["output"]["files"]:
        assert hashlib.sha256((output / entry["name"]).read_bytes()).hexdigest() == entry["sha256"]
    assert manifest["seed"] == 0
    assert manifest["settings"]["filters"] == list(clean_settings.DEFAULT_FILTERS)
    assert {"datatrove", "ftfy", "kronfold"} <= set(manifest["versions"])
    assert not list(output.parent.glob("*.partial"))


def test_two_workers_and_a_resumed_run_give_the_same_bytes(tmp_path, monkeypatch):
    source = write(tmp_path / "web.jsonl", dirty())
    chosen = {"filters": ["html", "exact"], "shard_megabytes": 0.004}
    one = clean(source, tmp_path / "one", **chosen)
    two = clean(source, tmp_path / "two", workers=2, **chosen)
    assert one["output"] == two["output"]
    assert one["filters"] == two["filters"]

    from datatrove.executor.local import LocalPipelineExecutor

    real = LocalPipelineExecutor._run_for_rank

    def fails_late(self, rank, *rest):
        if "exact-drop" in str(self.logging_dir.path) and rank == 2:
            raise RuntimeError("cut off")
        return real(self, rank, *rest)

    monkeypatch.setattr(LocalPipelineExecutor, "_run_for_rank", fails_late)
    with pytest.raises(RuntimeError, match="cut off"):
        clean(source, tmp_path / "three", **chosen)
    monkeypatch.undo()
    assert not (tmp_path / "three").exists()
    with pytest.raises(OutputError, match="unfinished run"):
        clean(source, tmp_path / "three", **chosen)
    with pytest.raises(CheckpointError, match=r"other options \(filters\)"):
        clean(source, tmp_path / "three", resume=True, **{**chosen, "filters": ["exact"]})
    resumed = clean(source, tmp_path / "three", resume=True, **chosen)
    assert resumed["output"] == one["output"]
    assert resumed["filters"] == one["filters"]
    assert not list(tmp_path.glob("*.partial"))


def test_clean_text_stays_as_it_is(cleaned, tmp_path):
    first, output = cleaned
    again = clean(output, tmp_path / "again", format="parquet")
    assert list(documents(tmp_path / "again")) == list(documents(output))
    assert all(entry["documents_in"] == entry["documents_out"] for entry in again["filters"])
    assert again["input"]["words"] == again["output"]["words"] == first["output"]["words"]
    assert [file["name"] for file in again["output"]["files"]] == ["00000.parquet"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("<p>text</p>", True),
        ("end of it</div>", True),
        ("a <BR/> b", True),
        ("<img src=x alt='a > b'>", True),
        ("<!-- note -->", True),
        ("<!DOCTYPE html>", True),
        ("if a < b and b > c then", False),
        ("the <unk> token", False),
        ("List<String> of x", False),
        ("I <3 you, a<b", False),
        ("an unfinished <div class=", False),
        ("x &lt;p&gt; y", False),
    ],
)
def test_html_lines(line, expected):
    assert has_html(line) is expected


def test_short_study_key_by_hand():
    from datatrove.data import Document

    def key(text):
        return short_study_key(Document(text=text, id="0"))

    import hashlib

    text = "One, two; three four five six (seven) eight nine!"
    ends = hashlib.md5(b"One two three four six seven eight nine").hexdigest()
    assert key(text) == f"{len('Onetwothreefourfivesixseveneightnine')} {ends}"
    assert key(text) == key("One two three four - five six seven, eight nine")  # punctuation does not count
    assert key(text) == key(text.replace("five", "FIVE"))  # same length, the middle is not looked at
    assert key(text) != key(text.replace("five", "fifth"))  # another length
    assert key(text) != key(text.replace("nine", "mine"))  # another end


def test_first_of_exact_duplicates_stays_across_shards(tmp_path):
    texts = [CLEAN[5], CLEAN[1], CLEAN[2], CLEAN[1], CLEAN[0], CLEAN[2], CLEAN[3]]
    clean(write(tmp_path / "in.jsonl", texts), tmp_path / "out", filters=["exact"], shard_megabytes=0.001)
    assert list(documents(tmp_path / "out")) == [CLEAN[5], CLEAN[1], CLEAN[2], CLEAN[0], CLEAN[3]]
    rows = [
        json.loads(line)
        for file in sorted((tmp_path / "out").glob("*.gz"))
        for line in gzip.decompress(file.read_bytes()).splitlines()
    ]
    assert [row["id"] for row in rows] == ["0", "1", "2", "4", "6"]


def test_shards_follow_the_source_only(tmp_path):
    texts = [*CLEAN, "\ud800 lone", "  "]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = spool(path, tmp_path / "shards", 2000)
    assert found["documents"] == 13
    assert found["blank"] == 1
    assert found["shards"] == len(list((tmp_path / "shards").glob("*.parquet"))) > 3
    read = list(documents(tmp_path / "shards"))
    assert read == [*CLEAN, "\ufffd lone"]


def test_options_reach_datatrove(tmp_path):
    source = write(tmp_path / "in.jsonl", [*CLEAN[:3], SHORT])
    settings = tmp_path / "s.yaml"
    settings.write_text("filters: [quality]\noptions: {quality: {min_doc_words: 3, min_stop_words: null}}\n")
    found = clean(source, tmp_path / "out", settings)
    assert found["output"]["documents"] == 4
    assert found["settings"]["options"] == {"quality": {"min_doc_words": 3, "min_stop_words": None}}


def test_language_filter_asks_its_model(tmp_path, monkeypatch):
    """The model cannot be had offline: a stand-in that knows one foreign word shows that its verdict is obeyed."""
    from datatrove.utils.lid import FT176LID

    def predict(self, doc):
        scores = {"en": 0.1, "de": 0.9} if "Straße" in doc.text else {"en": 0.9, "de": 0.1}
        return max(scores.items(), key=lambda pair: pair[1]), {name: scores[name] for name in self.languages}

    monkeypatch.setattr(FT176LID, "predict", predict)
    monkeypatch.setattr("datatrove.pipeline.base.check_required_dependencies", lambda *_: None)
    monkeypatch.setattr(clean_settings, "find", lambda name: object())
    source = write(tmp_path / "in.jsonl", [CLEAN[0], "Auf der Straße", CLEAN[1]])
    english = clean(source, tmp_path / "en", filters=["language"])
    assert list(documents(tmp_path / "en")) == CLEAN[:2]
    assert by_filter(english)["language"]["examples"] == [{"id": "1", "text": "Auf der Straße"}]
    clean(source, tmp_path / "de", filters=["language"], options={"language": {"languages": ["de"]}})
    assert list(documents(tmp_path / "de")) == ["Auf der Straße"]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"filters": ["htlm"]}, InputError, "Did you mean 'html'"),
        ({"filters": ["html", "html"]}, InputError, "named twice"),
        ({"filters": []}, RecipeError, "at least 1"),
        ({"filters": ["html"], "options": {"quality": {}}}, InputError, "not among the filters"),
        ({"options": {"quality": {"min_doc_word": 3}}}, InputError, "Did you mean 'min_doc_words'"),
        ({"options": {"html": {"x": 3}}}, InputError, "takes no options"),
        ({"options": {"quality": {"language": "de"}}}, InputError, "Unknown option 'language'"),
        ({"format": "csv"}, RecipeError, "'jsonl' or 'parquet'"),
        ({"seeds": 3}, RecipeError, "Did you mean 'seed'"),
        ({"workers": 0}, RecipeError, "workers"),
        ({"filters": ["language"]}, InputError, "pip install fasttext-numpy2-wheel"),
        ({"executor": "slurm"}, InputError, "sbatch"),
        ({"executor": "ray"}, InputError, "pip install 'ray"),
        ({"cluster": {"time": "1:00:00"}}, InputError, "slurm and ray"),
        ({"text_column": "body"}, DataError, "Columns found: text"),
    ],
)
def test_bad_settings_stop_before_any_work(tmp_path, monkeypatch, changes, error, words):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr(clean_settings, "find", lambda name: None if name == "fasttext" else object())
    source = write(tmp_path / "in.jsonl", CLEAN)
    with pytest.raises(error, match=words):
        clean(source, tmp_path / "out", **changes)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_missing_packages_name_the_pip_command(tmp_path, monkeypatch):
    monkeypatch.setattr(clean_settings, "find", lambda name: None)
    with pytest.raises(InputError, match=r"needs datatrove and ftfy. Install with: pip install 'kronfold\[data\]'"):
        clean(write(tmp_path / "in.jsonl", CLEAN), tmp_path / "out")


def test_output_taken_source_missing_and_nothing_left(tmp_path):
    source = write(tmp_path / "in.jsonl", [SHORT, SHORT + " Twice."])
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(OutputError, match="exists already"):
        clean(source, tmp_path / "taken")
    with pytest.raises(DataError, match="does not exist"):
        clean(tmp_path / "none.jsonl", tmp_path / "out")
    with pytest.raises(DataError, match="holds no text"):
        clean(write(tmp_path / "blank.jsonl", ["", " "]), tmp_path / "out")
    with pytest.raises(DataError, match=r"quality 2 \(reasons: gopher_short_doc\)"):
        clean(source, tmp_path / "out", filters=["quality"])
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*.partial"))


def cut_off(source, output, monkeypatch, **chosen):
    """A cleaning that stopped in its last stage."""
    from datatrove.executor.local import LocalPipelineExecutor

    real = LocalPipelineExecutor._run_for_rank

    def fails(self, rank, *rest):
        if "exact-drop" in str(self.logging_dir.path):
            raise RuntimeError("cut off")
        return real(self, rank, *rest)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut off"):
        patch.setattr(LocalPipelineExecutor, "_run_for_rank", fails)
        clean(source, output, **chosen)


@pytest.mark.parametrize("lost", ["shards/00000.parquet", "kept-0/00000.parquet"])
def test_a_damaged_intermediate_file_is_made_again(tmp_path, monkeypatch, lost):
    source = write(tmp_path / "web.jsonl", dirty())
    chosen = {"filters": ["html", "exact"], "shard_megabytes": 0.004}
    whole = clean(source, tmp_path / "whole", **chosen)
    cut_off(source, tmp_path / "out", monkeypatch, **chosen)
    torn = tmp_path / "out.partial" / lost
    content = torn.read_bytes()
    torn.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    assert clean(source, tmp_path / "out", resume=True, **chosen)["output"] == whole["output"]


def test_counts_that_do_not_add_up_to_the_files_are_refused(tmp_path, monkeypatch):
    source = write(tmp_path / "web.jsonl", dirty())
    chosen = {"filters": ["html", "exact"], "shard_megabytes": 0.004}
    real = clean_room._filters

    def miscounts(*arguments):
        found = real(*arguments)
        found[-1]["documents_out"] += 1
        return found

    monkeypatch.setattr(clean_room, "_filters", miscounts)
    with pytest.raises(CheckpointError, match="its shards hold 1. documents and its counts say"):
        clean(source, tmp_path / "out", **chosen)
    assert not (tmp_path / "out").exists()


def test_another_text_of_the_same_name_is_not_resumed(tmp_path, monkeypatch):
    source = write(tmp_path / "web.jsonl", dirty())
    chosen = {"filters": ["html", "exact"], "shard_megabytes": 0.004}
    cut_off(source, tmp_path / "out", monkeypatch, **chosen)
    write(source, [text.replace("a", "e", 1) for text in dirty()])
    with pytest.raises(CheckpointError, match=r"other options \(content\)"):
        clean(source, tmp_path / "out", resume=True, **chosen)
    with pytest.raises(OutputError, match="lies in .* read as a whole"):
        clean(tmp_path, tmp_path / "cleaned", **chosen)


def test_slurm_gets_a_chain_of_arrays_and_resume_collects(tmp_path, monkeypatch):
    """sbatch is a stand-in that notes the scripts; run by hand, task by task, they give what local running gives."""
    calls = tmp_path / "calls"
    calls.mkdir()
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    sbatch = bin_ / "sbatch"
    sbatch.write_text(
        f'#!/bin/bash\nn=$(ls {calls} | wc -l)\necho "$@" | sed "s# /[^ ]*##g" > {calls}/$n\n'
        f"cat ${{@: -1}} >> {calls}/$n\necho Submitted batch job $((1000 + n))\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_}:/usr/bin:/bin")
    source = write(tmp_path / "web.jsonl", dirty())
    chosen = {"filters": ["html", "exact"], "shard_megabytes": 0.004}
    local = clean(source, tmp_path / "local", **chosen)
    cluster = {**chosen, "executor": "slurm", "cluster": {"partition": "cpu", "time": "1:00:00"}, "workers": 2}
    answer = clean(source, tmp_path / "out", **cluster)
    shards = local["input"]["shards"]
    assert answer["submitted"]
    assert answer["tasks"] == {"filters": shards, "exact-find": 1, "exact-drop": shards}
    scripts = [(calls / str(n)).read_text() for n in range(len(list(calls.iterdir())))]
    jobs = [text for text in scripts if "launch_pickled_pipeline" in text]
    assert [f"--array=0-{n - 1}%{min(2, n)}" in text for text, n in zip(jobs, (shards, 1, shards), strict=True)] == [
        True, True, True,
    ]  # fmt: skip
    assert "--dependency" not in jobs[0].splitlines()[0]
    assert all("--dependency=afterok:" in text.splitlines()[0] for text in jobs[1:])
    with pytest.raises(DataError, match="tasks missing: filters"):
        clean(source, tmp_path / "out", resume=True, **cluster)

    import dill

    monkeypatch.setattr("datatrove.executor.slurm.expand_slurm_nodelist", lambda names: [names])
    monkeypatch.setenv("SLURM_NODELIST", "here")
    for stage, tasks in answer["tasks"].items():
        pickled = (tmp_path / "out.partial" / "logs" / stage / "executor.pik").read_bytes()
        for rank in range(tasks):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            dill.loads(pickled).run()
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    done = clean(source, tmp_path / "out", resume=True, **cluster)
    assert done["output"] == local["output"]
    assert done["executor"] == "slurm"


@pytest.mark.parametrize("options", [{}, {"remove_citations": True}])
def test_boilerplate_keeps_the_white_space_of_what_stays(tmp_path, options):
    lines = [" = Title = ", "", f" {CLEAN[0]} ", "\tWe use cookies here.", f"    {CLEAN[1]} [1] ", "", " end [2]"]
    source = write(tmp_path / "in.jsonl", ["\n".join(lines)])
    clean(source, tmp_path / "out", filters=["boilerplate"], options={"boilerplate": options} if options else None)
    if options:
        lines = [line.replace("[1]", "").replace("[2]", "") for line in lines]
    (text,) = documents(tmp_path / "out")
    assert text == "\n".join([*lines[:3], *lines[4:]])


def test_blank_lines_of_white_space_are_no_repeats(tmp_path):
    lines = [f" {line} " for line in CLEAN]
    source = write(tmp_path / "in.jsonl", ["\n \n".join(lines), "\n \n".join(lines[:1] * 6)])
    clean(source, tmp_path / "out", filters=["repetition"])
    assert list(documents(tmp_path / "out")) == ["\n \n".join(lines)]


def test_command_line(tmp_path, call):
    source = write(tmp_path / "in.jsonl", [*CLEAN[:4], CLEAN[0]])
    code, out, _ = call("data", "clean", source, "-o", tmp_path / "a", "--filters", "exact", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "a" / "manifest.json").read_text())
    code, out, err = call("data", "clean", source, "-o", tmp_path / "b", "--filters", "exact", "--seed", "3")
    assert code == 0
    assert "4 of 5 documents" in out
    assert [line for line in err.splitlines() if line] == [
        "clean: read ...", "clean: filters ...", "clean: exact-find ...", "clean: exact-drop ...",
    ]  # fmt: skip
    code, out, err = call("data", "clean", source, "-o", tmp_path / "c", "--filters", "exakt")
    assert (code, out) == (2, "")
    assert "Did you mean 'exact'" in err
