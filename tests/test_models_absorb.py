"""Reordering channels of dense models leaves the logits as they are."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from absorb_models import (
    assert_equal_logits,
    double,
    each_family,
    hidden_units,
    kv_shape,
    residual_perm,
    rows_of,
    run,
)
from kronfold.base.errors import InputError
from kronfold.models import absorb as ab
from kronfold.models.families import family_of
from kronfold.models.linear_view import is_tied, sites
from kronfold.models.place import replace_modules


@each_family
def test_hidden_units(name):
    model = double(name)
    expected = run(model)[0]
    before = {name: view.weight().clone() for name, view in sites(model).items() if view.role and "mlp" in view.role}
    perm = torch.randperm(hidden_units(model))
    ab.permute_hidden_units(model, 1, perm)
    assert_equal_logits(model, expected)
    for site, view in sites(model).items():
        if view.role in ("mlp_in", "mlp_out"):
            moved = before[site][perm] if view.role == "mlp_in" else before[site][:, perm]
            assert torch.equal(view.weight(), moved if view.block == 1 else before[site])


@each_family
def test_value_channels(name):
    model = double(name)
    expected = run(model)[0]
    ab.permute_value_channels(model, 0, rows_of(*kv_shape(model)))
    changed = copy.deepcopy(model)
    assert_equal_logits(model, expected)
    output = next(v for v in sites(changed).values() if v.role == "attention_out")
    with torch.no_grad():  # the output projection really moved: without it the logits differ
        output.module.weight.copy_(next(v for v in sites(double(name)).values() if v.name == output.name).module.weight)
    assert (run(changed)[0] - expected).abs().max() > 1e-4


@each_family
def test_query_and_key_channels(name):
    """Any reordering inside a head where positions are learned; refused where they are rotary."""
    model = double(name)
    expected = run(model)[0]
    perm = rows_of(*kv_shape(model))
    if family_of(model).rotary:
        with pytest.raises(InputError, match="rotary"):
            ab.permute_query_key_channels(model, 0, perm)
    else:
        ab.permute_query_key_channels(model, 0, perm)
    assert_equal_logits(model, expected)


def test_rotary_pairs_cannot_be_reordered_even_together():
    """Swapping two whole pairs (i, i + d/2) in queries and keys alike changes the logits, hence the refusal."""
    model = double("llama")
    expected = run(model)[0]
    swap = torch.tensor([1, 0, 2, 3, 5, 4, 6, 7])
    for layer in (model.model.layers[0].self_attn.q_proj, model.model.layers[0].self_attn.k_proj):
        heads = layer.weight.data.view(-1, 8, 32)
        heads.copy_(heads[:, swap].clone())
    assert (run(model)[0] - expected).abs().max() > 1e-4


@each_family
def test_the_residual_stream(name):
    model = double(name)
    expected, hidden = run(model)
    perm = residual_perm()
    ab.permute_residual(model, perm)
    assert is_tied(model, family_of(model)) == is_tied(double(name), family_of(model))
    found, reordered = run(model)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    for before, after in zip(hidden, reordered, strict=True):
        torch.testing.assert_close(after, before[..., perm], rtol=0, atol=1e-10)


BAD = {
    "length": lambda m: ab.permute_hidden_units(m, 0, torch.arange(7)),
    "twice": lambda m: ab.permute_residual(m, torch.zeros(32, dtype=torch.int64)),
    "across heads": lambda m: ab.permute_value_channels(m, 0, torch.randperm(16).view(2, 8) + 1),
    "heads": lambda m: ab.permute_value_channels(m, 0, rows_of(4, 8)),
    "block": lambda m: ab.permute_hidden_units(m, 2, torch.arange(48)),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_no_reordering_is_refused_and_changes_nothing(fault):
    model = double("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="blocks 0 to 1" if fault == "block" else "Needed: a permutation.*unchanged"):
        BAD[fault](model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_cannot_be_reordered_stops_it_before_anything_changes():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = double("llama")
    replace_modules(model, {"model.layers.1.mlp.down_proj": Scaled(48, 32).double()})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"(?s)unchanged.*down_proj: Scaled does more"):
        ab.permute_hidden_units(model, 1, torch.randperm(48))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert ab.absorb(model).absorbed == []


def test_unknown_families_are_refused():
    config = GPTNeoXConfig(vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(InputError, match="'gpt_neox'.*Known: gpt2"):
        ab.absorb(AutoModelForCausalLM.from_config(config))
