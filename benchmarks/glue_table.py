"""Compressed models on GLUE tasks, fine-tuned on the labels alone and with the fine-tuned teacher beside them.

    python benchmarks/glue_table.py --teacher DIR --student NAME=DIR [--student ...] \\
        --task cola=FOLDER --task sst2=FOLDER --work DIR -o result.json

A task's FOLDER holds train.tsv and dev.tsv. The teacher is fine-tuned first; the classifier of its best seed teaches
the students of the second kind. All rows share seeds, epochs and learning rate. A row that is in the result file
already is not worked out again, and an unfinished one goes on after its last finished seed. Prints a Markdown table:
mean and standard deviation over the seeds of the best epoch by the dev set.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from kronfold.base.files import write_json
from kronfold.base.results import machine, versions
from kronfold.distill import ObjectiveConfig
from kronfold.pipelines.finetune import FineTuneOptions, finetune
from kronfold.train.classify import LABELS_ONLY, FineTuneConfig

TITLES = {"cola": "CoLA, Matthews", "sst2": "SST-2, accuracy", "stsb": "STS-B, Pearson"}
KEPT = ("held_parameters", "seeds", "summary", "summary_last", "saved_seed", "seconds", "data", "settings", "teacher")


def run_row(
    name: str, model: str, task: str, folder: Path, teacher: Path | None, arguments: argparse.Namespace
) -> dict[str, Any]:
    """The result document of one fine-tuning, without what is the same in all of them."""
    place = Path(arguments.work) / f"{task}-{name}{'-kd' if teacher else ''}"
    objective = LABELS_ONLY
    if teacher:
        weights = {"kl": arguments.kl, "ce": arguments.ce, "temperature": arguments.temperature}
        objective = ObjectiveConfig(**weights, method=arguments.method)
    options = FineTuneOptions(
        model=model,
        task=task,
        train_file=str(folder / "train.tsv"),
        dev_files=(str(folder / "dev.tsv"),),
        teacher=str(teacher) if teacher else None,
        settings=FineTuneConfig(
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            objective=objective,
        ),
        seeds=tuple(int(seed) for seed in arguments.seeds.split(",")),
    )
    begun = place.with_name(place.name + ".partial") / "steps.json"
    if (place / "results.json").is_file():  # finished, but not written down in the result file
        document = json.loads((place / "results.json").read_text(encoding="utf-8"))
    else:
        document = finetune(options, place, name=name, resume=begun.is_file(), report=reporter(place.name))
    return {key: document[key] for key in KEPT}


def reporter(row: str) -> Callable[[str, int, int], None]:
    """Progress on stderr, a line every hundred steps."""

    def report(what: str, done: int, total: int) -> None:
        if done % 100 == 0 or done == total:
            print(f"{row}: {what} {done}/{total}", file=sys.stderr, flush=True)

    return report


def markdown(rows: Mapping[str, Any], tasks: list[str]) -> str:
    """One line per model and kind of training; mean ± standard deviation, times 100."""
    titles = [TITLES.get(task, task) for task in tasks]
    lines = [
        "| model | held parameters | trained on | " + " | ".join(titles) + " |",
        "|---|---:|---|" + "---:|" * len(tasks),
    ]
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows.values():
        kinds.setdefault((row["model"], row["trained_on"]), {})[row["task"]] = row
    for (model, kind), found in kinds.items():
        held = next(iter(found.values()))["held_parameters"]
        lines.append(f"| {model} | {held:,} | {kind} | " + " | ".join(cell(found.get(task)) for task in tasks) + " |")
    return "\n".join(lines)


def cell(row: Mapping[str, Any] | None) -> str:
    """The first metric of a row."""
    if row is None:
        return "–"
    first = next(iter(row["summary"].values()))
    return f"{100 * first['mean']:.1f}" + ("" if first["std"] is None else f" ± {100 * first['std']:.1f}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, metavar="DIR", help="the dense language model")
    parser.add_argument("--student", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--task", action="append", required=True, metavar="TASK=FOLDER")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="default suits models of some 7M parameters")
    parser.add_argument("--method", default="kd")
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--ce", type=float, default=1.0)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--work", required=True, help="where the classifiers go")
    parser.add_argument("-o", "--output", required=True)
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    students = dict(entry.split("=", 1) for entry in arguments.student)
    tasks = {name: Path(folder) for name, folder in (entry.split("=", 1) for entry in arguments.task)}
    output = Path(arguments.output)
    document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"rows": {}}
    named = {name: Path(place).name for name, place in {"teacher": arguments.teacher, **students}.items()}
    shared = {
        key: value for key, value in vars(arguments).items() if key not in ("work", "output", "teacher", "student")
    }
    shared |= {"models": named, "task": sorted(tasks)}
    fixed = {key: value for key, value in shared.items() if key not in ("models", "task")}
    if any(document.get("arguments", shared)[key] != value for key, value in fixed.items()):
        sys.exit(f"{output} was made with other settings: {document['arguments']}. Give another -o and --work.")
    document |= {
        "benchmark": "glue_table",
        "arguments": shared,
        "versions": versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    for task, folder in tasks.items():
        taught_by = Path(arguments.work) / f"{task}-teacher"
        wanted: list[tuple[str, str, Path | None]] = [("teacher", arguments.teacher, None)]
        wanted += [(name, place, taught) for name, place in students.items() for taught in (None, taught_by)]
        for name, model, taught in wanted:
            kind = f"labels and teacher ({arguments.method})" if taught else "labels"
            key = f"{task}, {name}, {kind}"
            if key not in document["rows"]:
                found = run_row(name, model, task, folder, taught, arguments)
                document["rows"][key] = {"model": name, "task": task, "trained_on": kind, **found}
                write_json(output, document)
    print(markdown(document["rows"], list(tasks)))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
