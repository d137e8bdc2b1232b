"""GPT-2's activation in one kernel: the same function, and nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch

import pico
from kronfold.train.heal import fused_gelu


def test_the_same_logits_and_gradients():
    plain, fused = pico.gpt2().double(), pico.gpt2().double()
    ids = pico.ids(plain)
    plain(ids).logits.square().mean().backward()
    with fused_gelu(fused, None):
        fused(ids).logits.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), fused.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-10, atol=1e-13), name


def test_it_runs_torchs_kernel_and_leaves_no_trace(monkeypatch):
    model = pico.gpt2()
    activation = model.transformer.h[0].mlp.act
    before = copy.deepcopy(activation.__dict__)
    with pytest.raises(RuntimeError, match="stop"), fused_gelu(model):
        assert "forward" in activation.__dict__
        raise RuntimeError("stop")
    assert activation.__dict__.keys() == before.keys()
    other = torch.nn.GELU()
    with fused_gelu(torch.nn.Sequential(other)):
        assert "forward" not in other.__dict__  # the exact one is another function
