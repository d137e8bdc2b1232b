"""Healing as recipes write it, and from checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import processes, results
from kronfold.base.job import Job
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.distill.stored import StoredTeacher
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.texts import open_text
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer, on_disk, read_dtype
from kronfold.pipelines.checkpoint import write_saved
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
    offline_teacher: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    report: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Heal the checkpoint `student` by distillation from `teacher` and save the result in `output`.

    Trainer checkpoints live in `<output>.partial` until the end; `resume` continues from them, with another number of
    processes too, as long as student, teacher, text and settings are the same. `micro_batch`: see `split_batch`; it
    changes speed and memory only.
    `offline_teacher`: directory that `kronfold teach` made of `teacher` and `train_text`; `teacher` is then measured
    but takes no part in the training, and the blocks are those stored, read as often as the budget asks for.
    Returns the results document. Raises OutputError, CheckpointError, DataError, before training starts.
    """
    processes.start(device)
    reads = [student, teacher, train_text, eval_text, offline_teacher]
    with Job.open(output, "heal", inputs=reads, resume=resume, overwrite=overwrite, together=True) as job:
        stored = StoredTeacher(offline_teacher) if offline_teacher else None
        objective = objective_of(recipe)
        if stored:
            stored.check_objective(objective)
        split_batch(recipe.batch_size, micro_batch)
        saved_dtype = read_dtype(dtype) if dtype else None
        model, original = load_model(student, device=device), load_model(teacher, device=device)
        tokenizer, teacher_cost = load_tokenizer(student), cost(original).to_dict()
        if stored:
            stored.check_teacher(original)
        blocks = processes.on_main(lambda: _blocks(train_text, tokenizer, model, recipe.tokens, stored))

        def measure(subject: PreTrainedModel, what: str) -> float | None:
            if eval_text is None:
                return None
            return perplexity(
                subject, tokenizer, open_text(eval_text), protocol,
                progress=lambda done, total: report(f"evaluate {what}", done, total),
            ).perplexity  # fmt: skip

        facts = {
            "recipe": recipe.model_dump(mode="json"),
            "train_sha256": blocks.sha256,
            "offline_teacher": stored.manifest.to_dict() if stored else None,
            "protocol": protocol if eval_text else None,
            "seed": seed,
            "dtype": dtype,
        }
        if job.begin(facts, student=on_disk(student), teacher=on_disk(teacher), eval_text=eval_text):
            return job.document()
        teacher_perplexity = job.step("teacher", partial(measure, original, "the teacher"))
        before = job.step("before healing", partial(measure, model, "before healing"))
        guide = stored or original
        del original  # with an offline teacher its memory is free now
        healed = heal_by(
            recipe, model, guide, blocks,
            seed=seed, output_dir=job.work / "trainer", resume=job.resumed, micro_batch=micro_batch,
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
            teacher={**teacher_cost, "perplexity": teacher_perplexity},
            **({"offline_teacher": stored.manifest.to_dict()} if stored else {}),
            **cost(model).to_dict(),
            stages=[_stage_entry(healed, before, after)],
        )
        processes.on_main(lambda: write_saved(model, tokenizer, student, job.result, saved_dtype))
        job.finish(document)
    return document


def _blocks(
    train_text: str, tokenizer: Any, student: PreTrainedModel, tokens: int, stored: StoredTeacher | None
) -> TokenBlocks:
    """What to heal on; with an offline teacher its own blocks, however many the budget asks for. Raises DataError,
    InputError when the text is not that of the offline teacher.
    """
    size = min(1024, getattr(student.config, "max_position_embeddings", 1024))
    if stored is None:
        return pack(documents(train_text), tokenizer, size, max_tokens=tokens)
    manifest = stored.manifest
    blocks = pack(documents(train_text), tokenizer, manifest.block_size, max_tokens=manifest.tokens)
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
