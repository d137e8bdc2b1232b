"""fine_tune(): the order of examples, the best-epoch rule, a planted task, a teacher that is followed."""

from __future__ import annotations

import random

import pytest
import torch

import pico
from kronfold.base.errors import InputError
from kronfold.data.glue import collator
from kronfold.distill import ObjectiveConfig
from kronfold.models.load import load_classifier
from kronfold.options.finetune import FineTuneConfig
from kronfold.train.classify import LengthGroupedStream, fine_tune

SIGN = 7  # the planted task: is this token in the text?


def planted(count: int, seed: int, flipped: bool = False) -> list[dict]:
    """Rows of 3 to 12 tokens; half of them hold SIGN somewhere. `flipped`: every label wrong."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        ids = [draw.choice([t for t in range(1, 30) if t != SIGN]) for _ in range(draw.randint(3, 12))]
        if index % 2:
            ids[draw.randrange(len(ids))] = SIGN
        rows.append({"input_ids": ids, "labels": (index % 2) ^ flipped})
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return pico.model_directory(tmp_path_factory.mktemp("classify") / "model", n_layer=1)


def classifier(place, seed: int = 0):
    torch.manual_seed(seed)
    return load_classifier(place, 2, pad=0)


def accuracy(model, rows) -> float:
    batch = collator(0)(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        return (model(**batch).logits.argmax(-1) == labels).float().mean().item()


FAST = {"epochs": 4, "batch_size": 16, "learning_rate": 5e-3}


def test_learns_a_planted_task_and_ends_in_eval_mode(place) -> None:
    model, dev = classifier(place), planted(60, 1)
    steps = []

    def measure(subject):
        subject.eval()
        found = accuracy(subject, dev)
        subject.train()
        return found, {"accuracy": found}

    assert accuracy(model, dev) < 0.8
    found = fine_tune(
        model, None, planted(300, 0), collator(0), measure, FineTuneConfig(**FAST),
        progress=lambda *done: steps.append(done),
    )  # fmt: skip
    assert found.epochs[found.best]["score"] >= 0.95
    assert accuracy(model, dev) == pytest.approx(found.epochs[found.best]["score"])
    assert not model.training
    assert found.steps == 75  # 300 · 4 / 16
    assert steps == [(n, 75) for n in range(1, 76)]
    assert [entry["epoch"] for entry in found.epochs] == [1, 2, 3, 4]
    assert found.epochs[3]["losses"]["ce"] < found.epochs[0]["losses"]["ce"]


def test_the_first_of_the_best_epochs_is_kept(place) -> None:
    model = classifier(place)
    scores, seen = iter([0.3, 0.9, 0.9, 0.1]), []

    def measure(subject):
        seen.append({name: value.clone() for name, value in subject.state_dict().items()})
        return next(scores), {"note": len(seen)}

    found = fine_tune(model, None, planted(40, 0), collator(0), measure, FineTuneConfig(**FAST))
    assert found.best == 1
    assert found.epochs[1]["dev"] == {"note": 2}
    assert len(seen) == 4
    assert all(torch.equal(value, seen[1][name]) for name, value in model.state_dict().items())
    assert not torch.equal(seen[1]["score.weight"], seen[2]["score.weight"])


def test_a_student_follows_its_teacher_where_the_labels_say_otherwise(place) -> None:
    def none(_):
        return 0.0, {}

    rows, flipped, dev = planted(300, 0), planted(300, 0, flipped=True), planted(60, 1)
    teacher = classifier(place)
    last = iter(range(99))  # a score that rises keeps the last epoch
    fine_tune(teacher, None, rows, collator(0), lambda m: (next(last), {}), FineTuneConfig(**FAST))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = classifier(place, seed=1)
    follow = FineTuneConfig(**FAST, objective=ObjectiveConfig(kl=1.0, ce=0.0, temperature=2.0))
    found = fine_tune(student, teacher, flipped, collator(0), lambda m: (next(last), {}), follow)
    assert set(found.epochs[0]["losses"]) == {"loss", "kl"}
    agreement = accuracy(student, dev), accuracy(teacher, dev)
    assert min(agreement) > 0.8  # of a student that obeyed the labels: below 0.2
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    with pytest.raises(InputError, match="needs a teacher"):
        fine_tune(student, None, rows, collator(0), none, follow)


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_the_seed_decides(place, seeds) -> None:
    weights = []
    for seed in seeds:
        model = classifier(place)
        config = FineTuneConfig(epochs=1, batch_size=8, learning_rate=1e-3, seed=seed)
        fine_tune(model, None, planted(32, 0), collator(0), lambda m: (0.0, {}), config)
        weights.append(model.score.weight.detach().clone())
    assert torch.equal(*weights) == (seeds[0] == seeds[1])


def test_dropout_is_the_models_own_unless_switched_off(place) -> None:
    losses = {}
    for dropout in (True, False):
        model = classifier(place)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.9
        config = FineTuneConfig(epochs=1, batch_size=32, learning_rate=1e-9, dropout=dropout)
        rows = planted(32, 0)
        losses[dropout] = fine_tune(model, None, rows, collator(0), lambda m: (0.0, {}), config).epochs[0]["losses"]
        batch = collator(0)(rows)
        plain = model(**batch).loss.item()
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.9}
    assert losses[False]["ce"] == pytest.approx(plain, abs=1e-4)
    assert abs(losses[True]["ce"] - plain) > 1e-3


def test_epochs_are_permutations_of_like_lengths() -> None:
    rows = planted(500, 0)
    stream = LengthGroupedStream(rows, 1000, 3, 8)
    order = [stream[i] for i in range(1000)]
    places = {id(row): index for index, row in enumerate(rows)}
    for epoch in (order[:500], order[500:]):
        assert sorted(places[id(row)] for row in epoch) == list(range(500))
    assert order[:500] != order[500:]
    assert [stream[i] for i in (700, 3, 499)] == [order[i] for i in (700, 3, 499)]

    def padded(sequence) -> int:
        lengths = [len(row["input_ids"]) for row in sequence]
        return sum(max(lengths[i : i + 8]) * len(lengths[i : i + 8]) for i in range(0, len(sequence), 8))

    real = sum(len(row["input_ids"]) for row in rows)
    assert padded(order[:500]) < 1.1 * real < 1.3 * real < padded(rows)
    assert padded(order[504:1000]) < 1.1 * real  # batches of the second epoch start at 4, inside one of the first
    firsts = [len(order[i]["input_ids"]) for i in range(0, 240, 8)]
    assert firsts != sorted(firsts, reverse=True)  # the batches themselves are not sorted


def test_bad_settings(place) -> None:
    with pytest.raises(
        InputError, match=r"3 faults:\n  epochs: .*given: 0\)\n  learning_rate: .*2\.0\)\n  weight_decay: .*-1\)"
    ):
        FineTuneConfig(epochs=0, learning_rate=2.0, weight_decay=-1)
    with pytest.raises(InputError, match="no examples"):
        fine_tune(classifier(place), None, [], collator(0), lambda m: (0.0, {}), FineTuneConfig())
    model = classifier(place)
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="diverged"):
        fine_tune(model, None, planted(8, 0), collator(0), lambda m: (0.0, {}), FineTuneConfig(epochs=1))
