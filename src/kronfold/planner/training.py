"""What a healing takes on each device, and how many tokens and steps it is: formulas, no model is run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from transformers import PretrainedConfig

from kronfold.base.errors import InputError
from kronfold.planner.plan import Plan

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainingShape:
    """What of a model decides about activations.

    Attributes:
        width: of the residual stream. hidden: units of the feed-forward part. layers: transformer blocks of the
            student. vocabulary: rows of the embedding.
    """

    width: int
    hidden: int
    layers: int
    vocabulary: int

    @classmethod
    def of(cls, config: PretrainedConfig, layers: int | None = None) -> TrainingShape:
        """From a config of any family; `layers` where the student keeps fewer blocks."""
        text = config.get_text_config()
        width = text.hidden_size
        hidden = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * width
        return cls(width, hidden, layers or text.num_hidden_layers, text.vocab_size)


@dataclass(frozen=True)
class TrainingJob:
    """How a healing is run.

    Args:
        tokens: budget in all. block: tokens of a block. batch: blocks per optimiser step, over all processes.
        micro_batch: blocks a process takes at once, None for its whole share. processes: one for each device.
        precision: of matrix products; weights, gradients and the optimiser's state are fp32 always.
        sharded: weights, gradients and optimiser split over the processes (FSDP2, block by block), else a copy in each
            (DDP).
        chunk: tokens whose logits are alive at once (`ObjectiveConfig.chunk_tokens`).

    Raises:
        InputError: a count below 1, or a batch that the processes or micro-batches do not divide.
    """

    tokens: int
    block: int = 1024
    batch: int = 16
    micro_batch: int | None = None
    processes: int = 1
    precision: Precision = "bf16"
    sharded: bool = False
    chunk: int = 1024

    def __post_init__(self) -> None:
        counts = ("tokens", "block", "batch", "micro_batch", "processes", "chunk")
        faults = [f"{name} is {getattr(self, name)}" for name in counts if (getattr(self, name) or 1) < 1]
        if faults:
            raise InputError(f"A healing cannot be planned: {', '.join(faults)}; give at least 1.")
        if self.precision not in ("fp32", "bf16"):
            raise InputError(f"Precision {self.precision!r} is unknown. Allowed: fp32, bf16.")
        if self.batch % self.processes or (self.batch // self.processes) % self.at_once:
            raise InputError(
                f"A batch of {self.batch} blocks cannot be split equally over {self.processes} process(es) in "
                f"micro-batches of {self.at_once}. Choose a batch that is a multiple of "
                f"{self.processes * self.at_once}."
            )

    @property
    def at_once(self) -> int:
        """Blocks a process takes through the models at once."""
        share = max(1, self.batch // self.processes)
        return min(self.micro_batch or share, share)


def training_cost(student: int, teacher: int, shape: TrainingShape, job: TrainingJob) -> dict[str, Any]:
    """Bytes per device by what they are for, tokens per step, and steps of the budget.

    With P = `student` and T = `teacher` (held parameters; T = 0 without a teacher), n tokens in a micro-batch, s bytes
    per number of a matrix product (4 or 2), d, f, L, V the shape, S = processes when sharded, else 1:

    - weights 4 P / S, gradients 4 P / S, AdamW's two moments 8 P / S
    - buckets 4 P: DDP gathers the gradients in memory of its own (several processes, not sharded)
    - gathered (4 + 4) (E + 2 B): when sharded, weights and gradients that are whole at one time: two blocks, the next
      being fetched, and what stands outside the blocks, which the head needs from forward to backward. E is at most
      V d, the dense embedding with its head tied; B is a block's share of the rest
    - copies 2 P: with bf16, autocast keeps a copy of every weight for the step
    - teacher 4 T, and with bf16 2 V d more, a copy of its head; in every process, it is not sharded
    - activations n L ((2 · 4 + 6 s) d + 5 s f) + 4 n · 3 d: in each block what two norms read, in fp32; with s bytes
      what they give, queries, keys, values and the heads' output, and five tensors of the hidden units' width, which
      GPT-2's activation function keeps; then embeddings, last norm and last hidden state. Counted on dense GPT-2; a
      gated feed-forward part keeps four instead of five
    - logits 4 c V · 3: student, teacher, and the gradient, of one chunk of c tokens

    Not counted: what the allocator rounds up, the library's own memory (about 1 GB with CUDA), and what a method beyond
    the logits compares.
    """
    width = 2 if job.precision == "bf16" else 4
    parts = job.processes if job.sharded else 1
    tokens = job.at_once * job.block
    half = job.precision == "bf16"
    block = (2 * 4 + 6 * width) * shape.width + 5 * width * shape.hidden
    outside = min(student, shape.vocabulary * shape.width)
    memory = {
        "weights": math.ceil(4 * student / parts),
        "gradients": math.ceil(4 * student / parts),
        "optimiser": math.ceil(8 * student / parts),
        "buckets": 4 * student if job.processes > 1 and not job.sharded else 0,
        "gathered": 8 * (outside + 2 * math.ceil((student - outside) / shape.layers)) if job.sharded else 0,
        "copies": 2 * student if half else 0,
        "teacher": 4 * teacher + (2 * shape.vocabulary * shape.width if half and teacher else 0),
        "activations": tokens * (shape.layers * block + 4 * 3 * shape.width),
        "logits": 4 * min(job.chunk, tokens) * shape.vocabulary * (3 if teacher else 2),
    }
    per_step = job.batch * job.block
    steps = math.ceil(job.tokens / per_step)
    return {
        **asdict(job),
        "micro_batch": job.at_once,
        "accumulate": job.batch // job.processes // job.at_once,
        "memory": memory,
        "memory_per_device": sum(memory.values()),
        "tokens_per_step": per_step,
        "tokens_per_device_and_step": per_step // job.processes,
        "steps": steps,
        "tokens_trained": steps * per_step,
    }


def training_of(
    plan: Plan,
    config: PretrainedConfig,
    *,
    tokens: int | None = None,
    batch: int | None = None,
    block: int | None = None,
    **job: Any,
) -> dict[str, Any]:
    """`training_cost` of healing what `plan` makes of the model `config` is of.

    `tokens`, `batch`: by default those of the plan's stages, in all and the largest. `block`: default the context, at
    most 1024. `job`: the other fields of `TrainingJob`. The student is counted as large as it is after all stages.
    Raises InputError; also when the plan heals nothing and no budget is given.
    """
    heals = [stage.heal for stage in plan.stages if stage.heal]
    budget = tokens or sum(heal.tokens or 0 for heal in heals)
    if not budget:
        raise InputError(f"Recipe {plan.recipe} does not heal. Give a budget with --heal-tokens.")
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 1024
    kept = len(plan.layers.kept) if plan.layers else None
    chosen = TrainingJob(
        tokens=budget,
        batch=batch or max((heal.batch_size for heal in heals), default=16),
        block=min(block or 1024, context),
        **job,
    )
    return training_cost(plan.held_parameters, plan.teacher.held_parameters, TrainingShape.of(config, kept), chosen)
