"""The language-model head and its losses: how fast, and how much memory, beside the straightforward way.

    python benchmarks/loss_speed.py -o results.json

Shapes of GPT-2 small: width 768, vocabulary 50,257.

1. Logits of 512 tokens: a dense head, and the head tied to a factorised embedding of half, of a quarter of the width.
2. Cross entropy and KL at batch 8 x 512, head included, forward and backward: in chunks (as kronfold trains), and on
   full logits (`straightforward`). `stored` is the same in chunks with the teacher's 64 likeliest tokens from disk.
3. Peak memory of these two, each in a process of its own: the highest resident memory (VmHWM, reset after the inputs
   were made and a first call on a few tokens) minus that before. It holds the gradients of hidden states and head,
   which both need. On CUDA: torch.cuda.max_memory_allocated, alike.
4. Their gradients in float64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronfold.base.errors import KronfoldError
from kronfold.distill import chunked_loss, head_parameters
from kronfold.distill.losses import TopK, top_k
from kronfold.nn import FactorizedEmbedding
from kronfold.train import bf16_is_fast
from large_models import peak_resident
from timing import figure, finish, interleaved, medians, parser, prepare

KL, CE, TOP_K = 1.0, 0.1, 64


@dataclass(frozen=True)
class Sizes:
    width: int = 768
    vocabulary: int = 50257
    logit_tokens: int = 512
    loss_tokens: int = 8 * 512
    rounds: int = 5


QUICK = Sizes(width=64, vocabulary=1000, logit_tokens=64, loss_tokens=256, rounds=2)


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
    def made(cls, tokens: int, sizes: Sizes, device: str, dtype: torch.dtype = torch.float32) -> Case:
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        heads = [nn.Linear(sizes.width, sizes.vocabulary, bias=False, **where) for _ in range(2)]
        states = [torch.randn(tokens, sizes.width, **where) for _ in range(2)]
        labels = torch.randint(sizes.vocabulary, (tokens,), device=device)
        return cls(states[0].requires_grad_(), heads[0], states[1], heads[1].requires_grad_(False), labels)

    def straightforward(self, temperature: float = 1.0) -> Tensor:
        """The textbook: full logits, KLDivLoss with batchmean times T², cross entropy."""
        student = self.head(self.hidden)
        with torch.no_grad():
            teacher = F.softmax(self.teacher_head(self.teacher_hidden) / temperature, -1)
        softened = F.log_softmax(student / temperature, -1)
        kl = F.kl_div(softened, teacher, reduction="batchmean") * temperature**2
        return KL * kl + CE * F.cross_entropy(student, self.labels)

    def chunked(self, temperature: float = 1.0) -> Tensor:
        teacher: dict[str, Any] = {"teacher_hidden": self.teacher_hidden, "teacher_head": self.teacher_head}
        if self.top is not None:
            teacher = {"teacher_top": self.top}
        weights = {"kl": KL, "ce": CE}
        common = self.hidden, self.head, head_parameters(self.head), self.labels, weights
        return chunked_loss(*common, **teacher, temperature=temperature)[0] / len(self.labels)

    def step(self, way: str, bf16: bool = False) -> None:
        """Forward and backward."""
        self.hidden.grad = self.head.weight.grad = None
        with torch.autocast(self.hidden.device.type, torch.bfloat16, enabled=bf16):
            loss = self.straightforward() if way == "straightforward" else self.chunked()
        loss.backward()


@torch.no_grad()
def logits_speed(sizes: Sizes, device: str, bf16: bool) -> dict[str, list[float]]:
    dtype = torch.bfloat16 if bf16 else torch.float32
    where: dict[str, Any] = {"device": device, "dtype": dtype}
    level = {"block": 2, "permute": True}
    dense = nn.Linear(sizes.width, sizes.vocabulary, bias=False, **where)
    half = FactorizedEmbedding(sizes.vocabulary, sizes.width, [level], **where)
    quarter = FactorizedEmbedding(sizes.vocabulary, sizes.width, [level, level], **where)
    for embedding in (half, quarter):
        for one in embedding.levels:
            one.gather.copy_(torch.randperm(len(one.gather)))
    hidden = torch.randn(sizes.logit_tokens, sizes.width, **where)
    jobs: dict[str, Callable[[], Any]] = {
        "dense": lambda: dense(hidden),
        "half width": lambda: half.project(hidden),
        "quarter width": lambda: quarter.project(hidden),
    }
    return interleaved(jobs, 3 * sizes.rounds, device, warm_up=3)


def loss_speed(sizes: Sizes, device: str, bf16: bool) -> dict[str, list[float]]:
    case = Case.made(sizes.loss_tokens, sizes, device)
    with torch.no_grad():
        parts = [top_k(case.teacher_head(rows), TOP_K) for rows in case.teacher_hidden.split(256)]
        kept = TopK(torch.cat([p.ids for p in parts]).int(), torch.cat([p.log_probs for p in parts]).half())
    stored = Case(case.hidden, case.head, case.teacher_hidden, case.teacher_head, case.labels, kept)
    jobs: dict[str, Callable[[], Any]] = {
        "chunked": lambda: case.step("chunked", bf16),
        "straightforward": lambda: case.step("straightforward", bf16),
        "stored": lambda: stored.step("chunked", bf16),
    }
    return interleaved(jobs, sizes.rounds, device)


def extra_memory(way: str, sizes: Sizes, device: str, bf16: bool) -> int:
    """Bytes at the peak of one step beyond what lay there before. Run it in a process of its own."""
    case = Case.made(sizes.loss_tokens, sizes, device)
    few = Case(case.hidden[:8].detach().requires_grad_(), case.head, case.teacher_hidden[:8], case.teacher_head,
               case.labels[:8])  # fmt: skip
    few.step(way, bf16)
    case.head.weight.grad = None
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.step(way, bf16)
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # VmHWM starts again from what is resident now
    before = peak_resident()
    case.step(way, bf16)
    return peak_resident() - before


def memory(sizes: Sizes, options: argparse.Namespace, bf16: bool) -> dict[str, int]:
    found = {}
    for way in ("chunked", "straightforward"):
        command = [sys.executable, __file__, "--memory-of", way, "--device", options.device]
        command += [*(["--bf16"] if bf16 else []), *(["--quick"] if options.quick else [])]
        command += ["--threads", str(torch.get_num_threads())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout)
    return found


def gradient_difference(sizes: Sizes, device: str) -> float:
    """The larger relative difference of the two gradients, float64, T = 2, a few tokens."""
    case = Case.made(min(64, sizes.loss_tokens), sizes, device, torch.float64)
    wanted = [case.hidden, case.head.weight]
    found = torch.autograd.grad(case.chunked(2.0), wanted)
    true = torch.autograd.grad(case.straightforward(2.0), wanted)
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, true, strict=True))


def measure(sizes: Sizes, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(figures, everything behind them)."""
    figures, details = [], []
    precisions = ["fp32", *(["bf16"] if options.bf16 or bf16_is_fast(options.device) else [])]
    for precision in precisions:
        bf16 = precision == "bf16"
        logits, losses = logits_speed(sizes, options.device, bf16), loss_speed(sizes, options.device, bf16)
        bytes_ = memory(sizes, options, bf16)
        head, loss = medians(logits), medians(losses)
        figures += [
            figure(f"{precision}: logits, half width over dense, speed", head["dense"] / head["half width"], 1.8),
            figure(f"{precision}: logits, quarter width over dense, speed", head["dense"] / head["quarter width"], 3.2),
            figure(f"{precision}: losses, chunked / straightforward, time",
                   loss["chunked"] / loss["straightforward"], 1.05, at_most=True),
            figure(f"{precision}: losses, chunked / straightforward, peak extra memory",
                   bytes_["chunked"] / bytes_["straightforward"], 0.25, at_most=True),
            figure(f"{precision}: losses, stored teacher / chunked, time", loss["stored"] / loss["chunked"]),
        ]  # fmt: skip
        details.append(
            {"precision": precision, "logits_seconds": logits, "loss_seconds": losses, "extra_bytes": bytes_}
        )
    difference = gradient_difference(sizes, options.device)
    figures.append(figure("float64: gradients, relative difference", difference, 1e-6, at_most=True))
    return figures, details


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--bf16", action="store_true", help="also in bfloat16 where it is not fast")
    made.add_argument("--memory-of", choices=("chunked", "straightforward"), help=argparse.SUPPRESS)
    options = made.parse_args()
    try:
        prepare(options)
        sizes = QUICK if options.quick else Sizes()
        if options.memory_of:
            print(extra_memory(options.memory_of, sizes, options.device, options.bf16))
            return
        if options.rounds:
            sizes = Sizes(**{**sizes.__dict__, "rounds": options.rounds})
        figures, details = measure(sizes, options)
        finish("loss_speed", options, figures, sizes=sizes.__dict__, details=details)
    except KronfoldError as error:
        made.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
