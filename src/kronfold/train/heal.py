"""Which arithmetic pays on this machine."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState, TrainingArguments
from transformers.activations import NewGELUActivation
from transformers.trainer_utils import SaveStrategy

from kronfold.base import processes
from kronfold.base.errors import DataError, DivergedError, InputError
from kronfold.distill import Method, Objective
from kronfold.distill.stored import StoredTeacher, text_sha256
from kronfold.models.calibrate import fingerprint
from kronfold.options import read
from kronfold.options.healing import HealConfig
from kronfold.train import checkpoints, sharded, zero
from kronfold.train.trainer import DistillationTrainer, ShuffledStream, check_objective


def bf16_is_fast(device: torch.device | str) -> bool:
    """Whether autocast to bfloat16 is native on `device`: CPUs with AMX or AVX512-BF16, CUDA from Ampere on.

    Elsewhere bfloat16 is emulated and slower than float32.
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # private, so asked for with care
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return False


# GPT-2's activation in one kernel while a model trains: transformers writes it out in eight passes over memory.


@contextlib.contextmanager
def fused_gelu(*models: nn.Module | None) -> Iterator[None]:
    """Every `gelu_new` (the tanh approximation) of the models by torch's own kernel; the same function to rounding."""
    found = [
        module
        for model in models
        if model is not None
        for module in model.modules()
        if type(module) is NewGELUActivation and "forward" not in module.__dict__
    ]
    try:
        for module in found:
            module.forward = partial(F.gelu, approximate="tanh")
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)


# heal(): continue training a compressed model towards the model it came from.


Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class HealResult:
    """What a healing did.

    Args:
        tokens: tokens seen in all, resumed part included (steps x batch_size x block).
        steps: optimiser steps in all.
        seconds: wall time of this call's training loop; a resumed run counts only its own part.
        tokens_per_second: of this call; 0 when nothing was left to do.
        losses: one entry per log: step, tokens, loss, each named loss (nats per token, mean over the steps
            since the entry before), learning_rate.
        learning_rate: the highest of the schedule.
        bf16: whether matrix products ran in bfloat16.
        resumed_from: the step this call continued from, or None.
    """

    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float
    losses: list[dict[str, float]]
    learning_rate: float
    bf16: bool
    resumed_from: int | None

    @property
    def seconds_in_all(self) -> float:
        """What the whole healing takes at this call's rate; `seconds` where nothing was left to do."""
        return self.tokens / self.tokens_per_second if self.tokens_per_second else self.seconds

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel | StoredTeacher | None,
    data: Dataset,
    *,
    device: str | torch.device | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    config: HealConfig | None = None,
    **options: Any,
) -> HealResult:
    """Train `student` in place towards `teacher` on blocks of text.

    Under torchrun or accelerate launch every process calls this alike: the first one's weights count, each step is one
    over `batch_size` blocks, shared by all, and all hold the same student afterwards. So the number of processes
    changes no result beyond rounding, and a run may be resumed by another number of them.

    The dense control, the teacher itself fine-tuned on the same text, is this function on
    `copy.deepcopy(teacher)` with `teacher=None` and `objective=ObjectiveConfig(kl=0, ce=1)`.

    Args:
        student: trained in place; its parameters are float32 afterwards, its mode and config are as before.
        teacher: the same afterwards, though on the training device. None when the objective needs none. An offline
            teacher of this very data (`store_teacher`) serves method kd, and no teacher is run.
        data: map-style dataset of {"input_ids", "labels"}, integer blocks of one length.
        device: where to train: "cpu", "cuda", or None for the Trainer's choice (a GPU when there is one).
        output_dir: where checkpoints go, plain `save_pretrained` directories with the state of the run
            beside. Written by the main process, read by all.
        resume: continue from the newest whole checkpoint in output_dir, or start afresh when there is none.
            On CPU in float32 the result is bitwise that of the run that was never stopped. After a divergence it
            continues from the newest one of before, and wants another learning_rate, warmup or max_grad_norm.
        callbacks: further callbacks of transformers.Trainer.
        progress: called after every step with (step, steps, latest entry of `losses`), in the main process alone.
        config: budget, optimiser, objective. options: the fields of `HealConfig` instead, by name: tokens or steps,
            batch_size, learning_rate, objective, seed, ...

    Raises:
        InputError: options, budget, method or pair that cannot be used, an offline teacher of another text, method or
            temperature. NotFiniteError: the teacher's outputs are NaN or infinite, before the student is changed.
        DivergedError: loss, gradients or weights are no longer finite; good checkpoints stay in output_dir.
        DataError: no blocks, or blocks that are not integers of one length.
        OutputError, CheckpointError: output_dir is taken or cannot be written, or is of another run.
    """
    config = config or read(HealConfig, options, "These options")
    objective = Objective(config.objective)
    if not objective.needs_teacher and not isinstance(teacher, StoredTeacher):
        teacher = None
    if output_dir is None and (resume or config.save_steps):
        raise InputError("resume and save_steps need checkpoints; say where with output_dir.")
    block, fingerprint = inspect_blocks(data)
    check_objective(objective, student, teacher, config.seed, block)
    _check_launch(objective.method)
    if isinstance(teacher, StoredTeacher):
        data = teacher.beside(data)
        fingerprint["offline_teacher"] = teacher.manifest.to_dict() | {"about": None}
    with contextlib.ExitStack() as stack:
        place = Path(output_dir) if output_dir else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = _arguments(config, student, place, device)
        blocks_per_step = config.batch_size
        _set_budget(args, config, config.steps_for(blocks_per_step * block), saves=output_dir is not None)
        settings = _settings(config, args, blocks_per_step, student) | fingerprint
        checkpoint = None
        if output_dir:
            checkpoint = processes.on_main(
                lambda: checkpoints.prepare(place, settings | _contents(student, teacher, data), resume)
            )
        watcher = _Watcher(progress if processes.is_main() else None, blocks_per_step * block)
        start = config.start_tokens // block
        stream = ShuffledStream(data, args.max_steps * blocks_per_step, config.seed, start)
        try:
            state, seconds = _train(
                student, teacher, stream, config, args, checkpoint, [checkpoints.Seal(), watcher, *callbacks]
            )
        except DivergedError as error:
            if output_dir is None:
                raise
            found = error
            raise processes.on_main(lambda: checkpoints.mark_diverged(place, settings, found)) from error
        processes.barrier()  # the last checkpoint, which the main process writes, is whole
    steps, resumed_from = state.global_step, checkpoints.step_of(checkpoint) if checkpoint else None
    return HealResult(
        tokens=steps * blocks_per_step * block,
        steps=steps,
        seconds=seconds,
        tokens_per_second=(steps - (resumed_from or 0)) * blocks_per_step * block / seconds,
        losses=[watcher.entry(logs) for logs in state.log_history if "loss" in logs],
        learning_rate=config.learning_rate,
        bf16=args.bf16,
        resumed_from=resumed_from,
    )


