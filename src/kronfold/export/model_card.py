"""The README.md that goes with a pre-trained model, written from its results document."""

from __future__ import annotations

import textwrap
from typing import Any

_STDLIB = """\
The text is English prose from the Python {python} installation: the help topics of `pydoc_data.topics`, the docstrings
and the longer comments of the standard library, cleaned by `kronfold data stdlib`. It is (c) Python Software Foundation
and contributors, under the PSF License Agreement, https://docs.python.org/3/license.html.
"""

_KEPT = {"best": "the lowest validation loss", "last": "the last"}
_CAVEAT = {"best": "The validation split chose the step, so this number is slightly favourable. ", "last": ""}


def model_card(document: dict[str, Any]) -> str:
    """Markdown with YAML front matter: what the model is, its data, its training and its held-out perplexity."""
    config, data, training = document["config"], document["data"], document["training"]
    found, sizes = document["evaluation"], document["config"]["model"]
    protocol, keep = found["protocol"], config["training"]["keep"]
    stdlib = config["data"]["source"] == "stdlib"
    source = _STDLIB.format(python=document["versions"]["python"]) if stdlib else f"Text: {config['data']['source']}.\n"
    rows = {
        "held parameters": f"{document['held_parameters']:,} (head tied to the embedding)",
        "size": f"{sizes['n_layer']} blocks, width {sizes['n_embd']}, {sizes['n_head']} heads, "
        f"context {sizes['n_positions']}",
        "tokenizer": f"byte-level BPE, {config['tokenizer']['vocab_size']:,} entries, from the training split",
        "training split": _split(data["train"]),
        "validation split": _split(data["validation"]),
        "training": f"{training['steps']:,} steps, {training['tokens']:,} tokens, {training['epochs']} epochs; "
        f"weights of step {training['kept_step']:,}, {_KEPT[keep]}",
        "seed": document["seed"],
        "arithmetic": "bfloat16 autocast" if training["bf16"] else "float32",
        "versions": ", ".join(f"{name} {version}" for name, version in document["versions"].items()),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    measured = f"""**Held-out perplexity {found["perplexity"]:.4f}** per token, of the float16 weights in this directory
computed in float32, on the validation split: {found["tokens"]:,} tokens, {found["words"]:,} words, {found["bytes"]:,}
bytes. Protocol `{protocol["name"]}`: documents joined by `{protocol["join"]}`, window {protocol["window"]}, stride
{protocol["stride"]}, {protocol["averaging"]}. {_CAVEAT[keep]}No document of it was trained on."""
    return f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
---
# kronfold {config["name"]}

A small GPT-2, trained from scratch by `kronfold pretrain`. It writes in the manner of its training text and knows
nothing else; it exists to have something real to compress.

{source}
| | |
|---|---|
{table}

{textwrap.fill(measured, 110, break_on_hyphens=False)}
"""


def _split(data: dict[str, Any]) -> str:
    counts = f"{data['documents']:,} documents, {data['bytes']:,} bytes, {data['tokens']:,} tokens"
    return f"{counts}, sha256 `{data['sha256']}`"
