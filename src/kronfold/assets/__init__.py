"""What ships inside the package so that the demo needs no network: a small GPT-2, text to heal and to measure it."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

PROMPT = "If the file does not exist,"


def teacher_path() -> Path:
    """Directory of the embedded GPT-2; loads with `AutoModelForCausalLM.from_pretrained`. See its README.md."""
    return _asset("teacher")


def heal_text() -> Path:
    """Documents that the embedded GPT-2 was trained on (.jsonl.gz), in an order that mixes their sources."""
    return _asset("demo_text", "heal.jsonl.gz")


def eval_text() -> Path:
    """Documents that were kept out of its training (.jsonl.gz), the text of its model card's perplexity."""
    return _asset("demo_text", "eval.jsonl.gz")


def _asset(*parts: str) -> Path:
    return Path(str(importlib.resources.files("kronfold.assets").joinpath(*parts)))
