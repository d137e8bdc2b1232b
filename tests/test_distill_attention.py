"""Attention maps recomputed from queries and keys: equal to eager maps in every family, structured layers included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import kronfold as kf
import pico
from kronfold.distill.attention import (
    EagerAttention,
    RecordedAttention,
    attention_fault,
    recording,
    run_with_attention,
)
from kronfold.distill.signals import Batch, _eager_divergence, attention_divergence
from kronfold.options import read
from kronfold.planner.recipe import Recipe

LOW_RANK = {
    "name": "attention",
    "stages": [{"name": "one", "compress": [{"modules": "role:attention_in", "structure": "low_rank", "ratio": 0.5}]}],
}
RECORDED = ["gpt2", "llama", "mistral", "qwen2", "qwen3"]


def case(name):
    model = pico.family(name).double()
    ids = pico.ids(model, rows=3, length=14)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    return model, ids, mask


def eager_maps(model, ids, mask):
    model = copy.deepcopy(model)
    model.config._attn_implementation_internal = "eager"
    return model(ids, attention_mask=mask, output_attentions=True).attentions


def observed(model, ids, mask, layers):
    return run_with_attention(model, lambda **more: model(ids, attention_mask=mask, use_cache=False, **more), layers)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*RECORDED, "gpt_neo"])
def test_maps_equal_eager_maps_in_float64(name, padded):
    model, ids, mask = case(name)
    mask = mask if padded else torch.ones_like(mask)
    expected = eager_maps(model, ids, mask)
    out, found = observed(model, ids, mask, (0, 1))
    assert sorted(found) == [0, 1]
    assert all(isinstance(found[i], RecordedAttention if name in RECORDED else EagerAttention) for i in found)
    for index, attention in found.items():
        seen = mask.bool()[:, None, :, None].expand_as(expected[index])  # padding queries are nobody's concern
        ours = attention.log_map().exp()
        torch.testing.assert_close(ours[seen], expected[index][seen], rtol=1e-6, atol=1e-9)
        assert ours.isfinite().all()
    torch.testing.assert_close(out.logits, model(ids, attention_mask=mask).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_padding_on_the_left_gives_finite_maps_that_see_no_padding(name):
    """Eager attention in float64 gives not-a-number there, so there is nothing to compare with."""
    model, ids, mask = case(name)
    mask = torch.ones_like(ids)
    mask[2, :4] = 0
    ours = observed(model, ids, mask, (1,))[1][1].log_map().exp()
    assert ours.isfinite().all()
    assert ours[2, :, 4:, :4].max() == 0
    torch.testing.assert_close(ours.sum(-1), torch.ones(3, 4, 14, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_structured_layers_give_their_own_maps(name):
    model, ids, mask = case(name)
    student = kf.compress(model.float(), read(Recipe, LOW_RANK, "Recipe")).double()
    found = observed(student, ids, mask, (1,))[1][1]
    seen = mask.bool()[:, None, :, None].expand(-1, 4, -1, 14)
    mine, dense = eager_maps(student, ids, mask)[1], eager_maps(model.double(), ids, mask)[1]
    torch.testing.assert_close(found.log_map().exp()[seen], mine[seen], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(mine[seen], dense[seen], atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_flow_through_recomputed_maps_into_queries_and_keys(name):
    """The same gradient as through eager maps, for the divergence from a fixed distribution."""
    model, ids, mask = case(name)
    other = EagerAttention(eager_maps(pico.family(name, seed=3).double(), ids, mask)[1].detach())
    batch = Batch(mask.double() / mask.sum())

    mine = observed(model, ids, mask, (1,))[1][1]
    loss = attention_divergence(mine, other, batch)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    eager = copy.deepcopy(model)
    eager.config._attn_implementation_internal = "eager"
    maps = eager(ids, attention_mask=mask, output_attentions=True).attentions[1]
    logs = maps.clamp(min=1e-300).log(), other.probabilities.clamp(min=1e-300).log()
    per_query = F.kl_div(*logs, reduction="none", log_target=True).sum(-1).mean(1)
    true_loss = (per_query * batch.weights).sum()
    true = torch.autograd.grad(true_loss, list(eager.parameters()), allow_unused=True)

    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-6)
    moved = [i for i, t in enumerate(true) if t is not None and t.abs().max() > 1e-12]
    assert moved
    for index in moved:
        torch.testing.assert_close(found[index], true[index], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("maps", [1, 3, 1 << 10])  # in one step: of fewer heads, of one row, of all
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_closed_form_gradient_is_that_of_autograd(name, maps, left, monkeypatch):
    """The teacher runs without gradients here, as in training; llama's keys serve two heads each."""
    model, ids, mask = case(name)
    mask[2, :left] = 0
    with torch.no_grad():
        other = observed(pico.family(name, seed=3).double(), ids, mask, (1,))[1][1]
    found = observed(model, ids, mask, (1,))[1][1]
    batch = Batch(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * mask)
    monkeypatch.setattr("kronfold.distill.attention._CACHED_ELEMENTS", maps * ids.shape[1] ** 2)
    fast, slow = attention_divergence(found, other, batch), _eager_divergence(found, other, batch)
    assert fast.grad_fn.name() == "_MapDivergenceBackward"
    assert fast.item() == pytest.approx(slow.item(), rel=1e-12)
    for mine, true in zip(
        *(torch.autograd.grad(2 * loss, [found.query, found.key]) for loss in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-14)
    with torch.no_grad():
        assert attention_divergence(found, other, batch).item() == pytest.approx(slow.item(), rel=1e-12)


def test_the_gradient_of_a_teacher_in_training_is_kept():
    model, ids, mask = case("gpt2")
    mine, other = (observed(m, ids, mask, (1,))[1][1] for m in (model, pico.family("gpt2", seed=3).double()))
    loss = attention_divergence(mine, other, Batch(mask.double()))
    assert torch.autograd.grad(loss, other.query)[0].abs().max() > 0


def test_divergence_is_the_same_in_rows_and_zero_for_equal_maps(monkeypatch):
    model, ids, mask = case("gpt2")
    attention = observed(model, ids, mask, (0,))[1][0]
    batch = Batch(mask.double() / mask.sum())
    other = observed(pico.family("gpt2", seed=3).double(), ids, mask, (0,))[1][0]
    assert attention_divergence(attention, attention, batch).item() == pytest.approx(0, abs=1e-12)
    whole = attention_divergence(attention, other, batch)
    assert whole.item() > 1e-3
    monkeypatch.setattr("kronfold.distill.signals._MAP_ELEMENTS", 1)
    assert attention_divergence(attention, other, batch).item() == pytest.approx(whole.item(), rel=1e-12)


def test_only_the_layers_asked_for_are_kept_and_nothing_stays_behind():
    model, ids, _ = case("gpt2")
    before = model(ids).logits
    with recording((1,)) as records:
        inside = model(ids).logits
    assert sorted(records) == [1]
    with recording(()) as none:
        model(ids)
    assert none == {}
    assert torch.equal(inside, before)
    model(ids)
    assert sorted(records) == [1]
    _, neo_ids, _ = case("gpt_neo")
    neo = pico.family("gpt_neo")
    implementation = neo.config._attn_implementation
    observed(neo, neo_ids, None, (0,))
    assert neo.config._attn_implementation == implementation


def test_a_model_that_cannot_give_attention_says_so(monkeypatch):
    model = pico.family("gpt_neo")
    assert attention_fault(model, (0, 1)) is None
    assert "value vectors" in attention_fault(model, (0, 1), values=True)
    assert "no attention maps" in attention_fault(model, (2,))
    assert attention_fault(pico.family("llama").train(), (1,), values=True) is None
