"""One view on every weight that can be compressed: canonical orientation (out, in), whatever holds it.

GPT-2 keeps its linear layers as `Conv1D`, transposed, and q, k, v in one matrix; both facts end here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronfold.models.families import Family, family_of
from kronfold.structures.layer import Structured, StructuredEmbedding, StructuredLinear, parts_of, read_by

DENSE_LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class LinearView:
    """A compressible weight of a model ("site").

    Attributes:
        name: dotted site name, e.g. `transformer.h.1.mlp.c_fc`; a part of a fused layer adds its own name:
            `transformer.h.1.attn.c_attn.q`.
        kind: "linear" or "embedding".
        module: the module that holds the weight (the whole fused layer for a part). module_name: its dotted name.
        part: name of the part of a fused layer, or None.
        rows: the outputs of `module` this weight gives, as (start, stop).
        block: 0-based block index, or None outside the blocks.
        part_names: names of all parts of the fused layer, empty for any other.
        role: what it does in the model (`families.ROLES`), None where that is not known.
    """

    name: str
    kind: Literal["linear", "embedding"]
    module: nn.Module
    module_name: str
    part: str | None
    rows: tuple[int, int]
    block: int | None
    part_names: tuple[str, ...] = ()
    role: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features); for an embedding (vocabulary, stored width)."""
        if isinstance(self.module, StructuredEmbedding):
            return self.module.site_shape
        if isinstance(self.module, nn.Embedding):
            return (self.module.weight.shape[0], self.module.weight.shape[1])
        return (self.rows[1] - self.rows[0], in_features(self.module))

    @property
    def is_inside(self) -> bool:
        """Whether this is the stored matrix of an embedding in levels, narrower than what the embedding gives."""
        return isinstance(self.module, StructuredEmbedding) and self.shape[1] != self.module.embedding_dim

    @property
    def is_dense(self) -> bool:
        """Whether the weight is still one plain matrix."""
        return not isinstance(self._layer(), Structured)

    def _layer(self) -> nn.Module:
        return parts_of(self.module).get(self.part or "", self.module)

    def weight(self) -> Tensor:
        """The dense weight (out_features, in_features), detached; for a factorised embedding its stored matrix."""
        layer = self._layer()
        with torch.no_grad():
            if isinstance(layer, Conv1D):
                return layer.weight.detach()[:, self.rows[0] : self.rows[1]].T
            if isinstance(layer, StructuredEmbedding):
                return layer.site_weight()
            if isinstance(layer, StructuredLinear):
                return layer.dense_weight()
            weight: Tensor = layer.get_parameter("weight").detach()
            whole = layer is not self.module or self.kind == "embedding"
            return weight if whole else weight[self.rows[0] : self.rows[1]]

    def bias(self) -> Tensor | None:
        """The bias entries of these outputs, detached, or None."""
        layer = self._layer()
        bias = getattr(layer, "bias", None)
        if bias is None:
            return None
        return bias.detach() if layer is not self.module else bias.detach()[self.rows[0] : self.rows[1]]


def vocabulary_of(embedding: nn.Module) -> int:
    """Vocabulary size of an embedding, dense or structured."""
    return embedding.num_embeddings  # type: ignore[return-value]


def in_features(module: nn.Module) -> int:
    """Input width of a Linear, Conv1D or structured layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0]
    if parts := parts_of(module):
        return in_features(next(iter(parts.values())))
    return module.in_features  # type: ignore[return-value]


def out_features(module: nn.Module) -> int:
    """Output width of a Linear, Conv1D or structured layer."""
    if isinstance(module, Conv1D):
        return module.weight.shape[1]
    if parts := parts_of(module):
        return sum(out_features(part) for part in parts.values())
    return module.out_features  # type: ignore[return-value]


def sites(model: PreTrainedModel) -> dict[str, LinearView]:
    """All compressible weights of a model by site name, in model order. Works on the meta device.

    A tied LM head is no site of its own, it follows the embedding; an untied one is a linear site outside the blocks.
    Raises InputError for a model of which nothing is recognised.
    """
    return {view.name: view for view in _walk(model, family_of(model))}


def is_tied(model: PreTrainedModel, family: Family) -> bool:
    """Whether the LM head reads the token embedding's numbers."""
    if family.head is None:
        return False
    head, embedding = model.get_submodule(family.head), model.get_submodule(family.embedding)
    weight = getattr(head, "weight", None)
    return read_by(head) is not None or (weight is not None and weight is getattr(embedding, "weight", None))


def does_more(module: nn.Module) -> bool:
    """Whether an embedding or linear layer of a subclass computes something else than the stock one does (a scaled
    embedding, an adapter), so that replacing it by its weight would lose that."""
    stock = next((cls for cls in (nn.Embedding, *DENSE_LINEAR) if isinstance(module, cls)), None)
    return stock is not None and type(module).forward is not stock.forward


