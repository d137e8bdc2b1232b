"""Tokens per second of healing, beside a plain Trainer with the textbook loss and beside what the GEMMs allow.

    python benchmarks/heal_speed.py -o results.json
    python benchmarks/heal_speed.py --model DIR
    python benchmarks/heal_speed.py --profile kronfold

The teacher has the shapes of GPT-2 small and random weights, or is the model in a directory; the student has the
modules of recipe `tqcompressor` with random factors and permutations (speed asks no more of them). In one run, in turn:

    kronfold   `kronfold.heal`: teacher forward, student forward and backward, AdamW
    offline    the same with the teacher's 64 likeliest tokens from disk, as from the second epoch on
    plain      transformers.Trainer with full logits, KLDivLoss (batchmean) times T² and cross entropy
    plain, no dropout     the same with the student's dropout off, as kronfold has it

A step is timed from the end of one to the end of the next; the first of each run is warm-up. The limit is the time of
the counted FLOPs (multiply-accumulates as `kronfold plan` counts them, backward twice forward, half the attention) at
the rates of matrix products measured in the same run: of the blocks' shapes, and of the two heads at 1024 tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

from kronfold.base.errors import KronfoldError
from kronfold.data.packing import TokenBlocks
from kronfold.distill import ObjectiveConfig
from kronfold.distill.stored import StoredTeacher
from kronfold.models.cost import cost
from kronfold.models.load import load_model
from kronfold.models.place import build_skeleton, read_specs
from kronfold.models.presets import preset_config
from kronfold.pipelines.gathers import absorb_gathers
from kronfold.planner import planning
from kronfold.structures.levels import TiedHead
from kronfold.train import bf16_is_fast, heal, store_teacher
from kronfold.train.heal import left_as_found, without_dropout
from timing import figure, finish, interleaved, medians, parser, prepare, wait

OBJECTIVE = ObjectiveConfig(kl=1.0, ce=0.1)
LEARNING_RATE = 1e-5
HEAD_TOKENS = 1024  # as `chunk_tokens` of the objective
BARS = {"plain": 1.2, "plain, no dropout": 1.2, "offline": 1.25, "limit": 0.7}


@dataclass
class Bench:
    """Everything that the runs share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    blocks: TokenBlocks
    stored: StoredTeacher
    batch: int
    device: str

    @property
    def step_tokens(self) -> int:
        return self.batch * self.blocks.ids.shape[1]


