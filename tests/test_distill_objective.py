"""Objective and its config: label shift, per-token means, micro-batches that add up, refusals. Pairs and heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from kronfold.base.errors import InputError
from kronfold.distill import Objective, ObjectiveConfig, check_head, check_pair, head_parameters
from train_examples import POSITIONS, VOCABULARY, Blocks, gpt2, llama

CONFIG = ObjectiveConfig(kl=0.7, ce=0.3, temperature=2.0, chunk_tokens=7)


def batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    items = [Blocks(ignore=3)[i] for i in range(size)]
    return torch.stack([i["input_ids"] for i in items]), torch.stack([i["labels"] for i in items])


def run(objective, student, teacher, ids, labels, num_items=None):
    hidden = student(ids, output_hidden_states=True).hidden_states[-1]
    with torch.no_grad():
        seen = teacher.base_model(ids).last_hidden_state
    heads = student.get_output_embeddings(), teacher.get_output_embeddings()
    return objective(hidden, heads[0], seen, heads[1], labels, num_items)


def textbook(student, teacher, ids, labels):
    """Means over predicted tokens, from full logits: (kl with T², ce)."""
    z, t = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1]
    y = labels[:, 1:]
    p, q = F.log_softmax(t / 2.0, -1), F.log_softmax(z / 2.0, -1)
    kl = 4.0 * (p.exp() * (p - q)).sum(-1)[y != -100].mean()
    return kl, F.cross_entropy(z.flatten(0, 1), y.flatten())


@pytest.mark.parametrize("family", [gpt2, llama])
def test_equals_the_textbook_objective_with_shifted_labels(family):
    student, teacher = family(0).double().eval(), family(1).double().eval()
    ids, labels = batch()
    loss, named = run(Objective(CONFIG), student, teacher, ids, labels)
    kl, ce = textbook(student, teacher, ids, labels)
    torch.testing.assert_close(loss, 0.7 * kl + 0.3 * ce, rtol=1e-10, atol=0)
    torch.testing.assert_close([named["kl"], named["ce"]], [kl.detach(), ce.detach()], rtol=1e-10, atol=0)
    parameters = list(student.parameters())
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    true = torch.autograd.grad(0.7 * kl + 0.3 * ce, parameters)
    norm = torch.stack([t.norm() for t in true]).norm()
    assert all((f - t).norm() < 1e-10 * norm for f, t in zip(found, true, strict=True))


@pytest.mark.parametrize("split", [[4], [1, 3], [2, 1, 1]])
def test_micro_batches_of_unequal_token_counts_give_the_gradients_of_the_whole(split):
    student, teacher = gpt2(0).double().eval(), gpt2(1).double().eval()
    ids, labels = batch()
    items = labels[:, 1:].ne(-100).sum()
    whole, whole_named = run(Objective(CONFIG), student, teacher, ids, labels)
    true = torch.autograd.grad(whole, list(student.parameters()))
    student.zero_grad()
    total, parts = 0.0, []
    for i, y in zip(ids.split(split), labels.split(split), strict=True):
        loss, named = run(Objective(CONFIG), student, teacher, i, y, items)
        loss.backward()
        total, parts = total + loss.item(), [*parts, named["kl"]]
    assert total == pytest.approx(whole.item(), rel=1e-10)
    assert sum(parts).item() == pytest.approx(whole_named["kl"].item(), rel=1e-10)
    for parameter, gradient in zip(student.parameters(), true, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-12)


def test_without_kl_no_teacher_is_needed_and_only_ce_is_reported():
    student = gpt2().double().eval()
    config = ObjectiveConfig(kl=0, ce=1)
    assert not Objective(config).needs_teacher
    ids, labels = batch()
    hidden = student(ids, output_hidden_states=True).hidden_states[-1]
    loss, named = Objective(config)(hidden, student.get_output_embeddings(), None, None, labels)
    expected = student(ids, labels=labels).loss
    assert list(named) == ["ce"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # theirs is computed in float32


def test_a_batch_with_nothing_to_predict_gives_zero_not_nan():
    student = gpt2().double().eval()
    ids, labels = batch()
    hidden = student(ids, output_hidden_states=True).hidden_states[-1]
    config = ObjectiveConfig(kl=0, ce=1)
    loss, _ = Objective(config)(hidden, student.get_output_embeddings(), None, None, labels * 0 - 100)
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": -1.0}, r"kl: .*given: -1\.0"),
        ({"ce": float("nan")}, "ce: .*given: nan"),
        ({"kl": 0.0, "ce": 0.0}, "ce and kl are both 0: there is nothing to train on"),
        ({"temperature": 0.0}, r"temperature: .*given: 0\.0"),
        ({"chunk_tokens": 0}, "chunk_tokens: .*given: 0"),
        ({"kl": float("inf"), "temperature": -2.0}, r"2 faults:\n  kl: .*given: inf\)\n  temperature: .*given: -2\.0"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_all_faults(options, message):
    with pytest.raises(InputError, match=message):
        ObjectiveConfig(**options)


def test_weights_are_the_losses_above_zero():
    assert ObjectiveConfig(kl=0.5, ce=0).weights == {"kl": 0.5}
    assert ObjectiveConfig(**CONFIG.model_dump()) == CONFIG


def test_check_pair_accepts_what_fits():
    assert check_pair(gpt2(0), llama(1), block=POSITIONS) is None


@pytest.mark.parametrize(
    ("student", "teacher", "block", "message"),
    [
        (gpt2(), gpt2(vocabulary=64), None, r"predicts 61 tokens and the teacher 64\..*resize_token_embeddings\(61\)"),
        (gpt2(), gpt2(1), POSITIONS + 1, "blocks of 33 tokens are longer than the 32 positions of the student"),
        (gpt2(), None, 64, "blocks of at most 32"),
    ],
)
def test_check_pair_refuses_with_sizes_and_next_step(student, teacher, block, message):
    with pytest.raises(InputError, match=message):
        check_pair(student, teacher, block)


def test_check_pair_refuses_shared_tensors():
    student, teacher = gpt2(0), gpt2(1)
    student.transformer.wpe = teacher.transformer.wpe
    with pytest.raises(InputError, match=r"share 1 tensors.*copy\.deepcopy"):
        check_pair(student, teacher)
    check_pair(copy.deepcopy(teacher), teacher)


@pytest.mark.parametrize("family", [gpt2, llama])
def test_the_head_of_the_last_hidden_state_is_the_logits(family):
    model = family().eval()
    ids, _ = batch()
    out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(model.get_output_embeddings()(out.hidden_states[-1]), out.logits, rtol=0, atol=0)
    torch.testing.assert_close(model.base_model(ids).last_hidden_state, out.hidden_states[-1], rtol=0, atol=0)
    model.train()
    check_head(model)
    assert model.training


def test_a_model_that_changes_its_logits_after_the_head_is_refused():
    class Scaled(GPT2LMHeadModel):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 30 * out.logits
            return out

    with pytest.raises(InputError, match="scales or caps"):
        check_head(Scaled(gpt2().config))


def test_a_model_without_a_head_is_refused():
    with pytest.raises(InputError, match="no language-model head"):
        check_head(gpt2().transformer)
    assert len(head_parameters(gpt2())) == 1
    assert gpt2().get_output_embeddings().out_features == VOCABULARY
