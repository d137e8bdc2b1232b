"""Every layer shape of the shipped recipes at GPT-2 small's sizes, beside the dense layer and other ways to compute it.

    python benchmarks/layer_speed.py -o benchmarks/results/layer_speed.json

For each shape, dtype, number of tokens and pass (forward without gradients; forward and backward for the input and all
parameters), in one process, interleaved, medians: dense `F.linear`; the layer as it is; the layer with a kept weight
(`kf.cache_dense`, forward only). At --others tokens (512) also the naive twin (B first, as the papers write it), the
dense Kronecker product made on each call as peft's LoKr does, and where they are installed a two-core tensor-train
matrix of tltorch and pyfastkron (those take no permutations and get none).

In a model every layer reads other weights, so calls go round as many copies of a layer as hold --working-set megabytes
of dense weights (256: more than the caches of most processors; 0 takes one copy, whose weights then stay in the cache:
dense layers profit more, having more to read). It matters where a call has few tokens.

Ratios are dense seconds over the layer's. The bar is 1.7 for rank-1 (1, 2) attention projections at 512 tokens and
above, 0.95 for everything else; the limit is what the multiply-accumulates allow.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

import kronfold as kf
from kronfold.base.errors import KronfoldError
from kronfold.base.files import write_json
from kronfold.base.results import document
from kronfold.models.absorb import expected_gathers
from kronfold.models.linear_view import sites
from kronfold.models.load import load_config
from kronfold.models.structures import STRUCTURES
from kronfold.models.surgery import read_specs
from kronfold.models.truncate import truncate
from kronfold.nn import LowRankLinear
from kronfold.ops import cost
from kronfold.ops.tuning import interleaved
from kronfold.planner.planning import name_of_tied_head, skeleton_of, specs_after
from kronfold.planner.recipe import load_recipe, shipped_recipes
from kronfold.structures.kronecker import KroneckerLinear, matrix
from timing import parser, prepare

Job = Callable[[], object]
OPTIONAL = ("peft", "tltorch", "pyfastkron")


def skeleton_after(config: Any, recipe: str) -> Any:
    """The model a recipe makes of a config, without weights, gathers as its fitting leaves them."""
    skeleton = skeleton_of(config)
    specs, head = read_specs(skeleton), name_of_tied_head(skeleton)
    made = kf.plan(config, recipe)
    if made.layers:
        skeleton = truncate(skeleton, made.layers.kept)
        config = skeleton.config
    for stage in made.stages:
        specs = specs_after(sites(skeleton), stage.rows, specs, head)
        skeleton = skeleton_of(config, specs)
    return skeleton


def shapes(recipes: list[str]) -> list[dict[str, Any]]:
    """Every different layer that the recipes put into GPT-2 small: its spec, with the gathers that remain once the
    others are absorbed, its role, and the recipes it is from. What a planned recipe chooses depends on text."""
    found: dict[str, dict[str, Any]] = {}
    for name in (name for name in recipes if load_recipe(name).auto is None):
        skeleton = skeleton_after(load_config("config:gpt2"), name)
        remaining = {gather.name for gather in expected_gathers(skeleton).remaining}
        modules = dict(skeleton.named_modules())
        for site in sites(skeleton).values():
            layer = modules.get(site.name)  # parts of a dense fused layer are no modules
            if not isinstance(layer, KroneckerLinear | LowRankLinear):
                continue
            spec = layer.to_spec()
            sides = {"permute_in": "gather_in", "permute_out": "gather_out", "permuted": "gather_out"}
            spec |= {flag: f"{site.name}.{side}" in remaining for flag, side in sides.items() if flag in spec}
            entry = found.setdefault(repr((spec, site.role)), {"spec": spec, "role": site.role, "recipes": []})
            entry["recipes"] = sorted({*entry["recipes"], name})
    return list(found.values())


def make_layer(spec: dict[str, Any], dtype: torch.dtype, device: str) -> KroneckerLinear | LowRankLinear:
    """A layer with random factors and, where it gathers, random permutations."""
    layer = STRUCTURES.get(spec["structure"]).module.from_spec(spec, True, device, dtype).eval()
    for buffer in layer.buffers():
        buffer.copy_(torch.randperm(buffer.numel()))
    return layer


def naive(layer: KroneckerLinear | LowRankLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer as the papers describe it: permute, B first, A, permute back; of low rank: one factor, the other."""
    if isinstance(layer, LowRankLinear):
        z = F.linear(x, layer.pivots)
        y = torch.cat([z, F.linear(z, layer.mix)], -1)
        return y[..., layer.gather_out.long()] + layer.bias if layer.gather_out is not None else y + layer.bias
    x = x if layer.gather_in is None else x[..., layer.gather_in.long()]
    blocks = x.unflatten(-1, (layer.spec.a[1], layer.spec.b[1]))
    inner = torch.einsum("...jl,kml->...kjm", blocks, layer.b)
    y = torch.einsum("...kjm,kij->...im", inner, layer.a).flatten(-2)
    return (y if layer.gather_out is None else y[..., layer.gather_out.long()]) + layer.bias


