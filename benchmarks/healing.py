"""Healing: tokens per second of whole steps, and the head and its losses alone, by time and by memory.

    python benchmarks/healing.py -o healing.json
    python benchmarks/healing.py --part steps --model DIR --batch 16 --length 256 --steps 3
    python benchmarks/healing.py --profile kronfold --precision bf16 --steps 2

Part "steps". The teacher has the shapes of GPT-2 small and random weights, or is the model in a directory; the student
is what `kf.compress` makes of it by recipe `tqcompressor`. In one run, in turn:

    kronfold   `kf.heal`: teacher forward, student forward and backward, AdamW
    offline    the same with the teacher's 64 likeliest tokens from disk, as from the second epoch on
    plain      transformers.Trainer with full logits, KLDivLoss (batchmean) times T² and cross entropy
    plain, no dropout     the same with the student's dropout off, as kronfold has it

A step is timed from the end of one to the end of the next; the first of each run is warm-up. The limit is the time of
the counted FLOPs (multiply-accumulates as `kronfold plan` counts them, backward twice forward, half the attention) at
the rates of matrix products measured in the same run: of the blocks' shapes, and of the two heads at 1,024 tokens.

Part "losses", at GPT-2 small's width and vocabulary: logits of 512 tokens by a dense head and by heads tied to a
factorised embedding of half and a quarter of the width; cross entropy and KL at batch 8 x 512 with the head, forward
and backward, in chunks (as kronfold trains), on full logits (straightforward) and in chunks with the teacher's 64
likeliest tokens; the peak of extra memory of the first two, each in a process of its own (VmHWM beyond what was
resident before); their gradients in float64.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import kronfold as kf
from bench import Benchmark, Run, figure, gpt2, interleaved, medians, resident, wait
from kronfold.base.errors import InputError
from kronfold.data.packing import TokenBlocks
from kronfold.distill import ObjectiveConfig, chunked_loss, head_parameters
from kronfold.distill.losses import TopK, top_k
from kronfold.models.cost import cost
from kronfold.models.load import load_model
from kronfold.nn import FactorizedEmbedding
from kronfold.train import bf16_is_fast
from kronfold.train.heal import left_as_found, without_dropout

OBJECTIVE = ObjectiveConfig(kl=1.0, ce=0.1)
LEARNING_RATE = 1e-5
TOP_K = 64
HEAD_TOKENS = 1024  # as `chunk_tokens` of the objective
WAYS = ("kronfold", "plain", "plain, no dropout", "offline")


# Whole steps


@dataclass
class Bench:
    """Everything that the runs share."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    blocks: TokenBlocks
    stored: kf.StoredTeacher
    batch: int
    device: str

    @property
    def step_tokens(self) -> int:
        return self.batch * self.blocks.ids.shape[1]


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
        teacher = F.softmax(teacher / OBJECTIVE.temperature, -1)
        return textbook_loss(student, teacher, inputs["labels"][:, 1:].flatten(), OBJECTIVE.temperature)


