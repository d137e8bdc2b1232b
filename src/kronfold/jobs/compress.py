"""From a checkpoint to a plan, to a compressed checkpoint, and back to a plain one."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base import results
from kronfold.base.job import Job
from kronfold.data.bad_rows import Reading
from kronfold.export.checkpoint import write_model
from kronfold.export.dense import to_dense
from kronfold.export.quantizer import attach
from kronfold.fit.compress import plan
from kronfold.fit.fit import Progress, absorb_gathers, calibrate_on, fit_rows, keep_layers, settings_of
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer, read_dtype
from kronfold.models.place import read_specs
from kronfold.planner import planning
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
    progress: Progress | None = None,
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
        made = Plan.load(plan_path) if plan_path else None
        teacher = load_model(model)
        tokenizer = load_tokenizer(model)
        started, before, stages = time.monotonic(), cost(teacher), []
        settings = settings_of(None if made else recipe, changes)
        found, recipe_used = None, _changed(recipe, settings)
        if made is None and recipe_used.auto is None:
            made = plan(teacher, recipe_used, budget=budget, errors=False, seed=seed)
        if made:
            planning.check_plan(made, teacher)
        student = keep_layers(teacher, made.layers if made else None)
        if calibration:
            found = calibrate_on(
                student, tokenizer, calibration, settings, reading=reading, seed=seed, cache=cache, progress=progress
            )
        if made is None:
            made = plan(student, recipe_used, found, budget=budget, errors=False, seed=seed, progress=progress)
            planning.check_plan(made, student)
        planned = time.monotonic() - started
        job.begin()
        for stage in made.stages:
            stage.rows = fit_rows(
                student, stage.rows, found,
                sequential=settings.sequential, adapt=settings.adapt, seed=seed, progress=progress,
            )  # fmt: skip
            stages.append({"name": stage.name, "rows": [row.to_dict() for row in stage.rows]})
        gathers = absorb_gathers(student)
        document = results.document(
            "compress",
            seed,
            model=model,
            recipe={"name": made.recipe, "description": made.description},
            teacher=before.to_dict(),
            **cost(student).to_dict(),
            **({"layers": made.layers.to_dict()} if made.layers else {}),
            gathers=gathers,
            stages=stages,
            budget=made.budget,
            calibration={"texts": [Path(text).name for text in calibration], **found.to_dict()} if found else None,
            plan_seconds=round(planned, 2),
            decompose_seconds=round(time.monotonic() - started - planned, 2),
        )
        write_saved(student, tokenizer, model, job.result, saved_dtype)
        job.finish(document)
        return document


def make_plan(
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
    progress: Progress | None = None,
) -> Plan:
    """`plan` with texts by name: for `auto`, calibrate on them with the tokenizer beside `source`."""
    settings = settings_of(recipe, changes)
    found = None
    if calibration and isinstance(subject, PreTrainedModel):
        tokenizer = load_tokenizer(source)
        found = calibrate_on(
            subject, tokenizer, calibration, settings, reading=reading, seed=seed, cache=cache, progress=progress
        )
    used = _changed(recipe, settings)
    return plan(subject, used, found, budget=budget, errors=errors, seed=seed, progress=progress)


def _changed(recipe: str, settings: AutoRecipe) -> Recipe:
    """The recipe with its `auto` entry, if it has one, as the command wants it."""
    loaded = load_recipe(recipe)
    return loaded.model_copy(update={"auto": settings}) if loaded.auto else loaded


def export_dense(
    model: str, output: str | Path, *, dtype: str | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Fold the structures of the checkpoint `model` back into plain weights and save that in `output`, tokenizer too.

    Returns the results document (schema `kronfold/export`). Raises OutputError, CheckpointError, InputError, before
    anything is written.
    """
    with Job.open(output, "export", inputs=[model], overwrite=overwrite, resumable=False) as job:
        saved_dtype = read_dtype(dtype) if dtype else None
        compressed, tokenizer = load_model(model), load_tokenizer(model)
        plain = to_dense(compressed)
        sizes = {"source": cost(compressed).to_dict(), **cost(plain).to_dict()}
        job.begin()
        document = results.document("export", None, model=model, **sizes)
        write_saved(plain, tokenizer, model, job.result, saved_dtype)
        job.finish(document)
    return document


def write_saved(model: PreTrainedModel, tokenizer: Any, source: str, place: Path, dtype: torch.dtype | None) -> None:
    """Write model and tokenizer into `place`, in `dtype` or in that of the checkpoint `source`. Raises as
    `write_model`."""
    dtype = dtype or load_model(source, dtype="auto").dtype
    if read_specs(model):
        attach(model)
    write_model(model, tokenizer, place, dtype)
