"""What tests/test_sharded.py has two processes do under FSDP2: `torchrun tests/sharded_jobs.py DIRECTORY`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import process_jobs as jobs
from kronfold.base import processes

def main(place: Path) -> None:
    processes.start("cpu")
    facts = {}
    for name, job in jobs.healings().items():
        if name == "mate": continue
        student = job["student"]
        found, trained, companions = jobs.healed(job, 2)
        trained = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in trained]
        everywhere = processes.gather([p.detach().numpy().tobytes() for p in student.parameters()])
        facts[name] = {**found, "equal": everywhere[0] == everywhere[1], "companions": companions}
        if processes.is_main():
            torch.save(trained, place / f"{name}.pt")
    if processes.is_main():
        (place / "facts.json").write_text(json.dumps(facts))
    processes.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
