"""Fit one row of a plan to its weight, and put what was found into the place of the old module."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronfold.base.errors import InputError, RecipeError
from kronfold.decompose.weighting import Weighting
from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView
from kronfold.models.structures import STRUCTURES
from kronfold.models.surgery import STRUCTURED_EMBEDDING, dense_part
from kronfold.nn import FactorizedEmbedding, FusedLinear, GroupedEmbedding, TensorTrainEmbedding, TiedHead
from kronfold.planner import planning
from kronfold.planner.plan import PlanRow
from kronfold.structures.kronecker import nearest_kronecker


def fit_row(weight: Tensor, row: PlanRow, seed: int, weighting: Weighting | None = None) -> tuple[Any, float]:
    """The solver's result for a weight (out, in), and the relative error of the same shape without permutations.

    Raises RecipeError, ShapeError, InputError, each with the row's name.
    """
    structure = STRUCTURES.get(row.spec["structure"])
    if structure.fit is None:
        raise RecipeError(f"{row.name}: structure {row.spec['structure']!r} cannot be fitted to a weight.")
    solve = structure.inits.get(row.spec.get("init", ""), structure.fit)
    spec = planning.spec_of(row)
    searched = weighting is None and row.spec["structure"] == "kronecker" and (spec.searches_in or spec.searches_out)
    try:
        plain_error = nearest_kronecker(weight, spec).relative_error if searched else None  # first: one fit in memory
        fit = solve(weight, spec, seed, weighting)
    except InputError as error:
        raise type(error)(f"{row.name}: {error}") from error
    return fit, fit.relative_error if plain_error is None else plain_error


def weighting_for(row: PlanRow, weighting: Weighting) -> Weighting:
    """The part of a site's weighting that pays: blocks of several rows are fitted without a full output moment.

    With it every step over the A's is a run of conjugate gradients on the whole weight: 7 to 20 times the time, for a
    gain in perplexity that was never measured.
    """
    several = row.spec["structure"] == "kronecker" and row.spec["b"][0] > 1
    full = weighting.outputs is not None and weighting.outputs.dim() == 2
    return replace(weighting, outputs=None) if several and full else weighting


def place_linear(
    modules: dict[str, nn.Module], view: LinearView, row: PlanRow, fit: Any, bias: Tensor | None = None
) -> None:
    """Add to `modules` the layer that replaces the view's module (for a part: the fused layer around it).

    `bias`: (out_features,) in place of the present one.
    """
    cls = STRUCTURES.get(row.spec["structure"]).module
    assert cls is not None
    like = next(view.module.parameters())
    layer = cls.from_fit(fit, view.bias() if bias is None else bias, like.dtype, like.device)
    layer.train(view.module.training)
    if view.part is None:
        modules[view.module_name] = layer
        return
    fused = modules.get(view.module_name)
    parts = fused.parts if isinstance(fused, FusedLinear) else _parts_of(view)
    modules[view.module_name] = FusedLinear({**parts, view.part: layer})


@torch.no_grad()
def overwrite(view: LinearView, weight: Tensor, bias: Tensor | None) -> None:
    """Put a dense weight (out, in), and a bias (out,), in place of those of a dense view."""
    layer, (start, stop) = view.module, view.rows
    if view.part is not None and isinstance(layer, FusedLinear):
        layer, start, stop = layer.parts[view.part], 0, stop - start
    held = layer.get_parameter("weight")
    (held[:, start:stop].T if isinstance(layer, Conv1D) else held[start:stop]).copy_(weight)
    if bias is not None:
        layer.get_parameter("bias")[start:stop].copy_(bias)


def _parts_of(view: LinearView) -> dict[str, nn.Module]:
    """The parts a fused layer has now: its structured parts, or dense copies of its rows."""
    if isinstance(view.module, FusedLinear):
        return view.module.parts
    width = view.rows[1] - view.rows[0]
    return {name: dense_part(view.module, (i * width, (i + 1) * width)) for i, name in enumerate(view.part_names)}


def place_embedding(
    model: PreTrainedModel, modules: dict[str, nn.Module], view: LinearView, row: PlanRow, fit: Any
) -> None:
    """Add to `modules` the new embedding, and a tied head: one that reads it, or one with a copy of its own."""
    is_first = not isinstance(view.module, STRUCTURED_EMBEDDING)
    new = _embedding_with(view, row, fit)
    modules[view.module_name] = new
    head_name = family_of(model).head
    if head_name is None:
        return
    head = model.get_submodule(head_name)
    was_tied = isinstance(head, TiedHead) or (is_first and getattr(head, "weight", None) is view.module.weight)
    if was_tied and row.spec["head"] == "tied":
        modules[head_name] = TiedHead(new)
    elif was_tied:
        modules[head_name] = _own_head(head, view)


def _embedding_with(
    view: LinearView, row: PlanRow, fit: Any
) -> FactorizedEmbedding | GroupedEmbedding | TensorTrainEmbedding:
    """A Kronecker fit is one more level inside the embedding; any other one takes its place."""
    old, cls = view.module, STRUCTURES.get(row.spec["structure"]).embedding
    if cls is not None:
        like = next(old.parameters())
        return cls.from_fit(fit, like.dtype, like.device)
    embedding = old if isinstance(old, FactorizedEmbedding) else FactorizedEmbedding.from_dense(view.weight())
    return embedding.add_level(fit.b[:, 0, :], fit.perm_in, fit.a)


def _own_head(head: nn.Module, view: LinearView) -> nn.Module:
    """An LM head with its own copy of the dense embedding (the published model's untied head)."""
    weight = view.module.dense_weight() if isinstance(view.module, FactorizedEmbedding) else view.weight()
    own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        own.weight.copy_(weight)
    return own.train(head.training)
