"""Healing as recipes write it, and from checkpoint to checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import processes, results
from kronfold.base.errors import OutputError
from kronfold.base.files import check_output
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.texts import open_text
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer, read_dtype
from kronfold.pipelines.checkpoint import save_checkpoint
from kronfold.pipelines.objectives import objective_of
from kronfold.pipelines.together import split_batch
from kronfold.planner.recipe import HealRecipe
from kronfold.train.heal import HealResult, heal


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
    micro_batch: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Heal the checkpoint `student` by distillation from `teacher` and save the result in `output`.

    Trainer checkpoints live in `<output>.partial` until the end; `resume` continues from them, with another number of
    processes too. `micro_batch`: see `split_batch`; it changes speed and memory only.
    Returns the results document. Raises OutputError, CheckpointError, DataError, before training starts.
    """
    processes.start(device)
    processes.on_main(lambda: check_output(output, overwrite))
    objective_of(recipe)
    split_batch(recipe.batch_size, micro_batch)
    saved_dtype = read_dtype(dtype) if dtype else None
    work = processes.on_main(lambda: _work_directory(output, resume, overwrite))
    model, original = load_model(student, device=device), load_model(teacher, device=device)
    tokenizer = load_tokenizer(student)
    size = min(1024, getattr(model.config, "max_position_embeddings", 1024))
    blocks = processes.on_main(lambda: pack(documents(train_text), tokenizer, size, max_tokens=recipe.tokens))

    def measure(subject: PreTrainedModel, what: str) -> float | None:
        if eval_text is None:
            return None
        return perplexity(
            subject, tokenizer, open_text(eval_text), protocol,
            progress=lambda done, total: report(f"evaluate {what}", done, total),
        ).perplexity  # fmt: skip

    teacher_perplexity, before = measure(original, "the teacher"), measure(model, "before healing")
    healed = heal_by(
        recipe, model, original, blocks,
        seed=seed, output_dir=work, resume=resume, micro_batch=micro_batch,
        progress=lambda step, total, _logs: report("heal", step, total),
    )  # fmt: skip
    after = measure(model, "after healing")
    document = results.document(
        "heal",
        seed,
        model=student,
        objective=recipe.objective.model_dump(),
        protocol=protocol if eval_text else None,
        data={"heal": {"source": Path(train_text).name, "tokens": blocks.tokens, "sha256": blocks.sha256}},
        teacher={**cost(original).to_dict(), "perplexity": teacher_perplexity},
        **cost(model).to_dict(),
        stages=[_stage_entry(healed, before, after)],
    )

    def save() -> None:
        save_checkpoint(model, tokenizer, student, output, document, saved_dtype, overwrite)
        shutil.rmtree(work, ignore_errors=True)

    processes.on_main(save)
    return document


def _stage_entry(healed: HealResult, before: float | None, after: float | None) -> dict[str, Any]:
    """The one entry of `stages` in the document of a healing."""
    return {
        "name": "heal",
        "before_healing": before,
        "after_healing": after,
        "tokens": healed.tokens,
        "seconds": healed.seconds,
        "losses": healed.losses,
    }


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
    micro_batch: int | None = None,
) -> HealResult:
    """`kronfold.train.heal.heal` with the settings of a recipe; an objective that compares nothing uses no teacher.

    `output_dir` receives trainer checkpoints on the way, None keeps none (such a healing cannot be resumed).
    `start_tokens`: what earlier stages have read of the blocks already.
    A step is over `recipe.batch_size` blocks however many processes share them, so their number changes no result
    beyond rounding. Raises InputError when they cannot, see `split_batch`.
    """
    batch_size, accumulate = split_batch(recipe.batch_size, micro_batch)
    objective = objective_of(recipe)
    return heal(
        student,
        teacher if objective.needs_teacher else None,
        blocks,
        tokens=recipe.tokens,
        batch_size=batch_size,
        accumulate=accumulate,
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
