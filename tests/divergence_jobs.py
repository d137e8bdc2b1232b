"""What tests/test_train_divergence.py has two processes do: `torchrun tests/divergence_jobs.py DIRECTORY`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

from kronfold.base import processes
from kronfold.base.errors import DivergedError, NotFiniteError
from kronfold.train import heal
from train_examples import Blocks, gpt2


def main(place: Path) -> None:
    processes.start("cpu")
    options = {
        "steps": 6,
        "batch_size": 2,
        "bf16": False,
        "log_every": 3,
        "save_steps": 1,
        "output_dir": place / "work",
    }
    facts = {}
    try:
        heal(gpt2(0), gpt2(1), Blocks(), learning_rate=1e30, **options)
    except DivergedError as error:
        facts["diverged"] = processes.gather(str(error))
    found = heal(gpt2(0), gpt2(1), Blocks(), learning_rate=1e-3, resume=True, **options)
    facts["resumed"] = processes.gather([found.resumed_from, found.steps])
    teacher = gpt2(1)
    with torch.no_grad():
        teacher.transformer.h[0].ln_1.weight[0] = math.nan
    try:
        heal(gpt2(0), teacher, Blocks(), steps=3, bf16=False)
    except NotFiniteError as error:
        facts["teacher"] = processes.gather(str(error))
    if processes.is_main():
        (place / "facts.json").write_text(json.dumps(facts))
    processes.stop()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
