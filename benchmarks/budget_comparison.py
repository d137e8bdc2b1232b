"""One budget, several ways to meet it, nothing trained: perplexity of each, beside the dense model.

    python benchmarks/budget_comparison.py MODEL --calibration TRAIN --eval NAME=TEXT [--eval ...] -o result.json

Rows: `auto` (planned, fitted to the dense model's inputs), `auto, sequential` (each layer fitted to what the compressed
layers before it give), `whitened SVD` (every linear layer at one ratio, weighted by its inputs only, embedding dense)
and `permuted Kronecker` (every linear layer as a permuted sum of rank 5 of 8, embedding halved, weights only). A row
that is in the result file already is not worked out again.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kronfold.base.files import write_json
from kronfold.base.results import versions
from kronfold.evaluate.perplexity import perplexity
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer
from kronfold.pipelines.auto import calibrate_on, fit_rows, plan_auto
from kronfold.pipelines.calibration import Calibration
from kronfold.planner import planning
from kronfold.planner.budget import Budget
from kronfold.planner.plan import Plan, PlanRow, PlanStage
from kronfold.planner.recipe import AutoRecipe, Recipe, load_recipe

ROWS = ("auto", "auto, sequential", "whitened SVD", "permuted Kronecker")
KRONECKER = {
    "name": "kronecker-everywhere",
    "stages": [
        {
            "name": "all",
            "compress": [
                {"modules": "role:embedding", "block": [1, 2], "permute": "in"},
                {"modules": ["role:attention_in", "role:attention_out"], "block": [2, 4], "rank": 5},
                {"modules": "role:mlp_in", "block": [4, 2], "rank": 5},
                {"modules": "role:mlp_out", "block": [2, 4], "rank": 5},
            ],
        }
    ],
}


def excerpt(text: str, characters: int, folder: Path) -> Path:
    """The first lines of a text, of about so many characters, as a file of the same kind."""
    place = folder / Path(text).name.removesuffix(".gz")
    opener = gzip.open if text.endswith(".gz") else open
    with opener(text, "rt", encoding="utf-8") as lines, place.open("w", encoding="utf-8") as out:
        for line in lines:
            if out.tell() >= characters:
                break
            out.write(line)
    return place


def uniform_plan(model: Any, held: int) -> Plan:
    """Every linear layer at the largest common ratio at which the model holds at most `held` numbers."""
    low, high = 0.0, 1.0
    for _ in range(30):
        ratio = (low + high) / 2
        recipe = Recipe.model_validate(
            {
                "name": "whitened-svd",
                "stages": [{"name": "all", "compress": [
                    {"modules": "role:" + role, "structure": "low_rank", "ratio": ratio}
                    for role in ("attention_in", "attention_out", "mlp_in", "mlp_out")
                ]}],
            }
        )  # fmt: skip
        made = planning.plan(model, recipe)
        low, high = (ratio, high) if made.held_parameters <= held else (low, ratio)
        if low == ratio:
            best = made
    return best


def without_gradients(calibration: Calibration) -> Calibration:
    """The same statistics as if only inputs had been measured, as whitening uses them."""
    bare = copy.copy(calibration.statistics)
    object.__setattr__(bare, "gradient_tokens", 0)
    return Calibration(calibration.windows, bare)


def student_of(row: str, model: Any, calibration: Any, budget: Budget) -> tuple[Any, dict[str, Any]]:
    """The compressed model of a row, and what its plan says."""
    started = time.monotonic()
    sequential, data = row == "auto, sequential", calibration
    if row.startswith("auto"):
        plan = plan_auto(model, calibration, load_recipe("auto"), budget)
    elif row == "whitened SVD":
        plan = uniform_plan(model, round(budget.amount_for(cost(model))))
        data = without_gradients(calibration)
    else:
        plan, data = planning.plan(model, Recipe.model_validate(KRONECKER)), None  # type: ignore[assignment]
    planned = time.monotonic()
    student = copy.deepcopy(model)
    stages: list[PlanStage] = plan.stages
    for stage in stages:
        rows: list[PlanRow] = stage.rows
        fit_rows(student, rows, data, sequential=sequential)
    found = {"plan_seconds": planned - started, "fit_seconds": time.monotonic() - planned}
    return student, {**found, **({"predicted_loss": plan.budget["predicted_loss"]} if plan.budget else {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval", action="append", required=True, metavar="NAME=TEXT")
    parser.add_argument("--eval-characters", type=int, default=150_000, help="read so much of each text")
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--gradient-windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--rows", default=",".join(name.replace(", ", " ") for name in ROWS[:1] + ROWS[2:]))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()
    asked = [name for name in ROWS if name.replace(", ", " ") in arguments.rows.split(",")]
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    output = Path(arguments.output)
    document: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {"rows": {}}
    document |= {
        "benchmark": "budget_comparison",
        "arguments": {
            **{key: value for key, value in vars(arguments).items() if key not in ("output", "rows")},
            "model": Path(arguments.model).name,
            "calibration": [Path(text).name for text in arguments.calibration],
            "eval": [entry.split("=")[0] + "=" + Path(entry.split("=")[1]).name for entry in arguments.eval],
        },
        "versions": versions(),
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as folder:
        texts = {
            name: excerpt(text, arguments.eval_characters, Path(folder))
            for name, text in (entry.split("=", 1) for entry in arguments.eval)
        }

        def measure(subject: Any) -> dict[str, Any]:
            found = {name: perplexity(subject, tokenizer, text, "paper") for name, text in texts.items()}
            return {name: {"perplexity": one.perplexity, "tokens": one.tokens} for name, one in found.items()}

        work(document, asked, model, tokenizer, arguments, measure, output)


def calibrate(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> tuple[Calibration, float]:
    """Statistics on the calibration texts, without the cache, and the seconds they took."""
    started = time.monotonic()
    settings = AutoRecipe.model_validate(
        {
            "windows": arguments.windows,
            "window": arguments.window,
            "gradient_windows": arguments.gradient_windows,
            "sequential": False,
        }
    )
    found = calibrate_on(model, tokenizer, arguments.calibration, settings, seed=arguments.seed)
    return found, time.monotonic() - started


def work(
    document: dict[str, Any],
    asked: list[str],
    model: Any,
    tokenizer: Any,
    arguments: argparse.Namespace,
    measure: Callable[[Any], dict[str, Any]],
    output: Path,
) -> None:
    """Fill in the rows that are missing, writing the file after each, and print the table."""
    rows = document["rows"]
    if "dense" not in rows:
        rows["dense"] = {**cost(model).to_dict(), "perplexity": measure(model)}
        write_json(output, document)
    calibration: Calibration | None = None
    if set(asked) - set(rows) - {"permuted Kronecker"}:  # the only row that reads no text
        calibration, seconds = calibrate(model, tokenizer, arguments)
        document["calibration"] = {**calibration.to_dict(), "seconds": seconds}
    budget = Budget("params", ratio=arguments.ratio)
    for name in asked:
        if name not in rows:
            student, found = student_of(name, model, calibration, budget)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2  # GiB, of the whole process so far
            rows[name] = {**cost(student).to_dict(), **found, "peak_gib": memory, "perplexity": measure(student)}
            del student
            write_json(output, document)
    dense = rows["dense"]["perplexity"]
    print(f"calibration {document['calibration']['seconds']:.0f} s")
    for name, row in rows.items():
        ratios = "  ".join(
            f"{text} {one['perplexity']:.2f} ({one['perplexity'] / dense[text]['perplexity']:.3f}x)"
            for text, one in row["perplexity"].items()
        )
        seconds = f"plan {row.get('plan_seconds', 0):.0f} s, fit {row.get('fit_seconds', 0):.0f} s"
        print(f"{name:20s} held {row['held_parameters']:>11,}  {ratios}  {seconds}")


if __name__ == "__main__":
    main()
