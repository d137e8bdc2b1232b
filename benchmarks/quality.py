"""One budget, several ways to meet it, nothing trained: perplexity of each, beside the dense model.

    python benchmarks/quality.py --model MODEL --calibration TRAIN --eval NAME=TEXT [--eval ...] -o quality.json

Rows: `auto` (planned, fitted to the dense model's inputs), `auto, sequential` (each layer fitted to what the compressed
layers before it give), `whitened SVD` (every linear layer at one ratio, weighted by its inputs only, embedding dense)
and `permuted Kronecker` (every linear layer as a permuted sum of rank 5 of 8, embedding halved, weights only: its size
is its own). A row that is in the result file already is not worked out again. For the same with healing, and for the
published recipes: `kronfold compare`.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import kronfold as kf
from bench import Benchmark, Run, figure, resident
from kronfold.assets import eval_text, heal_text, teacher_path
from kronfold.base.errors import InputError
from kronfold.base.files import sha256_of_source, write_text
from kronfold.data.sources import documents
from kronfold.fit.calibration import Calibration
from kronfold.fit.fit import calibrate_on, settings_of
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer
from kronfold.planner.recipe import Recipe

ROWS = ("auto", "auto, sequential", "whitened SVD", "permuted Kronecker")
LINEAR = ["role:attention_in", "role:attention_out", "role:mlp_in", "role:mlp_out"]
KRONECKER = [
    {"modules": "role:embedding", "block": [1, 2], "permute": "in"},
    {"modules": ["role:attention_in", "role:attention_out"], "block": [2, 4], "rank": 5},
    {"modules": "role:mlp_in", "block": [4, 2], "rank": 5},
    {"modules": "role:mlp_out", "block": [2, 4], "rank": 5},
]


def recipe(name: str, compress: list[dict[str, Any]], auto: dict[str, Any] | None = None) -> Recipe:
    stages = [{"name": "all", "compress": compress, **({"heal": {"tokens": 1}} if auto else {})}]
    return Recipe.model_validate({"name": name, "stages": stages, **({"auto": auto} if auto else {})})


def one_ratio(model: Any, held: int) -> Recipe:
    """Every linear layer at the largest common ratio at which the model holds at most `held` numbers, within 0.05 %.

    Raises InputError: not even the smallest ratio gets there.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(20):
        ratio = (low + high) / 2
        made = recipe("whitened-svd", [{"modules": LINEAR, "structure": "low_rank", "ratio": ratio}])
        found = kf.plan(model.config, made).held_parameters
        low, high, best = (ratio, high, made) if found <= held else (low, ratio, best)
        if 0.9995 * held <= found <= held:
            break
    if best is None:
        raise InputError(f"Linear layers alone cannot bring this model to {held:,} held parameters. Raise --ratio.")
    return best


def without_gradients(found: Calibration) -> Calibration:
    """The same statistics as if only inputs had been measured, as whitening uses them."""
    bare = copy.copy(found.statistics)
    object.__setattr__(bare, "gradient_tokens", 0)
    return replace(found, statistics=bare)