def _walk(model: PreTrainedModel, family: Family) -> Iterator[LinearView]:
    inside: tuple[str, ...] = ()
    tied = is_tied(model, family)
    # A bias of a tied head has no place in a TiedHead; such an embedding stays as it is.
    keeps_embedding = tied and getattr(model.get_submodule(family.head or ""), "bias", None) is not None
    for name, module in model.named_modules():
        if (tied and name == family.head) or does_more(module) or (inside and name.startswith(inside)):
            continue
        block, role = family.block_index(name), family.role(name)
        if name == family.embedding:
            inside = (*inside, name + ".")
            if not keeps_embedding:
                rows = (0, vocabulary_of(module))
                yield LinearView(name, "embedding", module, name, None, rows, block, role=role)
        elif isinstance(module, (*DENSE_LINEAR, Structured)):
            inside = (*inside, name + ".")
            parts = family.parts_of(name)
            width = out_features(module)
            if parts is None:
                yield LinearView(name, "linear", module, name, None, (0, width), block, role=role)
                continue
            step = width // len(parts)
            for i, part in enumerate(parts):
                rows = (i * step, (i + 1) * step)
                yield LinearView(f"{name}.{part}", "linear", module, name, part, rows, block, parts, role)


# What of a model is a site and what is left alone, and why; for people who bring a model of an unknown type.


@dataclass(frozen=True)
class Recognised:
    """Attributes:
    model_type: as in config.json. generic: no family record of its own.
    embedding, head, blocks: dotted names; head is None without one. tied: the head reads the embedding.
    depth: number of blocks.
    sites: site pattern (`*` for a block's index) -> how many there are and their role.
    left_alone: pattern of a module with parameters of its own -> why it is no site.
    """

    model_type: str
    generic: bool
    embedding: str
    head: str | None
    tied: bool
    blocks: str
    depth: int
    sites: dict[str, dict[str, Any]]
    left_alone: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def lines(self) -> str:
        """For the terminal."""
        head = "none" if self.head is None else f"{self.head} ({'tied' if self.tied else 'untied'})"
        kind = "no family record, recognised by its parts" if self.generic else "known family"
        found = [f"model type {self.model_type}: {kind}"]
        found.append(f"  embedding {self.embedding}, head {head}, {self.depth} blocks {self.blocks}")
        found.append("  recognised:")
        for name, entry in self.sites.items():
            found.append(f"    {name} ×{entry['count']}" + (f", {entry['role']}" if entry["role"] else ""))
        found.append("  left alone:")
        found += [f"    {name}: {why}" for name, why in self.left_alone.items()] or ["    nothing"]
        return "\n".join(found)


def recognised(model: PreTrainedModel) -> Recognised:
    """What is recognised in a model (also on the meta device) and what is left alone.

    Raises InputError for a model of which nothing is recognised.
    """
    family = family_of(model)
    views = sites(model)
    found: dict[str, dict[str, Any]] = {}
    for view in views.values():
        entry = found.setdefault(_pattern(view.name), {"count": 0, "role": view.role})
        entry["count"] += 1
    inside = tuple(view.module_name + "." for view in views.values())
    left = {}
    for name, module in model.named_modules():
        own = any(True for _ in module.parameters(recurse=False)) or name == family.head
        if own and not (name + ".").startswith(inside):
            left[_pattern(name)] = _why_left(model, family, name, module)
    return Recognised(
        model_type=family.model_type,
        generic=family.generic,
        embedding=family.embedding,
        head=family.head,
        tied=is_tied(model, family),
        blocks=family.blocks,
        depth=len(list(model.get_submodule(family.blocks).children())),
        sites=found,
        left_alone=left,
    )


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _why_left(model: PreTrainedModel, family: Family, name: str, module: nn.Module) -> str:
    kind = type(module).__name__
    dimensions = {parameter.dim() for parameter in module.parameters(recurse=False)}
    if name == family.head and is_tied(model, family):
        return "tied head, follows the embedding"
    if name == family.embedding and not does_more(module):
        return "token embedding whose tied head has a bias of its own"
    if does_more(module):
        return f"{kind} does more than multiply by its weight"
    if isinstance(module, nn.Embedding):
        return "embedding of something other than tokens"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"convolution ({kind})"
    if max(dimensions, default=0) > 2:
        return f"parameters of {max(dimensions)} dimensions (stacked experts?) in {kind}, not linear layers"
    if dimensions == {1}:
        return f"vectors only ({kind})"
    return f"{kind} is no nn.Linear or Conv1D"
