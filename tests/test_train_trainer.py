"""DistillationTrainer: gradients, logged columns, the frozen teacher, what is saved."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.quantizers import HfQuantizer

from kronfold.base.errors import InputError
from kronfold.distill import ObjectiveConfig
from kronfold.train import DistillationTrainer
from train_examples import Blocks, gpt2, llama

CONFIG = ObjectiveConfig(kl=0.7, ce=0.3, temperature=2.0, chunk_tokens=9)


def trainer(tmp_path, student, teacher, data, objective=CONFIG, **options):
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        **options,
    }
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **arguments
    )
    return DistillationTrainer(student, teacher, objective, args=args, train_dataset=data)


def textbook_step(student, teacher, data, count):
    """Means over all predicted tokens of the first `count` blocks, in eval mode: (kl, ce)."""
    ids = torch.stack([data[i]["input_ids"] for i in range(count)])
    labels = torch.stack([data[i]["labels"] for i in range(count)])[:, 1:]
    z, t = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
    p, q = F.log_softmax(t / 2.0, -1), F.log_softmax(z / 2.0, -1)
    return 4 * (p.exp() * (p - q)).sum(-1)[labels != -100].mean(), F.cross_entropy(z.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize("family", [gpt2, llama])
@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4), (3, 3)])
def test_first_step_is_the_textbook_step_for_every_split_of_the_batch(tmp_path, family, batch_size, accumulate):
    torch.manual_seed(0)
    no_dropout = {"dropout": 0.0} if family is gpt2 else {}
    student, teacher = family(0, **no_dropout), family(1, **no_dropout)
    data = Blocks(count=batch_size * accumulate, ignore=3)
    reference = copy.deepcopy(student)
    kl, ce = textbook_step(reference, teacher, data, len(data))
    (0.7 * kl + 0.3 * ce).backward()

    loop = trainer(
        tmp_path, student, teacher, data, max_steps=1, optim="sgd", lr_scheduler_type="constant",
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    before = copy.deepcopy(dict(student.named_parameters()))
    loop.train()
    first = loop.state.log_history[0]
    assert first["kl"] == pytest.approx(kl.item(), rel=1e-5)
    assert first["ce"] == pytest.approx(ce.item(), rel=1e-5)
    assert first["loss"] == pytest.approx(0.7 * first["kl"] + 0.3 * first["ce"], rel=1e-5)
    for name, parameter in student.named_parameters():
        step = (before[name] - parameter) / 1e-2
        expected = dict(reference.named_parameters())[name].grad
        torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-5)


def test_logged_losses_are_means_over_the_logged_steps(tmp_path):
    runs = {}
    for every in (1, 2):
        loop = trainer(
            tmp_path, gpt2(0), gpt2(1), Blocks(16), logging_steps=every, max_steps=4, gradient_accumulation_steps=2
        )
        loop.train()
        runs[every] = [log for log in loop.state.log_history if "loss" in log]
    assert [log["step"] for log in runs[2]] == [2, 4]
    for pair, log in zip((runs[1][:2], runs[1][2:]), runs[2], strict=True):
        for name in ("loss", "kl", "ce"):
            assert log[name] == pytest.approx(sum(one[name] for one in pair) / 2, rel=1e-5)


def test_the_teacher_is_frozen_and_in_no_optimiser_or_checkpoint(tmp_path):
    student, teacher = gpt2(0), gpt2(1, layers=3)
    before = copy.deepcopy(teacher.state_dict())
    teacher.train()
    loop = trainer(tmp_path, student, teacher, Blocks())
    loop.train()
    assert not teacher.training
    assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in student.parameters()}
    loop.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.state_dict(), student.state_dict(), rtol=0, atol=0)


def test_weight_decay_spares_biases_and_norms(tmp_path):
    loop = trainer(tmp_path, gpt2(0), gpt2(1), Blocks(), weight_decay=0.1)
    decayed = loop.get_decay_parameter_names(loop.model)
    assert "transformer.h.0.mlp.c_fc.weight" in decayed
    assert not [name for name in decayed if name.endswith("bias") or "ln_" in name]
    names = trainer(tmp_path, llama(0), llama(1), Blocks()).get_decay_parameter_names(llama())
    assert not [name for name in names if "norm" in name]


def test_a_student_under_a_trainable_quantizer_trains(tmp_path):
    """Loaded students carry our quantizer; the Trainer asks it, under these names, whether training is allowed."""

    class Structured(HfQuantizer):
        is_qat_trainable = True
        is_trainable = True

        def __init__(self):
            pass

        def is_serializable(self, **_):
            return True

    student = gpt2(0)
    student.is_quantized, student.hf_quantizer = True, Structured()
    before = copy.deepcopy(student.lm_head.weight)
    trainer(tmp_path, student, gpt2(1), Blocks()).train()
    assert not torch.equal(student.lm_head.weight, before)


def test_evaluate_gives_the_objective_and_leaves_the_logs_alone(tmp_path):
    student, teacher, data = gpt2(0), gpt2(1), Blocks(4, ignore=3)
    loop = trainer(tmp_path, student, teacher, data)
    measured = loop.evaluate(data)["eval_loss"]
    with torch.no_grad():
        kl, ce = textbook_step(student.eval(), teacher.eval(), data, 4)
    assert measured == pytest.approx(0.7 * kl.item() + 0.3 * ce.item(), rel=1e-5)
    assert not loop._running


def test_refusals_come_before_any_training(tmp_path):
    with pytest.raises(InputError, match="needs a teacher"):
        trainer(tmp_path, gpt2(0), None, Blocks())
    with pytest.raises(InputError, match="predicts 61 tokens and the teacher 64"):
        trainer(tmp_path, gpt2(0), gpt2(1, vocabulary=64), Blocks())
    assert trainer(tmp_path, gpt2(0), None, Blocks(), ObjectiveConfig(kl=0, ce=1)).teacher is None
