"""Would one right factor for q, k and v pay? The same plan, the same numbers, fitted jointly instead of one by one.

    python benchmarks/shared_factor.py MODEL --calibration TEXT --eval TEXT -o out.json

Plans MODEL (a Llama-like one, with layers called q_proj, k_proj, v_proj) for a budget, fits it, and measures it. Then
the three layers of every block are replaced by slices of one low-rank matrix that holds as many numbers as the plan
gives the three together, optimal under the same input moments and the same output gradients, and it is measured again.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budget_comparison import excerpt
from kronfold.base.files import write_json
from kronfold.base.results import document
from kronfold.evaluate.perplexity import perplexity
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.load import load_model, load_tokenizer
from kronfold.pipelines.auto import calibrate_on, fit_rows, plan_auto, settings_of
from kronfold.pipelines.calibration import Calibration
from kronfold.planner.budget import Budget
from kronfold.planner.recipe import load_recipe
from kronfold.structures.low_rank import LowRankSpec, nearest_low_rank
from kronfold.structures.weighting import Weighting


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The dense weight that stands in the model, float64."""
    module: Any = model.get_submodule(name)
    dense = module.dense_weight() if hasattr(module, "dense_weight") else module.weight
    return dense.detach().double()


def share(student: nn.Module, views: dict[str, LinearView], held: dict[str, int], found: Calibration) -> dict[str, Any]:
    """Replace q, k and v of every block by slices of one joint fit, in place; errors before and after."""
    blocks = sorted({view.block for view in views.values() if view.block is not None})
    before, after, ranks = 0.0, 0.0, []
    for block in blocks:
        names = [f"model.layers.{block}.self_attn.{part}_proj" for part in "qkv"]
        three = [views[name] for name in names]
        numbers = sum(held.get(view.name, view.shape[0] * view.shape[1]) for view in three)
        weight = torch.cat([view.weight().double() for view in three])
        each = [found.statistics.weighting(view) for view in three]
        metric = Weighting(each[0].inputs, torch.block_diag(*(one.outputs.double() for one in each)))  # type: ignore
        out, width = weight.shape
        rank = max(r for r in range(1, width + 1) if r * (out + width - r) <= numbers)
        if rank == width:
            continue
        joint = nearest_low_rank(weight, LowRankSpec(out, width, rank), metric).to_dense()
        damped = metric.checked((out, width))
        before += damped.squared_error(weight - torch.cat([weight_of(student, name) for name in names]))
        after += damped.squared_error(weight - joint)
        ranks.append(rank)
        for view, part in zip(three, joint.split([view.shape[0] for view in three]), strict=True):
            layer = nn.Linear(width, view.shape[0], bias=False)
            layer.weight.data = part.float()
            parent, _, leaf = view.name.rpartition(".")
            setattr(student.get_submodule(parent), leaf, layer)
    return {"weighted_squared_error": {"separate": before, "shared": after}, "ranks": ranks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", action="append", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--eval-characters", type=int, default=60_000)
    parser.add_argument("--ratio", type=float, default=0.65)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--gradient-windows", type=int, default=8)
    parser.add_argument("--cache", help="directory that keeps the statistics")
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    settings = settings_of("auto", {"windows": arguments.windows, "gradient_windows": arguments.gradient_windows})
    found = calibrate_on(model, tokenizer, arguments.calibration, settings, cache=arguments.cache)
    plan = plan_auto(model, found, load_recipe("auto"), Budget("params", ratio=arguments.ratio))
    rows = plan.stages[0].rows
    student = copy.deepcopy(model)
    fit_rows(student, rows, found, sequential=False)
    with tempfile.TemporaryDirectory() as folder:
        text = excerpt(arguments.eval, arguments.eval_characters, Path(folder))
        separate = perplexity(student, tokenizer, text, "paper")
        errors = share(student, sites(model), {row.name: row.held_parameters for row in rows}, found)
        shared = perplexity(student, tokenizer, text, "paper")
    content = {
        "model": Path(arguments.model).name,
        "calibration": found.to_dict(),
        "eval": {"source": Path(arguments.eval).name, "tokens": separate.tokens, "protocol": separate.protocol},
        "held_parameters": plan.held_parameters,
        "perplexity": {"separate": separate.perplexity, "shared": shared.perplexity},
        **errors,
    }
    write_json(arguments.output, document("shared-factor", 0, **content))
    print(f"perplexity {separate.perplexity:.2f} separate, {shared.perplexity:.2f} shared; {errors}")


if __name__ == "__main__":
    main()
