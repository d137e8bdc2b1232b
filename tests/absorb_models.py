"""Models whose channels are reordered, and the oracle that nothing else changed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import kronfold as kf
import pico
from kronfold.base.specs import LowRankSpec
from kronfold.decompose.low_rank import nearest_low_rank
from kronfold.models import absorb as ab
from kronfold.models.families import family_of
from kronfold.models.linear_view import is_tied, sites
from kronfold.nn import LowRankLinear
from kronfold.options import read
from kronfold.planner.recipe import Recipe
from kronfold.structures.kronecker import KroneckerLinear

each_family = pytest.mark.parametrize("name", pico.FAMILY_CONFIGS)


@contextmanager
def everything_in_float64():
    """Stock code rounds inside norms and attention by `.to(torch.float32)`; here that means float64."""
    stock, torch.float32 = torch.float32, torch.float64
    try:
        yield
    finally:
        torch.float32 = stock


def run(model) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits and hidden states (embedding, then after each block)."""
    with torch.no_grad(), everything_in_float64():
        out = model(pico.ids(model), output_hidden_states=True)
    return out.logits, out.hidden_states


def double(name: str):
    return pico.family(name).double()


def rows_of(heads: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(width, generator=generator) for _ in range(heads)])


def residual_perm(seed: int = 3) -> torch.Tensor:
    return torch.randperm(32, generator=torch.Generator().manual_seed(seed))


def kv_shape(model) -> tuple[int, int]:
    """(heads of keys and values, width of a head), from the weights."""
    values = next(view for view in sites(model).values() if view.name.endswith(("v_proj", "c_attn.v")))
    heads = 4 if model.config.model_type in ("gpt2", "gpt_neo") else 2
    return heads, values.shape[0] // heads


def hidden_units(model) -> int:
    return next(view.shape[0] for view in sites(model).values() if view.role == "mlp_in")


def assert_equal_logits(model, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(run(model)[0], expected, rtol=0, atol=tolerance)


def without_gathers(name: str):
    """Every weight in factors, no gather anywhere, float64."""
    model = pico.family(name)
    entries = [
        {"modules": "role:embedding", "block": [1, 2], "permute": "none"},
        {"modules": ["role:attention_in", "role:attention_out", "role:mlp_in"], "block": [2, 2], "permute": "none"},
    ]
    if not is_tied(model, family_of(model)):
        entries.append({"modules": "role:head", "block": [1, 2], "permute": "none"})
    recipe = {"name": "x", "stages": [{"name": "x", "compress": entries}]}  # mlp_out stays dense
    student = kf.compress(model, read(Recipe, recipe, "Recipe x")).double()
    assert ab.remaining_gathers(student) == []
    return student


def permuted(shape: tuple[int, int], bias: bool, gather_in=None, gather_out=None) -> KroneckerLinear:
    """A Kronecker layer for a weight of `shape` with these gathers, float64."""
    spec = ((shape[0] // 2, shape[1] // 2), (2, 2), 1, gather_in is not None, gather_out is not None, bias)
    layer = KroneckerLinear(*spec, dtype=torch.float64)
    for own, given in ((layer.gather_in, gather_in), (layer.gather_out, gather_out)):
        if own is not None:
            own.copy_(given)
    if bias:
        torch.nn.init.normal_(layer.bias)
    return layer


def perm_of(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def low_rank(out: int, into: int, rank: int, seed: int = 0) -> LowRankLinear:
    """The best layer of that rank for a random weight, with a random bias, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, into), (out,)))
    return LowRankLinear.from_fit(nearest_low_rank(weight, LowRankSpec(out, into, rank)), bias, torch.float64)
