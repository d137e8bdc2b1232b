"""Healing as recipes write it, and from checkpoint to checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import processes, results
from kronfold.base.job import Job
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.distill.objective import Objective
from kronfold.distill.stored import StoredTeacher
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.texts import open_text
from kronfold.jobs.export import write_saved
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer, on_disk, read_dtype
from kronfold.options.healing import HealOptions
from kronfold.train import checkpoints
from kronfold.train.heal import HealResult, heal
from kronfold.train.watch import check_teacher_outputs


def heal_to(
    options: HealOptions, *, report: Callable[[str, int, int], None] = lambda what, done, total: None
) -> dict[str, Any]:
    """Heal the checkpoint `options.model` by distillation from its teacher and save the result in `options.output`.

    Trainer checkpoints live in `<output>.partial` until the end; `resume` continues from them, with another number of
    processes too, as long as student, teacher, text and settings are the same. With an `offline_teacher`, which
    `kronfold teach` made of the same teacher and text, the teacher is measured but takes no part in the training, and
    the blocks are those stored, read as often as the budget asks for.
    Returns the results document. Raises OutputError, CheckpointError, DataError, before training starts.
    """
    processes.start(options.device)
    student, eval_text, config = options.model, options.eval_text, options.healing
    device, reading = processes.usable(options.device), Reading.of(options)
    protocol = options.protocol if eval_text else None
    reads = [student, options.teacher, options.train_text, eval_text, options.offline_teacher]
    with Job.open(
        options.output, "heal", inputs=reads, resume=options.resume, overwrite=options.overwrite, together=True
    ) as job:
        stored = StoredTeacher(options.offline_teacher) if options.offline_teacher else None
        Objective(config.objective)  # refuses an unknown method or option before anything is loaded
        if stored:
            stored.check_objective(config.objective)
        processes.split_batch(config.batch_size, config.micro_batch)
        saved_dtype = read_dtype(options.dtype) if options.dtype else None
        model, original = load_model(student, device=device), load_model(options.teacher, device=device)
        tokenizer, teacher_cost = load_tokenizer(student), cost(original).to_dict()
        if stored:
            stored.check_teacher(original)
        blocks = processes.on_main(lambda: _blocks(options, tokenizer, model, stored, reading))
        check_teacher_outputs(original, blocks[0]["input_ids"])
        measured: dict[str, Any] = {}  # of the evaluation text; each measurement reads the same

        def measure(subject: PreTrainedModel, what: str) -> float | None:
            if eval_text is None:
                return None
            found = perplexity(
                subject, tokenizer, open_text(eval_text, reading), options.protocol,
                progress=lambda done, total: report(f"evaluate {what}", done, total),
            )  # fmt: skip
            measured.update({key: getattr(found, key) for key in ("tokens", "words", "bytes", "read")})
            return found.perplexity

        # What may change after a divergence is compared where the checkpoints are, see `checkpoints.prepare`.
        calming = {"micro_batch", *checkpoints.CALMING}
        facts = {
            "healing": config.model_dump(mode="json", exclude=calming),
            "train_sha256": blocks.sha256,
            "offline_teacher": stored.manifest.to_dict() if stored else None,
            "protocol": protocol,
            "reading": asdict(reading),
            "seed": options.seed,
        }
        if job.begin(facts, student=on_disk(student), teacher=on_disk(options.teacher), eval_text=eval_text):
            return job.document()
        teacher_perplexity = job.step("teacher", partial(measure, original, "the teacher"))
        before = job.step("before healing", partial(measure, model, "before healing"))
        guide = stored or original
        del original  # with an offline teacher its memory is free now
        healed = heal(
            model, guide, blocks,
            config=config.model_copy(update={"seed": options.seed}), device=model.device,
            output_dir=job.work / "trainer", resume=job.resumed,
            progress=lambda step, total, _logs: report("heal", step, total),
        )  # fmt: skip
        after = measure(model, "after healing")
        document = results.document(
            "heal",
            options.seed,
            model=student,
            objective=config.objective.model_dump(),
            protocol=protocol,
            data={
                "heal": {
                    "source": Path(options.train_text).name,
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
        processes.on_main(lambda: write_saved(model, tokenizer, student, job.result, saved_dtype))
        job.finish(document)
    return document


def _blocks(
    options: HealOptions, tokenizer: Any, student: PreTrainedModel, stored: StoredTeacher | None, reading: Reading
) -> TokenBlocks:
    """What to heal on; with an offline teacher its own blocks, however many the budget asks for. Raises DataError,
    InputError when the text is not that of the offline teacher.
    """
    size = min(1024, getattr(student.config, "max_position_embeddings", 1024))
    texts = documents(options.train_text, **asdict(reading))
    if stored is None:
        return pack(texts, tokenizer, size, max_tokens=options.healing.tokens or 0)
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