def dense_each_call(layer: KroneckerLinear, x: torch.Tensor) -> torch.Tensor:
    """peft's LoKr: the Kronecker product as a dense matrix on each call (by peft's own function if it is there)."""
    try:
        from peft.tuners.lokr.layer import make_kron
    except ImportError:
        make_kron = torch.kron
    weight = make_kron(layer.a[0], layer.b[0])
    for k in range(1, layer.spec.rank):
        weight = weight + make_kron(layer.a[k], layer.b[k])
    return F.linear(x, weight, layer.bias)


def others(layer: KroneckerLinear | LowRankLinear, x: torch.Tensor, installed: dict[str, bool]) -> dict[str, Any]:
    """name -> (function of x, its parameters), as far as a way can compute this layer here."""
    found: dict[str, Any] = {"naive": (lambda x: naive(layer, x), layer.parameters())}
    if not isinstance(layer, KroneckerLinear):
        return found
    found["dense each call"] = (lambda x: dense_each_call(layer, x), layer.parameters())
    spec = layer.spec
    if installed["tltorch"]:
        from tltorch import FactorizedLinear

        cores = FactorizedLinear(
            in_tensorized_features=(spec.a[1], spec.b[1]), out_tensorized_features=(spec.a[0], spec.b[0]),
            factorization="blocktt", rank=[1, spec.rank, 1], implementation="factorized",
            device=x.device, dtype=x.dtype,
        )  # fmt: skip
        found["tltorch"] = (cores, cores.parameters())
    if installed["pyfastkron"] and spec.rank == 1 and x.dtype == torch.float32:
        from pyfastkron import fastkrontorch

        factors = [factor.detach()[0].t().contiguous() for factor in (layer.a, layer.b)]
        found["pyfastkron"] = (lambda x: fastkrontorch.gemkm(x, factors), ())
    return found


def backward(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, parameters: Any, target: torch.Tensor
) -> Job:
    """A job: forward and backward for x and the parameters."""
    wanted = [x, *parameters]
    return lambda: torch.autograd.grad(run(x), wanted, target, allow_unused=True)


def in_turn(jobs: list[Job]) -> Job:
    """A job that is another of `jobs` on each call, round and round."""
    round_and_round = itertools.cycle(jobs)
    return lambda: next(round_and_round)()


def job_of(run: Any, parameters: Any, x: torch.Tensor, target: torch.Tensor, training: bool) -> Job:
    return backward(run, x, list(parameters), target) if training else lambda: run(x)


def ways_of(entry: dict[str, Any], dtype: torch.dtype, x: torch.Tensor, options: argparse.Namespace) -> dict[str, Any]:
    """name -> (function of x, its parameters): one copy of all that is measured."""
    layer = make_layer(entry["spec"], dtype, options.device)
    dense = torch.nn.Linear(layer.in_features, layer.out_features, device=options.device, dtype=dtype)
    found: dict[str, Any] = {"dense": (dense, dense.parameters()), "kronfold": (layer, layer.parameters())}
    kept = make_layer(entry["spec"], dtype, options.device)
    if kf.cache_dense(kept):
        found["kept"] = (kept, ())
    return found | (others(layer, x, options.installed) if len(x) in options.others else {})