def textbook_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KLDivLoss with batchmean times T², and cross entropy; student: logits, teacher: probabilities at T, both (tokens,
    vocabulary)."""
    kl = F.kl_div(F.log_softmax(student / temperature, -1), teacher, reduction="batchmean")
    return OBJECTIVE.kl * temperature**2 * kl + OBJECTIVE.ce * F.cross_entropy(student, labels)


def timed_steps(bench: Bench, way: str, steps: int, bf16: bool, profiler: Any = None) -> list[float]:
    """Seconds of `steps` steps after one of warm-up."""
    clock = Clock(bench.device, profiler)
    if way in ("kronfold", "offline"):
        kf.heal(
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


def gemm_rates(bench: Bench, bf16: bool) -> dict[str, float]:
    """FLOP/s of matrix products at the sizes used: in the blocks, in the teacher's head, in the student's."""
    config = bench.teacher.config.get_text_config()
    width, hidden = config.hidden_size, getattr(config, "n_inner", None) or 4 * config.hidden_size
    stored_width = bench.student.get_input_embeddings().weight.shape[1]
    shapes = {
        "blocks": [(bench.step_tokens, *pair) for pair in ((width, width), (width, hidden), (hidden, width))],
        "teacher head": [(HEAD_TOKENS, width, config.vocab_size)],
        "student head": [(HEAD_TOKENS, stored_width, config.vocab_size)],
    }
    options: dict[str, Any] = {"device": bench.device, "dtype": torch.bfloat16 if bf16 else torch.float32}
    jobs: dict[str, Callable[[], Any]] = {}
    flops: dict[str, float] = {}
    for name, each in shapes.items():
        pairs = [(torch.randn(n, k, **options), torch.randn(m, k, **options)) for n, k, m in each]
        jobs[name] = lambda pairs=pairs: [F.linear(*pair) for pair in pairs]
        flops[name] = sum(2.0 * n * k * m for n, k, m in each)
    seconds = medians(interleaved(jobs, 5, bench.device, warm_up=2))
    return {name: flops[name] / seconds[name] for name in jobs}


def limit(bench: Bench, rates: dict[str, float], with_teacher: bool) -> float:
    """Tokens per second if nothing but the counted FLOPs took time, at those rates."""
    config = bench.teacher.config.get_text_config()
    attention = bench.blocks.ids.shape[1] * config.hidden_size * config.num_hidden_layers  # two products, half of each
    seconds = 0.0
    for name, model, passes in (("student", bench.student, 3), ("teacher", bench.teacher, int(with_teacher))):
        head = model.get_output_embeddings()
        macs = head.macs_per_token() if hasattr(head, "macs_per_token") else head.weight.numel()
        blocks = cost(model).macs_per_token - macs + attention
        seconds += 2 * passes * (blocks / rates["blocks"] + macs / rates[f"{name} head"])
    return 1 / seconds


def measure_steps(bench: Bench, run: Run, precision: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(figures, what is behind them)."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(run.options.rounds):
        for way in WAYS:
            seconds[way] += timed_steps(bench, way, run.options.steps, precision == "bf16")
    rates = gemm_rates(bench, precision == "bf16")
    speed = {way: bench.step_tokens / value for way, value in medians(seconds).items()}
    limits = {way: limit(bench, rates, way != "offline") for way in ("kronfold", "offline")}
    figures = [figure(f"{precision}: {way}, tokens/s", value) for way, value in speed.items()]
    for way in ("plain", "plain, no dropout"):
        figures.append(figure(f"{precision}: kronfold over {way}", speed["kronfold"] / speed[way], 1.2))
    figures.append(figure(f"{precision}: offline over kronfold", speed["offline"] / speed["kronfold"], 1.25))
    for way, bar in (("kronfold", 0.7), ("offline", None)):
        figures.append(figure(f"{precision}: {way}, share of what the GEMMs allow", speed[way] / limits[way], bar))
    return figures, {"precision": precision, "step_seconds": seconds, "gemm_flops_per_second": rates,
                     "limit_tokens_per_second": limits}  # fmt: skip


def profile(bench: Bench, way: str, bf16: bool, steps: int) -> str:
    """The top operations of `steps` steps, by their own time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, record_shapes=True)
    timed_steps(bench, way, steps, bf16, profiler)
    found = profiler.key_averages(group_by_input_shape=True)
    order = f"self_{bench.device}_time_total"
    return found.table(sort_by=order, row_limit=25, max_name_column_width=40, max_shapes_column_width=60)


