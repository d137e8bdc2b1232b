"""A training that diverges stops at that step, keeps what is good, and another learning rate goes on from there."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from transformers import TrainerCallback

import pico
from kronfold.base.errors import CheckpointError, DivergedError, InputError, NotFiniteError
from kronfold.distill import ObjectiveConfig
from kronfold.models.finite import not_finite
from kronfold.train import heal
from kronfold.train.classify import FineTuneConfig, fine_tune
from kronfold.train.watch import LossWatch, check_teacher_outputs
from test_processes import TESTS, launch
from train_examples import Blocks, KillAfter, Stop, gpt2

CE = ObjectiveConfig(kl=0, ce=1)
SMALL = {"batch_size": 2, "bf16": False}


class Break(TrainerCallback):
    """Puts a number that is not finite into the student (or its optimiser) after a step."""

    def __init__(self, step, value=math.nan, gradient=False):
        self.step, self.value, self.gradient = step, value, gradient

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step and not self.gradient:
            with torch.no_grad():
                model.transformer.h[0].mlp.c_fc.weight[0, 0] = self.value

    def on_step_begin(self, args, state, control, model=None, **_):
        if self.gradient and state.global_step == self.step - 1:
            parameter = model.transformer.h[0].mlp.c_fc.bias
            self.handle = parameter.register_hook(lambda gradient: gradient * self.value)


def steps_in(place):
    return sorted(int(path.name.rpartition("-")[2]) for path in place.glob("checkpoint-*"))


def finite(model):
    return not not_finite(model.named_parameters())


@pytest.mark.parametrize(("rate", "log_every"), [(1e3, 100), (1e8, 1), (1e30, 3)])
def test_a_rate_that_is_far_too_high_stops_at_the_step_whatever_is_logged(rate, log_every):
    """0.3 looked at logged losses only, and saved NaN as healed where it diverged after the last log."""
    student = gpt2(0)
    with pytest.raises(
        DivergedError, match=rf"at step [34]: the healing has diverged\. .*now {rate:g}".replace("+", r"\+")
    ):
        heal(student, gpt2(1), Blocks(), steps=8, learning_rate=rate, log_every=log_every, **SMALL)
    assert finite(student)  # on a CPU it stops before the weights are changed


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights():
    student = gpt2(0)
    with pytest.raises(DivergedError, match="The gradient norm is nan at step 2"):
        heal(student, None, Blocks(), steps=5, objective=CE, callbacks=[Break(2, gradient=True)], **SMALL)
    assert finite(student)


def test_a_weight_broken_by_the_last_step_is_never_returned_as_healed():
    """No loss was computed with it any more."""
    with pytest.raises(DivergedError, match=r"at step 4\. Weights .*\n  transformer\.h\.0\.mlp\.c_fc\.weight: 1 of"):
        heal(gpt2(0), None, Blocks(), steps=4, objective=CE, callbacks=[Break(4)], **SMALL)


def test_no_bad_checkpoint_takes_the_place_of_the_last_good_one(tmp_path):
    breaking = Break(4, math.inf)
    with pytest.raises(DivergedError, match=r"checkpoint-3 is kept.*--resume.*lower learning rate goes on from there"):
        heal(
            gpt2(0),
            None,
            Blocks(),
            steps=8,
            objective=CE,
            output_dir=tmp_path,
            save_steps=1,
            callbacks=[breaking],
            **SMALL,
        )
    assert steps_in(tmp_path) == [2, 3]
    marker = json.loads((tmp_path / "diverged.json").read_text())
    assert (marker["since_step"], marker["good_up_to"]) == (5, 3)
    assert marker["settings"]["learning_rate"] == 5e-4


def test_a_lower_learning_rate_continues_from_before_it_went_wrong(tmp_path):
    """Equal to: the same steps at the high rate, then the rest at the low one, whose schedule goes on where it was."""
    options = {"steps": 8, "output_dir": tmp_path, "save_steps": 1, "warmup": 0.5, **SMALL}
    teacher, data = gpt2(1), Blocks()
    with pytest.raises(DivergedError):
        heal(gpt2(0), teacher, data, learning_rate=1e3, **options)
    bad = steps_in(tmp_path)
    with pytest.raises(CheckpointError, match=r"diverged at step \d with learning rate 1000, and would do so again"):
        heal(gpt2(0), teacher, data, learning_rate=1e3, resume=True, **options)
    with pytest.raises(CheckpointError, match="other settings: seed was 0 and is now 1"):
        heal(gpt2(0), teacher, data, learning_rate=1e-3, resume=True, seed=1, **options)
    assert steps_in(tmp_path) == bad  # a refusal deletes nothing

    student = gpt2(0)
    found = heal(student, teacher, data, learning_rate=1e-3, resume=True, log_every=1, **options)
    assert found.resumed_from == 1  # checkpoint 2, made by a step at a rate of 250, was finite and ruined
    assert finite(student)
    assert found.losses[-1]["loss"] < 1.2 * found.losses[0]["loss"]
    assert not (tmp_path / "diverged.json").exists()
    assert json.loads((tmp_path / "heal.json").read_text())["learning_rate"] == 1e-3
    assert steps_in(tmp_path) == [7, 8]

    with pytest.raises(CheckpointError, match="learning_rate was 0.001 and is now 0.01"):  # it has not diverged
        heal(gpt2(0), teacher, data, learning_rate=1e-2, resume=True, **options)


class Rates(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        self.seen[state.global_step] = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"learning_rate": 0.5, "warmup": 0.9}])
def test_the_resumed_schedule_is_that_of_the_new_settings(tmp_path, change):
    options = {"steps": 8, "objective": CE, "output_dir": tmp_path, "save_steps": 1, **SMALL}
    with pytest.raises(DivergedError):
        heal(gpt2(0), None, Blocks(), learning_rate=0.5, callbacks=[Break(4)], **options)
    resumed, whole = Rates(), Rates()
    found = heal(gpt2(0), None, Blocks(), resume=True, callbacks=[resumed], **options | change)
    heal(gpt2(0), None, Blocks(), callbacks=[whole], **options | change | {"output_dir": None, "save_steps": None})
    assert found.resumed_from is not None
    assert resumed.seen == {step: pytest.approx(whole.seen[step]) for step in range(found.resumed_from, 8)}


def test_a_divergence_before_the_first_checkpoint_begins_anew(tmp_path):
    options = {"steps": 8, "output_dir": tmp_path, "save_steps": 8, **SMALL}
    with pytest.raises(DivergedError, match=r"There is no checkpoint .* begins anew"):
        heal(gpt2(0), gpt2(1), Blocks(), learning_rate=1e3, **options)
    found = heal(gpt2(0), gpt2(1), Blocks(), learning_rate=1e-3, resume=True, **options)
    assert (found.resumed_from, found.steps) == (None, 8)


def test_a_killed_second_attempt_resumes_with_the_new_rate(tmp_path):
    options = {"steps": 8, "output_dir": tmp_path, "save_steps": 1, **SMALL}
    with pytest.raises(DivergedError):
        heal(gpt2(0), gpt2(1), Blocks(), learning_rate=1e3, **options)
    with pytest.raises(Stop):
        heal(gpt2(0), gpt2(1), Blocks(), learning_rate=1e-3, resume=True, callbacks=[KillAfter(5)], **options)
    assert heal(gpt2(0), gpt2(1), Blocks(), learning_rate=1e-3, resume=True, **options).resumed_from == 5


def test_a_blown_up_loss_that_is_finite_is_a_warning_in_plain_words(caplog, tmp_path):
    student = gpt2(0)
    with caplog.at_level(logging.WARNING):
        heal(student, None, Blocks(), steps=1, objective=CE, learning_rate=1e-3, **SMALL)
    assert "makes the model worse" not in caplog.text

    class Ruin(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step == 4:
                with torch.no_grad():
                    model.transformer.wte.weight.mul_(1e3)

    with caplog.at_level(logging.WARNING):
        result = heal(
            student, None, Blocks(), steps=8, objective=CE, log_every=100, output_dir=tmp_path, save_steps=1,
            callbacks=[Ruin()], **SMALL,
        )  # fmt: skip
    assert result.steps == 8
    said = [record.message for record in caplog.records if "makes the model worse" in record.message]
    assert len(said) == 1
    assert "Since step 5 the loss is more than three times" in said[0]
    assert steps_in(tmp_path) == [3, 4]  # 4, the first ruined one, was written before its loss was known


def test_the_watch_finds_the_first_step_and_keeps_losses_of_different_kinds_apart():
    watch = LossWatch()
    for step, (loss, norm, kind) in enumerate(
        [
            (1.0, 1.0, "a"),
            (2.9, 1.0, "a"),
            (90.0, 1.0, "b"),
            (3.1, 1.0, "a"),
            (3.2, math.inf, "a"),
            (math.nan, 1.0, "a"),
        ],
        start=1,
    ):
        watch.add(torch.tensor(loss / 2))
        watch.add(torch.tensor(loss / 2))  # two micro-batches
        watch.add_teacher(torch.tensor(step != 6))
        watch.end_step(step, torch.tensor(norm), kind)
    seen = watch.read()
    assert (seen.bad, seen.norm, seen.teacher, seen.high) == (5, math.inf, 6, 4)
    assert seen.loss == pytest.approx(3.2)


def test_two_processes_stop_alike_and_go_on_alike(tmp_path):
    """They look when they log and save, and one must not wait for another that has stopped."""
    launch(TESTS / "divergence_jobs.py", tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text())
    for name, words in (("diverged", "at step 3: the healing has diverged"), ("teacher", "h.0.ln_1.weight: 1 of 16")):
        assert facts[name][0] == facts[name][1]
        assert words in facts[name][0]
    assert facts["resumed"] == [[1, 6], [1, 6]]


@pytest.mark.parametrize("damage", ["nan", "overflow", "head"])
def test_a_teacher_that_is_not_finite_is_named_before_the_student_is_changed(damage):
    teacher, student = gpt2(1), gpt2(0)
    with torch.no_grad():
        if damage == "nan":
            teacher.transformer.h[1].ln_2.weight[3] = math.nan
        elif damage == "overflow":
            teacher.transformer.ln_f.weight.fill_(1e38)
            teacher.transformer.wte.weight.mul_(1e3)
        else:
            teacher.transformer.wte.weight[7] = math.inf
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(NotFiniteError, match=r"The teacher's outputs are not finite on the batch of step 1") as caught:
        heal(student, teacher, Blocks(), steps=3, **SMALL)
    if damage != "overflow":
        assert "1 of 16 numbers" in str(caught.value) or "16 of" in str(caught.value)
    assert not isinstance(caught.value, DivergedError)
    torch.testing.assert_close(student.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(NotFiniteError, match="teacher's outputs are not finite on the first block"):
        check_teacher_outputs(teacher, torch.arange(10))


def test_a_teacher_that_says_never_is_a_teacher():
    """Logits of -inf are probabilities of 0."""
    teacher = gpt2(1)
    bias = torch.zeros(teacher.config.vocab_size)
    bias[5] = -math.inf
    teacher.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    check_teacher_outputs(teacher, torch.arange(10))


def rows():
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 101, (6,), generator=generator).tolist(), "labels": i % 2} for i in range(16)
    ]


def collate(batch):
    ids = torch.tensor([row["input_ids"] for row in batch])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }


def classifier(seed):
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(pico.config(n_layer=2, num_labels=2, pad_token_id=0))


@pytest.mark.parametrize("where", ["loss", "last step"])
def test_fine_tuning_stops_too(where):
    model, config = classifier(0), FineTuneConfig(epochs=2, batch_size=4)
    measured = []

    def measure(one):
        measured.append(finite(one))
        return 1.0, {}

    def poison(*_):
        poison.steps += 1
        if poison.steps == (3 if where == "loss" else 5):
            with torch.no_grad():
                model.score.weight[0, 0] = math.nan

    poison.steps = 0
    # A forward pass of step 3 breaks its own loss; that of step 5 would be met at the end of the next epoch at latest.
    model.transformer.register_forward_hook(poison)
    with pytest.raises(DivergedError, match="the fine-tuning has diverged"):
        fine_tune(model, None, rows(), collate, measure, config)
    assert all(measured)


def test_a_classifier_teacher_that_is_not_finite_is_named():
    teacher = classifier(1)
    with torch.no_grad():
        teacher.score.weight[0, 0] = math.inf
    config = FineTuneConfig(epochs=1, batch_size=4, objective=ObjectiveConfig(kl=1.0, ce=0.0))
    with pytest.raises(
        InputError, match=r"teacher's outputs are not finite on the batch of step 1(.|\n)*score\.weight"
    ):
        fine_tune(classifier(0), teacher, rows(), collate, lambda model: (1.0, {}), config)
