"""Gathers of structured layers go where they cost nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from absorb_models import (
    assert_equal_logits,
    double,
    each_family,
    hidden_units,
    kv_shape,
    low_rank,
    perm_of,
    permuted,
    residual_perm,
    rows_of,
    run,
    without_gathers,
)
from kronfold.export.quantizer import attach
from kronfold.fit.fit import absorb_gathers, gathers_of
from kronfold.models import absorb as ab
from kronfold.models.cost import cost
from kronfold.models.place import replace_modules
from kronfold.structures.grouped_embedding import GroupedEmbedding, GroupedEmbeddingSpec, grouped_embedding
from kronfold.structures.low_rank import LowRankLinear


@each_family
def test_planted_gathers_are_all_absorbed(name, tmp_path):
    """Reorder a model without gathers: its layers then hold them, and absorb finds the way back."""
    student = without_gathers(name)
    expected = run(student)[0]
    lean = cost(student)
    ab.permute_residual(student, residual_perm())
    ab.permute_residual(student, residual_perm(seed=4))  # upon gathers that are there already
    for block in range(2):
        ab.permute_hidden_units(student, block, torch.randperm(hidden_units(student)))
        ab.permute_value_channels(student, block, rows_of(*kv_shape(student), seed=block))
    assert_equal_logits(student, expected)
    assert len(ab.remaining_gathers(student)) > 12
    assert cost(student).index_bytes == sum(gather.bytes for gather in ab.remaining_gathers(student))

    report = ab.absorb(student)
    assert (report.remaining, report.bytes_after) == ([], 0)
    assert report.bytes_before == sum(gather.bytes for gather in report.absorbed) > 0
    assert cost(student) == lean
    assert_equal_logits(student, expected)
    student.save_pretrained(tmp_path)
    assert_equal_logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64), expected)


def test_the_residual_stream_can_be_left_as_it_is():
    student = without_gathers("llama")
    hidden = run(student)[1]
    ab.permute_residual(student, residual_perm())
    assert ab.absorb(student, residual=False).absorbed == []
    torch.testing.assert_close(run(student)[1][1], hidden[1][..., residual_perm()], rtol=0, atol=1e-10)


def test_two_kronecker_layers_keep_one_gather_and_every_bit():
    model = double("gpt2")
    names = ("transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj")
    c_fc = permuted((128, 32), True, perm_of(32, 0), perm_of(128, 1))
    c_proj = permuted((32, 128), True, perm_of(128, 2), perm_of(32, 3))
    replace_modules(model, dict(zip(names, (c_fc, c_proj), strict=True)))
    expected = run(model)[0]
    report = ab.absorb(model, residual=False)
    assert [gather.name for gather in report.absorbed] == [f"{names[0]}.gather_out"]
    assert [gather.name for gather in report.remaining] == [
        f"{names[0]}.gather_in", f"{names[1]}.gather_in", f"{names[1]}.gather_out"
    ]  # fmt: skip
    assert report.bytes_before - report.bytes_after == 4 * 128
    assert str(report) == "1 gathers absorbed, 3 remain (1,280 -> 768 bytes)"
    torch.testing.assert_close(run(model)[0], expected, rtol=0, atol=1e-12)  # another order of computation may pay now
    assert c_fc.to_spec()["permute_out"] is False


@pytest.mark.parametrize("structured", ["c_fc", "c_proj"])
def test_a_dense_neighbour_takes_the_gather(structured):
    model = double("gpt2")
    name = f"transformer.h.1.mlp.{structured}"
    layer = permuted((128, 32), True, None, perm_of(128, 1)) if structured == "c_fc" else permuted(
        (32, 128), True, perm_of(128, 1), None)  # fmt: skip
    replace_modules(model, {name: layer})
    expected = run(model)[0]
    report = ab.absorb(model)
    assert (len(report.absorbed), report.remaining) == (1, [])
    assert_equal_logits(model, expected)


@pytest.mark.parametrize(("up", "left"), [(1, 0), (2, 1)])
def test_gate_and_up_share_their_hidden_units(up, left):
    """Equal gathers both go into the dense down projection; of two that differ one stays."""
    model = double("llama")
    mlp = "model.layers.0.mlp."
    layers = {
        mlp + "gate_proj": permuted((48, 32), True, None, perm_of(48, 1)),
        mlp + "up_proj": permuted((48, 32), True, None, perm_of(48, up)),
    }
    replace_modules(model, layers)
    expected = run(model)[0]
    assert len(ab.absorb(model).remaining) == left
    assert_equal_logits(model, expected)


def test_nothing_is_moved_where_nothing_is_saved():
    """A gather in `up` alone would only move to `gate`, which has none."""
    model = double("llama")
    mlp = "model.layers.0.mlp."
    layers = {
        mlp + "gate_proj": permuted((48, 32), True),
        mlp + "up_proj": permuted((48, 32), True, None, perm_of(48, 1)),
    }
    replace_modules(model, layers)
    before = copy.deepcopy(model.state_dict())
    report = ab.absorb(model)
    assert (report.absorbed, len(report.remaining)) == ([], 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_value_gather_across_heads_stays():
    model = double("llama")
    attention = model.model.layers[0].self_attn
    attention.v_proj = permuted((16, 32), False, None, perm_of(16, 1))
    assert len(ab.absorb(model).remaining) == 1
    inside = torch.cat([perm_of(8, 2), 8 + perm_of(8, 3)])
    attention.v_proj = permuted((16, 32), False, None, inside)
    expected = run(model)[0]
    assert ab.absorb(model).remaining == []
    assert_equal_logits(model, expected)


@pytest.mark.parametrize(("second", "left"), [(4, 0), (5, 1)])
def test_query_heads_of_a_group_share_their_values(second, left):
    """A gather of the output projection moves to v only when it treats the two heads of a group alike."""
    model = double("llama")
    inside = torch.cat([perm_of(8, seed) + 8 * head for head, seed in enumerate((4, second, 6, 6))])
    model.model.layers[0].self_attn.o_proj = permuted((32, 32), False, inside)
    expected = run(model)[0]
    assert len(ab.absorb(model, residual=False).remaining) == left
    assert_equal_logits(model, expected)


def test_a_shipped_recipe_after_absorbing():
    """As it ships, in float32: a gather of each compressed feed-forward part went, and one more of the stream goes."""
    student = kf.compress(pico.gpt2(n_layer=2), "tqcompressor")
    held = {gather.name for gather in ab.remaining_gathers(student)}
    assert "transformer.h.1.mlp.c_fc.gather_out" not in held
    assert "transformer.h.1.mlp.c_proj.gather_in" in held
    with torch.no_grad():
        expected = student(pico.ids(student)).logits
        report = ab.absorb(student)
        torch.testing.assert_close(student(pico.ids(student)).logits, expected, rtol=0, atol=1e-5)
    assert len(report.absorbed) >= 1
    assert report.bytes_after < report.bytes_before
    assert cost(student).index_bytes == report.bytes_after


def test_a_low_rank_layer_is_reordered():
    layer = low_rank(12, 8, 3)
    weight, bias, x = layer.dense_weight().clone(), layer.bias.detach().clone(), torch.randn(5, 8, dtype=torch.float64)
    into, out = perm_of(8, 1), perm_of(12, 2)
    layer.permute_inputs(into)
    layer.permute_outputs(out)
    assert torch.equal(layer.dense_weight(), weight[out][:, into])
    torch.testing.assert_close(layer(x[:, into]), (x @ weight.T + bias)[:, out], rtol=0, atol=1e-12)
    assert layer.to_spec()["permuted"]
    layer.permute_outputs(torch.argsort(layer.gather_out))
    assert layer.gather_out is None
    assert (layer.to_spec()["permuted"], layer.spec.index_count) == (False, 0)
    assert "gather_out" not in layer.state_dict()
    again = LowRankLinear.from_spec(layer.to_spec(), True, dtype=torch.float64)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x))
    layer.permute_outputs(out)  # and a gather comes back where one is needed
    torch.testing.assert_close(layer(x), again(x)[:, out], rtol=0, atol=1e-12)


def test_a_spec_without_the_key_holds_a_gather():
    spec = {"structure": "low_rank", "out_features": 6, "in_features": 4, "rank": 2}
    assert LowRankLinear.from_spec(spec, False).gather_out is not None
    assert LowRankLinear.from_spec({**spec, "permuted": False}, False).gather_out is None


def test_a_grouped_embedding_is_reordered():
    """Groups below full rank compose their gathers, one of full rank reorders the columns of its rows."""
    weight = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fit = grouped_embedding(weight, GroupedEmbeddingSpec((8, 12), (6, 2), 6))
    embedding = GroupedEmbedding.from_fit(fit, torch.float64)
    before, ids = embedding.dense_weight().clone(), torch.arange(20)
    perm = perm_of(6, 1)
    embedding.permute_outputs(perm)
    assert torch.equal(embedding.dense_weight(), before[:, perm])
    assert torch.equal(embedding(ids), before[:, perm])
    hidden = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(embedding.project(hidden[:, perm]), hidden @ before.T, rtol=0, atol=1e-12)


def test_a_low_rank_writer_loses_its_gather(tmp_path):
    """GPT-2's c_fc is the only writer of its hidden units: they take its order, whatever reads them."""
    model = double("gpt2")
    mlps = [f"transformer.h.{block}.mlp." for block in range(2)]
    layers = {mlp + "c_fc": low_rank(128, 32, 10, seed) for seed, mlp in enumerate(mlps)}
    layers[mlps[1] + "c_proj"] = low_rank(32, 128, 10, 7)  # in block 0 a dense one reads
    replace_modules(model, layers)
    expected = run(model)[0]
    report = absorb_gathers(model)
    assert report == {"absorbed": 2, "remaining": [mlps[1] + "c_proj.gather_out"], "bytes": 4 * 32}
    assert_equal_logits(model, expected)
    assert all(layers[mlp + "c_fc"].gather_out is None for mlp in mlps)
    attach(model)  # as `fit` does
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert gathers_of(loaded) == {**report, "absorbed": 0}
    assert torch.equal(run(loaded)[0], run(model)[0])


def test_gathers_of_gate_and_up_do_not_agree():
    """One of two low-rank writers can have its order; the residual stream passes through both."""
    model = double("llama")
    mlp = "model.layers.0.mlp."
    replace_modules(model, {mlp + "gate_proj": low_rank(48, 32, 9, 1), mlp + "up_proj": low_rank(48, 32, 9, 2)})
    expected = run(model)[0]
    report = ab.absorb(model)
    assert [gather.name for gather in report.absorbed] == [mlp + "gate_proj.gather_out"]
    assert_equal_logits(model, expected)
    ab.permute_residual(model, residual_perm())
    assert_equal_logits(model, expected)
