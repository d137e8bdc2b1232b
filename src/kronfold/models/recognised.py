"""What of a model is a site and what is left alone, and why; for people who bring a model of an unknown type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from kronfold.models.families import Family, family_of
from kronfold.models.linear_view import does_more, is_tied, sites


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
