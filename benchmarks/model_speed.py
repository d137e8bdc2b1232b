"""Whole models of GPT-2 small's shapes: a compressed one beside the dense one, by time and by memory.

    python benchmarks/model_speed.py -o benchmarks/results/model_speed.json

The weights are random, and so are the permutations: nothing is fitted or searched for, but every gather that the recipe
leaves after absorption is there and runs. Interleaved, medians, one process:

- prefill: a forward pass over 8 x 512 tokens, logits of all of them;
- decode: greedy decoding at batch 1 with a cache, 64 tokens after a prompt of 64;
- both again with `torch.compile` (prefill only; --no-compile leaves it out), and with kept weights (`kf.cache_dense`).

Memory: bytes of every tensor the model holds, and what a process of its own grows by when it builds the model and
decodes with it. Ratios are dense seconds (or bytes of the model over dense bytes for memory); the bars are 1.2 for
prefill, 1.25 for decode and at most 0.70 for memory; the limits are what multiply-accumulates and bytes allow.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

import kronfold as kf
from kronfold.base.errors import KronfoldError
from kronfold.base.files import write_json
from kronfold.base.results import document
from kronfold.evaluate.speed import generation_speed
from kronfold.models.cost import cost
from kronfold.models.place import build_skeleton, read_specs
from kronfold.models.presets import preset_config
from kronfold.pipelines.gathers import absorb_gathers
from kronfold.structures.rates import device_name, interleaved, rates_path
from layer_speed import skeleton_after
from timing import parser, prepare

BARS = {"prefill": 1.2, "decode": 1.25, "memory": 0.70}


def build(which: str, options: argparse.Namespace) -> PreTrainedModel:
    """`dense`, or the model a recipe makes, with random weights and random permutations, gathers absorbed."""
    config = preset_config("gpt2")
    if options.quick:
        config.n_layer, config.vocab_size = 2, 5027
    torch.manual_seed(options.seed)
    model = AutoModelForCausalLM.from_config(config)
    if which != "dense":
        build_skeleton(model, read_specs(skeleton_after(config, which)))
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in ("gather", "gather_in", "gather_out"):
                buffer.copy_(torch.randperm(buffer.numel()))
        absorb_gathers(model)
    gc.collect()
    return model.to(options.device, getattr(torch, options.dtype)).eval()


def tensor_bytes(model: PreTrainedModel) -> int:
    """Bytes of all parameters and buffers, shared storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages.values())


def resident() -> int:
    """Resident memory of this process in bytes; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def memory(which: str, options: argparse.Namespace) -> dict[str, int]:
    """Job of a process of its own: what building the model and decoding with it adds to resident memory."""
    tiny = preset_config("gpt2")
    tiny.n_layer, tiny.n_embd, tiny.n_head, tiny.vocab_size = 1, 12, 1, 11
    with torch.no_grad():  # what the first pass loads is not the model's
        AutoModelForCausalLM.from_config(tiny)(torch.zeros(1, 4, dtype=torch.long))
    before = resident()
    model = build(which, options)
    with torch.no_grad():
        for _ in range(4):
            model(torch.zeros(1, 1, dtype=torch.long, device=options.device))
    gc.collect()
    return {"tensor_bytes": tensor_bytes(model), "resident_growth": resident() - before}


def memory_of(which: str, options: argparse.Namespace) -> dict[str, int]:
    command = [sys.executable, __file__, "--memory-of", which, "--seed", str(options.seed), "--dtype", options.dtype]
    command += ["--device", options.device, *(["--quick"] if options.quick else [])]
    command += ["--threads", str(torch.get_num_threads())]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def prefill(models: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a forward pass over the whole batch, by name."""
    batch = torch.randint(0, 5000, options.shape, device=options.device)
    jobs = {name: (lambda model=model: model(batch, use_cache=False).logits) for name, model in models.items()}
    with torch.no_grad():
        return interleaved(jobs, options.device, options.rounds)


