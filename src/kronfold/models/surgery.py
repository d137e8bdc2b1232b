"""Swap modules of a model for structured ones, read the specs back, and keep the ties of embedding and head right.

Specs of a whole model are one dict: module name -> spec dict (as the modules' `to_spec` gives them). That dict is what
a checkpoint's config carries, and the same code builds the skeleton when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronfold.base.errors import CheckpointError, KronfoldError, suggest
from kronfold.models.families import family_of
from kronfold.models.linear_view import DENSE_LINEAR, in_features, out_features
from kronfold.models.structures import STRUCTURES
from kronfold.nn import FactorizedEmbedding, FusedLinear, GroupedEmbedding, TensorTrainEmbedding, TiedHead

Specs = Mapping[str, Mapping[str, Any]]
STRUCTURED_EMBEDDING = (FactorizedEmbedding, GroupedEmbedding, TensorTrainEmbedding)


def replace_modules(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in its place and mend the ties. Everything is looked up before anything is changed."""
    places = {}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        places[name] = (model.get_submodule(parent), leaf, module)
    for parent_module, leaf, module in places.values():
        setattr(parent_module, leaf, module)
    _mend_ties(model)


def _mend_ties(model: PreTrainedModel) -> None:
    """A structured embedding either feeds a TiedHead or has parted from its head; say so in the model's own terms."""
    if not isinstance(model.get_input_embeddings(), STRUCTURED_EMBEDDING):
        return
    head = model.get_output_embeddings()
    if head is not None:
        model.config.tie_word_embeddings = isinstance(head, TiedHead)
    # transformers ties by parameter name; there is no name to tie any more (a TiedHead has no parameters).
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def read_specs(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Specs of all structured modules of a model, by module name; empty for a dense model."""
    specs: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "to_spec") or any(name.startswith(done + ".") for done in specs):
            continue
        specs[name] = module.to_spec()
    return specs


def check_specs(model: PreTrainedModel, specs: Specs) -> list[str]:
    """All faults of `specs` against a model, as sentences; empty when they fit. Nothing is built or changed."""
    faults = []
    modules = dict(model.named_modules())
    for name, spec in specs.items():
        structure = spec.get("structure")
        if name not in modules:
            faults.append(f"{name}: the model has no such module. {suggest(name, modules, limit=6)}")
        elif structure not in STRUCTURES:
            faults.append(f"{name}: unknown structure {structure!r}. {suggest(str(structure), STRUCTURES)}")
        else:
            try:
                with torch.device("meta"):
                    _build(model, name, spec)
            except (KronfoldError, KeyError, TypeError, ValueError) as error:
                faults.append(f"{name}: {error}")
    return faults


def build_skeleton(model: PreTrainedModel, specs: Specs) -> None:
    """Replace modules of `model` by empty structured ones as `specs` say, on the devices and dtypes they had.

    Raises CheckpointError with all faults at once, before anything is changed.
    """
    faults = check_specs(model, specs)
    if faults:
        raise CheckpointError("The specs do not fit this model, which is unchanged:\n  " + "\n  ".join(faults))
    built: dict[str, nn.Module] = {}
    # Heads last: a TiedHead needs the embedding that has just been built.
    for name, spec in sorted(specs.items(), key=lambda item: item[1]["structure"] == "tied_head"):
        built[name] = _build(model, name, spec, built)
    replace_modules(model, built)


def _build(
    model: PreTrainedModel, name: str, spec: Mapping[str, Any], built: Mapping[str, nn.Module] | None = None
) -> nn.Module:
    source = model.get_submodule(name)
    structure = spec["structure"]
    if structure == "tied_head":
        embedding_name = family_of(model).embedding
        embedding = (built or {}).get(embedding_name, model.get_submodule(embedding_name))
        if built is not None and not isinstance(embedding, STRUCTURED_EMBEDDING):
            raise CheckpointError(f"a tied_head needs a structured embedding at {embedding_name}")
        return TiedHead(embedding)
    weight = next(source.parameters())
    where = {"device": weight.device, "dtype": weight.dtype}
    found = STRUCTURES.get(structure)
    if structure == "factorized_embedding" or found.embedding is not None:
        if not isinstance(source, nn.Embedding):
            raise CheckpointError(f"{structure} needs an embedding, found {type(source).__name__}")
        if found.embedding is not None:
            found.read_spec(spec).check_weight((source.num_embeddings, source.embedding_dim))
            return found.embedding.from_spec(dict(spec), **where)
        return FactorizedEmbedding(source.num_embeddings, source.embedding_dim, spec["levels"], **where)
    if not isinstance(source, DENSE_LINEAR):
        raise CheckpointError(f"{structure} needs a linear layer, found {type(source).__name__}")
    if structure == "fused":
        return _build_fused(model, name, source, spec, where)
    return build_linear(spec, (out_features(source), in_features(source)), source.bias is not None, where)


def _build_fused(
    model: PreTrainedModel, name: str, source: nn.Module, spec: Mapping[str, Any], where: dict[str, Any]
) -> FusedLinear:
    expected = family_of(model).parts_of(name)
    if expected is None or set(spec["parts"]) != set(expected):
        raise CheckpointError(f"parts {list(spec['parts'])} do not match this layer's parts {list(expected or ())}")
    rows = out_features(source) // len(expected)
    shape = (rows, in_features(source))
    has_bias = source.bias is not None
    return FusedLinear({part: build_linear(spec["parts"][part], shape, has_bias, where) for part in expected})


def build_linear(spec: Mapping[str, Any], shape: tuple[int, int], bias: bool, where: dict[str, Any]) -> nn.Module:
    """An empty layer for one weight of `shape` (out, in). Raises ShapeError when the spec describes another shape."""
    if spec["structure"] == "dense":
        return nn.Linear(shape[1], shape[0], bias=bias, **where)
    structure = STRUCTURES.get(spec["structure"])
    if structure.spec is None or structure.module is None:
        raise CheckpointError(f"structure {spec['structure']!r} does not describe a linear layer")
    structure.read_spec(spec).check_weight(shape)
    return structure.module.from_spec(dict(spec), bias, **where)


def dense_part(module: nn.Module, rows: tuple[int, int]) -> nn.Linear:
    """Rows of a Linear or Conv1D as an `nn.Linear` of their own (copied storage)."""
    stored = module.get_parameter("weight")
    weight = (stored.T if isinstance(module, Conv1D) else stored)[rows[0] : rows[1]]
    bias = None if module.bias is None else module.get_parameter("bias")[rows[0] : rows[1]]
    part = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        part.weight.copy_(weight)
        if bias is not None:
            part.bias.copy_(bias)
    return part
