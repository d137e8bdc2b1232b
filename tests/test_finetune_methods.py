"""Every distillation method fine-tunes a classifier whose teacher is deeper than it is."""

from __future__ import annotations

import pytest
import torch

import pico
from kronfold.data.glue import collator
from kronfold.distill import METHODS, ObjectiveConfig
from kronfold.models.load import load_classifier
from kronfold.options.finetune import FineTuneConfig
from kronfold.train.classify import fine_tune

ROWS = [{"input_ids": [1 + (i * j) % 17 for j in range(1, 4 + i % 5)], "labels": i % 2} for i in range(24)]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    teacher = pico.model_directory(folder / "teacher", n_layer=4)
    student = pico.model_directory(folder / "student", seed=1, n_layer=2)
    return student, teacher


@pytest.mark.parametrize("method", METHODS.names())
def test_the_loss_of_each_method_trains_the_student(places, method) -> None:
    torch.manual_seed(0)
    student, teacher = (load_classifier(place, 2, pad=0) for place in places)
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (student, teacher)]
    objective = ObjectiveConfig(kl=1.0, ce=1.0, temperature=2.0, method=method)
    config = FineTuneConfig(epochs=2, batch_size=8, learning_rate=1e-3, objective=objective)
    found = fine_tune(student, teacher, ROWS, collator(0), lambda model: (0.0, {}), config)
    assert found.steps == 6
    assert all(torch.tensor(value).isfinite() for epoch in found.epochs for value in epoch["losses"].values())
    assert set(student.state_dict()) == set(before[0])  # what the method learns beside it is not the student's
    assert not torch.equal(
        student.state_dict()["transformer.h.0.mlp.c_fc.weight"], before[0]["transformer.h.0.mlp.c_fc.weight"]
    )
    assert all(torch.equal(value, before[1][name]) for name, value in teacher.state_dict().items())
