"""What tests/test_sharded.py has two processes do, in one launch: `torchrun tests/sharded_jobs.py DIRECTORY`.

The launch sets what `accelerate launch` sets from a configuration of `distributed_type: FSDP`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

import kronfold as kf
import process_jobs as jobs
from kronfold.base import processes
from kronfold.distill import ObjectiveConfig
from kronfold.export.quantizer import attach
from kronfold.models.place import replace_modules
from kronfold.structures.grouped_embedding import GroupedEmbedding
from kronfold.structures.levels import TiedHead
from kronfold.structures.tensor_train import TensorTrainEmbedding
from train_examples import VOCABULARY, Blocks, gpt2

WRAPPED = {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "true"}
UNWRAPPED = {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_RESHARD_AFTER_FORWARD": "false"}
EVERYTHING = ObjectiveConfig(
    kl=1, ce=0.5, method="intermediate", options={"embedding": 1.0, "attention": 1.0, "hidden": 1.0}
)
NO_LOGITS = ObjectiveConfig(kl=0, ce=0, method="minilm")
BOTH_LEARN = ObjectiveConfig(kl=1, ce=0.5, method="ctcd")


def factorized(seed: int = 0) -> PreTrainedModel:
    """Kronecker layers with permutations, and a head that reads a factorised embedding."""
    return kf.compress(gpt2(seed), "tqcompressor")


def grouped() -> PreTrainedModel:
    torch.manual_seed(4)
    embedding = GroupedEmbedding((11, 20, 30), (9, 6, 3), 16)
    embedding.position.copy_(torch.randperm(VOCABULARY))
    return _reading(embedding)


def tensor_train() -> PreTrainedModel:
    torch.manual_seed(4)
    return _reading(TensorTrainEmbedding(VOCABULARY, (4, 4), (3,)))


def _reading(embedding: torch.nn.Module) -> PreTrainedModel:
    student = gpt2(0)
    replace_modules(student, {"transformer.wte": embedding, "lm_head": TiedHead(embedding)})
    attach(student)
    return student


def healings() -> dict[str, dict]:
    """Name to arguments of `process_jobs.healed`; each meets another part of a model or a method."""
    blocks = Blocks(10, ignore=3)
    shared = {"data": blocks, "learning_rate": 1e-2, "bf16": False, "log_every": 1, "share": (2, 1), "steps": 3}
    teacher = {"teacher": gpt2(1), "objective": ObjectiveConfig(kl=1, ce=0.5)}
    return {
        "tied": {**shared, "student": gpt2(0), **teacher},
        "untied, accumulated": {**jobs.healings()["accumulated"]},
        "unwrapped": {**shared, "student": grouped(), **teacher},
        "grouped": {**shared, "student": grouped(), **teacher},
        "tensor train": {**shared, "student": tensor_train(), **teacher},
        "everything": {**shared, "student": gpt2(0), "teacher": gpt2(1), "objective": EVERYTHING},
        "no logits": {**shared, "student": gpt2(0), "teacher": gpt2(1), "objective": NO_LOGITS},
        "both learn": {**shared, "student": gpt2(0), "teacher": gpt2(1), "objective": BOTH_LEARN},
    }


def resumable() -> dict:
    """A structured student, and a method with projections, so that every kind of state is in the checkpoint."""
    objective = {"teacher": gpt2(1, width=24), "objective": jobs.WIDER}
    job = {"data": Blocks(10, ignore=3), "learning_rate": 1e-2, "bf16": False, "log_every": 1, "share": (2, 1)}
    return {**job, "student": factorized(), **objective, "steps": 6}


class Look(TrainerCallback):
    """How much of the split student this process holds."""

    def on_train_begin(self, args, state, control, model=None, **_):
        parameters = list(model.parameters())
        self.split = isinstance(model, FSDPModule) and all(isinstance(p, DTensor) for p in parameters)
        self.share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)


def trained(job: dict, **more) -> dict:
    """Facts of one healing, with everything that was trained, whole, in every process."""
    look, student = Look(), job["student"]
    found, parameters, companions = jobs.healed(job, 2, callbacks=[look, *more.pop("callbacks", [])], **more)
    parameters = [p.full_tensor() if isinstance(p, DTensor) else p for p in parameters]
    own = [type(p) is torch.nn.Parameter and p.device.type == "cpu" for p in student.parameters()]
    plain = all(own) and not any(isinstance(m, FSDPModule) for m in student.modules())
    held = processes.gather([p.detach().numpy().tobytes() for p in student.parameters()])
    return {
        **found, "companions": companions, "split": look.split, "shares": processes.gather(look.share), "plain": plain,
        "equal": held[0] == held[1], "weights": parameters, "student": list(student.parameters()),
    }  # fmt: skip


def main(place: Path) -> None:
    processes.start("cpu")
    facts = {}
    for name, job in healings().items():
        os.environ.update(UNWRAPPED if name == "unwrapped" else WRAPPED)
        AcceleratorState._reset_state()  # it reads the environment once
        facts[name] = trained(job)
    facts["resumed"] = trained(resumable(), output_dir=place / "of-one", resume=True, save_steps=2)
    jobs.refusal(lambda: trained(resumable(), output_dir=place / "of-two", save_steps=2, callbacks=[jobs.KillAfter(5)]))
    job = healings()["tied"]
    refused = jobs.refusal(lambda: trained({**job, "teacher": gpt2(1 + processes.index())}))
    if processes.is_main():
        (place / "refused").write_text(json.dumps(refused))
        torch.save(facts, place / "facts.pt")
    processes.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
