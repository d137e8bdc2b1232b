"""Compressed models on GLUE tasks, fine-tuned on the labels alone and with the fine-tuned teacher beside them.

    python benchmarks/glue_table.py --teacher DIR --student NAME=DIR [--student ...] \\
        --task cola=FOLDER --task sst2=FOLDER --work DIR -o glue_table.json

A task's FOLDER holds train.tsv and dev.tsv. The teacher is fine-tuned first (`kronfold finetune`); the classifier of
its best seed teaches the students of the second kind. All rows share seeds, epochs and learning rate. A row that is in
the result file already is not worked out again, and an unfinished one goes on after its last finished seed. Prints a
Markdown table: mean and standard deviation over the seeds of the best epoch by the dev set.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kronfold as kf
from bench import Benchmark, Run, figure
from kronfold.assets import teacher_path
from kronfold.base.errors import InputError, KronfoldError
from kronfold.cli.main import main as kronfold
from kronfold.models.load import load_model, load_tokenizer

TITLES = {"cola": "CoLA, Matthews", "sst2": "SST-2, accuracy", "stsb": "STS-B, Pearson"}
KEPT = ("held_parameters", "seeds", "summary", "summary_last", "saved_seed", "seconds", "data", "settings", "teacher")


def finetuned(model: str, task: str, folder: Path, teacher: Path | None, place: Path, run: Run) -> dict[str, Any]:
    """The result document of one fine-tuning, without what is the same in all of them."""
    results = place / "results.json"
    if not results.is_file():  # else finished, but not written down in the result file
        options = run.options
        words = ["finetune", model, "--task", task, "-o", str(place), "--device", options.device]
        words += ["--train-file", str(folder / "train.tsv"), "--dev-file", str(folder / "dev.tsv")]
        for name in ("seeds", "epochs", "batch_size", "learning_rate"):
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        if teacher:
            words += ["--teacher", str(teacher), "--method", options.method, "--kl", str(options.kl)]
            words += ["--ce", str(options.ce), "--temperature", str(options.temperature)]
        words += ["--resume"] if place.with_name(place.name + ".partial").is_dir() else []
        with contextlib.redirect_stdout(sys.stderr):
            try:
                kronfold(words)
            except SystemExit as end:
                if end.code:
                    raise KronfoldError(f"kronfold {' '.join(words)} ended with exit code {end.code}.") from None
    document = json.loads(results.read_text(encoding="utf-8"))
    return {key: document[key] for key in KEPT}


def made_up(place: Path) -> tuple[str, dict[str, str], dict[str, Path]]:
    """For --quick: the model in the package, a student of it, and a task of a few sentences."""
    student, folder = place / "student", place / "cola"
    kf.compress(load_model(teacher_path()), "krony-pt").save_pretrained(student)
    load_tokenizer(teacher_path()).save_pretrained(student)
    folder.mkdir()
    pairs = [("The file exists .", 1), ("File the exists not .", 0), ("The option is ignored .", 1), ("Is if .", 0)]
    lines = "".join(f"{sentence}\t{label}\n" for sentence, label in pairs * 2)
    for name in ("train", "dev"):
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + lines, encoding="utf-8")
    return str(teacher_path()), {"student": str(student)}, {"cola": folder}


def pairs_of(entries: list[str], flag: str) -> dict[str, str]:
    """NAME=PLACE entries. Raises InputError."""
    if wrong := [entry for entry in entries if "=" not in entry]:
        raise InputError(f"{flag} {wrong[0]}: give NAME=FOLDER.")
    return dict(entry.split("=", 1) for entry in entries)


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    with tempfile.TemporaryDirectory(prefix="kronfold-glue-") as scratch:
        work = Path(options.work or scratch)
        if options.quick:
            teacher, students, tasks = made_up(Path(scratch))
        elif options.teacher and options.task and options.work:
            teacher, students = options.teacher, pairs_of(options.student, "--student")
            tasks = {name: Path(folder) for name, folder in pairs_of(options.task, "--task").items()}
        else:
            raise InputError("Give --teacher, --task and --work, or --quick.")
        rows: dict[str, Any] = run.earlier.get("rows", {})
        for task, folder in tasks.items():
            taught_by = work / f"{task}-teacher"
            wanted: list[tuple[str, str, Path | None]] = [("teacher", teacher, None)]
            wanted += [(name, place, taught) for name, place in students.items() for taught in (None, taught_by)]
            for name, model, taught in wanted:
                kind = f"labels and teacher ({options.method})" if taught else "labels"
                key = f"{task}, {name}, {kind}"
                if key not in rows:
                    place = work / f"{task}-{name}{'-kd' if taught else ''}"
                    found = finetuned(model, task, folder, taught, place, run)
                    rows[key] = {"model": name, "task": task, "trained_on": kind, **found}
                    run.save({"rows": rows})
    print(markdown(rows, list(tasks)))
    figures = [figure(key, next(iter(row["summary"].values()))["mean"]) for key, row in rows.items()]
    return {"figures": figures, "rows": rows}


def markdown(rows: Mapping[str, Any], tasks: list[str]) -> str:
    """One line per model and kind of training; mean ± standard deviation of the first metric, times 100."""
    titles = [TITLES.get(task, task) for task in tasks]
    lines = ["| model | held parameters | trained on | " + " | ".join(titles) + " |"]
    lines.append("|---|---:|---|" + "---:|" * len(tasks))
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows.values():
        kinds.setdefault((row["model"], row["trained_on"]), {})[row["task"]] = row
    for (model, kind), found in kinds.items():
        cells = []
        for task in tasks:
            first = next(iter(found[task]["summary"].values())) if task in found else None
            spread = "" if first is None or first["std"] is None else f" ± {100 * first['std']:.1f}"
            cells.append("–" if first is None else f"{100 * first['mean']:.1f}{spread}")
        held = next(iter(found.values()))["held_parameters"]
        lines.append(f"| {model} | {held:,} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--teacher", metavar="DIR", help="the dense language model")
    made.add_argument("--student", action="append", default=[], metavar="NAME=DIR")
    made.add_argument("--task", action="append", default=[], metavar="TASK=FOLDER")
    made.add_argument("--seeds", default="0,1,2")
    made.add_argument("--epochs", type=int, default=3)
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--learning-rate", type=float, default=5e-4, help="default suits models of some 7M parameters")
    made.add_argument("--method", default="kd")
    made.add_argument("--kl", type=float, default=1.0)
    made.add_argument("--ce", type=float, default=1.0)
    made.add_argument("--temperature", type=float, default=2.0)
    made.add_argument("--work", metavar="DIR", help="where the classifiers go")


QUICK = {"seeds": "0", "epochs": 1, "batch_size": 8, "work": None}
BENCHMARK = Benchmark(
    "glue_table", __doc__ or "", add_options, measure, QUICK, continues=True, selects=("student", "task", "work")
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
