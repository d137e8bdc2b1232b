"""A bridge to lm-eval (EleutherAI's evaluation harness): its tasks on any model of ours, structured ones included."""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kronfold.base.errors import DataError, InputError, suggest


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    samples: bool = False,
) -> dict[str, Any]:
    """Scores of lm-eval's `tasks`: {"version", "results": {task: {"metric,filter": value}}}.

    Args:
        include: directory of further task files (.yaml), for tasks of your own or without network.
        limit: examples per task, None for all. samples: keep lm-eval's record of every example, under "samples".

    Raises:
        InputError: lm-eval is not installed, or has no such task. DataError: the data of a task cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("Tasks of lm-eval need that package: pip install 'kronfold[harness]'.") from error
    place = None if include is None else str(include)
    known = TaskManager(include_path=place, include_defaults=False)
    if any(task not in known.all_tasks for task in tasks):
        known = TaskManager(include_path=place)  # reads thousands of task files, so only where it must
    unknown = [task for task in tasks if task not in known.all_tasks]
    if unknown or not tasks:
        names = "; ".join(f"{task!r}: {suggest(task, known.all_tasks)}" for task in unknown)
        raise InputError(f"lm-eval has no such task. {names}" if unknown else "Name at least one task of lm-eval.")
    reader = copy.deepcopy(tokenizer)  # the harness gives it a padding token
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
        subject = HFLM(pretrained=model, tokenizer=reader, batch_size=batch_size, device=str(model.device))
        try:
            found = simple_evaluate(
                subject, tasks=list(tasks), task_manager=known, limit=limit, log_samples=samples, bootstrap_iters=0
            )
        except (ConnectionError, FileNotFoundError) as error:
            raise DataError(
                f"The data of {', '.join(tasks)} cannot be loaded: {str(error).splitlines()[0]} Check the network."
            ) from error
    kept = {"version": importlib.metadata.version("lm_eval"), "results": found["results"]}
    return kept | ({"samples": found["samples"]} if samples else {})