def models(source: str | None, quick: bool, device: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(student, teacher)."""
    if source:
        teacher = load_model(source, device=device)
        config = teacher.config
    else:
        config = preset_config("gpt2")
        if quick:
            config.n_embd, config.n_layer, config.n_head, config.vocab_size = 64, 2, 4, 1000
        teacher = AutoModelForCausalLM.from_config(config).to(device)
    student = AutoModelForCausalLM.from_config(config)
    skeleton = planning.skeleton_of(config)
    for stage in planning.plan(config, "tqcompressor").stages:
        planning.place_empty(skeleton, stage.rows)
    build_skeleton(student, read_specs(skeleton))
    for buffer in student.buffers():
        if buffer.dtype == torch.int32:  # gathers
            buffer.copy_(torch.randperm(len(buffer)))
    absorb_gathers(student)
    return student.to(device), teacher


class Clock(TrainerCallback):
    """Seconds of every step but the first; `profiler` sees these too."""

    def __init__(self, device: str, profiler: Any = None) -> None:
        self.device, self.profiler = device, profiler
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        wait(self.device)
        self.ends.append(time.perf_counter())
        if self.profiler and state.global_step == 1:
            self.profiler.start()
        if self.profiler and state.global_step == state.max_steps:
            self.profiler.stop()

    @property
    def seconds(self) -> list[float]:
        return [end - start for start, end in zip(self.ends, self.ends[1:], strict=False)]


class TextbookTrainer(Trainer):
    """Knowledge distillation as it is usually written."""

    def __init__(self, teacher: PreTrainedModel, **options: Any) -> None:
        super().__init__(**options)
        self.teacher = teacher.eval()

    def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
        with self.accelerator.autocast():
            with torch.no_grad():
                teacher = self.teacher(input_ids=inputs["input_ids"]).logits
            student = model(input_ids=inputs["input_ids"]).logits
        student, teacher = (logits[:, :-1].flatten(0, 1).float() for logits in (student, teacher))
        temperature = OBJECTIVE.temperature
        kl = torch.nn.KLDivLoss(reduction="batchmean")(
            F.log_softmax(student / temperature, -1), F.softmax(teacher / temperature, -1)
        )
        ce = F.cross_entropy(student, inputs["labels"][:, 1:].flatten())
        return OBJECTIVE.kl * temperature**2 * kl + OBJECTIVE.ce * ce


def run(bench: Bench, way: str, steps: int, bf16: bool, profiler: Any = None) -> list[float]:
    """Seconds of `steps` steps after one of warm-up."""
    clock = Clock(bench.device, profiler)
    if way in ("kronfold", "offline"):
        heal(
            bench.student, bench.stored if way == "offline" else bench.teacher, bench.blocks,
            steps=1 + steps, batch_size=bench.batch, learning_rate=LEARNING_RATE, objective=OBJECTIVE, bf16=bf16,
            device=bench.device, callbacks=[clock],
        )  # fmt: skip
        return clock.seconds
    with tempfile.TemporaryDirectory() as place, left_as_found(bench.student, bench.teacher):
        args = TrainingArguments(
            output_dir=place, per_device_train_batch_size=bench.batch, max_steps=1 + steps,
            learning_rate=LEARNING_RATE, lr_scheduler_type="cosine", bf16=bf16, use_cpu=bench.device == "cpu",
            save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
            dataloader_pin_memory=bench.device != "cpu",
        )  # fmt: skip
        trainer = TextbookTrainer(
            bench.teacher, model=bench.student, args=args, train_dataset=bench.blocks, callbacks=[clock]
        )
        trainer.remove_callback(PrinterCallback)
        if way == "plain, no dropout":
            with without_dropout(bench.student):
                trainer.train()
        else:
            trainer.train()
    return clock.seconds


def head_macs(model: PreTrainedModel) -> float:
    head = model.get_output_embeddings()
    return head.macs_per_token() if isinstance(head, TiedHead) else head.weight.numel()


def gemm_rates(bench: Bench, bf16: bool, rounds: int) -> dict[str, float]:
    """FLOP/s of matrix products at the sizes used: in the blocks, in the teacher's head, in the student's."""
    config = bench.teacher.config.get_text_config()
    width, hidden = config.hidden_size, getattr(config, "n_inner", None) or 4 * config.hidden_size
    embedding = bench.student.get_input_embeddings()
    shapes = {
        "blocks": [(bench.step_tokens, *pair) for pair in ((width, width), (width, hidden), (hidden, width))],
        "teacher head": [(HEAD_TOKENS, width, config.vocab_size)],
        "student head": [(HEAD_TOKENS, embedding.weight.shape[1], config.vocab_size)],
    }
    options: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16 if bf16 else torch.float32}
    jobs: dict[str, Callable[[], Tensor]] = {}
    flops: dict[str, float] = {}
    for name, each in shapes.items():
        pairs = [(torch.randn(n, k, **options), torch.randn(m, k, **options)) for n, k, m in each]
        jobs[name] = lambda pairs=pairs: [F.linear(*pair) for pair in pairs]
        flops[name] = sum(2.0 * n * k * m for n, k, m in each)
    seconds = medians(interleaved(jobs, rounds, bench.device, warm_up=2))
    return {name: flops[name] / seconds[name] for name in jobs}


def limit(bench: Bench, rates: dict[str, float], with_teacher: bool) -> float:
    """Tokens per second if nothing but the counted FLOPs took time, at those rates."""
    config = bench.teacher.config.get_text_config()
    attention = bench.blocks.ids.shape[1] * config.hidden_size * config.num_hidden_layers  # two products, half of each
    seconds = 0.0
    for name, model, passes in (("student", bench.student, 3), ("teacher", bench.teacher, 1)):
        if name == "teacher" and not with_teacher:
            continue
        head = head_macs(model)
        blocks = cost(model).macs_per_token - head + attention
        seconds += 2 * passes * (blocks / rates["blocks"] + head / rates[f"{name} head"])
    return 1 / seconds


def measure(bench: Bench, precision: str, rounds: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    bf16 = precision == "bf16"
    ways = ["kronfold", "plain", "plain, no dropout", "offline"]
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            seconds[way] += run(bench, way, steps, bf16)
    rates = gemm_rates(bench, bf16, 5)
    speed = {way: bench.step_tokens / value for way, value in medians(seconds).items()}
    limits = {way: limit(bench, rates, way != "offline") for way in ("kronfold", "offline")}
    figures = [figure(f"{precision}: {way}, tokens/s", value) for way, value in speed.items()]
    for way in ("plain", "plain, no dropout"):
        figures.append(figure(f"{precision}: kronfold over {way}", speed["kronfold"] / speed[way], BARS[way]))
    share = speed["kronfold"] / limits["kronfold"]
    figures += [
        figure(f"{precision}: offline over kronfold", speed["offline"] / speed["kronfold"], BARS["offline"]),
        figure(f"{precision}: kronfold, share of what the GEMMs allow", share, BARS["limit"]),
        figure(f"{precision}: offline, share of what the GEMMs allow", speed["offline"] / limits["offline"]),
    ]
    return figures, {
        "precision": precision,
        "step_seconds": seconds,
        "gemm_flops_per_second": rates,
        "limit_tokens_per_second": limits,
    }


def profile(bench: Bench, way: str, bf16: bool, steps: int) -> str:
    """The top operations of `steps` steps, by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    run(bench, way, steps, bf16, profiler)
    order = f"self_{bench.device}_time_total"
    found = profiler.key_averages(group_by_input_shape=True)
    return found.table(sort_by=order, row_limit=25, max_name_column_width=40, max_shapes_column_width=60)


def options_of() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    made = parser(__doc__)
    made.add_argument("--model", help="a model directory instead of GPT-2 small's shapes")
    made.add_argument("--batch", type=int, default=4, help="blocks per step")
    made.add_argument("--length", type=int, default=512, help="tokens per block, at most the model's context")
    made.add_argument("--steps", type=int, default=1, help="timed steps per run, after one of warm-up")
    made.add_argument("--top-k", type=int, default=64, help="of the offline teacher")
    made.add_argument("--precision", help="fp32, bf16 or both with a comma; default: bf16 only where it is fast")
    made.add_argument("--profile", choices=("kronfold", "offline", "plain"), help="print the top operations instead")
    return made, made.parse_args()


def main() -> None:
    made, options = options_of()
    logging.set_verbosity_error()
    try:
        prepare(options)
        precisions = ["fp32", *(["bf16"] if bf16_is_fast(options.device) else [])]
        precisions = options.precision.split(",") if options.precision else precisions
        student, teacher = models(options.model, options.quick, options.device)
        length = min(options.length, 32 if options.quick else teacher.config.max_position_embeddings)
        ids = np.random.default_rng(options.seed).integers(teacher.config.vocab_size, size=(2 * options.batch, length))
        blocks = TokenBlocks(ids.astype(np.uint32))
        with tempfile.TemporaryDirectory() as place:
            stored = store_teacher(
                teacher, blocks, Path(place) / "teacher", top_k=options.top_k, batch_size=options.batch
            )
            bench = Bench(student, teacher, blocks, stored, options.batch, options.device)
            if options.profile:
                for precision in precisions:
                    print(profile(bench, options.profile, precision == "bf16", options.steps))
                return
            found = [measure(bench, precision, options.rounds or 2, options.steps) for precision in precisions]
        facts = {
            "model": Path(options.model).name if options.model else "shapes of GPT-2 small, random weights",
            "batch": options.batch,
            "length": length,
            "top_k": options.top_k,
            "student": cost(student).to_dict(),
            "teacher": cost(teacher).to_dict(),
        }
        figures = [row for rows, _ in found for row in rows]
        finish("heal_speed", options, figures, **facts, details=[details for _, details in found])
    except KronfoldError as error:
        made.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
