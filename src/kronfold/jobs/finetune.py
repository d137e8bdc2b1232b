"""Fine-tune a checkpoint on a task of GLUE, over several seeds, with or without a teacher; save the best."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kronfold.base import processes, results
from kronfold.base.errors import DataError, InputError
from kronfold.base.files import explain_write_errors
from kronfold.base.job import Job
from kronfold.data import glue
from kronfold.data.glue import collator, encode_examples, padding_token
from kronfold.distill.objective import Objective
from kronfold.evaluate.glue import answers, predict, score, spread
from kronfold.export.checkpoint import write_model
from kronfold.export.quantizer import attach
from kronfold.models.cost import cost
from kronfold.models.load import load_classifier, load_config, load_tokenizer, on_disk, read_dtype
from kronfold.models.place import read_specs
from kronfold.options.finetune import FineTuneOptions
from kronfold.train.classify import fine_tune
from kronfold.train.trainer import check_objective

RULE = (
    "best epoch of each seed by the score on the dev set (mean of the task's metrics over its dev sets; the earliest "
    "of equals); the model of the best seed by the same score is saved. Scores chosen on a set are a little too good "
    "on it, alike for all models; `last` holds those of the last epoch, which nothing was chosen by."
)
INPUT = (
    "end-of-text token between two texts, none at the end; cut to max_length from the right; padded on the right to "
    "the longest of the batch; answer read at the last real token"
)
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class _Bench:
    """What all seeds share."""

    task: glue.Task
    tokenizer: Any
    pad: int
    max_length: int
    train: list[dict[str, Any]]
    dev: dict[str, tuple[list[dict[str, Any]], list[float]]]  # rows and labels by the name of the dev set

    def measure(self, model: PreTrainedModel) -> tuple[float, dict[str, float]]:
        """The score and every metric on every dev set, named `metric` or `metric_set`."""
        found = {}
        for name, (rows, labels) in self.dev.items():
            said = answers(predict(model, rows, collator(self.pad)), self.task)
            for metric, value in score(self.task.metrics, said, labels).items():
                found[f"{metric}_{name}" if name else metric] = value
        return sum(found.values()) / len(found), found


def finetune(
    options: FineTuneOptions,
    *,
    name: str | None = None,
    report: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Fine-tune by `options`; the best model, its tokenizer and results.json in their output. Returns the document.

    `name`: what the document calls the model. Finished seeds lie in `<output>.partial` until the end; `resume` goes on
    after them. Raises InputError, DataError, CheckpointError, OutputError, all before any training but for a loss that
    is no longer finite.
    """
    task, device = _check(options), processes.usable(options.device)
    reads = [options.model, options.teacher, options.train_file, *options.dev_files]
    with Job.open(options.output, "finetune", inputs=reads, resume=options.resume, overwrite=options.overwrite) as job:
        if options.dtype:
            read_dtype(options.dtype)
        train, dev = _read(options, task)
        bench = _bench(options, task, train, dev)
        student, teacher = _pair(options, bench, device)
        data = {"train": train.to_dict(), "dev": {split or "dev": one.to_dict() for split, one in dev.items()}}
        files = {"model": options.model, "teacher": options.teacher}
        read = {what: on_disk(source) if source else None for what, source in files.items()}
        read |= {f"text {i}": Path(path) for i, path in enumerate(reads[2:]) if path}
        if job.begin({"options": _shaping(options), "data": data}, **read):
            return job.document()

        def one_seed(seed: int) -> dict[str, Any]:
            found, model = _one_seed(options, bench, teacher, seed, device, report)
            _save(model, bench, _dtype(options.model, options.dtype), job.work / f"seed-{seed}")
            return found

        seeds: list[dict[str, Any]] = []
        for seed in options.seeds:
            place = job.work / f"seed-{seed}"
            seeds.append(job.step(f"seed {seed}", partial(one_seed, seed), [place]))
            best = _best(seeds)["seed"]
            for other in options.seeds[: len(seeds)]:
                if other != best:
                    job.release(f"seed {other}", job.work / f"seed-{other}")
        taught = job.step("teacher", lambda: bench.measure(teacher)[1] if teacher else None)
        document = results.document(
            "finetune",
            None,
            model=name or options.model,
            task=task.name,
            rule=RULE,
            input={"description": INPUT, "max_length": bench.max_length},
            data=data,
            teacher={"model": Path(options.teacher).name, "dev": taught} if options.teacher else None,
            settings=options.trained.model_dump(mode="json", exclude={"seed"}),
            **cost(student).to_dict(),
            **_summary(seeds),
            seconds=round(job.seconds(), 1),
        )
        with explain_write_errors(options.output):
            shutil.copytree(job.work / f"seed-{_best(seeds)['seed']}", job.result, dirs_exist_ok=True)
        job.finish(document)
    return document


def _shaping(options: FineTuneOptions) -> dict[str, Any]:
    """What the result depends on: all but where and how it is made."""
    where = {"output", "overwrite", "resume", "device", "settings"}
    return {
        **options.model_dump(mode="json", exclude=where),
        "settings": options.trained.model_dump(mode="json", exclude={"seed"}),
    }


