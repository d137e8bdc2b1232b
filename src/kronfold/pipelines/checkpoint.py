"""Single steps from files to files: compress a checkpoint, heal a checkpoint."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base import results
from kronfold.base.errors import OutputError
from kronfold.base.files import atomic_directory, check_output, write_json
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.texts import open_text
from kronfold.export.checkpoint import write_model
from kronfold.export.quantizer import attach
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer, read_dtype
from kronfold.models.surgery import read_specs
from kronfold.pipelines.auto import calibrate_on, fit_rows, settings_of
from kronfold.pipelines.compress import plan
from kronfold.pipelines.gathers import absorb_gathers
from kronfold.pipelines.objectives import objective_of
from kronfold.pipelines.stage import Progress, keep_layers
from kronfold.planner import planning
from kronfold.planner.budget import Budget
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import AutoRecipe, HealRecipe, Recipe, load_recipe
from kronfold.train.heal import HealResult, heal


def compress_to(
    model: str,
    output: str | Path,
    recipe: str,
    plan_path: str | None = None,
    calibration: Sequence[str] = (),
    budget: Budget | None = None,
    *,
    changes: Mapping[str, Any] | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Compress the checkpoint `model` by a recipe (or a saved plan) and save it with its tokenizer in `output`.

    Args:
        calibration: texts to fit to; recipe `auto` needs one. budget: for `auto`.
        changes: fields of the recipe's `auto` entry to change, such as `windows`.
        cache: directory that keeps statistics and curves by content, None for none.

    Returns the results document. Raises OutputError, RecipeError, CheckpointError, DataError, before anything is
    written.
    """
    check_output(output, overwrite)
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
        found = calibrate_on(student, tokenizer, calibration, settings, seed=seed, cache=cache, progress=progress)
    if made is None:
        made = plan(student, recipe_used, found, budget=budget, errors=False, seed=seed, progress=progress)
        planning.check_plan(made, student)
    planned = time.monotonic() - started
    for stage in made.stages:
        stage.rows = fit_rows(student, stage.rows, found, sequential=settings.sequential, seed=seed, progress=progress)
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
    save_checkpoint(student, tokenizer, model, output, document, saved_dtype, overwrite)
    return document


def make_plan(
    subject: PreTrainedModel | PretrainedConfig,
    recipe: str,
    calibration: Sequence[str] = (),
    budget: Budget | None = None,
    *,
    source: str = "",
    changes: Mapping[str, Any] | None = None,
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
        found = calibrate_on(subject, tokenizer, calibration, settings, seed=seed, cache=cache, progress=progress)
    used = _changed(recipe, settings)
    return plan(subject, used, found, budget=budget, errors=errors, seed=seed, progress=progress)


def _changed(recipe: str, settings: AutoRecipe) -> Recipe:
    """The recipe with its `auto` entry, if it has one, as the command wants it."""
    loaded = load_recipe(recipe)
    return loaded.model_copy(update={"auto": settings}) if loaded.auto else loaded


def heal_to(
    student: str,
    teacher: str,
    train_text: str,
    output: str | Path,
    recipe: HealRecipe,
    *,
    eval_text: str | None = None,
    protocol: str = "sliding",
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Heal the checkpoint `student` by distillation from `teacher` and save the result in `output`.

    Trainer checkpoints live in `<output>.partial` until the end; `resume` continues from them.
    Returns the results document. Raises OutputError, CheckpointError, DataError, before training starts.
    """
    check_output(output, overwrite)
    objective_of(recipe)
    saved_dtype = read_dtype(dtype) if dtype else None
    work = _work_directory(output, resume, overwrite)
    model, original = load_model(student, device=device), load_model(teacher, device=device)
    tokenizer = load_tokenizer(student)
    size = min(1024, getattr(model.config, "max_position_embeddings", 1024))
    blocks = pack(documents(train_text), tokenizer, size, max_tokens=recipe.tokens)

    def measure(subject: PreTrainedModel, what: str) -> float | None:
        if eval_text is None:
            return None
        return perplexity(
            subject, tokenizer, open_text(eval_text), protocol,
            progress=lambda done, total: report(f"evaluate {what}", done, total),
        ).perplexity  # fmt: skip

    teacher_perplexity, before = measure(original, "the teacher"), measure(model, "before healing")
    healed = heal_by(
        recipe,
        model,
        original,
        blocks,
        seed=seed,
        output_dir=work,
        resume=resume,
        progress=lambda step, total, _logs: report("heal", step, total),
    )
    stage = {
        "name": "heal",
        "before_healing": before,
        "after_healing": measure(model, "after healing"),
        "tokens": healed.tokens,
        "seconds": healed.seconds,
        "losses": healed.losses,
    }
    document = results.document(
        "heal",
        seed,
        model=student,
        objective=recipe.objective.model_dump(),
        protocol=protocol if eval_text else None,
        data={"heal": {"source": Path(train_text).name, "tokens": blocks.tokens, "sha256": blocks.sha256}},
        teacher={**cost(original).to_dict(), "perplexity": teacher_perplexity},
        **cost(model).to_dict(),
        stages=[stage],
    )
    save_checkpoint(model, tokenizer, student, output, document, saved_dtype, overwrite)
    shutil.rmtree(work, ignore_errors=True)
    return document


def _work_directory(output: str | Path, resume: bool, overwrite: bool) -> Path:
    """`<output>.partial`, emptied unless the job there is to be resumed. Raises OutputError when one lies there."""
    work = Path(output).with_name(Path(output).name + ".partial")
    if work.is_dir() and any(work.iterdir()) and not resume:
        if not overwrite:
            raise OutputError(f"An unfinished job lies in {work}. Continue it with --resume, or pass --overwrite.")
        shutil.rmtree(work)
    return work


def heal_by(
    recipe: HealRecipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    blocks: TokenBlocks,
    *,
    seed: int,
    output_dir: Path | None,
    resume: bool,
    progress: Callable[[int, int, dict[str, float]], None],
    start_tokens: int = 0,
) -> HealResult:
    """`kronfold.train.heal.heal` with the settings of a recipe; an objective that compares nothing uses no teacher.

    `output_dir` receives trainer checkpoints on the way, None keeps none (such a healing cannot be resumed).
    `start_tokens`: what earlier stages have read of the blocks already.
    """
    objective = objective_of(recipe)
    return heal(
        student,
        teacher if objective.needs_teacher else None,
        blocks,
        tokens=recipe.tokens,
        batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        warmup=recipe.warmup,
        weight_decay=recipe.weight_decay,
        objective=objective,
        seed=seed,
        start_tokens=start_tokens,
        device=student.device,
        output_dir=output_dir,
        resume=resume and output_dir is not None,
        progress=progress,
    )


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: Any,
    source: str,
    output: str | Path,
    document: dict[str, Any],
    dtype: torch.dtype | None,
    overwrite: bool,
) -> None:
    """Save model, tokenizer and results.json in one atomic step, in `dtype` or in that of the checkpoint `source`."""
    model.to(dtype or load_model(source, dtype="auto").dtype)
    if read_specs(model):
        attach(model)
    with atomic_directory(output, overwrite) as place:
        write_model(model, tokenizer, place)
        write_json(place / "results.json", document)
