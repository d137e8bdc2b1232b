"""Who runs the tasks of a `datatrove` pipeline: processes here, a Slurm cluster, a Ray cluster."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kronfold.base.errors import DataError, InputError, suggest
from kronfold.base.files import write_json
from kronfold.base.job import Job
from kronfold.data.clean_settings import CleanSettings

_CLASSES = {"local": "LocalPipelineExecutor", "slurm": "SlurmPipelineExecutor", "ray": "RayPipelineExecutor"}
_OURS = {"self", "pipeline", "tasks", "workers", "logging_dir", "depends", "skip_completed"}
_SUBMITTED = "submitted.json"


@dataclass(frozen=True)
class Stage:
    """One datatrove pipeline: `tasks` runs of `blocks`, which need all tasks of the stages before."""

    name: str
    blocks: Sequence[Any]
    tasks: int

    def missing(self, logs: Path) -> int:
        """Tasks without datatrove's completion marker."""
        return sum(not (logs / self.name / "completions" / f"{rank:05d}").exists() for rank in range(self.tasks))


def check_executor(settings: CleanSettings) -> None:
    """Raises InputError when the executor cannot be used here or `cluster` names what it does not take."""
    if settings.executor == "local" and settings.cluster:
        raise InputError("'cluster' is for the executors slurm and ray; set 'executor' or leave it out.")
    if settings.executor == "slurm" and shutil.which("sbatch") is None:
        raise InputError("The executor slurm needs the command sbatch, which is not here. Start it on a login node.")
    if settings.executor == "ray":
        try:
            importlib.import_module("ray")
        except ImportError as error:
            raise InputError("The executor ray needs Ray. Install with: pip install 'ray[default]'") from error
    signature = inspect.signature(_executor_class(settings.executor))
    allowed = set(signature.parameters) - _OURS
    for option in settings.cluster:
        if option not in allowed:
            raise InputError(f"cluster.{option} is unknown to {settings.executor}. {suggest(option, allowed, 40)}")
    needed = [name for name in allowed if signature.parameters[name].default is inspect.Parameter.empty]
    if absent := sorted(set(needed) - set(settings.cluster)):
        raise InputError(f"The executor {settings.executor} needs cluster.{' and cluster.'.join(absent)}.")


def _executor_class(name: str) -> Any:
    return getattr(importlib.import_module(f"datatrove.executor.{name}"), _CLASSES[name])


def executors(stages: Sequence[Stage], settings: CleanSettings, logs: Path) -> list[Any]:
    """A datatrove executor per stage, each depending on the one before; nothing is started."""
    made: list[Any] = []
    for stage in stages:
        workers = min(settings.workers, stage.tasks)
        extra = dict(settings.cluster)
        if settings.executor == "slurm":
            extra.setdefault("job_name", f"kronfold-{stage.name}")
        made.append(
            _executor_class(settings.executor)(
                pipeline=list(stage.blocks),
                tasks=stage.tasks,
                workers=workers,
                logging_dir=str((logs / stage.name).resolve()),
                depends=made[-1] if made and settings.executor != "local" else None,
                **extra,
            )
        )
    return made


def run_stages(stages: Sequence[Stage], settings: CleanSettings, job: Job, report: Any = None) -> bool:
    """Run what is not complete yet. Returns True when all is done, False when Slurm was given jobs to do.

    Local and Ray stages run one after the other, each a step of the job; within one, tasks with datatrove's completion
    marker are skipped. Slurm gets all stages as job arrays that wait for each other; call again when they have ended.
    Raises DataError when jobs given to Slurm earlier are not complete.
    """
    logs = job.work / "logs"
    for stage in stages:  # what is done again must not look done to datatrove
        if f"stage {stage.name}" in job.damaged:
            shutil.rmtree(logs / stage.name, ignore_errors=True)
    missing = {stage.name: stage.missing(logs) for stage in stages}
    if settings.executor == "slurm" and any(missing.values()):
        note = logs / _SUBMITTED
        if note.exists():
            open_tasks = ", ".join(f"{name} {count}" for name, count in missing.items() if count)
            raise DataError(
                f"Jobs given to Slurm are not complete; tasks missing: {open_tasks}. Look with squeue. If they have "
                f"ended with a fault, delete {note} and resume: only the missing tasks are submitted again."
            )
        chain = executors(stages, settings, logs)
        with _quiet():
            chain[-1].run()  # launches those it depends on first
        write_json(note, {"executor": "slurm", "missing": missing})
        return False
    if settings.workers > 1 and any(missing.values()):
        _preload()
    for done, (stage, executor) in enumerate(zip(stages, executors(stages, settings, logs), strict=True)):
        if report:
            report(f"clean: {stage.name}", done, len(stages))
        job.step(f"stage {stage.name}", partial(_run, stage, executor, logs), job.unlisted())
    return True


def _run(stage: Stage, executor: Any, logs: Path) -> None:
    """Run what is missing of one stage; the stages before are complete."""
    if stage.missing(logs):
        executor.depends = None
        with _quiet():
            executor.run()
    if left := stage.missing(logs):
        raise DataError(f"Stage {stage.name}: {left} of {stage.tasks} tasks failed. Look into {logs}, resume.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """datatrove's progress bars and log lines would drown ours; what goes wrong arrives as an exception."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # for worker processes
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _preload() -> None:
    """Let the server that worker processes are forked from import what they need, once instead of per worker."""
    import multiprocess

    with contextlib.suppress(ValueError):  # a platform without fork servers
        multiprocess.get_context("forkserver").set_forkserver_preload(
            ["kronfold.data.clean_blocks", "datatrove.executor.local", "datatrove.pipeline.dedup.minhash"]
        )
