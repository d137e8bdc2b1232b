"""From a model and a plan to a compressed model: `fit` is the one way, of every command and of Python.

Below it stand its parts, in the order in which it uses them, and then what the recipe `auto` needs before it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import RecipeError
from kronfold.base.progress import Progress, Report
from kronfold.data.bad_rows import Reading
from kronfold.data.calibration import draw_windows
from kronfold.export.quantizer import attach
from kronfold.fit.calibration import Calibration, calibrated
from kronfold.fit.rows import fit_row, side_by_side
from kronfold.fit.sequential import compress_sequentially
from kronfold.models.absorb import AbsorbReport, absorb, remaining_gathers
from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.place import fitted_layer, place, read_specs
from kronfold.models.statistics import Statistics
from kronfold.models.truncate import depth_of, truncate
from kronfold.options import read
from kronfold.planner import planning
from kronfold.planner.budget import Budget, plan_for_budget
from kronfold.planner.plan import KeptLayers, Plan, PlanRow, PlanStage
from kronfold.planner.recipe import AutoRecipe, Recipe, load_recipe


@dataclass(frozen=True)
class Fitted:
    """What `fit` made.

    Attributes:
        model: compressed, and it saves itself as a kronfold checkpoint. stages: as planned, with the errors of their
            rows. gathers: the `gathers` entry of documents, see `absorb_gathers`; None where none were absorbed yet.
    """

    model: PreTrainedModel
    stages: list[PlanStage]
    gathers: dict[str, Any] | None


def fit(
    model: PreTrainedModel,
    plan: Plan | PlanStage,
    calibration: Calibration | None = None,
    *,
    sequential: bool = False,
    adapt: bool = False,
    seed: int = 0,
    last: bool = True,
    in_place: bool = False,
    progress: Report | None = None,
) -> Fitted:
    """Carry out a plan, or one stage of it: drop blocks, fit the rows stage by stage, absorb gathers.

    Args:
        model: with weights; unchanged, unless `in_place`.
        plan: for this model. A job that heals between stages gives one at a time, with the model as it then is.
        calibration: text and statistics of the dense model (without the blocks that the plan drops) to fit to; None
            fits to the weights alone.
        sequential: with calibration, fit each layer to what the compressed layers before it produce; else all to the
            dense model's inputs, which measured better (docs/results.md, "In sequence or together").
        adapt: with sequential, also refit the layers of the blocks that stay dense.
        seed: of the permutation searches.
        last: no stage comes after this one, so gathers are absorbed. Earlier that would move a later search's start.
        in_place: `model` itself becomes the compressed one; a plan that drops blocks makes a new one all the same.

    Raises RecipeError, before anything is changed, when the plan does not fit the model. ShapeError, InputError with
    the row's name for a weight that cannot be fitted.
    """
    stages = plan.stages if isinstance(plan, Plan) else [plan]
    planning.check_stages(stages, model)
    student = keep_layers(model, stages[0].layers if stages else None)
    if student is model and not in_place:
        student = copy.deepcopy(model)
    done = [
        replace(
            stage,
            rows=fit_rows(
                student, stage.rows, calibration, sequential=sequential, adapt=adapt, seed=seed, progress=progress
            ),
        )
        for stage in stages
    ]
    gathers = absorb_gathers(student) if last else None
    if read_specs(student):
        attach(student)
    return Fitted(student, done, gathers)


def keep_layers(model: PreTrainedModel, layers: KeptLayers | None) -> PreTrainedModel:
    """A new model with the blocks that a plan keeps, `model` itself where it keeps all (None).

    Raises RecipeError when they are not blocks of the model, which is never changed.
    """
    if layers is None:
        return model
    planning.check_layers(layers, depth_of(model))
    return truncate(model, layers.kept)


def fit_rows(
    model: PreTrainedModel,
    rows: Sequence[PlanRow],
    calibration: Calibration | None = None,
    *,
    sequential: bool = False,
    adapt: bool = False,
    seed: int = 0,
    progress: Report | None = None,
) -> list[PlanRow]:
    """Fit rows that fit the model and swap them into it, in place. Returns them with their errors filled in.

    The arguments are those of `fit`. Rows that do not wait for each other are fitted side by side, as many at once as
    torch has threads, and swapped in when all are done. Biases take up what a fit to data leaves of the mean output.
    """
    if not rows:
        return []
    if calibration is not None and sequential:
        return compress_sequentially(
            model, rows, calibration.statistics, calibration.windows, adapt=adapt, seed=seed, progress=progress
        )
    views, statistics = sites(model), calibration.statistics if calibration else None
    told = Progress.of(progress).step("decompose")
    layers: list[nn.Module] = []
    done = []
    works = [partial(_fit, views[row.name], row, seed, statistics) for row in rows]
    with closing(side_by_side(works, [math.prod(views[row.name].shape) for row in rows])) as fits:
        for i, row in enumerate(rows):
            told.update(i, len(rows), item=row.name)
            view, (found, plain) = views[row.name], next(fits)
            layers.append(fitted_layer(view, row.spec, found, _refitted_bias(view, found, statistics)))
            done.append(replace(row, relative_error=found.relative_error, relative_error_plain=plain))
    told.update(len(rows), len(rows))
    for row, layer in zip(rows, layers, strict=True):
        place(model, views[row.name], layer, row.head)
    return done


def _fit(view: LinearView, row: PlanRow, seed: int, statistics: Statistics | None) -> tuple[Any, float | None]:
    return fit_row(view.weight(), row, seed, statistics.weighting(view) if statistics else None)


def _refitted_bias(view: LinearView, fit: Any, statistics: Statistics | None) -> Tensor | None:
    """The bias with which the mean output on the calibration text stays what it was; None leaves it alone."""
    bias = view.bias()
    if statistics is None or bias is None:
        return None
    mean = statistics.input_moments(view.module_name)[1].double()
    return bias.double().cpu() + (view.weight().double().cpu() - fit.to_dense()) @ mean


def absorb_gathers(model: PreTrainedModel, blocks: Iterable[int] | None = None) -> dict[str, Any]:
    """Reorder hidden units and value channels, in place, so that fewer gathers run; logits stay as they are.

    The residual stream is left alone: hidden states between blocks still agree with the teacher's, channel by channel.
    Call it once, after the last stage is fitted: a later stage would search its permutations from another start. Of a
    model without a family record nothing is reordered.

    `blocks`: only these, each once; None for all.

    Returns the `gathers` entry of documents: {"absorbed": how many are gone, "remaining": names, "bytes": theirs}.
    """
    if family_of(model).generic:
        return gathers_of(model)
    return absorb(model, residual=False, blocks=blocks).to_dict()


def gathers_of(model: PreTrainedModel) -> dict[str, Any]:
    """The same entry for a model as it stands: nothing absorbed. Works on the meta device."""
    held = remaining_gathers(model)
    total = sum(gather.bytes for gather in held)
    return AbsorbReport([], held, total, total).to_dict()


# The `auto` recipe: calibrate, plan for a budget, fit to data.


def settings_of(recipe: str | Recipe | None, changes: Mapping[str, Any] | None = None) -> AutoRecipe:
    """The `auto` entry of a recipe (the default one where it has none) with some fields changed.

    Raises RecipeError: a field that is not there, or a value that is not allowed.
    """
    own = load_recipe(recipe).auto if recipe is not None else None
    known = own.model_dump() if own else {}
    return read(AutoRecipe, {**known, **(changes or {})}, "These options")


def calibrate_on(
    model: PreTrainedModel,
    tokenizer: Any,
    sources: Sequence[str | Path] | Tensor,
    settings: AutoRecipe,
    *,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Report | None = None,
) -> Calibration:
    """Draw windows from the texts (or take the given ones) and measure `model` on them. `reading`: how texts are read.

    Raises DataError: a text too short (what it holds is named); and as `calibrate`.
    """
    context = getattr(model.config, "max_position_embeddings", None) or settings.window
    texts: list[dict[str, Any]] = []
    if isinstance(sources, Tensor):
        windows = sources
    else:
        window = min(settings.window, context)
        windows, texts = draw_windows(
            sources, tokenizer, count=settings.windows, window=window, seed=seed, reading=reading
        )
    calibration = calibrated(
        model,
        windows,
        gradient_windows=settings.gradient_windows,
        all_windows=not settings.sequential,
        seed=seed,
        cache=cache,
        progress=progress,
    )
    return replace(calibration, read=tuple(texts))


def plan_auto(
    model: PreTrainedModel,
    calibration: Calibration,
    recipe: Recipe,
    budget: Budget | None = None,
    *,
    progress: Report | None = None,
) -> Plan:
    """The plan of least predicted loss for `budget` (default: the recipe's `target_ratio`).

    `recipe`: one with an `auto` entry; its last stage takes the rows.

    Raises RecipeError for a model that is already structured, and as `plan_for_budget`.
    """
    if read_specs(model):
        raise RecipeError(
            "The planner starts from a dense model, and this one holds structured layers already. Plan from the "
            "original, or fold this one first: kronfold.to_dense(model)."
        )
    settings = settings_of(recipe)
    curves = calibration.curves(model, settings.structures, progress)
    return plan_for_budget(model, curves, budget or Budget("params", ratio=settings.target_ratio), recipe=recipe)
