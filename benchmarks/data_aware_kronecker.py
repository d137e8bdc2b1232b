"""Perplexity before healing of the paper's shapes, fitted to the weights alone and to data.

    python benchmarks/data_aware_kronecker.py MODEL --calibration train.txt --eval-text valid.txt -o results.json

All ways carry out one recipe, so they hold the same number of parameters:

- weights: permuted Kronecker, errors in Frobenius norm;
- data: permuted Kronecker, errors weighted by the statistics of the dense model, every layer on its own;
- sequential: the same, but the FFN layers see the inputs that the compressed layers before them give;
- adapted: sequential, and the dense layers of the blocks are refitted too, by ridge regression.

The sequential ways compress the embedding first, as the recipe's last stage leaves it.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import KronfoldError
from kronfold.base.files import sha256_of, write_json
from kronfold.base.output import check_output
from kronfold.base.results import document
from kronfold.data.calibration import calibration_windows
from kronfold.data.sources import documents
from kronfold.evaluate.perplexity import perplexity
from kronfold.models.calibrate import calibrate
from kronfold.models.linear_view import sites
from kronfold.models.load import load_model, load_tokenizer
from kronfold.models.statistics import Statistics
from kronfold.models.surgery import replace_modules
from kronfold.pipelines.compress import compress
from kronfold.pipelines.placement import fit_row, place_embedding, place_linear, weighting_for
from kronfold.pipelines.sequential import compress_sequentially
from kronfold.planner import planning
from kronfold.planner.plan import Plan

BAR = 5.0  # how many times lower the perplexity of a data-aware fit should be than that of weights alone


def independent(model: PreTrainedModel, plan: Plan, statistics: Statistics, seed: int) -> PreTrainedModel:
    """Every row fitted under the statistics of the dense model."""
    student = copy.deepcopy(model)
    for stage in plan.stages:
        views, modules = sites(student), dict[str, nn.Module]()
        for row in stage.rows:
            view = views[row.name]
            fit, _ = fit_row(view.weight(), row, seed, weighting_for(row, statistics.weighting(view)))
            if view.kind == "embedding":
                place_embedding(student, modules, view, row, fit)
            else:
                place_linear(modules, view, row, fit)
        replace_modules(student, modules)
    return student


def sequential(
    model: PreTrainedModel, plan: Plan, statistics: Statistics, windows: Tensor, seed: int, adapt: bool
) -> PreTrainedModel:
    """Stages outside the blocks first; the others then see what those changed."""
    student = copy.deepcopy(model)
    views = sites(model)
    inner = [all(views[row.name].block is not None for row in stage.rows) for stage in plan.stages]
    order = sorted(range(len(plan.stages)), key=lambda i: inner[i])
    for i in order:
        compress_sequentially(
            student,
            plan.stages[i].rows,
            statistics,
            windows if inner[i] else windows[:1],
            reference=model if inner[i] else None,
            adapt=adapt and inner[i],
            seed=seed,
        )
    return student


def ways(
    model: PreTrainedModel, plan: Plan, statistics: Statistics, windows: Tensor, seed: int
) -> dict[str, Callable[[], PreTrainedModel]]:
    return {
        "dense": lambda: model,
        "weights": lambda: compress(model, plan, seed=seed),
        "data": lambda: independent(model, plan, statistics, seed),
        "sequential": lambda: sequential(model, plan, statistics, windows, seed, False),
        "adapted": lambda: sequential(model, plan, statistics, windows, seed, True),
    }


def measure(make: Callable[[], PreTrainedModel], tokenizer: Any, text: str) -> dict[str, Any]:
    """Build one model and measure it; seconds are of building alone."""
    wall, processor = time.perf_counter(), time.process_time()
    student = make()
    seconds = {
        "wall_seconds": round(time.perf_counter() - wall, 2),
        "processor_seconds": round(time.process_time() - processor, 2),
    }
    result = perplexity(student, tokenizer, text, "sliding")
    held = sum(parameter.numel() for parameter in student.parameters())
    return {"perplexity": result.perplexity, "held_parameters": held, **seconds, "evaluation": result.to_dict()}


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="Perplexity before healing")
    for name in ("fit", "perplexity", "times lower", "held parameters", "seconds"):
        shown.add_column(name, justify="left" if name == "fit" else "right")
    for row in rows:
        ratio = "" if row["times_lower"] is None else f"{row['times_lower']:.2f}"
        numbers = (f"{row['perplexity']:.2f}", ratio, f"{row['held_parameters']:,}", f"{row['processor_seconds']:.1f}")
        shown.add_row(row["fit"], *numbers)
    return shown


def compare(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    windows = calibration_windows(
        [options.calibration], tokenizer, count=options.windows, window=options.window, seed=options.seed
    )
    started = time.process_time()
    statistics = calibrate(model, windows, seed=options.seed)
    calibration_seconds = round(time.process_time() - started, 2)
    plan = planning.plan(model, options.recipe)
    text = "\n\n".join(documents(options.eval_text))[: options.characters]
    rows: list[dict[str, Any]] = []
    for name, make in ways(model, plan, statistics, windows, options.seed).items():
        rows.append({"fit": name, **measure(make, tokenizer, text)})
        Console(stderr=True).print(f"{name}: {rows[-1]['perplexity']:.2f}")
    blind = next(row["perplexity"] for row in rows if row["fit"] == "weights")
    for row in rows:
        row["times_lower"] = None if row["fit"] in ("dense", "weights") else blind / row["perplexity"]
    calibration = {"file": Path(options.calibration).name, "windows": options.windows, "window": options.window}
    return {
        "model": Path(options.model).name,
        "recipe": plan.recipe,
        "calibration": {**calibration, "processor_seconds": calibration_seconds},
        "eval_text": {
            "file": Path(options.eval_text).name,
            "sha256": sha256_of(Path(options.eval_text)),
            "characters": len(text),
        },
        "bar_times_lower": BAR,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="directory or hub name of a causal language model")
    parser.add_argument("--calibration", required=True, help="text the statistics are taken on")
    parser.add_argument("--eval-text", required=True, help="text file perplexity is measured on")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows")
    parser.add_argument("--window", type=int, default=256, help="tokens in each")
    parser.add_argument("--characters", type=int, help="measure on so many characters from the first; default all")
    parser.add_argument("--recipe", default="tqcompressor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write the comparison as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args()
    try:
        if options.output:
            check_output(options.output, options.overwrite)
        torch.set_num_threads(1)
        found = compare(options)
        Console().print(table(found["rows"]))
        if options.output:
            write_json(options.output, document("data_aware_kronecker", options.seed, **found))
    except KronfoldError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