def student_of(row: str, model: Any, found: Calibration | None, run: Run) -> tuple[Any, dict[str, Any]]:
    """The compressed model of a row, and seconds, prediction."""
    options, about, started = run.options, dict[str, Any](), time.monotonic()
    budget = kf.Budget("params", ratio=options.ratio)
    if row == "auto":
        made = kf.plan(model, "auto", found, budget=budget)
        about = {"predicted_loss": made.budget["predicted_loss"], "plan_seconds": time.monotonic() - started}
        student = kf.compress(model, made, found, seed=options.seed)
    elif row == "auto, sequential":
        made = recipe("auto-sequential", [], {"sequential": True})
        student = kf.compress(model, made, found, budget=budget, seed=options.seed)
    elif row == "whitened SVD":
        made = one_ratio(model, round(budget.amount_for(cost(model))))
        student = kf.compress(model, made, without_gradients(found), seed=options.seed)
    else:
        student = kf.compress(model, recipe("kronecker-everywhere", KRONECKER), seed=options.seed)
    return student, {**about, "seconds": time.monotonic() - started}


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    asked = [name for name in ROWS if name.replace(", ", " ") in options.rows.split(",")]
    source = options.model or str(teacher_path())
    model, tokenizer = load_model(source), load_tokenizer(source)
    if options.quick:
        del model.transformer.h[2:]
        model.config.n_layer = 2
    texts = dict(entry.split("=", 1) for entry in options.eval or [f"demo={eval_text()}"])
    content: dict[str, Any] = {"rows": run.earlier.get("rows", {}), "protocol": options.protocol}
    content["calibration"] = run.earlier.get("calibration")
    content["texts"] = {name: {"sha256": sha256_of_source(text)} for name, text in texts.items()}
    rows = content["rows"]
    with tempfile.TemporaryDirectory(prefix="kronfold-bench-") as folder:
        excerpts = {name: Path(folder) / f"{name}.txt" for name in texts}
        for name, text in texts.items():
            write_text(excerpts[name], "\n".join(documents(text))[: options.eval_characters])

        def keep(name: str, student: Any, about: dict[str, Any]) -> None:
            found = {text: kf.perplexity(student, tokenizer, file, options.protocol) for text, file in excerpts.items()}
            scores = {text: {"perplexity": one.perplexity, "tokens": one.tokens} for text, one in found.items()}
            rows[name] = {**cost(student).to_dict(), **about, "peak_resident_bytes": resident(), "perplexity": scores}
            run.save(content)

        if "dense" not in rows:
            keep("dense", model, {})
        found = None
        if set(asked) - set(rows) - {"permuted Kronecker"}:  # the only row that reads no text
            started = time.monotonic()
            windows = {key: getattr(options, key) for key in ("windows", "window", "gradient_windows")}
            settings = settings_of("auto", windows)
            found = calibrate_on(model, tokenizer, options.calibration or [heal_text()], settings, seed=options.seed)
            content["calibration"] = {**found.to_dict(), "seconds": time.monotonic() - started}
        for name in (name for name in asked if name not in rows):
            keep(name, *student_of(name, model, found, run))
    figures = []
    for name, row in rows.items():
        figures.append(figure(f"{name}: held parameters", row["held_parameters"]))
        for text, one in row["perplexity"].items():
            over = one["perplexity"] / rows["dense"]["perplexity"][text]["perplexity"]
            figures.append(figure(f"{name}: perplexity, {text}", one["perplexity"]))
            figures.append(figure(f"{name}: over dense, {text}", over))
    return {"figures": figures, **content}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--model", help="directory, hub id or .gguf file; default: the model in the package")
    made.add_argument("--calibration", action="append", help="text to fit to, may be repeated; default: the package's")
    made.add_argument("--eval", action="append", metavar="NAME=TEXT", help="may be repeated; default: the package's")
    made.add_argument("--eval-characters", type=int, default=150_000, help="so much of each text")
    made.add_argument("--protocol", default="paper", choices=("paper", "sliding"))
    made.add_argument("--ratio", type=float, default=0.65, help="of the held parameters")
    made.add_argument("--windows", type=int, default=128, help="of calibration")
    made.add_argument("--gradient-windows", type=int, default=16)
    made.add_argument("--window", type=int, default=1024)
    made.add_argument("--rows", default="auto,whitened SVD,permuted Kronecker", help="also: auto sequential")


QUICK = {
    "model": None, "calibration": None, "eval": None, "eval_characters": 6_000, "windows": 2, "gradient_windows": 1,
    "window": 64, "rows": "auto,whitened SVD",
}  # fmt: skip
BENCHMARK = Benchmark("quality", __doc__ or "", add_options, measure, QUICK, continues=True, selects=("rows",))

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
