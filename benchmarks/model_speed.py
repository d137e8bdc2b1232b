"""Whole models of GPT-2 small's shapes: a compressed one beside the dense one, by time and by memory.

    python benchmarks/model_speed.py -o model_speed.json

The weights are random and compressed by a recipe, permutations searched for, as `kf.compress` leaves them. In turn,
medians, one process:

- prefill: a forward pass over 8 x 512 tokens, logits of all of them;
- decode: greedy decoding at batch 1 with a cache, 64 tokens after a prompt of 64;
- both again with kept weights (`kf.cache_dense`), and prefill with `torch.compile` (--no-compile leaves it out).

Memory: bytes of every tensor the model holds, and what a process of its own grows by when it loads the checkpoint and
runs it. Ratios are dense seconds over the compressed model's, or bytes of it over dense ones; the bars are 1.2 for
prefill, 1.25 for decode and at most 0.70 for memory; the limits are what multiply-accumulates and bytes allow.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

import kronfold as kf
from bench import Benchmark, Run, figure, gpt2, interleaved, medians, resident
from kronfold.evaluate.samples import generation_speed
from kronfold.models.cost import cost

BARS = {"prefill": 1.2, "decode": 1.25}
MEMORY_BAR = 0.70


def tensor_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())


@torch.no_grad()
def memory(options: argparse.Namespace, place: str) -> dict[str, Any]:
    """Job of a process of its own: what loading a checkpoint and running it adds to resident memory."""
    tiny = GPT2Config(n_layer=1, n_embd=12, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(tiny)(torch.zeros(1, 4, dtype=torch.long))  # what it loads is not the model's
    before = resident("VmRSS")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, options.dtype)).to(options.device).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # files mapped into memory would count where they were touched only
    for _ in range(4):
        model(torch.zeros(1, 1, dtype=torch.long, device=options.device))
    gc.collect()
    return {"tensor_bytes": tensor_bytes(model), "resident_growth": resident("VmRSS") - before}


def prefill(models: dict[str, Any], run: Run) -> dict[str, float]:
    """Seconds of a forward pass over the whole batch, by name."""
    batch = torch.randint(0, 1000, (2, 16) if run.options.quick else (8, 512), device=run.options.device)
    jobs = {name: (lambda model=model: model(batch, use_cache=False).logits) for name, model in models.items()}
    with torch.no_grad():
        return medians(interleaved(jobs, run.options.rounds, run.options.device))


def decode(models: dict[str, Any], run: Run) -> dict[str, float]:
    """Seconds per token, by name."""
    length = 4 if run.options.quick else 64
    prompt = torch.randint(0, 1000, (1, length), device=run.options.device)
    speeds = generation_speed(models, prompt, new_tokens=length, rounds=run.options.rounds)
    return {name: 1 / speed for name, speed in speeds.items()}


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    dense = gpt2(options.quick, options.seed)
    models: dict[str, Any] = {"dense": dense, "compressed": kf.compress(dense, options.recipe, seed=options.seed)}
    grown = {}
    for name, model in models.items():
        model.to(options.device, getattr(torch, options.dtype))
        with tempfile.TemporaryDirectory(prefix="kronfold-bench-") as place:
            model.save_pretrained(place)
            grown[name] = run.child("memory", Path(place))
    costs = {name: cost(model) for name, model in models.items()}
    limits = {
        "prefill": costs["dense"].macs_per_token / costs["compressed"].macs_per_token,
        "decode": tensor_bytes(models["dense"]) / tensor_bytes(models["compressed"]),
        "memory": costs["compressed"].held_parameters / costs["dense"].held_parameters,
    }
    seconds: dict[str, dict[str, float]] = {"prefill": prefill(models, run), "decode": decode(models, run)}
    kept_bytes = kf.cache_dense(models["compressed"])
    seconds |= {"prefill, kept weights": prefill(models, run), "decode, kept weights": decode(models, run)}
    kf.cache_dense(models["compressed"], False)
    failed = None
    if options.compile:
        try:
            seconds["prefill, compiled"] = prefill({name: torch.compile(m) for name, m in models.items()}, run)
        except Exception as error:  # a machine without a C++ compiler can do all the rest
            failed = f"{type(error).__name__}: {error}".splitlines()[0]
    figures = [
        figure(f"{what}: dense / compressed, seconds", took["dense"] / took["compressed"], BARS[what.split(",")[0]])
        for what, took in seconds.items()
    ]
    for key in ("tensor_bytes", "resident_growth"):
        if grown["dense"][key] > 0:
            ratio = grown["compressed"][key] / grown["dense"][key]
            figures.append(figure(f"memory, {key.replace('_', ' ')}: compressed / dense", ratio, MEMORY_BAR, True))
    figures += [figure(f"{what}: limit", value) for what, value in limits.items()]
    return {"figures": figures, "seconds": seconds, "compile_failed": failed, "memory": grown, "kept_bytes": kept_bytes,
            "costs": {name: found.to_dict() for name, found in costs.items()}}  # fmt: skip


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--recipe", default="tqcompressor", help="a recipe that needs no text")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")


BENCHMARK = Benchmark(
    "model_speed", __doc__ or "", add_options, measure, quick={"compile": False}, children={"memory": memory}
)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
