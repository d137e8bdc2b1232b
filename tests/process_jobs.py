"""What tests/test_processes.py has two processes do, in one launch: `torchrun tests/process_jobs.py DIRECTORY`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import TrainerCallback

import pico
from kronfold.base import processes
from kronfold.distill import ObjectiveConfig
from kronfold.evaluate.lambada import lambada
from kronfold.evaluate.perplexity import perplexity
from kronfold.train import heal, store_teacher
from train_examples import Blocks, KillAfter, gpt2, llama

TEXTS = [pico.TEXT * 7, pico.TEXT * 12, pico.TEXT * 3]
PASSAGES = [" ".join(pico.TEXT.split()[start : start + 9]) for start in range(11)]
WIDER = ObjectiveConfig(kl=1, ce=0.5, method="intermediate", options={"hidden": 1.0})
NO_LOGITS = ObjectiveConfig(kl=0, ce=0, method="intermediate", options={"embedding": 1.0})
MATE = ObjectiveConfig(method="mate", options={"generator_layers": 1, "masked": 0.3, "every": 1})


class Keep(TrainerCallback):
    """Everything the optimiser trained, the method's own parameters last."""

    def on_train_end(self, args, state, control, optimizer=None, **_):
        groups = [group["params"] for group in optimizer.param_groups]
        self.trained = [p.detach().clone() for group in groups for p in group]
        self.companions = len(groups[-1])


def healings() -> dict[str, dict]:
    """Name to arguments of `heal`; "share" blocks of every step are one process's of two."""
    blocks = Blocks(10, ignore=3)  # a step ends one epoch and begins the next
    shared = {"data": blocks, "learning_rate": 1e-2, "bf16": False, "log_every": 1}
    kd = {"student": gpt2(0), "teacher": gpt2(1), "objective": ObjectiveConfig(kl=1, ce=0.5)}
    with tempfile.TemporaryDirectory() as place:  # the files stay mapped
        stored = store_teacher(gpt2(1), blocks, f"{place}/teacher", top_k=8, shard_bytes=1, batch_size=4)
    return {
        "kd": {**kd, "steps": 8, "share": (2, 1), **shared},
        "accumulated": {**kd, "student": llama(0), "steps": 3, "share": (1, 2), **shared},
        "offline": {**kd, "teacher": stored, "steps": 4, "share": (2, 1), **shared},
        "wider": {
            "student": gpt2(0), "teacher": gpt2(1, width=24), "objective": WIDER, "steps": 4, "share": (2, 1), **shared
        },
        "no logits": {
            "student": gpt2(0), "teacher": gpt2(1, width=24), "objective": NO_LOGITS, "steps": 2, "share": (2, 1),
            **shared
        },
        "mate": {
            "student": gpt2(0), "teacher": gpt2(1), "objective": MATE, "steps": 2, "share": (2, 1), **shared
        },
    }  # fmt: skip


def healed(job: dict, count: int, **more) -> tuple[dict, list[torch.Tensor], int]:
    """(result, what was trained, how much of it is the method's) with `count` processes and the same global batch."""
    job, keep = dict(job), Keep()
    share, accumulate = job.pop("share")
    batch = {"batch_size": share * 2 * accumulate, "micro_batch": share * 2 // count}
    callbacks = [keep, *more.pop("callbacks", [])]
    found = heal(**job, **batch, callbacks=callbacks, **more).to_dict()
    return found, keep.trained, keep.companions


def measured() -> dict[str, dict]:
    model, tokenizer = pico.gpt2(3, n_layer=2), pico.tokenizer()
    found = {name: perplexity(model, tokenizer, TEXTS, name, batch_size=2).to_dict() for name in ("paper", "sliding")}
    return found | {"lambada": lambada(model, tokenizer, PASSAGES, batch_size=2).to_dict()}


def refusal(work) -> list[str]:
    """The kind of error that `work` ends in, and what it says."""
    try:
        work()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def main(place: Path) -> None:
    processes.start("cpu")
    assert processes.gather(processes.index()) == [0, 1]
    assert processes.from_main(["of", processes.index()]) == ["of", 0]
    written = processes.on_main(lambda: place.joinpath("written").open("x").write("by one"))
    assert written == 6
    steps, facts = [], {"measured": measured(), "healed": {}}
    facts["wrong"] = processes.gather(refusal(lambda: processes.on_main(lambda: json.loads("not JSON"))))
    for name, job in healings().items():
        seen = (lambda done, total, logs: steps.append(done)) if name == "kd" else None
        found, trained, companions = healed(job, 2, progress=seen)
        everywhere = processes.gather([tensor.numpy().tobytes() for tensor in trained])
        facts["healed"][name] = {**found, "equal": everywhere[0] == everywhere[1], "companions": companions}
        if processes.is_main():
            torch.save(trained, place / f"{name}.pt")
    facts["reported"] = processes.gather(steps)

    job = healings()["kd"]
    found, trained, _ = healed(job, 2, output_dir=place / "of-one", resume=True, save_steps=2)
    facts["resumed"] = found
    if processes.is_main():
        torch.save(trained, place / "resumed.pt")
    refusal(
        lambda: healed(
            {**job, "student": gpt2(0)}, 2, output_dir=place / "of-two", save_steps=2, callbacks=[KillAfter(5)]
        )
    )
    facts["refused"] = processes.gather(refusal(lambda: healed(job, 2, output_dir=place / "of-two")))
    if processes.is_main():
        (place / "facts.json").write_text(json.dumps(facts))
    processes.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
