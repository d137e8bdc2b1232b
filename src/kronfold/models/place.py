"""Put structured layers into a model, and read back what a model holds: the one way, for fitting, planning and loading.

`place` puts a layer at a site and mends the ties of embedding and head. Planning does it on the meta device with empty
layers, fitting with fitted ones, so that both count the same. `build_skeleton` makes the empty layers that a checkpoint
describes. Specs of a whole model are one dict: module name -> spec dict (as the modules' `to_spec` gives them); a
checkpoint's config carries it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronfold.base.errors import CheckpointError, KronfoldError, suggest
from kronfold.models.families import FAMILIES, family_of
from kronfold.models.linear_view import DENSE_LINEAR, LinearView, in_features, is_tied, out_features
from kronfold.structures.layer import (
    FusedLinear,
    StructuredEmbedding,
    dense_rows,
    parts_of,
    read_by,
    structured_modules,
)
from kronfold.structures.levels import TiedHead
from kronfold.structures.registry import STRUCTURES, Kind, Where, structure_of

Head = Literal["tied", "untied"]
Specs = Mapping[str, Mapping[str, Any]]


def where(view: LinearView) -> Where:
    """The place of a site, for `Structure.empty` and `Structure.from_fit`."""
    like = next(view.module.parameters())
    return Where(view.kind, view.shape, view.bias() is not None, like.device, like.dtype, view.module)


def empty_layer(view: LinearView, spec: Any) -> nn.Module:
    """The layer that a fit of `spec` at this site will be, without its numbers."""
    structure = structure_of(spec)
    return structure.empty(structure.held(spec), where(view))


def fitted_layer(view: LinearView, spec: Any, fit: Any, bias: Tensor | None = None) -> nn.Module:
    """The layer that holds what a solver found for `spec` at this site. bias: (out,) in place of the present one."""
    return structure_of(spec).from_fit(fit, where(view), view.bias() if bias is None else bias)


def place(model: PreTrainedModel, view: LinearView, layer: nn.Module, head: Head | None = None) -> None:
    """Put `layer` at a site of `model`, in place.

    A part of a fused layer gets its place in the structured fused layer around it, whose other parts stay what they
    are. An embedding takes the LM head along if that reads it: `head` says whether it goes on reading (tied, also for
    None) or gets a copy of its own of what it read (untied).

    Args:
        view: of this model, or of the model as it was before other sites of it were placed.
    """
    layer.train(view.module.training)
    modules: dict[str, nn.Module] = {view.module_name: layer}
    if view.part is not None:
        present = model.get_submodule(view.module_name)
        step = view.rows[1] - view.rows[0]
        parts = parts_of(present) or {
            name: dense_part(present, (i * step, (i + 1) * step)) for i, name in enumerate(view.part_names)
        }
        modules[view.module_name] = FusedLinear({**parts, view.part: layer}).train(view.module.training)
    elif view.kind == "embedding":
        family = family_of(model)
        if family.head is not None and is_tied(model, family):
            old = model.get_submodule(family.head)
            new = own_head(view.module) if head == "untied" else TiedHead(layer)  # type: ignore[arg-type]
            modules[family.head] = new.train(old.training)
    replace_modules(model, modules)


@torch.no_grad()
def overwrite(view: LinearView, weight: Tensor, bias: Tensor | None) -> None:
    """Put a dense weight (out, in), and a bias (out,), in place of those of a dense view."""
    layer, (start, stop) = view.module, view.rows
    if view.part is not None and view.part in parts_of(layer):
        layer, start, stop = parts_of(layer)[view.part], 0, stop - start
    held = layer.get_parameter("weight")
    (held[:, start:stop].T if isinstance(layer, Conv1D) else held[start:stop]).copy_(weight)
    if bias is not None:
        layer.get_parameter("bias")[start:stop].copy_(bias)


def replace_modules(model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> None:
    """Put each module in its place and mend the ties. Everything is looked up before anything is changed."""
    places = {}
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        places[name] = (model.get_submodule(parent), leaf, module)
    for parent_module, leaf, module in places.values():
        setattr(parent_module, leaf, module)
    # A structured embedding either feeds a TiedHead or has parted from its head; say so in the model's own terms.
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, StructuredEmbedding):
        return
    if head is not None:
        model.config.tie_word_embeddings = read_by(head) is embedding
    # transformers ties by parameter name; there is no name to tie any more (a TiedHead has no parameters).
    model._tied_weights_keys = None
    model.all_tied_weights_keys = {}


def read_specs(model: PreTrainedModel) -> dict[str, dict[str, Any]]:
    """Specs of all structured modules of a model, by module name; empty for a dense model."""
    return {name: module.to_spec() for name, module in structured_modules(model)}


def check_specs(model: PreTrainedModel, specs: Specs) -> list[str]:
    """All faults of `specs` against a model, as sentences; empty when they fit. Nothing is changed."""
    with torch.device("meta"):
        return _built(model, specs, torch.device("meta"))[1]


def build_skeleton(model: PreTrainedModel, specs: Specs) -> None:
    """Replace modules of `model` by empty structured ones as `specs` say, on the devices and dtypes they had.

    Raises CheckpointError with all faults at once, before anything is changed.
    """
    if faults := check_specs(model, specs):
        raise CheckpointError("The specs do not fit this model, which is unchanged:\n  " + "\n  ".join(faults))
    replace_modules(model, _built(model, specs)[0])


def _built(
    model: PreTrainedModel, specs: Specs, device: torch.device | None = None
) -> tuple[dict[str, nn.Module], list[str]]:
    """The modules that `specs` describe, on the devices they had or on `device`, and the faults of those that do not
    fit."""
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    known = model.config.model_type in FAMILIES
    built: dict[str, nn.Module] = {}
    faults = []
    # The head last: it may read the embedding that has just been built.
    for name in sorted(specs, key=lambda name: modules.get(name) is head):
        spec = specs[name]
        if name not in modules:
            faults.append(f"{name}: the model has no such module. {suggest(name, modules, limit=6)}")
            continue
        try:
            if spec["structure"] not in STRUCTURES:
                raise CheckpointError(
                    f"unknown structure {spec['structure']!r}. {suggest(str(spec['structure']), STRUCTURES)}"
                )
            source = modules[name]
            kind: Kind = "linear"
            if isinstance(source, nn.Embedding):
                kind, shape, bias = "embedding", (source.num_embeddings, source.embedding_dim), False
            elif isinstance(source, DENSE_LINEAR):
                kind, shape, bias = "linear", (out_features(source), in_features(source)), source.bias is not None
            else:
                raise CheckpointError(f"{type(source).__name__} is no linear layer and no embedding")
            like = next(source.parameters())
            parts = FAMILIES.get(model.config.model_type).parts_of(name) if known else None
            read = None
            if source is head:
                read = next((built[at] for at in built if modules[at] is embedding), embedding)
            there = Where(kind, shape, bias, device or like.device, like.dtype, source, parts or (), read)
            built[name] = STRUCTURES.get(spec["structure"]).build(spec, there)
        except (KronfoldError, KeyError, TypeError, ValueError) as error:
            faults.append(f"{name}: {error}")
    return built, faults


def own_head(embedding: nn.Module) -> nn.Linear:
    """An LM head with a copy of its own of an embedding's dense weight (the published model's untied head)."""
    weight = dense_rows(embedding)
    own = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        own.weight.copy_(weight)
    return own


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
