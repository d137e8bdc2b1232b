"""GLUE's metrics against numbers worked out by hand, and answers that padding does not touch."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GPT2ForSequenceClassification

import kronfold as kf
import pico
from kronfold.base.errors import CheckpointError, InputError
from kronfold.data.glue import TASKS, collator
from kronfold.evaluate.glue import answers, predict, score, spread
from kronfold.models.load import load_classifier


def test_metrics_by_hand() -> None:
    # 2 true positives, 1 true negative, 1 false positive, 2 false negatives
    predicted, true = [1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1]
    found = score(("accuracy", "f1", "matthews_correlation"), predicted, true)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 2) / math.sqrt(3 * 4 * 2 * 3))
    skewed = score(("matthews_correlation",), [1, 1, 1, 1, 0], [1, 1, 1, 0, 0])
    assert skewed["matthews_correlation"] == pytest.approx(3 / math.sqrt(4 * 3 * 2 * 1))
    # deviations (-2, -1, 3) and (-1, 0, 1); ranks (1, 2, 3) and (1, 2, 3)
    close = score(("pearson", "spearman"), [1.0, 2.0, 6.0], [0.0, 1.0, 2.0])
    assert close["pearson"] == pytest.approx(5 / math.sqrt(14 * 2))
    assert close["spearman"] == pytest.approx(1)
    # ranks (2, 1, 3) and (1, 2, 3): 1 - 6 · 2 / (3 · 8)
    assert score(("spearman",), [2.0, 1.0, 6.0], [0.0, 1.0, 2.0])["spearman"] == pytest.approx(0.5)


def test_a_constant_answer_scores_zero() -> None:
    names = ("matthews_correlation", "f1", "pearson", "spearman")
    assert set(score(names, [0, 0, 0], [0, 1, 1]).values()) == {0.0}


def test_bad_scores() -> None:
    with pytest.raises(InputError, match="Did you mean 'accuracy'"):
        score(("acuracy",), [1], [1])
    with pytest.raises(InputError, match="2 predictions for 1 labels"):
        score(("accuracy",), [1, 0], [1])
    with pytest.raises(InputError, match="0 predictions for 0 labels"):
        score(("accuracy",), [], [])


def test_spread_over_seeds() -> None:
    assert spread([1.0, 2.0, 6.0]) == {"mean": 3.0, "std": pytest.approx(math.sqrt(14 / 2)), "seeds": 3}
    assert spread([0.5]) == {"mean": 0.5, "std": None, "seeds": 1}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A dense and a structured language model as directories."""
    folder = tmp_path_factory.mktemp("models")
    kf.compress(pico.gpt2(), "tqcompressor").save_pretrained(folder / "structured")
    return {"dense": pico.model_directory(folder / "dense"), "structured": folder / "structured"}


@pytest.mark.parametrize("kind", ["dense", "structured"])
def test_padding_changes_no_logit(places, kind) -> None:
    """Alone, in a batch of longer ones, beside other rows: a sequence gets the logits of its last real token."""
    torch.manual_seed(3)
    model = load_classifier(places[kind], 2, pad=0)
    # 0, the padding token, also stands inside the texts, as a separator does.
    rows = [{"input_ids": ids, "labels": 0} for ids in ([5, 7], [9, 0, 3, 8, 4, 4, 6], [11], [2, 0, 12] * 8)]
    together = predict(model, rows, collator(0))
    for row, logits in zip(rows, together, strict=True):
        ids = torch.tensor([row["input_ids"]])
        alone = model.score(model.transformer(ids).last_hidden_state)[0, -1]
        torch.testing.assert_close(logits, alone, rtol=0, atol=1e-6)
    for extra in (1, 5, 30):
        padded = collator(0)([*rows, {"input_ids": [1] * (24 + extra), "labels": 0}])
        logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
        torch.testing.assert_close(logits[: len(rows)], together, rtol=0, atol=1e-6)
    assert together.std(0).min() > 1e-3  # they do differ from row to row


@pytest.mark.parametrize("family", pico.FAMILY_CONFIGS)
def test_padding_changes_no_logit_in_any_family(tmp_path, family) -> None:
    pico.family(family).save_pretrained(tmp_path)
    torch.manual_seed(0)
    model = load_classifier(tmp_path, 2, pad=0)
    rows = [{"input_ids": ids, "labels": 0} for ids in ([5, 7], [9, 0, 3, 8], [11], [2, 0, 12] * 8)]
    alone = torch.cat([predict(model, [row], collator(0)) for row in rows])
    torch.testing.assert_close(predict(model, rows, collator(0)), alone, rtol=0, atol=1e-6)


def test_answers_and_modes(places) -> None:
    model = load_classifier(places["dense"], 3, pad=0).train()
    rows = [{"input_ids": [index + 1] * (index % 5 + 1), "labels": 0} for index in range(70)]  # more than a batch
    logits = predict(model, rows, collator(0))
    assert model.training
    assert logits.shape == (70, 3)
    assert answers(logits, TASKS["mnli"]) == logits.argmax(-1).tolist()
    assert answers(logits[:, :1], TASKS["stsb"]) == logits[:, 0].tolist()
    with torch.no_grad():
        model.score.weight.fill_(math.inf)
    with pytest.raises(CheckpointError, match="not finite"):
        predict(model, rows, collator(0))


def test_loading_a_classifier(places, tmp_path) -> None:
    first = load_classifier(places["dense"], 2, pad=0, labels=("no", "yes"))
    assert first.config.id2label == {0: "no", 1: "yes"}
    assert first.config.problem_type == "single_label_classification"
    assert not first.training
    first.save_pretrained(tmp_path)
    again = load_classifier(tmp_path, 2, trained=True)
    assert torch.equal(again.score.weight, first.score.weight)
    assert again.config.pad_token_id == 0
    plain = GPT2ForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(plain(pico.ids(plain)).logits, first(pico.ids(first)).logits)
    assert load_classifier(tmp_path, 3).score.weight.shape == (3, 32)  # another task: a new head on the same body
    with pytest.raises(CheckpointError, match="no classifier with 2 output"):
        load_classifier(places["dense"], 2, trained=True)
    with pytest.raises(CheckpointError, match="no classifier with 3 output"):
        load_classifier(tmp_path, 3, trained=True)
    assert load_classifier(places["dense"], 1).config.problem_type == "regression"