def _train(
    student: PreTrainedModel,
    teacher: PreTrainedModel | StoredTeacher | None,
    data: Dataset,
    config: HealConfig,
    args: TrainingArguments,
    checkpoint: Path | None,
    callbacks: list[TrainerCallback],
) -> tuple[TrainerState, float]:
    """(state at the end, seconds of the loop). The models are as before, but for the student's weights."""
    with contextlib.ExitStack() as stack:
        models = student, None if isinstance(teacher, StoredTeacher) else teacher
        stack.enter_context(left_as_found(*models))
        stack.enter_context(fused_gelu(*models))
        if not config.dropout:
            stack.enter_context(without_dropout(student))
        student.float()
        trainer = DistillationTrainer(
            student, teacher, config.objective, args=args, train_dataset=data, callbacks=callbacks, activity="healing"
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        start = time.perf_counter()
        with zero.differences_named():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return trainer.state, time.perf_counter() - start


def _check_launch(method: Method) -> None:
    """Raises InputError where accelerate was told to split the student in a way that healing cannot follow."""
    if sharded.asked():
        sharded.check(method)
    if zero.asked():
        zero.check(method)
    if processes.launcher_says("ACCELERATE_USE_MEGATRON_LM"):
        raise InputError(
            "Healing under Megatron-LM is not supported. Start it with DDP (torchrun, or accelerate launch with "
            "`distributed_type: MULTI_GPU`) or, where memory is short, with FSDP2 (`distributed_type: FSDP`, "
            "`fsdp_version: 2`)."
        )


def inspect_blocks(data: Dataset) -> tuple[int, dict[str, Any]]:
    """(tokens per block, how many there are). Raises DataError."""
    count = len(data)  # type: ignore[arg-type]
    if count == 0:
        raise DataError("There are no blocks to heal on: the text is shorter than one block. Give more text.")
    ends = [np.asarray(data[i]["input_ids"]) for i in (0, count - 1)]
    whole = all(e.ndim == 1 and np.issubdtype(e.dtype, np.integer) for e in ends)
    if not whole or len(ends[0]) != len(ends[1]):
        raise DataError(
            f"Healing takes blocks of integer tokens, all of one length; the first is {ends[0].dtype} "
            f"{ends[0].shape} and the last {ends[1].dtype} {ends[1].shape}. Pack the text into blocks first."
        )
    if len(ends[0]) < 2:
        raise DataError("Blocks of one token predict nothing; pack the text into longer blocks.")
    return len(ends[0]), {"blocks": count, "block": len(ends[0])}


def _contents(
    student: PreTrainedModel, teacher: PreTrainedModel | StoredTeacher | None, data: Dataset
) -> dict[str, Any]:
    """Hashes over the whole of what is healed, towards what, and on what: a resumed run must have the same."""
    found = {"student": fingerprint(student), "text": text_sha256(data)}
    if teacher is not None:
        known = isinstance(teacher, StoredTeacher)
        found["teacher"] = teacher.manifest.teacher if known else fingerprint(teacher)
    return found


def _arguments(
    config: HealConfig, student: PreTrainedModel, place: Path, device: str | torch.device | None
) -> TrainingArguments:
    on_cpu = not torch.cuda.is_available() if device is None else torch.device(device).type == "cpu"
    bf16 = bf16_is_fast("cpu" if on_cpu else "cuda") if config.bf16 == "auto" else config.bf16
    where = {"use_cpu": on_cpu, "bf16": bf16}
    at_once, accumulate = processes.split_batch(config.batch_size, config.micro_batch)
    if zero.asked():
        where |= zero.settings(on_cpu, config.bf16)
    args = TrainingArguments(
        **where,
        output_dir=str(place),
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulate,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide a diverged run behind the average of earlier losses
        save_total_limit=2,  # should the newest be damaged, there is one before it
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        ddp_find_unused_parameters=False,  # all are used, see DistillationTrainer; looking for others costs each step
        use_cache=bool(getattr(student.config, "use_cache", True)),  # the Trainer writes this into the config
    )
    if zero.asked():
        zero.complete(args)
    return args


def _set_budget(args: TrainingArguments, config: HealConfig, steps: int, saves: bool) -> None:
    """What depends on the number of steps, which is known only once the number of processes is."""
    args.max_steps = steps
    args.warmup_steps = math.ceil(config.warmup * steps)
    args.save_strategy = SaveStrategy.STEPS if saves else SaveStrategy.NO
    args.save_steps = config.save_steps or math.ceil(steps / 10)


def _settings(
    config: HealConfig, args: TrainingArguments, blocks_per_step: int, student: PreTrainedModel
) -> dict[str, Any]:
    """What must be equal for a resumed run to be the same run. How the batch is split may change."""
    free = {"tokens", "batch_size", "micro_batch", "save_steps", "log_every"}
    kept = config.model_dump(mode="json", exclude=free)
    numbers = sum(p.numel() for p in student.parameters())
    return kept | {
        "steps": args.max_steps,
        "bf16": args.bf16,
        "blocks_per_step": blocks_per_step,
        "student_parameters": numbers,
        "deepspeed_processes": args.world_size if zero.asked() else None,  # its files are theirs, one each
    }


@contextlib.contextmanager
def left_as_found(*models: PreTrainedModel | None) -> Iterator[None]:
    """Undo what training leaves on a model: gradients, train or eval mode, accelerate's wrapper of `forward`."""
    wrapping = ("forward", "_original_forward", "_is_accelerate_prepared")
    found = [
        (model, model.training, {name: model.__dict__[name] for name in wrapping if name in model.__dict__})
        for model in models
        if model is not None
    ]
    try:
        yield
    finally:
        for model, training, before in found:
            for name in wrapping:
                model.__dict__.pop(name, None)
            model.__dict__.update(before)
            model.train(training)
            model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def without_dropout(model: PreTrainedModel) -> Iterator[None]:
    """Every dropout rate 0: modules, and the plain number some attention classes keep."""
    names = [(module, "p") for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    names += [(module, "attention_dropout") for module in model.modules() if hasattr(module, "attention_dropout")]
    found = [(module, name, getattr(module, name)) for module, name in names]
    try:
        for module, name, _ in found:
            setattr(module, name, 0.0)
        yield
    finally:
        for module, name, rate in found:
            setattr(module, name, rate)


class _Watcher(TrainerCallback):
    """Feeds the progress callback."""

    def __init__(self, progress: Progress | None, tokens_per_step: int) -> None:
        self.progress = progress
        self.tokens_per_step = tokens_per_step
        self.latest: dict[str, float] = {}

    def entry(self, logs: dict[str, float]) -> dict[str, float]:
        left_out = ("step", "epoch")
        head = {"step": logs["step"], "tokens": logs["step"] * self.tokens_per_step}
        return head | {name: value for name, value in logs.items() if name not in left_out}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.latest = self.entry({**logs, "step": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps, self.latest)