def measure(
    entry: dict[str, Any], dtype: torch.dtype, tokens: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of one shape, dtype and number of tokens: one for each pass."""
    layer = make_layer(entry["spec"], dtype, options.device)
    x = torch.randn(tokens, layer.in_features, device=options.device, dtype=dtype)
    target = torch.randn(tokens, layer.out_features, device=options.device, dtype=dtype)
    dense_bytes = layer.in_features * layer.out_features * dtype.itemsize
    copies = max(1, round(options.working_set * 1e6 / dense_bytes)) if tokens < 512 else 1
    sets = [ways_of(entry, dtype, x, options) for _ in range(copies)]
    kept_bytes = kf.dense_cache_bytes(layer)
    rows = []
    for name in ("forward", "forward+backward"):
        training = name != "forward"
        x.requires_grad_(training)
        jobs = {
            way: in_turn([job_of(*ways[way], x, target, training) for ways in sets])
            for way in sets[0]
            if not (training and way == "kept")
        }
        with torch.set_grad_enabled(training):
            jobs, failed = runnable(jobs)
            for job in jobs.values():  # a kept weight is built on the first call of its layer
                for _ in range(copies):
                    job()
            seconds = interleaved(jobs, options.device, options.rounds)
        bar = bar_of(layer, entry["role"], tokens)
        ratio = seconds["dense"] / seconds["kronfold"]
        rows.append(
            {
                **entry,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "copies": copies,
                "pass": name,
                "way": chosen(layer, x, name != "forward"),
                "seconds": seconds,
                "failed": failed,
                "ratio": ratio,
                "bar": bar,
                "of_bar": ratio / bar,
                "limit": layer.in_features * layer.out_features / layer.macs_per_token(),
                "kept_ratio": seconds["dense"] / seconds["kept"] if "kept" in seconds else None,
                "kept_bytes": kept_bytes,
            }
        )
    return rows


def runnable(jobs: dict[str, Job]) -> tuple[dict[str, Job], dict[str, str]]:
    """The jobs that run here, and of other libraries' the error of those that do not."""
    failed = {}
    for name in [name for name in jobs if name in OPTIONAL]:
        try:
            jobs[name]()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return {name: job for name, job in jobs.items() if name not in failed}, failed


def bar_of(layer: Any, role: str, tokens: int) -> float:
    halved = isinstance(layer, KroneckerLinear) and layer.spec.b == (1, 2) and layer.spec.rank == 1
    return 1.7 if halved and role.startswith("attention") and tokens >= 512 else 0.95


def chosen(layer: Any, x: torch.Tensor, training: bool) -> str:
    """How the layer computes this call."""
    if isinstance(layer, LowRankLinear):
        return "factor" if layer._by_factor(len(x), cost.rates_for(x), training) else "gathered"
    s, gathers = layer.spec, (layer.gather_in is not None, layer.gather_out is not None)
    return matrix.fastest_order(s.a, s.b, s.rank, len(x), *gathers, cost.rates_for(x), training)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="Dense seconds / layer seconds")
    columns = ("layer", "role", "dtype", "tokens", "pass", "way", "dense ms", "ratio", "bar", "limit", "kept", "others")
    for name in columns:
        shown.add_column(
            name, justify="left" if name in ("layer", "role", "dtype", "pass", "way", "others") else "right"
        )
    for row in rows:
        dense = row["seconds"]["dense"]
        rest = {way: dense / took for way, took in row["seconds"].items() if way not in ("dense", "kronfold", "kept")}
        spec = STRUCTURES.get(row["spec"]["structure"]).read_spec(row["spec"])
        shown.add_row(
            f"{spec.shape[0]} x {spec.shape[1]}, {spec.label()}",
            row["role"],
            row["dtype"],
            str(row["tokens"]),
            row["pass"],
            row["way"],
            f"{dense * 1e3:.3f}",
            f"{row['ratio']:.2f}{'' if row['of_bar'] >= 1 else ' !'}",
            f"{row['bar']:.2f}",
            f"{row['limit']:.2f}",
            "" if row["kept_ratio"] is None else f"{row['kept_ratio']:.2f}",
            ", ".join(
                [*(f"{way} {ratio:.2f}" for way, ratio in rest.items()), *(f"{way} fails" for way in row["failed"])]
            ),
        )
    return shown


def installed() -> dict[str, bool]:
    """Which of the libraries to compare with can be imported; the others are named on stderr."""
    found = {}
    for name in OPTIONAL:
        try:
            importlib.import_module(name)
            found[name] = True
        except ImportError as error:
            found[name] = False
            print(f"{name} is not installed ({error}): its column is missing", file=sys.stderr)
    return found


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--recipes", default=",".join(shipped_recipes()), help="comma-separated; default: all shipped")
    made.add_argument("--tokens", default="1,16,512,4096", help="comma-separated")
    made.add_argument("--others", default="512", help="numbers of tokens at which other ways are measured too")
    made.add_argument("--dtypes", default="float32,bfloat16", help="comma-separated")
    made.add_argument("--working-set", type=float, default=256, help="megabytes of dense weights that calls go round")
    options = made.parse_args()
    options.rounds = 1 if options.quick else options.rounds or 5
    if options.quick:
        options.tokens, options.others = "1,16", "16"
    options.others = {int(count) for count in options.others.split(",") if count}
    try:
        prepare(options)
        options.installed, rows = installed(), []
        for entry in shapes(options.recipes.split(",")):
            for dtype in options.dtypes.split(","):
                for tokens in map(int, options.tokens.split(",")):
                    rows += measure(entry, getattr(torch, dtype), tokens, options)
            print(entry["role"], entry["spec"], file=sys.stderr, flush=True)
        content = {
            "device": cost.device_name(options.device),
            "threads": torch.get_num_threads(),
            "rates_saved": cost.rates_path().is_file(),
            "libraries": options.installed,
            "rows": rows,
        }
        if options.output:
            write_json(options.output, document("layer_speed", options.seed, **content))
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(table(rows))
        below = [row for row in rows if row["of_bar"] < 1]
        console.print(f"{len(rows) - len(below)} of {len(rows)} rows reach their bar; the others are marked with !")
    except KronfoldError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