def _best(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of the best seed, the first of equals."""
    return max(seeds, key=lambda one: one["score"])


def _summary(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The seeds' results, mean and deviation of each metric, and whose model is saved."""
    best = _best(seeds)
    return {
        "seeds": seeds,
        "summary": {key: spread([one["best"][key] for one in seeds]) for key in best["best"]},
        "summary_last": {key: spread([one["last"][key] for one in seeds]) for key in best["best"]},
        "saved_seed": best["seed"],
    }


def _check(options: FineTuneOptions) -> glue.Task:
    """The task; raises InputError for whatever can be seen without reading a file."""
    task = glue.task_of(options.task)
    if bool(options.train_file) != bool(options.dev_files):
        given, lacking = ("--train-file", "--dev-file") if options.train_file else ("--dev-file", "--train-file")
        raise InputError(f"{given} was given without {lacking}. Give both, or neither to ask {options.dataset}.")
    if len(options.dev_files) > len(task.dev):
        raise InputError(f"Task {task.name} has {len(task.dev)} dev set(s), {len(options.dev_files)} were given.")
    if options.columns and not options.train_file:
        raise InputError("--columns names the columns of local files; give --train-file and --dev-file too.")
    Objective(options.trained.objective)  # refuses an unknown method or option
    return task


def _read(options: FineTuneOptions, task: glue.Task) -> tuple[glue.Examples, dict[str, glue.Examples]]:
    """Train and dev examples. Raises DataError."""
    if options.train_file:
        files = dict(zip(task.dev, options.dev_files, strict=False))
        train = glue.read_tsv(options.train_file, task, options.columns)
        dev = {name: glue.read_tsv(path, task, options.columns) for name, path in files.items()}
    else:
        train = glue.read_dataset(options.dataset, task, "train")
        dev = {name: glue.read_dataset(options.dataset, task, split) for name, split in task.dev.items()}
    if task.labels and len(set(train.labels)) < 2:
        raise DataError(f"{train.source} has one label only ({train.labels[0]:g}); nothing can be learnt from it.")
    return train, dev


def _bench(options: FineTuneOptions, task: glue.Task, train: glue.Examples, dev: dict[str, glue.Examples]) -> _Bench:
    tokenizer = load_tokenizer(options.model)
    pad = padding_token(tokenizer)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    configs = [load_config(source) for source in (options.model, options.teacher) if source]
    contexts = [getattr(config.get_text_config(), "max_position_embeddings", None) for config in configs]
    length = min([options.max_length, *(context for context in contexts if context)])

    def rows(examples: glue.Examples) -> list[dict[str, Any]]:
        return encode_examples(examples, task, tokenizer, length)

    return _Bench(task, tokenizer, pad, length, rows(train), {n: (rows(one), one.labels) for n, one in dev.items()})


def _pair(options: FineTuneOptions, bench: _Bench, device: str) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """The student with some head, to look at, and the teacher. Raises InputError when they do not fit."""
    student = load_classifier(options.model, bench.task.outputs, pad=bench.pad)
    teacher = None
    if options.teacher:
        teacher = load_classifier(options.teacher, bench.task.outputs, trained=True, pad=bench.pad)
    check_objective(Objective(options.trained.objective), student, teacher, seed=0)
    return student, teacher.to(device) if teacher else None


def _one_seed(
    options: FineTuneOptions, bench: _Bench, teacher: PreTrainedModel | None, seed: int, device: str, report: Report
) -> tuple[dict[str, Any], PreTrainedModel]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the new head
        model = load_classifier(
            options.model, bench.task.outputs, labels=bench.task.labels, pad=bench.pad, device=device
        )
    settings = options.trained.model_copy(update={"seed": seed})
    trained = fine_tune(
        model, teacher, bench.train, collator(bench.pad), bench.measure, settings,
        device=device, progress=lambda done, total: report(f"fine-tune (seed {seed})", done, total),
    )  # fmt: skip
    best = trained.epochs[trained.best]
    found = {
        "seed": seed,
        "best_epoch": best["epoch"],
        "score": best["score"],
        "best": best["dev"],
        "last": trained.epochs[-1]["dev"],
        "epochs": trained.epochs,
        "steps": trained.steps,
        "seconds": round(trained.seconds, 1),
    }
    return found, model


def _save(model: PreTrainedModel, bench: _Bench, dtype: torch.dtype, place: Path) -> None:
    if read_specs(model):
        attach(model)
    with explain_write_errors(place):
        shutil.rmtree(place, ignore_errors=True)  # of a session that was killed while it wrote this
        place.mkdir()
        write_model(model, bench.tokenizer, place, dtype)


def _dtype(source: str, asked: str | None) -> torch.dtype:
    """What to save in: as asked, else as the checkpoint says, else float32."""
    own = asked or getattr(load_config(source), "dtype", None) or "float32"
    return own if isinstance(own, torch.dtype) else read_dtype(str(own).removeprefix("torch."))
