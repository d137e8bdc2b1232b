"""benchmarks/: every script runs on tiny sizes, results carry their header, and none replaces another's unasked."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
HEADER = {"schema", "schema_version", "created", "seed", "versions", "machine", "benchmark", "command", "revision",
          "threads", "quick", "rates", "settings"}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench")


@pytest.fixture
def toy(bench):
    """A benchmark that takes no time; `toy.calls` counts what was measured."""
    calls = []

    def measure(run):
        rows = run.earlier.get("rows", {})
        for name in run.options.rows.split(","):
            if name not in rows:
                calls.append(name)
                rows[name] = run.options.size
                run.save({"rows": rows})
        return {"figures": [bench.figure("size", run.options.size, 2.0)], "rows": rows}

    def add_options(made):
        made.add_argument("--size", type=int, default=3)
        made.add_argument("--rows", default="a")
        made.add_argument("--text")

    def made(**changes):
        return bench.Benchmark("toy", "A toy.", add_options, measure, quick={"size": 1}, **changes)

    made.calls = calls
    return made


def changed(path: Path, **values) -> bytes:
    """Write other values into a result file; returns its bytes."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return path.read_bytes()


def test_quick_all_writes_every_result(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("KRONFOLD_CACHE", str(tmp_path / "cache"))
    assert bench.main(["--quick", "all", "--threads", "1", "--seed", "3", "-o", str(tmp_path / "out")]) == 0
    assert sorted(path.stem for path in (tmp_path / "out").iterdir()) == sorted(bench.ALL)
    for path in (tmp_path / "out").iterdir():
        found = json.loads(path.read_text())
        assert set(found) > HEADER, path.name
        assert (found["benchmark"], found["schema"], found["seed"]) == (path.stem, "kronfold/benchmark", 3)
        assert found["quick"] is True
        assert found["threads"] == 1
        assert found["command"].startswith(f"python benchmarks/{path.stem}.py --device cpu --seed 3 --quick")
        assert str(tmp_path) not in path.read_text()
        assert found["machine"]["processor"]
        assert found["machine"]["cores"] >= 1
        assert found["figures"]
        for row in found["figures"]:
            assert row["what"]
            assert isinstance(row["value"], int | float)


def test_all_names_every_script(bench):
    scripts = {path.stem for path in BENCHMARKS.glob("*.py")}
    assert scripts == {*bench.ALL, "bench", "draw"}
    for path in BENCHMARKS.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 450


def test_pages_name_scripts_and_results_that_exist():
    for page in (BENCHMARKS / "README.md", *sorted((BENCHMARKS.parent / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"benchmarks/(\w+\.py)", text):
            assert (BENCHMARKS / name).is_file(), f"{page.name}: {name}"
    for page in (BENCHMARKS / "README.md", BENCHMARKS / "answered.md"):
        for link in re.findall(r"\]\((results/[^)]+)\)", page.read_text(encoding="utf-8")):
            assert (BENCHMARKS / link).is_file(), f"{page.name}: {link}"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"machine": {"machine": "x86_64", "system": "Linux", "cores": 2}}, "another machine"),  # as 0.3 wrote it
        ({"machine": {"system": "Linux", "processor": "Another", "cores": 2}}, "another machine: Linux, Another, 2"),
        ({"benchmark": "layers"}, "no result of this benchmark"),
        ({"benchmark": None}, "no result of this benchmark"),
    ],
)
def test_a_result_of_another_is_not_replaced_unasked(toy, tmp_path, capsys, changes, fault):
    path = tmp_path / "toy.json"
    assert toy().main(["-o", str(path)]) == 0
    before = changed(path, **changes)
    assert toy().main(["-o", str(path), "--size", "5"]) == 2
    shown = capsys.readouterr().err
    assert fault in shown
    assert "--overwrite" in shown
    assert path.read_bytes() == before
    assert toy.calls == ["a"]  # refused before anything was measured
    assert toy().main(["-o", str(path), "--size", "5", "--overwrite"]) == 0
    assert json.loads(path.read_text())["rows"] == {"a": 5}


def test_other_cores_are_another_machine(toy, bench, tmp_path):
    path = tmp_path / "toy.json"
    assert toy().main(["-o", str(path)]) == 0
    here = json.loads(path.read_text())["machine"]
    changed(path, machine={**here, "cores": here["cores"] + 1})
    assert toy().main(["-o", str(path)]) == 2
    changed(path, machine={**here, "memory_gb": 1})  # memory may differ by what the system keeps for itself
    assert toy().main(["-o", str(path)]) == 0


