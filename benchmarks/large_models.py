"""Time and memory of planning and compressing, whole and block by block from files, by model size.

    python benchmarks/large_models.py --sizes gpt2 -o large_models.json       # the bars of GPT-2 small, minutes
    python benchmarks/large_models.py --sizes gpt2-xl --jobs plan,stream -o large_models.json

For every size a checkpoint of random numbers is written to disk (fp16, GPT-2's shapes; random matrices are no easier to
fit than real ones). Each job runs in a process of its own, so that peak resident memory is its own:

    import         load the library and nothing else: what the others have to be compared with
    plan           kronfold plan config:NAME
    stream         kronfold compress --stream, recipe tqcompressor with its search for permutations
    stream-plain   the same recipe without permutations
    whole          kf.compress on a model in memory, the search included; left out above 400 M parameters

Seconds are given as wall time and as processor time: on a machine that does other work only the second means much.
Sizes and jobs that are in the result file already are not repeated.

Bars: GPT-2 small with permutations in 60 s of wall time on 2 cores, and 1.5 GB over the model; any size within 8 GB
resident block by block; processor time per parameter as that of GPT-2 small.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.resources
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

import kronfold as kf
from bench import Benchmark, Run, figure, gpt2, resident
from kronfold.assets import teacher_path
from kronfold.base.errors import InputError
from kronfold.cli.main import main as kronfold
from kronfold.models.cost import cost

SIZES = {  # width, blocks, heads
    "gpt2": (768, 12, 12),
    "gpt2-medium": (1024, 24, 16),
    "gpt2-large": (1280, 36, 20),
    "gpt2-xl": (1600, 48, 25),
}
JOBS = ("import", "plan", "stream", "stream-plain", "whole")
WHOLE_PARAMETERS = 400_000_000  # a model in memory, its copy, and what a search needs: about 4 GB


def write_checkpoint(size: str, place: Path, run: Run) -> int:
    """Random weights of a published size in fp16, with the tokenizer of the model in the package.

    Returns the parameters.
    """
    width, blocks, heads = SIZES[size]
    shapes = {} if run.options.quick else {"n_embd": width, "n_layer": blocks, "n_head": heads}
    model = gpt2(run.options.quick, run.options.seed, **shapes).half()
    model.save_pretrained(place, max_shard_size="200MB")
    for file in teacher_path().glob("token*"):
        shutil.copy(file, place)
    return cost(model).held_parameters


def without_permutations(place: Path) -> Path:
    """Recipe tqcompressor with no side permuted, as a file."""
    shipped = importlib.resources.files("kronfold.recipes").joinpath("tqcompressor.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(shipped)
    for stage in recipe["stages"]:
        for entry in stage["compress"]:
            entry["permute"] = "none"
    path = place / "plain.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def command(*words: str) -> None:
    """A kronfold command in this process; what it prints on stdout goes to stderr, which is no result of ours."""
    with contextlib.redirect_stdout(sys.stderr):
        try:
            kronfold(list(words))
        except SystemExit as end:
            if end.code:
                raise InputError(f"kronfold {' '.join(words)} ended with exit code {end.code}.") from None


def work(options: argparse.Namespace, job: str, size: str, place: str) -> dict[str, Any]:
    """One job, in a process of its own: seconds, peak resident memory in bytes."""
    source, output, found = Path(place) / "source", Path(place) / job, {}
    recipe = str(without_permutations(Path(place))) if job == "stream-plain" else "tqcompressor"
    if job == "whole":
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        found["resident_with_model_bytes"] = resident("VmRSS")
    wall, processor = time.perf_counter(), time.process_time()  # reading that checkpoint is not decomposing
    if job == "plan":
        command("plan", str(source) if options.quick else f"config:{size}", "-r", recipe, "--no-errors")
    elif job.startswith("stream"):
        command("compress", str(source), "-r", recipe, "-o", str(output), "--stream", "--seed", str(options.seed))
    elif job == "whole":
        kf.compress(model, recipe, seed=options.seed)
        found["over_model_bytes"] = resident() - found["resident_with_model_bytes"]
    seconds = {"wall_seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
    shutil.rmtree(output, ignore_errors=True)
    return {**seconds, "peak_resident_bytes": resident(), **found}


def figures_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked for beside what was measured."""
    found = []
    small = next((row for row in rows if row["size"] == "gpt2"), {"jobs": {}})
    for row in rows:
        for job, done in row["jobs"].items():
            name, is_small = f"{row['size']}, {job}", row["size"] == "gpt2"
            bars = job in ("stream", "whole") and is_small
            found.append(figure(f"{name}: wall s", done["wall_seconds"], 60 if bars else None, True))
            peak = done["peak_resident_bytes"] / 1e9
            found.append(figure(f"{name}: peak resident GB", peak, 8 if job != "whole" else None, True))
            if "over_model_bytes" in done:
                over = done["over_model_bytes"] / 1e9
                found.append(figure(f"{name}: GB over the model", over, 1.5 if is_small else None, True))
            if job.startswith("stream"):
                each = 1e6 * done["processor_seconds"] / row["parameters"]
                base = small["jobs"].get(job)
                bar = 1e6 * base["processor_seconds"] / small["parameters"] if base and not is_small else None
                found.append(figure(f"{name}: processor s per million parameters", each, bar, True))
    return found


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    sizes, jobs = options.sizes.split(","), options.jobs.split(",")
    for given, allowed, name in ((sizes, SIZES, "--sizes"), (jobs, JOBS, "--jobs")):
        if wrong := set(given) - set(allowed):
            raise InputError(f"{name} {', '.join(sorted(wrong))}: allowed are {', '.join(allowed)}.")
    rows = {row["size"]: row for row in run.earlier.get("rows", [])}
    for size in sizes:
        row = rows.setdefault(size, {"size": size, "jobs": {}})
        left = [job for job in JOBS if job in jobs and job not in row["jobs"]]
        if not left:
            continue
        with tempfile.TemporaryDirectory(prefix="kronfold-large-", dir=options.scratch) as place:
            row["parameters"] = write_checkpoint(size, Path(place) / "source", run)
            for job in left:
                if job == "whole" and row["parameters"] > WHOLE_PARAMETERS:
                    continue
                row["jobs"][job] = run.child("work", job, size, place)
                print(f"{size}, {job}: {row['jobs'][job]['wall_seconds']:.1f} s", file=sys.stderr, flush=True)
                run.save({"figures": figures_of(list(rows.values())), "rows": list(rows.values())})
    return {"figures": figures_of(list(rows.values())), "rows": list(rows.values()), "load_average": os.getloadavg()}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--sizes", default=",".join(SIZES), help="comma-separated")
    made.add_argument("--jobs", default=",".join(JOBS), help="comma-separated")
    made.add_argument("--scratch", help="where the random checkpoints are written; default: the temporary directory")


QUICK = {"sizes": "gpt2", "jobs": "plan,stream-plain,whole"}
BENCHMARK = Benchmark(
    "large_models", __doc__ or "", add_options, measure, QUICK, 1, {"work": work}, True, ("sizes", "jobs", "scratch")
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