def compiled_prefill(models: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """The same for compiled models; {"failed": why} where this machine cannot compile."""
    try:
        return prefill({name: torch.compile(model) for name, model in models.items()}, options)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def decode(models: dict[str, Any], options: argparse.Namespace) -> dict[str, float]:
    """Seconds per token, by name."""
    prompt = torch.randint(0, 5000, (1, options.prompt), device=options.device)
    speeds = generation_speed(models, prompt, new_tokens=options.new_tokens, rounds=options.rounds)
    return {name: 1 / speed for name, speed in speeds.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    models: dict[str, Any] = {name: build(name, options) for name in ("dense", options.recipe)}
    costs = {name: cost(model) for name, model in models.items()}
    dense, small = costs["dense"], costs[options.recipe]
    size = getattr(torch, options.dtype).itemsize
    bytes_of = {name: tensor_bytes(model) for name, model in models.items()}
    seconds: dict[str, dict[str, Any]] = {"prefill": prefill(models, options), "decode": decode(models, options)}
    cached = kf.cache_dense(models[options.recipe])
    for name, job in (("prefill", prefill), ("decode", decode)):
        seconds[f"{name}, kept weights"] = job(models, options)
    kf.cache_dense(models[options.recipe], False)
    if options.compile:
        seconds["prefill, compiled"] = compiled_prefill(models, options)
    del models
    gc.collect()
    grown = {name: memory_of(name, options) for name in ("dense", options.recipe)}
    limits = {
        "prefill": dense.macs_per_token / small.macs_per_token,
        "decode": bytes_of["dense"] / bytes_of[options.recipe],
        "memory": small.held_parameters / dense.held_parameters,
    }
    return {
        "recipe": options.recipe,
        "dtype": options.dtype,
        "batch": list(options.shape),
        "seconds": seconds,
        "memory": grown,
        "tensor_bytes": bytes_of,
        "parameter_bytes": {name: found.held_parameters * size for name, found in costs.items()},
        "kept_bytes": cached,
        "limits": limits,
        "rows": rows_of(seconds, grown, limits, options.recipe),
    }


def rows_of(
    seconds: dict[str, dict[str, Any]], grown: dict[str, dict[str, int]], limits: dict[str, float], name: str
) -> list[dict[str, Any]]:
    """One row for each figure: ratio, bar, limit."""
    rows = []
    for what, took in seconds.items():
        kind = what.split(",")[0]
        if "failed" in took:
            rows.append({"what": what, "failed": took["failed"]})
            continue
        ratio = took["dense"] / took[name]
        rows.append({"what": what, "dense": took["dense"], "compressed": took[name], "ratio": ratio, "bar": BARS[kind],
                     "of_bar": ratio / BARS[kind], "limit": limits[kind]})  # fmt: skip
    for key in ("tensor_bytes", "resident_growth"):
        dense, small = grown["dense"][key], grown[name][key]
        if dense:
            rows.append({"what": f"memory, {key.replace('_', ' ')}", "dense": dense, "compressed": small,
                         "ratio": small / dense, "bar": BARS["memory"], "of_bar": BARS["memory"] / (small / dense),
                         "limit": limits["memory"]})  # fmt: skip
    return rows


def table(found: dict[str, Any]) -> Table:
    shown = Table(title=f"{found['recipe']} beside dense, {found['dtype']}; prefill of {found['batch']}")
    for column in ("what", "dense", "compressed", "ratio", "bar", "limit"):
        shown.add_column(column, justify="left" if column == "what" else "right")
    for row in found["rows"]:
        if "failed" in row:
            shown.add_row(row["what"], row["failed"])
            continue
        memory_row = row["what"].startswith("memory")
        cells = (
            f"{row[key] / 1e6:.0f} MB" if memory_row else f"{row[key] * 1e3:.2f} ms" for key in ("dense", "compressed")
        )
        mark = "" if row["of_bar"] >= 1 else " !"
        sign = "at most " if memory_row else ""
        shown.add_row(
            row["what"], *cells, f"{row['ratio']:.3f}{mark}", f"{sign}{row['bar']:.2f}", f"{row['limit']:.2f}"
        )
    return shown


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--recipe", default="tqcompressor", help="a recipe that needs no text")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    made.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = made.parse_args()
    options.shape, options.prompt, options.new_tokens = ((2, 16), 4, 4) if options.quick else ((8, 512), 64, 64)
    options.rounds = 1 if options.quick else options.rounds or 5
    try:
        prepare(options)
        if options.memory_of:
            print(json.dumps(memory(options.memory_of, options)))
            return
        found = measure(options)
        about = {
            "device": device_name(options.device),
            "threads": torch.get_num_threads(),
            "rates_saved": rates_path().is_file(),
            "random_permutations": True,
        }
        if options.output:
            write_json(options.output, document("model_speed", options.seed, **about, **found))
        console = Console(width=None if sys.stdout.isatty() else 140)
        console.print(table(found))
        console.print(f"kept weights take at most {found['kept_bytes'] / 1e6:.0f} MB")
    except KronfoldError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
