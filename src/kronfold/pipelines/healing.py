"""Healing as recipes write it, and from checkpoint to checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import processes, results
from kronfold.base.files import check_output, work_directory
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.distill.stored import StoredTeacher
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
    reading: Reading = Reading(),  # noqa: B008 - frozen
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    micro_batch: int | None = None,
    offline_teacher: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Heal the checkpoint `student` by distillation from `teacher` and save the result in `output`.

    Trainer checkpoints live in `<output>.partial` until the end; `resume` continues from them, with another number of
    processes too. `micro_batch`: see `split_batch`; it changes speed and memory only.
    `reading`: how both texts are read.
    `offline_teacher`: directory that `kronfold teach` made of `teacher` and `train_text`; `teacher` is then measured
    but takes no part in the training, and the blocks are those stored, read as often as the budget asks for.
    Returns the results document. Raises OutputError, CheckpointError, DataError, before training starts.
    """
    processes.start(device)
    processes.on_main(lambda: check_output(output, overwrite))
    stored = StoredTeacher(offline_teacher) if offline_teacher else None
    objective = objective_of(recipe)
    if stored:
        stored.check_objective(objective)
    split_batch(recipe.batch_size, micro_batch)
    saved_dtype = read_dtype(dtype) if dtype else None
    work = processes.on_main(lambda: work_directory(output, resume, overwrite))
    model, original = load_model(student, device=device), load_model(teacher, device=device)
    tokenizer, teacher_cost = load_tokenizer(student), cost(original).to_dict()
    if stored:
        stored.check_teacher(original)
    blocks = processes.on_main(lambda: _blocks(train_text, tokenizer, model, recipe.tokens, stored, reading))

    measured: dict[str, Any] = {}  # of the evaluation text; each measurement reads the same

    def measure(subject: PreTrainedModel, what: str) -> float | None:
        if eval_text is None:
            return None
        found = perplexity(
            subject, tokenizer, open_text(eval_text, reading), protocol,
            progress=lambda done, total: report(f"evaluate {what}", done, total),
        )  # fmt: skip
        measured.update({key: getattr(found, key) for key in ("tokens", "words", "bytes", "read")})
        return found.perplexity

    teacher_perplexity, before = measure(original, "the teacher"), measure(model, "before healing")
    guide = stored or original
    del original  # with an offline teacher its memory is free now
    healed = heal_by(
        recipe, model, guide, blocks,
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
        data={
            "heal": {
                "source": Path(train_text).name,
                "tokens": blocks.tokens,
                "sha256": blocks.sha256,
                "read": blocks.read,
            },
            "eval": {"source": Path(eval_text).name, **measured} if eval_text else None,
        },
        teacher={**teacher_cost, "perplexity": teacher_perplexity},
        **({"offline_teacher": stored.manifest.to_dict()} if stored else {}),
        **cost(model).to_dict(),
        stages=[_stage_entry(healed, before, after)],
    )

    def save() -> None:
        save_checkpoint(model, tokenizer, student, output, document, saved_dtype, overwrite)
        shutil.rmtree(work, ignore_errors=True)

    processes.on_main(save)
    return document


def _blocks(
    train_text: str,
    tokenizer: Any,
    student: PreTrainedModel,
    tokens: int,
    stored: StoredTeacher | None,
    reading: Reading,
) -> TokenBlocks:
    """What to heal on; with an offline teacher its own blocks, however many the budget asks for. Raises DataError,
    InputError when the text is not that of the offline teacher.
    """
    size = min(1024, getattr(student.config, "max_position_embeddings", 1024))
    texts = documents(train_text, **asdict(reading))
    if stored is None:
        return pack(texts, tokenizer, size, max_tokens=tokens)
    manifest = stored.manifest
    blocks = pack(texts, tokenizer, manifest.block_size, max_tokens=manifest.tokens)
    stored.beside(blocks)
    return blocks


def _stage_entry(healed: HealResult, before: float | None, after: float | None) -> dict[str, Any]:
    """The one entry of `stages` in the document of a healing."""
    return {
        "name": "heal",
        "before_healing": before,
        "after_healing": after,
        "tokens": healed.tokens,
        "seconds": healed.seconds_in_all,
        "losses": healed.losses,
    }


def heal_by(
    recipe: HealRecipe,
    student: PreTrainedModel,
    teacher: PreTrainedModel | StoredTeacher,
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