def steps_part(run: Run, precisions: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(figures, what is behind them) of whole steps; with --profile, prints and gives none."""
    options = run.options
    if options.model:
        teacher = load_model(options.model, device=options.device)
    else:
        teacher = gpt2(options.quick, options.seed).to(options.device)
    length = min(options.length, teacher.config.max_position_embeddings)
    student = kf.compress(teacher.cpu(), "tqcompressor", seed=options.seed).to(options.device)
    teacher.to(options.device)
    ids = np.random.default_rng(options.seed).integers(teacher.config.vocab_size, size=(2 * options.batch, length))
    blocks = TokenBlocks(ids.astype(np.uint32))
    with tempfile.TemporaryDirectory() as place:
        stored = kf.store_teacher(teacher, blocks, Path(place) / "teacher", top_k=TOP_K, batch_size=options.batch)
        bench = Bench(student, teacher, blocks, stored, options.batch, options.device)
        if options.profile:
            for precision in precisions:
                print(profile(bench, options.profile, precision == "bf16", options.steps))
            return [], {}
        found = [measure_steps(bench, run, precision) for precision in precisions]
    costs = {"student": cost(student).to_dict(), "teacher": cost(teacher).to_dict()}
    return [row for rows, _ in found for row in rows], {**costs, "details": [details for _, details in found]}


# Head and losses


@dataclass(frozen=True)
class Case:
    """One micro-batch after the blocks: hidden states of student and teacher, their heads, labels."""

    hidden: Tensor
    head: nn.Module
    teacher_hidden: Tensor
    teacher_head: nn.Module
    labels: Tensor
    top: TopK | None = None

    @classmethod
    def made(cls, tokens: int, quick: bool, device: str, dtype: torch.dtype = torch.float32) -> Case:
        (width, vocabulary), where = sizes(quick), {"device": device, "dtype": dtype}
        heads = [nn.Linear(width, vocabulary, bias=False, **where) for _ in range(2)]
        states = [torch.randn(tokens, width, **where) for _ in range(2)]
        labels = torch.randint(vocabulary, (tokens,), device=device)
        return cls(states[0].requires_grad_(), heads[0], states[1], heads[1].requires_grad_(False), labels)

    def straightforward(self, temperature: float = 1.0) -> Tensor:
        student = self.head(self.hidden)
        with torch.no_grad():
            teacher = F.softmax(self.teacher_head(self.teacher_hidden) / temperature, -1)
        return textbook_loss(student, teacher, self.labels, temperature)

    def chunked(self, temperature: float = 1.0) -> Tensor:
        teacher: dict[str, Any] = {"teacher_hidden": self.teacher_hidden, "teacher_head": self.teacher_head}
        if self.top is not None:
            teacher = {"teacher_top": self.top}
        weights = {"kl": OBJECTIVE.kl, "ce": OBJECTIVE.ce}
        common = self.hidden, self.head, head_parameters(self.head), self.labels, weights
        return chunked_loss(*common, **teacher, temperature=temperature)[0] / len(self.labels)

    def step(self, way: str, bf16: bool = False) -> None:
        """Forward and backward."""
        self.hidden.grad = self.head.weight.grad = None
        with torch.autocast(self.hidden.device.type, torch.bfloat16, enabled=bf16):
            loss = self.straightforward() if way == "straightforward" else self.chunked()
        loss.backward()


def sizes(quick: bool) -> tuple[int, int]:
    """Width and vocabulary."""
    return (64, 1000) if quick else (768, 50257)


def loss_tokens(quick: bool) -> int:
    return 256 if quick else 8 * 512


@torch.no_grad()
def logits_speed(run: Run, bf16: bool) -> dict[str, list[float]]:
    """Seconds of the logits of 512 tokens by each head."""
    (width, vocabulary), device = sizes(run.options.quick), run.options.device
    where: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if bf16 else torch.float32}
    level = {"block": 2, "permute": True}
    dense = nn.Linear(width, vocabulary, bias=False, **where)
    half, quarter = (FactorizedEmbedding(vocabulary, width, [level] * count, **where) for count in (1, 2))
    for buffer in (*half.buffers(), *quarter.buffers()):  # gathers
        buffer.copy_(torch.randperm(buffer.numel()))
    hidden = torch.randn(64 if run.options.quick else 512, width, **where)
    jobs: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(hidden),
        "half width": lambda: half.project(hidden),
        "quarter width": lambda: quarter.project(hidden),
    }
    return interleaved(jobs, 3 * run.options.rounds, device, warm_up=3)


def loss_speed(run: Run, bf16: bool) -> dict[str, list[float]]:
    """Seconds of a step of the losses, each way."""
    case = Case.made(loss_tokens(run.options.quick), run.options.quick, run.options.device)
    with torch.no_grad():
        parts = [top_k(case.teacher_head(rows), TOP_K) for rows in case.teacher_hidden.split(256)]
        kept = TopK(torch.cat([p.ids for p in parts]).int(), torch.cat([p.log_probs for p in parts]).half())
    stored = Case(case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.labels, kept)
    jobs: dict[str, Callable[[], Any]] = {
        "chunked": lambda: case.step("chunked", bf16),
        "straightforward": lambda: case.step("straightforward", bf16),
        "stored": lambda: stored.step("chunked", bf16),
    }
    return interleaved(jobs, run.options.rounds, run.options.device)


def extra_memory(options: argparse.Namespace, way: str, precision: str) -> dict[str, Any]:
    """Job of a process of its own: bytes at the peak of one step beyond what lay there before."""
    case, bf16 = Case.made(loss_tokens(options.quick), options.quick, options.device), precision == "bf16"
    few = Case(case.hidden[:8].detach().requires_grad_(), case.head, case.teacher_hidden[:8], case.teacher_head,
               case.labels[:8])  # fmt: skip
    few.step(way, bf16)
    case.head.weight.grad = None
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.step(way, bf16)
        return {"bytes": torch.cuda.max_memory_allocated() - before}
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # VmHWM starts again from what is resident now
    before = resident()
    case.step(way, bf16)
    return {"bytes": resident() - before}


def losses_part(run: Run, precisions: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(figures, what is behind them) of head and losses."""
    figures, details = [], []
    for precision in precisions:
        logits, losses = logits_speed(run, precision == "bf16"), loss_speed(run, precision == "bf16")
        memory = {way: run.child("memory", way, precision)["bytes"] for way in ("chunked", "straightforward")}
        head, loss = medians(logits), medians(losses)
        chunked, full = loss["chunked"], loss["straightforward"]
        figures += [
            figure(f"{precision}: logits, half width over dense, speed", head["dense"] / head["half width"], 1.8),
            figure(f"{precision}: logits, quarter width over dense, speed", head["dense"] / head["quarter width"], 3.2),
            figure(f"{precision}: losses, chunked / straightforward, time", chunked / full, 1.05, at_most=True),
            figure(f"{precision}: losses, stored teacher / chunked, time", loss["stored"] / chunked),
        ]
        if memory["straightforward"] > 0:  # tiny sizes need no memory beyond what was there
            ratio = memory["chunked"] / memory["straightforward"]
            figures.append(figure(f"{precision}: losses, chunked / straightforward, peak memory", ratio, 0.25, True))
        details.append(
            {"precision": precision, "logits_seconds": logits, "loss_seconds": losses, "extra_bytes": memory}
        )
    case = Case.made(64, run.options.quick, run.options.device, torch.float64)
    wanted = [case.hidden, case.head.weight]
    found, true = (torch.autograd.grad(way(2.0), wanted) for way in (case.chunked, case.straightforward))
    difference = max(float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))
    figures.append(figure("float64: gradients, relative difference", difference, 1e-6, at_most=True))
    return figures, {"details": details}


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    precisions = ["fp32", *(["bf16"] if bf16_is_fast(options.device) else [])]
    precisions = options.precision.split(",") if options.precision else precisions
    if wrong := set(precisions) - {"fp32", "bf16"}:
        raise InputError(f"--precision {', '.join(sorted(wrong))}: give fp32, bf16 or both with a comma.")
    figures, content = [], {}
    for name, part in (("losses", losses_part), ("steps", steps_part)):
        if options.part in (None, name) and not (options.profile and name == "losses"):
            rows, content[name] = part(run, precisions)
            figures += rows
    return {"figures": figures, **content}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--part", choices=("steps", "losses"), help="only this part")
    made.add_argument("--precision", help="fp32, bf16 or both with a comma; default: bf16 only where it is fast")
    made.add_argument("--model", help="of the steps: a model directory instead of GPT-2 small's shapes")
    made.add_argument("--batch", type=int, default=4, help="blocks per step")
    made.add_argument("--length", type=int, default=512, help="tokens per block, at most the model's context")
    made.add_argument("--steps", type=int, default=1, help="timed steps per run, after one of warm-up")
    made.add_argument("--profile", choices=("kronfold", "offline", "plain"), help="print the top operations instead")


QUICK = {"precision": "fp32", "model": None, "batch": 2, "length": 32, "steps": 1, "profile": None}
BENCHMARK = Benchmark("healing", __doc__ or "", add_options, measure, QUICK, 3, {"memory": extra_memory})

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
