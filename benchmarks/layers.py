"""Every layer shape of the shipped recipes at GPT-2 small's sizes, beside the dense layer and other ways to compute it.

    python benchmarks/layers.py -o layers.json
    python benchmarks/layers.py --part few-rows --threads 1 -o few_rows.json

Part "shapes": for each shape, dtype, number of tokens and pass (forward without gradients; forward and backward for the
input and all parameters), in turn, medians: dense `F.linear`; the layer as it is; the layer with a kept weight
(`kf.cache_dense`, forward only). At --others tokens also, for one Kronecker sum without permutations, the papers' order
(B first), the dense product made on each call as peft's LoKr does, and where they are installed a two-core tensor-train
matrix of tltorch and pyfastkron.

The layers are those of two blocks of random weights compressed by each recipe, with the gathers that absorption leaves.
In a model every layer reads other weights, so calls with few tokens go round as many copies of a layer as hold
--working-set megabytes of dense weights (more than the caches of most processors).

Ratios are dense seconds over the layer's. The bar is 1.7 for rank-1 (1, 2) attention projections at 512 tokens and
above, 0.95 for everything else; the limit is what the multiply-accumulates allow.

Part "few-rows": one to many rows times a weight, `F.linear` against weight first (`weight @ rows.T`), as kronfold does
for up to 4 rows. The bar is 1 where kronfold takes that way: it must not be slower for it.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronfold as kf
from bench import Benchmark, Run, figure, gpt2, interleaved, medians
from kronfold.base.errors import InputError
from kronfold.ops.cost import FEW, FEW_INNER
from kronfold.planner.recipe import load_recipe, shipped_recipes

Job = Callable[[], object]
ROLES = {"attn.c_attn": "attention in", "attn.c_proj": "attention out", "mlp.c_fc": "FFN in", "mlp.c_proj": "FFN out"}
OPTIONAL = ("peft", "tltorch", "pyfastkron")
FEW_SHAPES = ((768, 384), (3072, 384), (1536, 768), (313, 768), (768, 3072), (50257, 192), (50257, 384))  # (out, in)
FEW_BYTES = 128e6  # of weights that the calls with few rows go round


def shapes(recipes: Iterable[str], quick: bool, seed: int) -> list[dict[str, Any]]:
    """Every different structured linear layer that the recipes make: the layer, its role, the recipes it is from.

    Recipes that plan (what they choose depends on text) or only drop blocks have none.
    """
    model, found = gpt2(quick, seed, n_layer=2, vocab_size=1000, bos_token_id=0, eos_token_id=0), {}
    for name in recipes:
        entries = [entry for stage in load_recipe(name).stages for entry in stage.compress]
        if load_recipe(name).auto or not any("role:" in m and "embed" not in m for e in entries for m in e.modules):
            continue
        for place, module in kf.compress(model, name, seed=seed).transformer.h.named_modules():
            if not hasattr(module, "to_spec") or "parts" in module.to_spec():  # a fused layer is its parts
                continue
            role = next(role for key, role in ROLES.items() if key in place)
            entry = {"spec": module.to_spec(), "role": role, "label": label_of(module), "layer": module, "recipes": []}
            entry = found.setdefault(repr((module.to_spec(), role)), entry)
            entry["recipes"] = sorted({*entry["recipes"], name})
    return list(found.values())


def label_of(layer: nn.Module) -> str:
    sides = [name.removeprefix("gather_") for name, _ in layer.named_buffers() if name.startswith("gather_")]
    return layer.spec.label() + (f", gathers {'+'.join(sides)}" if sides else "")


def others(spec: dict[str, Any], x: Tensor, installed: dict[str, bool]) -> dict[str, Any]:
    """name -> (function of x, its parameters): other ways to compute a Kronecker sum of these shapes."""
    if spec["structure"] != "kronecker":
        return {}
    (out_a, in_a), (out_b, in_b), rank = spec["a"], spec["b"], spec["rank"]
    where: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    a, b = nn.Parameter(torch.randn(rank, out_a, in_a, **where)), nn.Parameter(torch.randn(rank, out_b, in_b, **where))
    make_kron = importlib.import_module("peft.tuners.lokr.layer").make_kron if installed["peft"] else torch.kron

    def papers(x: Tensor) -> Tensor:
        inner = torch.einsum("...jl,kml->...kjm", x.unflatten(-1, (in_a, in_b)), b)
        return torch.einsum("...kjm,kij->...im", inner, a).flatten(-2)

    def dense_each_call(x: Tensor) -> Tensor:
        return F.linear(x, sum(make_kron(a[k], b[k]) for k in range(rank)))

    found: dict[str, Any] = {"papers' order": (papers, [a, b]), "dense each call": (dense_each_call, [a, b])}
    if installed["tltorch"]:
        from tltorch import FactorizedLinear

        cores = FactorizedLinear(
            in_tensorized_features=(in_a, in_b), out_tensorized_features=(out_a, out_b),
            factorization="blocktt", rank=[1, rank, 1], implementation="factorized", **where,
        )  # fmt: skip
        found["tltorch"] = (cores, list(cores.parameters()))
    if installed["pyfastkron"] and rank == 1 and x.dtype == torch.float32:
        from pyfastkron import fastkrontorch

        factors = [factor.detach()[0].t().contiguous() for factor in (a, b)]
        found["pyfastkron"] = (lambda x: fastkrontorch.gemkm(x, factors), [])
    return found


def ways_of(entry: dict[str, Any], dtype: torch.dtype, x: Tensor, with_others: dict[str, bool]) -> dict[str, Any]:
    """name -> (function of x, its parameters): one copy of all that is measured."""
    layer = copy.deepcopy(entry["layer"]).to(x.device, dtype)
    dense = nn.Linear(layer.in_features, layer.out_features, device=x.device, dtype=dtype)
    found: dict[str, Any] = {"dense": (dense, dense.parameters()), "kronfold": (layer, layer.parameters())}
    kept = copy.deepcopy(layer)
    if kf.cache_dense(kept):
        found["kept"] = (kept, [])
    return found | (others(entry["spec"], x, with_others) if with_others else {})


def job_of(way: tuple[Any, Iterable[Any]], x: Tensor, target: Tensor, training: bool) -> Job:
    """A forward pass, or forward and backward for x and the parameters."""
    function, parameters = way
    wanted = [x, *parameters]
    if not training:
        return lambda: function(x)
    return lambda: torch.autograd.grad(function(x), wanted, target, allow_unused=True)


def measure_shape(
    entry: dict[str, Any], dtype: torch.dtype, tokens: int, run: Run, installed: dict[str, bool]
) -> list[dict[str, Any]]:
    """The rows of one shape, dtype and number of tokens: one for each pass."""
    layer, options = entry["layer"], run.options
    x = torch.randn(tokens, layer.in_features, device=options.device, dtype=dtype)
    target = torch.randn(tokens, layer.out_features, device=options.device, dtype=dtype)
    dense_bytes = layer.in_features * layer.out_features * dtype.itemsize
    copies = max(1, round(options.working_set * 1e6 / dense_bytes)) if tokens < 512 and not options.quick else 1
    sets = [
        ways_of(entry, dtype, x, installed if str(tokens) in options.others.split(",") else {}) for _ in range(copies)
    ]
    halved = (entry["spec"].get("b"), entry["spec"].get("rank")) == ([1, 2], 1)
    bar = 1.7 if halved and entry["role"].startswith("attention") and tokens >= 512 else 0.95
    rows = []
    for name in ("forward", "forward+backward"):
        training = name != "forward"
        x.requires_grad_(training)
        jobs: dict[str, Job] = {}
        failed: dict[str, str] = {}
        with torch.set_grad_enabled(training):
            for way in sets[0]:
                if training and way == "kept":
                    continue
                each = [job_of(ways[way], x, target, training) for ways in sets]
                try:
                    for job in each:  # a kept weight is built on the first call of its layer
                        job()
                except Exception as error:  # another library's way may not work here; ours must
                    if way not in OPTIONAL:
                        raise
                    failed[way] = f"{type(error).__name__}: {error}".splitlines()[0]
                    continue
                turns = itertools.cycle(each)
                jobs[way] = lambda turns=turns: next(turns)()
            seconds = medians(interleaved(jobs, options.rounds, options.device))
        described = {key: entry[key] for key in ("spec", "role", "label", "recipes")}
        facts = {"dtype": str(dtype).removeprefix("torch."), "tokens": tokens, "pass": name, "copies": copies}
        limit = layer.in_features * layer.out_features / layer.macs_per_token()
        ratio = seconds["dense"] / seconds["kronfold"]
        rows.append({**described, **facts, "seconds": seconds, "failed": failed, "ratio": ratio, "bar": bar,
                     "limit": limit, "kept_bytes": kf.dense_cache_bytes(layer)})  # fmt: skip
    return rows


def measure_few(shape: tuple[int, int], rows: int, dtype: torch.dtype, run: Run) -> dict[str, Any]:
    """Seconds of both ways for one shape and number of rows; one row goes twice, as kronfold sends it."""
    size, device = shape[0] * shape[1] * dtype.itemsize, run.options.device
    copies = 2 if run.options.quick else max(2, round(FEW_BYTES / size))
    weights = itertools.cycle([torch.randn(*shape, device=device, dtype=dtype) for _ in range(copies)])
    x = torch.randn(rows, shape[1], device=device, dtype=dtype)
    padded = x if rows > 1 else x.expand(2, -1).contiguous()
    jobs = {
        "linear": lambda: F.linear(x, next(weights)),
        "weight first": lambda: (next(weights) @ padded.t())[:, :rows].t().contiguous(),
    }
    with torch.no_grad():
        seconds = medians(interleaved(jobs, run.options.rounds, device))
    reads = {way: size / taken / 1e9 for way, taken in seconds.items()}
    return {"shape": shape, "rows": rows, "seconds": seconds, "gigabytes_per_second": reads}


def measure(run: Run) -> dict[str, Any]:
    options, installed = run.options, {}
    dtypes = [getattr(torch, name, None) for name in options.dtypes.split(",")]
    if not all(isinstance(dtype, torch.dtype) and dtype.is_floating_point for dtype in dtypes):
        raise InputError(f"--dtypes {options.dtypes}: give float32, bfloat16 or float16, comma-separated.")
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
            installed[name] = True
        except ImportError as error:
            installed[name] = False
            print(f"{name} is not installed ({error}): it is not compared with", file=sys.stderr)
    rows, few, figures = [], [], []
    if options.part != "few-rows":
        for entry in shapes(options.recipes.split(","), options.quick, options.seed):
            for dtype in dtypes:
                for tokens in map(int, options.tokens.split(",")):
                    rows += measure_shape(entry, dtype, tokens, run, installed)
            print(f"{entry['label']}, {entry['role']}", file=sys.stderr, flush=True)
        for row in rows:
            what = f"{row['label']}, {row['role']}, {row['dtype']}, {row['tokens']} tokens, {row['pass']}"
            figures.append(figure(what, row["ratio"], row["bar"]))
    if options.part != "shapes":
        shapes_, counts = FEW_SHAPES[: 1 if options.quick else None], [int(n) for n in options.rows.split(",")]
        few = [measure_few(shape, count, dtypes[0], run) for shape in shapes_ for count in counts]
        for row in few:
            what = f"{row['shape']}, {row['rows']} rows: linear / weight first, seconds"
            bar = 1.0 if row["rows"] <= FEW and row["shape"][1] <= FEW_INNER else None
            figures.append(figure(what, row["seconds"]["linear"] / row["seconds"]["weight first"], bar))
    return {"figures": figures, "libraries": installed, "shapes": rows, "few_rows": few}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--part", choices=("shapes", "few-rows"), help="only this part")
    made.add_argument("--recipes", default=",".join(shipped_recipes()), help="comma-separated; default: all shipped")
    made.add_argument("--tokens", default="1,16,512,4096", help="comma-separated")
    made.add_argument("--others", default="512", help="numbers of tokens at which other ways are measured too")
    made.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated; few rows take the first")
    made.add_argument("--rows", default="1,2,4,8,16", help="of the few-rows part, comma-separated")
    made.add_argument("--working-set", type=float, default=256, help="megabytes of dense weights that calls go round")


QUICK = {"tokens": "1,16", "others": "16", "recipes": "tqcompressor,svd", "dtypes": "float32", "rows": "1,8"}
BENCHMARK = Benchmark("layers", __doc__ or "", add_options, measure, QUICK)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
