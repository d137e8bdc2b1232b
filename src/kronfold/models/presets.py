"""Published sizes by name, for planning without any weights: `config:NAME`."""

from __future__ import annotations

from transformers import GPT2Config

from kronfold.base.registry import Registry

# GPT-2: Radford et al. 2019, table 2. DistilGPT2: six of the twelve layers of GPT-2 small.
PRESETS: Registry[dict[str, int]] = Registry("model size")
PRESETS.register("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12})
PRESETS.register("gpt2-medium", {"n_embd": 1024, "n_layer": 24, "n_head": 16})
PRESETS.register("gpt2-large", {"n_embd": 1280, "n_layer": 36, "n_head": 20})
PRESETS.register("gpt2-xl", {"n_embd": 1600, "n_layer": 48, "n_head": 25})
PRESETS.register("distilgpt2", {"n_embd": 768, "n_layer": 6, "n_head": 12})


def preset_config(name: str) -> GPT2Config:
    """The config of a published size. Raises InputError with the names there are."""
    return GPT2Config(**PRESETS.get(name))
