"""From a checkpoint to a plan, and to a compressed checkpoint."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base import results
from kronfold.base.job import Job
from kronfold.base.progress import Report
from kronfold.data.bad_rows import Reading
from kronfold.export.checkpoint import write_model
from kronfold.fit.calibration import Calibration
from kronfold.fit.compress import plan as plan_by
from kronfold.fit.compress import plan_and_measure
from kronfold.fit.fit import calibrate_on, fit, settings_of
from kronfold.models.cost import cost
from kronfold.models.load import dtype_of, load_model, load_tokenizer, read_dtype
from kronfold.planner.budget import Budget
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import AutoRecipe, Recipe, load_recipe


def compress_to(
    model: str,
    output: str | Path,
    recipe: str,
    plan_path: str | None = None,
    calibration: Sequence[str] = (),
    budget: Budget | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    cache: str | Path | None = None,
    seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Compress the checkpoint `model` by a recipe (or a saved plan) and save it with its tokenizer in `output`.

    Args:
        calibration: texts to fit to; recipe `auto` needs one. budget: for `auto`.
        changes: fields of the recipe's `auto` entry to change, such as `windows`. reading: how the texts are read.
        cache: directory that keeps statistics and curves by content, None for none.

    Returns the results document. Raises OutputError, RecipeError, CheckpointError, DataError, before anything is
    written.
    """
    reads = [model, plan_path, recipe, *calibration]
    with Job.open(output, "compress", inputs=reads, overwrite=overwrite, resumable=False) as job:
        saved_dtype = read_dtype(dtype) if dtype else None
        settings = settings_of(None if plan_path else recipe, changes)
        asked = Plan.load(plan_path) if plan_path else _changed(recipe, settings)
        teacher, tokenizer = load_model(model), load_tokenizer(model)
        started, before = time.monotonic(), cost(teacher)

        def measure(subject: PreTrainedModel) -> Calibration:
            return calibrate_on(
                subject, tokenizer, calibration, settings, reading=reading, seed=seed, cache=cache, progress=progress
            )

        plan, measured = plan_and_measure(teacher, asked, measure if calibration else None, budget, progress=progress)
        planned = time.monotonic() - started
        job.begin()
        fitted = fit(
            teacher, plan, measured, sequential=settings.sequential, adapt=settings.adapt, seed=seed, in_place=True,
            progress=progress,
        )  # fmt: skip
        document = results.document(
            "compress",
            seed,
            model=model,
            recipe={"name": plan.recipe, "description": plan.description},
            teacher=before.to_dict(),
            **cost(fitted.model).to_dict(),
            **({"layers": plan.layers.to_dict()} if plan.layers else {}),
            gathers=fitted.gathers,
            stages=[{"name": stage.name, "rows": [row.to_dict() for row in stage.rows]} for stage in fitted.stages],
            budget=plan.budget,
            calibration={"texts": [Path(text).name for text in calibration], **measured.to_dict()}
            if measured
            else None,
            plan_seconds=round(planned, 2),
            decompose_seconds=round(time.monotonic() - started - planned, 2),
        )
        write_model(fitted.model, tokenizer, job.result, saved_dtype or dtype_of(model))
        job.finish(document)
        return document


def planned(
    subject: PreTrainedModel | PretrainedConfig,
    recipe: str,
    calibration: Sequence[str] = (),
    budget: Budget | None = None,
    *,
    source: str = "",
    changes: Mapping[str, Any] | None = None,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    errors: bool = True,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Report | None = None,
) -> Plan:
    """`kf.plan` with texts by name: for `auto`, calibrate on them with the tokenizer beside `source`."""
    settings = settings_of(recipe, changes)
    measured = None
    if calibration and isinstance(subject, PreTrainedModel):
        tokenizer = load_tokenizer(source)
        measured = calibrate_on(
            subject, tokenizer, calibration, settings, reading=reading, seed=seed, cache=cache, progress=progress
        )
    used = _changed(recipe, settings)
    return plan_by(subject, used, measured, budget=budget, errors=errors, seed=seed, progress=progress)


def _changed(recipe: str, settings: AutoRecipe) -> Recipe:
    """The recipe with its `auto` entry, if it has one, as the command wants it."""
    loaded = load_recipe(recipe)
    return loaded.model_copy(update={"auto": settings}) if loaded.auto else loaded
