"""Pre-training on a synthetic text: what is written, what is reproducible, what survives a kill, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kronfold.base.errors import CheckpointError, DataError, OutputError, RecipeError
from kronfold.data.sources import documents
from kronfold.data.stdlib import split_of
from kronfold.evaluate.perplexity import perplexity
from kronfold.jobs.pretrain import load_pretrain_config, pretrain

SENTENCE = "the module reads a file and returns its lines as text while every error is named"
WORDS = SENTENCE.split()
STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    chooser = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    rows = [" ".join(chooser.choices(WORDS, k=chooser.randint(5, 30))) + "." for _ in range(300)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(text: Path, **training: Any) -> dict[str, Any]:
    return {
        "name": "tiny",
        "data": {"source": str(text), "holdout": 0.2},
        "tokenizer": {"vocab_size": 300},
        "model": {"n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "training": {"steps": STEPS, "batch_size": 4, "evaluate_every": 2, "bf16": False, **training},
        "seed": 3,
    }


def config_file(place: Path, content: dict[str, Any]) -> Path:
    path = place / "config.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    return path


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[tuple[int, int]]]:
    place = tmp_path_factory.mktemp("trained")
    steps: list[tuple[int, int]] = []
    document = pretrain(
        config_file(place, settings(text)),
        place / "out",
        progress=lambda step, total, latest: steps.append((step, total)),
    )
    return place / "out", document, steps


def test_the_output_loads_with_plain_transformers_and_is_what_the_card_says(trained, text: Path) -> None:
    place, document, _ = trained
    assert json.loads((place / "results.json").read_text()) == document
    assert {value.dtype for value in load_file(place / "model.safetensors").values()} == {torch.float16}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    assert model.num_parameters() == document["held_parameters"]
    assert model.config.resid_pdrop == model.config.embd_pdrop == model.config.attn_pdrop == 0
    assert model.config.use_cache
    assert {path.stat().st_mode & 0o777 for path in place.iterdir()} == {0o644}
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 16
    held_out = [row for row in documents(text) if split_of(row, 0.2) == "validation"]
    measured = perplexity(model, tokenizer, held_out, "sliding")
    assert measured.perplexity == pytest.approx(document["perplexity"], rel=1e-6)
    card = (place / "README.md").read_text(encoding="utf-8")
    assert f"**Held-out perplexity {measured.perplexity:.4f}**" in card
    assert document["data"]["train"]["sha256"] in card


def test_results_describe_the_run(trained) -> None:
    place, document, steps = trained
    training = document["training"]
    assert steps == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert (training["steps"], training["tokens"], document["seed"]) == (STEPS, STEPS * 4 * 16, 3)
    assert [row["step"] for row in training["validation_losses"]] == [2, 4, 6]
    best = min(training["validation_losses"], key=lambda row: row["loss"])
    assert training["kept_step"] == best["step"]
    assert document["data"]["train"]["documents"] + document["data"]["validation"]["documents"] == 300
    assert not place.with_name("out.partial").exists()


def test_a_killed_run_resumes_to_the_same_weights(trained, text: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(step: int, total: int, latest: dict[str, float]) -> None:
        if step == 5:
            raise Killed

    config = config_file(tmp_path, settings(text))
    with pytest.raises(Killed):
        pretrain(config, tmp_path / "out", progress=kill)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="unfinished run"):
        pretrain(config, tmp_path / "out")
    with pytest.raises(CheckpointError, match="seed"):
        pretrain(config, tmp_path / "out", seed=4, resume=True)
    document = pretrain(config, tmp_path / "out", resume=True)
    assert document["training"]["resumed_from"] == 4
    place, whole, _ = trained
    assert document["training"]["losses"] == whole["training"]["losses"]
    expected, found = load_file(place / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_existing_output_stays_until_the_new_one_is_complete(text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    config = config_file(tmp_path, settings(text, steps=1))
    with pytest.raises(OutputError, match="exists already"):
        pretrain(config, tmp_path / "out")
    with pytest.raises(OutputError, match="not a result of kronfold's"):
        pretrain(config, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "results.json").write_text('{"schema": "kronfold/pretrain"}')
    with pytest.raises(OutputError, match="did not write: precious"):
        pretrain(config, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "precious").rename(tmp_path / "precious")
    (tmp_path / "out" / "README.md").write_text("old")
    with pytest.raises(DataError, match="The validation split, 0 documents, is too small"):
        pretrain(
            load_pretrain_config(config).model_copy(update={"data": _all_held(text)}), tmp_path / "out", overwrite=True
        )
    with pytest.raises(DataError, match="less than one batch of 5000"):
        pretrain(config_file(tmp_path, settings(text, batch_size=5000)), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "README.md").read_text() == "old"
    pretrain(config_file(tmp_path, settings(text, steps=1, keep="last")), tmp_path / "out", overwrite=True)
    assert "weights of step 1, the last" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "precious").read_text() == "mine"


def _all_held(text: Path) -> Any:
    return load_pretrain_config("demo").data.model_copy(update={"source": str(text), "holdout": 1e-9})


BAD_CONFIGS = {
    "unknown key": ({"learning_rat": 1}, ["training.learning_rat: unknown key", "learning_rate"]),
    "two faults at once": ({"steps": 0, "dropout": 2}, ["2 faults", "training.steps", "training.dropout"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs(name: str, text: Path, tmp_path: Path) -> None:
    training, messages = BAD_CONFIGS[name]
    with pytest.raises(RecipeError) as error:
        pretrain(config_file(tmp_path, settings(text, **training)), tmp_path / "out")
    assert all(message in str(error.value) for message in messages), error.value
    assert not (tmp_path / "out").exists()


def test_more_bad_configs(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = settings(text)
    content["model"]["n_head"] = 3
    with pytest.raises(RecipeError, match="16 is not divisible by n_head 3"):
        load_pretrain_config(config_file(tmp_path, content))
    with pytest.raises(RecipeError, match="There is no config file"):
        load_pretrain_config(tmp_path / "missing.yaml")
    (tmp_path / "torn.yaml").write_text("name: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_pretrain_config(tmp_path / "torn.yaml")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(RecipeError, match="needs a C\\+\\+ compiler"):
        pretrain(config_file(tmp_path, settings(text, compile=True)), tmp_path / "out")


def test_the_shipped_config_describes_a_model_that_the_recipes_fit() -> None:
    config = load_pretrain_config("demo")
    assert config.data.source == "stdlib"
    assert config.model.n_layer >= 6
    assert config.model.n_embd % 8 == 0
