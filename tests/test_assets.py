"""What ships inside the package is whole, small, and what its cards say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kronfold import assets
from kronfold.data.sources import documents
from kronfold.data.stdlib import split_of
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.samples import sample
from kronfold.export.model_card import model_card
from kronfold.jobs.pretrain import load_pretrain_config

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def results() -> dict:
    return json.loads((assets.teacher_path() / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def teacher():
    place = assets.teacher_path()
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), AutoTokenizer.from_pretrained(place)


def test_sizes_stay_small() -> None:
    assert (assets.teacher_path() / "model.safetensors").stat().st_size <= 8 * MEGABYTE
    assert sum(path.stat().st_size for path in assets.heal_text().parent.iterdir()) <= 1.2 * MEGABYTE


def test_the_texts_are_the_two_sides_of_the_split() -> None:
    holdout = load_pretrain_config("demo").data.holdout
    heal, held_out = list(documents(assets.heal_text())), list(documents(assets.eval_text()))
    assert {split_of(text, holdout) for text in heal} == {"train"}
    assert {split_of(text, holdout) for text in held_out} == {"validation"}
    trained = {paragraph for text in heal for paragraph in text.split("\n\n")}
    assert not trained & {paragraph for text in held_out for paragraph in text.split("\n\n")}


def test_the_teacher_came_from_the_shipped_recipe_and_the_shipped_text(results) -> None:
    assert results["config"] == load_pretrain_config("demo").model_dump(mode="json")
    for split, path in (("train", assets.heal_text()), ("validation", assets.eval_text())):
        texts = list(documents(path))
        assert results["data"][split]["documents"] == len(texts)
        assert results["data"][split]["bytes"] == sum(len(text.encode()) for text in texts)
    assert results["training"]["steps"] == results["config"]["training"]["steps"]


def test_the_card_gives_the_perplexity_of_the_shipped_weights(results, teacher) -> None:
    card = (assets.teacher_path() / "README.md").read_text(encoding="utf-8")
    assert card == model_card(results)
    claimed = float(re.search(r"\*\*Held-out perplexity ([\d.]+)\*\*", card)[1])
    found = perplexity(*teacher, Path(assets.eval_text()), "sliding")
    assert found.perplexity == pytest.approx(claimed, rel=2e-3)
    assert found.protocol == results["evaluation"]["protocol"]
    assert (found.tokens, found.words, found.bytes) == tuple(
        results["evaluation"][key] for key in ("tokens", "words", "bytes")
    )


def test_the_teacher_is_a_plain_gpt2_that_writes_words(results, teacher) -> None:
    model, tokenizer = teacher
    assert type(model).__name__ == "GPT2LMHeadModel"
    assert 3_000_000 <= model.num_parameters() == results["held_parameters"] <= 4_000_000
    assert model.lm_head.weight is model.transformer.wte.weight
    text = sample(model, tokenizer, assets.PROMPT, 24)
    assert text.startswith(assets.PROMPT)
    assert len(re.findall(r"[a-z]{2,}", text)) > 6
