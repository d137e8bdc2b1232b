"""Fold every structure back into plain weights: any runtime loads the result, and its size is the dense one again."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from kronfold.models.families import family_of
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.surgery import STRUCTURED_EMBEDDING, read_specs, replace_modules
from kronfold.nn import TiedHead


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """A plain transformers model with the same logits (to rounding). The given model is unchanged.

    Raises InputError for a model of which nothing is recognised.
    """
    family = family_of(model)
    head_follows = family.head is not None and isinstance(model.get_submodule(family.head), TiedHead)
    dense = copy.deepcopy(model)
    ours = ("hf_quantizer", "quantization_method", "_tied_weights_keys", "all_tied_weights_keys")
    for attribute in (*ours, "_keys_to_ignore_on_load_unexpected"):
        dense.__dict__.pop(attribute, None)
    if hasattr(dense.config, "quantization_config"):
        del dense.config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(dense.config)
    views = sites(model)
    plain: dict[str, nn.Module] = {}
    for name in read_specs(model):
        if name == family.head and head_follows:
            continue
        own = [view for view in views.values() if view.module_name == name]
        plain[name] = _materialise(skeleton.get_submodule(name), model.get_submodule(name), own)
    if family.head is not None and head_follows:
        head = skeleton.get_submodule(family.head)
        head.weight = plain[family.embedding].weight
        plain[family.head] = head
    replace_modules(dense, plain)
    dense.all_tied_weights_keys = dense.get_expanded_tied_weights_keys(all_submodels=True)
    return dense


def _materialise(target: nn.Module, source: nn.Module, views: list[LinearView]) -> nn.Module:
    """Give the empty stock module `target` the dense weight (and bias) that `source` stands for."""
    with torch.no_grad():
        if isinstance(source, STRUCTURED_EMBEDDING):
            weight, bias = source.dense_weight(), None
        else:
            weight = torch.cat([view.weight() for view in views])
            biases = [view.bias() for view in views]
            bias = None if biases[0] is None else torch.cat([b for b in biases if b is not None])
        if not isinstance(target, nn.Linear | nn.Embedding):
            weight = weight.T  # Conv1D
        target.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format))
        if bias is not None:
            target.bias = nn.Parameter(bias.detach().clone())
    return target
