"""One record per model family. A new family is one more record here and one more row in the contract test.

A model of any other type gets a record worked out from the model itself (`generic_family`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.base.registry import Registry

ROLES = ("embedding", "attention_in", "attention_out", "mlp_in", "mlp_out", "head")


@dataclass(frozen=True)
class Family:
    """Where things are in a causal language model of one `model_type`.

    Whether norms are LayerNorm or RMSNorm, and whether layers have biases, is read off the modules.

    Attributes:
        model_type: as in config.json.
        embedding: dotted name of the token embedding. head: dotted name of the LM head, None without one.
        blocks: dotted name of the list of transformer blocks.
        final_norm: dotted name of the norm before the head. positions: dotted name of a learned position embedding.
        attention_inputs: layers that read the attention's normed input, in the order q, k, v (or the fused layer);
            attention_output: the one layer that reads the heads' values. Names relative to a block, as all that follow.
        mlp_inputs: layers that read the normed input of the feed-forward part; their outputs are its hidden units.
        mlp_output: the one layer that reads the hidden units.
        attention_norm, mlp_norm: the norms that feed `attention_inputs` and `mlp_inputs`.
        fused: suffix of a layer that holds several weights side by side along its outputs -> the parts' names, all of
            equal width.
        rotary: queries and keys are rotated by position, every pair of channels at its own frequency.
        generic: worked out from the model. Its roles go by the layer names of the known families, and nothing is
            known of what reads what.
    """

    model_type: str
    embedding: str
    head: str | None
    blocks: str
    final_norm: str | None
    attention_inputs: tuple[str, ...]
    attention_output: tuple[str, ...]
    mlp_inputs: tuple[str, ...]
    mlp_output: tuple[str, ...]
    attention_norm: str | None = None
    mlp_norm: str | None = None
    positions: str | None = None
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rotary: bool = False
    generic: bool = False

    @property
    def roles(self) -> dict[str, tuple[str, ...]]:
        """Role -> names relative to a block."""
        return {
            "attention_in": self.attention_inputs,
            "attention_out": self.attention_output,
            "mlp_in": self.mlp_inputs,
            "mlp_out": self.mlp_output,
        }

    @property
    def norms(self) -> dict[str, tuple[str, ...]]:
        """Norm of a block -> the layers it feeds, names relative to a block."""
        pairs = ((self.attention_norm, self.attention_inputs), (self.mlp_norm, self.mlp_inputs))
        return {norm: fed for norm, fed in pairs if norm is not None}

    def role(self, module_name: str) -> str | None:
        """One of ROLES, None for a layer with no known role."""
        if module_name in (self.embedding, self.head):
            return "embedding" if module_name == self.embedding else "head"
        if self.block_index(module_name) is None:
            return None
        inner = module_name[len(self.blocks) + 1 :].partition(".")[2]
        return next((role for role, names in self.roles.items() if inner in names), None)

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

    def block_name(self, block: int, name: str = "") -> str:
        """Dotted name of a block, or of what is called `name` inside it."""
        return f"{self.blocks}.{block}" + (f".{name}" if name else "")


def _llama_like(model_type: str) -> Family:
    """Separate q, k, v (keys and values perhaps of fewer heads), a gated feed-forward part, RMSNorm before each."""
    return Family(
        model_type=model_type,
        embedding="model.embed_tokens",
        head="lm_head",
        blocks="model.layers",
        final_norm="model.norm",
        attention_inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        attention_output=("self_attn.o_proj",),
        mlp_inputs=("mlp.gate_proj", "mlp.up_proj"),
        mlp_output=("mlp.down_proj",),
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        rotary=True,
    )


FAMILIES: Registry[Family] = Registry("model family")
FAMILIES.register(
    "gpt2",
    Family(
        model_type="gpt2",
        embedding="transformer.wte",
        head="lm_head",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention_inputs=("attn.c_attn",),
        attention_output=("attn.c_proj",),
        mlp_inputs=("mlp.c_fc",),
        mlp_output=("mlp.c_proj",),
        attention_norm="ln_1",
        mlp_norm="ln_2",
        positions="transformer.wpe",
        fused={"attn.c_attn": ("q", "k", "v")},
    ),
)
FAMILIES.register(
    "gpt_neo",
    Family(
        model_type="gpt_neo",
        embedding="transformer.wte",
        head="lm_head",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention_inputs=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        attention_output=("attn.attention.out_proj",),
        mlp_inputs=("mlp.c_fc",),
        mlp_output=("mlp.c_proj",),
        attention_norm="ln_1",
        mlp_norm="ln_2",
        positions="transformer.wpe",
    ),
)
FAMILIES.register("llama", _llama_like("llama"))  # SmolLM2 and TinyLlama are of this type
FAMILIES.register("mistral", _llama_like("mistral"))
FAMILIES.register("qwen2", _llama_like("qwen2"))
FAMILIES.register("qwen3", _llama_like("qwen3"))  # its extra norms of queries and keys work inside a head


def family_of(model_or_config: PreTrainedModel | PretrainedConfig) -> Family:
    """The record for a model or config; for an unknown type the one worked out from the (empty) model.

    Raises InputError: an unknown type of which nothing can be recognised, or that is no causal language model.
    """
    config = model_or_config if isinstance(model_or_config, PretrainedConfig) else model_or_config.config
    if config.model_type in FAMILIES:
        return FAMILIES.get(config.model_type)
    if isinstance(model_or_config, PretrainedConfig):
        return generic_family(empty_model(model_or_config))
    return generic_family(model_or_config)


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The plain model of a config on the meta device. Raises InputError for what is no causal language model."""
    content = config.to_dict()
    content.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(type(config).from_dict(content))
    except ValueError as error:
        raise InputError(
            f"Models of type {config.model_type!r} are no causal language models that transformers can build "
            f"({str(error).splitlines()[0][:120]}). Known families: {', '.join(FAMILIES.names())}."
        ) from error


def generic_family(model: PreTrainedModel) -> Family:
    """A record for any decoder: its embedding and head by transformers' own accessors, its blocks as the list that
    holds most of the parameters.

    Raises InputError when it has no embedding or no list of blocks.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and name
    }
    if embedding is None or not lists:
        lacks = "token embedding" if embedding is None else "list of blocks"
        raise InputError(
            f"Nothing is recognised in this model of type {model.config.model_type!r} ({type(model).__name__}): it "
            f"has no {lacks}. Known families: {', '.join(FAMILIES.names())}."
        )
    blocks = max(lists, key=lambda name: lists[name])
    inner = {name for block in model.get_submodule(blocks).children() for name, _ in block.named_modules()}
    known = {
        role: tuple(dict.fromkeys(n for f in FAMILIES for n in FAMILIES.get(f).roles[role] if n in inner))
        for role in ROLES[1:-1]
    }
    return Family(
        model_type=model.config.model_type,
        embedding=names[id(embedding)],
        head=names.get(id(head)),
        blocks=blocks,
        final_norm=None,
        attention_inputs=known["attention_in"],
        attention_output=known["attention_out"],
        mlp_inputs=known["mlp_in"],
        mlp_output=known["mlp_out"],
        generic=True,
    )