@pytest.mark.parametrize("content", [b"", b"not JSON", b"[1]", b"\xff\xfe"])
def test_a_file_that_is_no_result_is_not_replaced_unasked(toy, tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    assert toy().main(["-o", str(path)]) == 2
    assert path.read_bytes() == content


def test_a_directory_is_never_replaced(toy, tmp_path):
    (tmp_path / "here").mkdir()
    assert toy().main(["-o", str(tmp_path / "here"), "--overwrite"]) == 2
    assert (tmp_path / "here").is_dir()


def test_the_same_machine_measures_again(toy, tmp_path):
    path = tmp_path / "toy.json"
    assert toy().main(["-o", str(path)]) == 0
    assert toy().main(["-o", str(path), "--size", "7"]) == 0
    assert json.loads(path.read_text())["rows"] == {"a": 7}


def test_a_quick_run_does_not_replace_a_full_one(toy, tmp_path, capsys):
    path = tmp_path / "toy.json"
    assert toy().main(["-o", str(path), "--quick"]) == 0
    assert json.loads(path.read_text())["rows"] == {"a": 1}  # quick sets the size
    assert toy().main(["-o", str(path)]) == 0  # a full one replaces a quick one
    assert toy().main(["-o", str(path), "--quick"]) == 2
    assert "full measurement" in capsys.readouterr().err
    assert json.loads(path.read_text())["rows"] == {"a": 3}


def test_rows_are_taken_over_only_from_the_same_settings(toy, tmp_path, capsys):
    path, going_on = tmp_path / "toy.json", toy(continues=True, selects=("rows",))
    assert going_on.main(["-o", str(path), "--rows", "a,b"]) == 0
    assert going_on.main(["-o", str(path), "--rows", "b,c"]) == 0
    assert toy.calls == ["a", "b", "c"]
    assert list(json.loads(path.read_text())["rows"]) == ["a", "b", "c"]
    for other, named in ((["--size", "4"], "size"), (["--seed", "1"], "seed")):
        assert going_on.main(["-o", str(path), "--rows", "d", *other]) == 2
        assert f"other settings ({named})" in capsys.readouterr().err
    assert toy.calls == ["a", "b", "c"]


def test_paths_of_this_machine_stay_out_of_the_file(toy, tmp_path):
    path = tmp_path / "toy.json"
    assert toy().main(["-o", str(path), "--text", f"valid={tmp_path}/valid.txt"]) == 0
    assert str(tmp_path) not in path.read_text()
    found = json.loads(path.read_text())
    assert found["settings"]["text"] == "valid=valid.txt"
    assert "valid.txt" in found["command"]


def test_jobs_take_turns_and_warm_up_is_not_counted(bench, monkeypatch):
    clock, order = [0.0], []

    def job(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds if order.count(name) > 1 else 100.0  # the first call is slow

        return run

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    found = bench.interleaved({"a": job("a", 1.0), "b": job("b", 3.0)}, rounds=3)
    assert order == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert found == {"a": [1.0] * 3, "b": [3.0] * 3}
    assert bench.medians({"a": [1.0, 9.0, 2.0]}) == {"a": 2.0}


def test_short_jobs_are_repeated_within_a_turn(bench, monkeypatch):
    clock, calls = [0.0], []

    def job():
        calls.append(clock[0])
        clock[0] += 2**-11

    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])
    found = bench.interleaved({"a": job}, rounds=2)
    assert found["a"] == [2**-11, 2**-11]
    assert len(calls) == 1 + 2 + 2 * 5  # warm-up, how short it is, two turns of at least 2 ms


@pytest.mark.parametrize(
    ("value", "bar", "at_most", "ratio"), [(2.0, 1.0, False, 2.0), (2.0, 1.0, True, 0.5), (0.0, 1.0, True, 1e12)]
)
def test_a_ratio_of_one_or_more_meets_the_bar_from_either_side(bench, value, bar, at_most, ratio):
    assert bench.figure("x", value, bar, at_most)["ratio_to_bar"] == ratio


def test_a_job_in_a_process_of_its_own(bench, tmp_path, monkeypatch):
    """It gets the options and the threads of the run; what else it prints does no harm; its failure is ours."""
    (tmp_path / "apart.py").write_text(
        f"""import os, sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import torch
from bench import Benchmark

def job(options, word):
    print("something else")
    if word == "bad":
        raise SystemExit(3)
    return {{"pid": os.getpid(), "word": word, "seed": options.seed, "threads": torch.get_num_threads()}}

def measure(run):
    return {{"figures": [], "found": run.child("job", "a word"), "bad": None if run.options.quick else run.child("job", "bad")}}

BENCHMARK = Benchmark("apart", "", lambda made: None, measure, children={{"job": job}})
if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
"""  # noqa: E501
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(bench, "HERE", tmp_path)
    benchmark, output = importlib.import_module("apart").BENCHMARK, tmp_path / "apart.json"
    assert benchmark.main(["--quick", "--seed", "5", "--threads", "1", "-o", str(output)]) == 0
    found = json.loads(output.read_text())["found"]
    assert found["pid"] != importlib.import_module("os").getpid()
    assert (found["word"], found["seed"], found["threads"]) == ("a word", 5, 1)
    assert benchmark.main(["--seed", "5", "--threads", "1"]) == 1


@pytest.mark.parametrize("words", [["--device", "cuda"], ["--threads", "0"], ["--rounds", "0"], ["--rounds", "-1"]])
def test_options_that_cannot_be_used(toy, words, capsys):
    if words == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert toy().main(words) == 2
    assert words[0] in capsys.readouterr().err
    assert toy.calls == []
