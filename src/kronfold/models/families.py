"""One record per model family. A new family is one more record here and one more row in the contract test."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PretrainedConfig

from kronfold.base.errors import InputError
from kronfold.base.registry import Registry


@dataclass(frozen=True)
class Family:
    """Where things are in a causal language model of one `model_type`.

    Attributes:
        model_type: as in config.json.
        embedding: dotted name of the token embedding. head: dotted name of the LM head.
        blocks: dotted name of the list of transformer blocks.
        fused: suffix of a layer that holds several weights side by side along its outputs -> the parts' names, all of
            equal width.
    """

    model_type: str
    embedding: str
    head: str
    blocks: str
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def parts_of(self, module_name: str) -> tuple[str, ...] | None:
        """Names of the parts of a fused layer, None for any other layer."""
        for suffix, parts in self.fused.items():
            if module_name.endswith("." + suffix):
                return parts
        return None

    def block_index(self, module_name: str) -> int | None:
        """0-based index of the block a module belongs to, None outside the blocks."""
        prefix = self.blocks + "."
        if not module_name.startswith(prefix):
            return None
        return int(module_name[len(prefix) :].split(".", 1)[0])


FAMILIES: Registry[Family] = Registry("model family")
FAMILIES.register(
    "gpt2",
    Family(
        model_type="gpt2",
        embedding="transformer.wte",
        head="lm_head",
        blocks="transformer.h",
        fused={"attn.c_attn": ("q", "k", "v")},
    ),
)


def family_of(config: PretrainedConfig) -> Family:
    """The record for a config. Raises InputError naming the families there are."""
    if config.model_type not in FAMILIES:
        raise InputError(
            f"Models of type {config.model_type!r} are not known to this version. Known: {', '.join(FAMILIES.names())}."
        )
    return FAMILIES.get(config.model_type)
