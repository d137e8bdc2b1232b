"""Every named loss: hand numbers, sums that add up over splits, ignored tokens, agreement with a naive twin."""

from __future__ import annotations

import math

import pytest
import torch

from kronfold.base.errors import InputError
from kronfold.distill import IGNORE, LOSSES, count_tokens


def naive_ce(student, teacher, labels, temperature):
    return sum(-torch.log_softmax(z, 0)[y] for z, y in zip(student, labels, strict=True) if y != IGNORE)


def naive_kl(student, teacher, labels, temperature):
    total = 0.0
    for z, t, y in zip(student, teacher, labels, strict=True):
        if y != IGNORE:
            p, q = torch.softmax(t / temperature, 0), torch.softmax(z / temperature, 0)
            total += temperature**2 * sum(pi * (pi.log() - qi.log()) for pi, qi in zip(p, q, strict=True))
    return total


def naive_logit_mse(student, teacher, labels, temperature):
    kept = [(z, t) for z, t, y in zip(student, teacher, labels, strict=True) if y != IGNORE]
    return sum(sum((zi - ti / temperature) ** 2 for zi, ti in zip(z, t, strict=True)) / len(z) for z, t in kept)


TWINS = {"ce": naive_ce, "kl": naive_kl, "logit_mse": naive_logit_mse}


def logits(tokens=6, vocabulary=9):
    torch.manual_seed(1)
    labels = torch.randint(vocabulary, (tokens,))
    labels[2] = IGNORE
    return (
        torch.randn(tokens, vocabulary, dtype=torch.float64),
        torch.randn(tokens, vocabulary, dtype=torch.float64),
        labels,
    )


def test_every_loss_has_a_twin():
    assert LOSSES.names() == sorted(TWINS)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", sorted(TWINS))
def test_equals_the_naive_twin_and_adds_up(name, temperature):
    student, teacher, labels = logits()
    loss = LOSSES.get(name).function
    whole = loss(student, teacher, labels, temperature)
    assert whole.item() == pytest.approx(float(TWINS[name](student, teacher, labels, temperature)), rel=1e-12)
    parts = [loss(student[s], teacher[s], labels[s], temperature) for s in (slice(0, 1), slice(1, 4), slice(4, 6))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("name", sorted(TWINS))
def test_ignored_tokens_add_nothing_to_value_or_gradient(name):
    student, teacher, _ = logits()
    student.requires_grad_()
    value = LOSSES.get(name).function(student, teacher, torch.full((6,), IGNORE), 1.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == 0
    assert not gradient.any()


def test_hand_numbers():
    student = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # probabilities 3/4, 1/4
    label = torch.tensor([0])
    assert LOSSES.get("ce").function(student, None, label, 1.0).item() == pytest.approx(math.log(2))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert LOSSES.get("kl").function(student, teacher, label, 1.0).item() == pytest.approx(expected)
    # At T=2 the teacher's probabilities are √3/(1+√3) and 1/(1+√3); T² = 4.
    p = math.sqrt(3) / (1 + math.sqrt(3))
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert LOSSES.get("kl").function(student, teacher, label, 2.0).item() == pytest.approx(expected)


def test_kl_of_equal_logits_is_zero_and_all_but_ce_need_a_teacher():
    student, _, labels = logits()
    assert LOSSES.get("kl").function(student, student, labels, 2.0).item() == pytest.approx(0, abs=1e-12)
    assert {name for name in LOSSES if LOSSES.get(name).needs_teacher} == {"kl", "logit_mse"}


def test_count_leaves_out_ignored_tokens():
    assert count_tokens(torch.tensor([[1, IGNORE, 3], [IGNORE, 0, 5]])).item() == 4


def test_unknown_loss_names_the_near_ones():
    with pytest.raises(InputError, match=r"Unknown loss 'kld'\. Did you mean 'kl'"):
        LOSSES.get("kld")
