"""Reordering channels leaves the logits as they are, and gathers go where they cost nothing."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import kronfold as kf
import pico
from kronfold.base.errors import InputError
from kronfold.base.specs import GroupedEmbeddingSpec, LowRankSpec
from kronfold.decompose.grouped_embedding import grouped_embedding
from kronfold.decompose.low_rank import nearest_low_rank
from kronfold.models import absorb as ab
from kronfold.models.cost import cost
from kronfold.models.families import family_of
from kronfold.models.linear_view import is_tied, sites
from kronfold.models.surgery import replace_modules
from kronfold.nn import GroupedEmbedding, KroneckerLinear, LowRankLinear
from kronfold.pipelines.compress import compress_stage
from kronfold.pipelines.gathers import absorb_gathers, gathers_of
from kronfold.planner.plan import Plan
from kronfold.planner.planning import check_plan, skeleton_of
from kronfold.planner.recipe import Recipe, validate

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


# --- dense models -----------------------------------------------------------------------------------------------


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


# --- structured models ------------------------------------------------------------------------------------------


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
    student = kf.compress(model, validate(Recipe, recipe, "Recipe x")).double()
    assert ab.remaining_gathers(student) == []
    return student


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


# --- low rank ---------------------------------------------------------------------------------------------------


def low_rank(out: int, into: int, rank: int, seed: int = 0) -> LowRankLinear:
    """The best layer of that rank for a random weight, with a random bias, float64."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((out, into), (out,)))
    return LowRankLinear.from_fit(nearest_low_rank(weight, LowRankSpec(out, into, rank)), bias, torch.float64)


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


# --- the pipeline -----------------------------------------------------------------------------------------------

KRONECKER = {"structure": "kronecker", "block": [2, 2]}
LOW_RANK = {"structure": "low_rank", "ratio": 0.6}
LAYERS = ["role:attention_in", "role:attention_out", "role:mlp_in", "role:mlp_out"]
MIXES = {
    "kronecker": [{**KRONECKER, "modules": LAYERS, "blocks": [1]}],
    "low rank": [{**LOW_RANK, "modules": ["role:embedding", *LAYERS]}],
    "low rank into kronecker": [{**LOW_RANK, "modules": "role:mlp_in"}, {**KRONECKER, "modules": "role:mlp_out"}],
    "into dense": [{**KRONECKER, "modules": "role:mlp_in", "blocks": [1]}],
    "out of dense": [{**KRONECKER, "modules": ["role:mlp_out", "role:attention_out"], "blocks": [0]}],
    "one without": [{**KRONECKER, "modules": "role:mlp_in", "permute": "in"}, {**KRONECKER, "modules": "role:mlp_out"}],
}


def recipe_of(mix: str) -> Recipe:
    return validate(Recipe, {"name": "x", "stages": [{"name": "x", "compress": MIXES[mix]}]}, "Recipe x")


EVERY_FAMILY = ("kronecker", "low rank")
CASES = [
    (name, mix) for name in pico.FAMILY_CONFIGS for mix in MIXES if mix in EVERY_FAMILY or name in ("gpt2", "llama")
]


@pytest.mark.parametrize(("name", "mix"), CASES)
def test_the_pipeline_keeps_logits_and_the_plan_foretells_what_is_held(name, mix):
    model = double(name)
    made = kf.plan(model, recipe_of(mix), errors=False)
    student = copy.deepcopy(model)
    compress_stage(student, made.stages[0].rows)
    expected, hidden = run(student)
    found = absorb_gathers(student)
    assert_equal_logits(student, expected)
    for before, after in zip(hidden, run(student)[1], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    assert found == made.gathers
    assert found["bytes"] == made.cost.index_bytes == cost(student).index_bytes
    assert made.cost == cost(student) == check_plan(made, model)
    assert absorb_gathers(student)["absorbed"] == 0  # nothing is left to do
    assert kf.plan(student, recipe_again(student), errors=False).teacher == cost(student)


def recipe_again(student) -> Recipe:
    """Any recipe that fits: the first linear site, at rank 1."""
    site = next(view.name for view in sites(student).values() if view.kind == "linear")
    entry = {"structure": "low_rank", "rank": 1, "modules": site}
    return validate(Recipe, {"name": "y", "stages": [{"name": "y", "compress": [entry]}]}, "Recipe y")


def test_compress_absorbs():
    model = pico.gpt2(n_layer=2)
    made = kf.plan(model, recipe_of("low rank"), errors=False)
    assert made.gathers["absorbed"] == 2
    assert gathers_of(kf.compress(model, made)) == {**made.gathers, "absorbed": 0}


def test_a_single_head_of_keys_and_values_is_its_own_order():
    """Multi-query attention: no value channel can leave its head, so the gather of v always goes."""
    config = LlamaConfig(**{**pico._SHARED, "num_key_value_heads": 1})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    entry = {**LOW_RANK, "modules": "role:attention_in"}
    recipe = validate(Recipe, {"name": "x", "stages": [{"name": "x", "compress": [entry]}]}, "Recipe x")
    made = kf.plan(model, recipe, errors=False)
    assert made.gathers["absorbed"] == 2
    assert not any("v_proj" in name for name in made.gathers["remaining"])
    assert gathers_of(kf.compress(model, recipe))["remaining"] == made.gathers["remaining"]


def test_an_unknown_family_keeps_its_gathers():
    config = GPTNeoXConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    entry = {**KRONECKER, "modules": [v.name for v in sites(model).values() if "mlp" in v.name]}
    recipe = validate(Recipe, {"name": "x", "stages": [{"name": "x", "compress": [entry]}]}, "Recipe x")
    made = kf.plan(model, recipe, errors=False)
    assert made.gathers == gathers_of(kf.compress(model, recipe))
    assert (made.gathers["absorbed"], len(made.gathers["remaining"])) == (0, 4)


def test_a_plan_of_an_older_version_loads(tmp_path):
    made = kf.plan(pico.config(), "tqcompressor")
    made.save(tmp_path / "new.json")
    assert Plan.load(tmp_path / "new.json") == made
    document = json.loads((tmp_path / "new.json").read_text())
    del document["gathers"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert Plan.load(tmp_path / "old.json").gathers is None


def test_the_gathers_of_a_skeleton_are_named_without_numbers():
    student = kf.compress(pico.gpt2(n_layer=2), recipe_of("low rank into kronecker"))
    assert gathers_of(skeleton_of(student)) == gathers_of(student)
    assert ab.expected_gathers(skeleton_of(student)).absorbed == []
