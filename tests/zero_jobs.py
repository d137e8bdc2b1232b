"""What tests/test_zero.py has two processes do, in one launch: `torchrun tests/zero_jobs.py DIRECTORY`.

The launch sets what `accelerate launch` sets from a configuration of `distributed_type: DEEPSPEED`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

import process_jobs as jobs
import sharded_jobs
from kronfold.base import processes
from train_examples import gpt2


def healings() -> dict[str, dict]:
    """Name to arguments of `process_jobs.healed`: methods without parameters of their own."""
    split = sharded_jobs.healings()
    return {
        "kd": jobs.healings()["kd"],
        "accumulated, untied": jobs.healings()["accumulated"],
        "offline": jobs.healings()["offline"],
        "grouped": split["grouped"],
        "everything": split["everything"],
        "no logits": split["no logits"],
        "factorized": resumable(),
    }


def resumable() -> dict:
    return {**jobs.healings()["kd"], "student": sharded_jobs.factorized(), "steps": 6}


def trained(job: dict, **more) -> dict:
    """Facts of one healing: the student's weights afterwards, whether all hold the same, and are free of hooks."""
    student = job["student"]
    found, parts, _ = jobs.healed(job, 2, **more)
    held = processes.gather([p.detach().numpy().tobytes() for p in student.parameters()])
    return {
        **found,
        "equal": held[0] == held[1],
        "student": [p.detach() for p in student.parameters()],
        "plain": not any(p.__dict__ for p in student.parameters()),
        "parts": processes.gather(sum(p.numel() for p in parts)),  # of the optimiser, in each process
        "numbers": sum(p.numel() for p in student.parameters()),
    }


def main(place: Path) -> None:
    facts = {name: trained(job) for name, job in healings().items()}
    run = {"output_dir": place / "run", "save_steps": 2}
    jobs.refusal(lambda: trained(resumable(), **run, callbacks=[jobs.KillAfter(5)]))
    facts["resumed"] = trained(resumable(), **run, resume=True)
    wider = {"student": gpt2(0), "teacher": gpt2(1, width=24), "objective": jobs.WIDER}
    facts["refused"] = jobs.refusal(lambda: trained({**resumable(), **wider}))
    file = place / "other.json"
    processes.on_main(
        lambda: file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 7.0}))
    )
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(file)
    facts["differs"] = jobs.refusal(lambda: trained(jobs.healings()["kd"]))
    if processes.is_main():
        torch.save(facts, place / "facts.pt")
    processes.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
