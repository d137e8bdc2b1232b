"""The contract of a model family: one row per family (in pico.FAMILY_CONFIGS), everything through the whole chain."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BloomConfig,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
)

import kronfold as kf
import pico
from kronfold.base.errors import InputError, RecipeError
from kronfold.distill.pairs import check_head
from kronfold.models.cost import cost
from kronfold.models.families import FAMILIES, empty_model, family_of
from kronfold.models.linear_view import is_tied, recognised, sites
from kronfold.models.load import load_config
from kronfold.models.place import read_specs, replace_modules
from kronfold.options import read
from kronfold.planner.recipe import Recipe, match

each_family = pytest.mark.parametrize("name", pico.FAMILY_CONFIGS)
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = (*QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NEO = tuple(f"attn.attention.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj"))
IN_BLOCK = {
    "gpt2": (*(f"attn.c_attn.{p}" for p in "qkv"), "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neo": (*NEO, "mlp.c_fc", "mlp.c_proj"),
}
ATTENTION = {"modules": ["role:attention_in", "role:attention_out"], "block": [2, 2], "permute": "none"}
EVERYTHING = [
    {"modules": "role:embedding", "block": [1, 2], "permute": "in"},
    {"modules": "role:mlp_in", "block": [4, 2], "permute": "out"},
    {"modules": "role:mlp_out", "block": [2, 4], "rank": 2, "permute": "in"},
    ATTENTION,
]
HEAD = {"modules": "role:head", "block": [1, 2], "permute": "in"}


def recipe_for(model) -> Recipe:
    entries = EVERYTHING if is_tied(model, family_of(model)) else [*EVERYTHING, HEAD]
    document = {"name": "everything", "stages": [{"name": "all", "compress": entries}]}
    return read(Recipe, document, "Recipe everything")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(pico.ids(model)).logits


@pytest.fixture(scope="module")
def compressed():
    """(model, everything of it compressed) by family; do not change them."""
    models = {name: pico.family(name) for name in pico.FAMILY_CONFIGS}
    return {name: (model, kf.compress(model, recipe_for(model))) for name, model in models.items()}


def test_every_family_record_has_a_row():
    assert {make().model_type for make in pico.FAMILY_CONFIGS.values()} == set(FAMILIES)


@each_family
def test_sites_and_roles(compressed, name):
    model = compressed[name][0]
    family = family_of(model)
    inner = IN_BLOCK.get(name, LLAMA)
    head = [] if is_tied(model, family) else ["lm_head"]
    views = sites(model)
    assert list(views) == [
        family.embedding, *(f"{family.blocks}.{i}.{layer}" for i in range(2) for layer in inner), *head
    ]  # fmt: skip
    assert is_tied(model, family) == (name not in ("llama", "mistral", "qwen3"))
    counts = {role: sum(v.role == role and v.block == 1 for v in views.values()) for role in family.roles}
    gated = name not in ("gpt2", "gpt_neo")
    assert counts == {"attention_in": 3, "attention_out": 1, "mlp_in": 1 + gated, "mlp_out": 1}
    assert views[family.embedding].role == "embedding"
    assert all(views[h].role == "head" and views[h].block is None for h in head)
    left = recognised(model).left_alone
    assert {why.split(" (")[0] for why in left.values()} <= {
        "vectors only", "embedding of something other than tokens", "tied head, follows the embedding"
    }  # fmt: skip


@each_family
def test_the_record_names_what_is_there(compressed, name):
    model = compressed[name][0]
    family = family_of(model)
    modules = dict(model.named_modules())
    for norm, fed in family.norms.items():
        assert modules[family.block_name(1, norm)].weight.shape == (32,)
        assert all(family.block_name(1, layer) in modules for layer in fed)
    assert modules[family.final_norm].weight.shape == (32,)
    assert (family.positions is None) == family.rotary
    assert family.positions is None or modules[family.positions].weight.shape == (64, 32)


@each_family
def test_weights_are_canonical(compressed, name):
    """x Wᵀ + b is what the stock layer computes, and keys are narrower than queries where heads are grouped."""
    model = compressed[name][0]
    for view in sites(model).values():
        if view.kind == "linear":
            x = torch.randn(3, view.shape[1])
            bias = 0 if view.bias() is None else view.bias()
            out = view.module(x)[:, view.rows[0] : view.rows[1]]
            torch.testing.assert_close(x @ view.weight().T + bias, out)
    if name not in ("gpt2", "gpt_neo"):
        q, k, v = (sites(model)[f"model.layers.1.{part}"].shape[0] for part in QKV)
        assert k == v == q // 2


@each_family
def test_the_plan_counts_what_the_model_holds(compressed, name):
    model, student = compressed[name]
    made = kf.plan(model, recipe_for(model), errors=False)
    assert made.cost == cost(student)
    assert made.cost == kf.plan(model.config, recipe_for(model)).cost
    distinct = {p.data_ptr(): p.numel() for p in student.parameters()}
    assert made.held_parameters == sum(distinct.values()) < cost(model).held_parameters
    assert len(made.rows) == len(sites(model))
    assert not any(view.is_dense for view in sites(student).values())


@each_family
def test_saved_loaded_generated_and_made_dense(compressed, tmp_path, name):
    student = compressed[name][1]
    student.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(loaded) is type(student)
    assert torch.equal(logits(loaded), logits(student))
    assert read_specs(loaded) == read_specs(student)
    prompt = pico.ids(loaded, rows=1, length=5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(prompt, **options), loaded.generate(prompt, use_cache=False, **options))
    body = AutoModel.from_pretrained(tmp_path / "small")
    ids = pico.ids(student)
    assert torch.equal(body(ids).last_hidden_state, student.base_model(ids).last_hidden_state)

    dense = kf.to_dense(loaded)
    torch.testing.assert_close(logits(dense), logits(student), rtol=0, atol=2e-5)
    assert cost(dense).held_parameters == cost(compressed[name][0]).held_parameters
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(dense))


@each_family
def test_what_healing_needs(compressed, name):
    """The head applied to the last hidden state is all there is to the logits, and every factor gets a gradient."""
    student = copy.deepcopy(compressed[name][1])
    check_head(student)
    ids = pico.ids(student)
    student(ids, labels=ids).loss.backward()
    idle = [key for key, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert idle == []


@each_family
def test_shipped_recipes_run_on_every_family(compressed, name):
    model = compressed[name][0]
    made = kf.plan(model, "tqcompressor-attention", errors=False)
    assert {sites(model)[row.name].role for row in made.rows} == {"embedding", "mlp_in", "mlp_out", "attention_in"}
    assert kf.plan(model, "tqcompressor", errors=False).held_parameters < made.teacher.held_parameters


def test_an_untied_head_survives_a_later_stage():
    """Part the head from the embedding, compress the head, then the embedding once more: each keeps its own."""
    embedding = {**EVERYTHING[0], "head": "untied"}
    stages = [[embedding], [HEAD], [embedding]]
    document = {"name": "x", "stages": [{"name": f"s{i}", "compress": entry} for i, entry in enumerate(stages)]}
    recipe = read(Recipe, document, "Recipe x")
    model = pico.family("llama-tied")
    student = kf.compress(model, recipe)
    specs = read_specs(student)
    assert specs["lm_head"]["structure"] == "kronecker"
    assert len(specs["model.embed_tokens"]["levels"]) == 2
    assert kf.plan(model, recipe, errors=False).cost == cost(student)


def test_a_block_that_does_not_divide_is_said():
    config = LlamaConfig(**{**pico._SHARED, "intermediate_size": 50})
    with pytest.raises(RecipeError, match=r"(?s)gate_proj: Block size 4 does not divide.*nearest allowed: .*down_proj"):
        kf.plan(config, "tqcompressor")


def test_a_directory_with_a_config_only_is_planned(tmp_path):
    pico.family("llama").config.save_pretrained(tmp_path)
    config = load_config(f"config:{tmp_path}")
    assert kf.plan(config, "tqcompressor").held_parameters < cost(pico.family("llama")).held_parameters


def test_published_sizes_are_planned():
    """GPT-2 XL: d = 1600, 48 blocks; the embedding to a quarter, the FFN of 24 blocks to a half (+ 32 numbers each)."""
    made = kf.plan(load_config("config:gpt2-xl"), "tqcompressor")
    d, ffn = 1600, 8 * 1600 * 1600
    assert made.teacher.held_parameters == 1_557_611_200
    assert made.held_parameters == 1_557_611_200 - 50257 * d * 3 // 4 + 4 - 24 * (ffn // 2 - 2 * 32)


def test_a_published_llama_is_planned():
    """SmolLM2-135M (134,515,008 numbers, tied): gate, up and down of 15 blocks to a half, embedding to a quarter."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    made = kf.plan(config, "tqcompressor")
    assert made.teacher.held_parameters == 134_515_008
    saved = 49152 * 576 * 3 // 4 - 4 + 15 * 3 * (576 * 1536 // 2 - 4 * 8)
    assert made.held_parameters == 134_515_008 - saved


def test_roles_in_patterns():
    views = list(sites(pico.family("llama")).values())
    assert [v.name for v in match(views, ["role:mlp_in"], [1])] == [
        "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"
    ]  # fmt: skip
    assert [v.name for v in match(views, ["role:head"])] == ["lm_head"]
    with pytest.raises(RecipeError, match="unknown role.*'mlp_in'"):
        match(views, ["role:mlp_inn"])
    with pytest.raises(RecipeError, match="match nothing.*role:mlp_in"):
        match(list(sites(pico.gpt2()).values()), ["role:head"])


# --- models without a record ------------------------------------------------------------------------------------

SIZES = {**pico._SHARED, "num_key_value_heads": 2}
UNKNOWN = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
    "opt": OPTConfig(
        vocab_size=101, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16,
    ),
    "gemma": GemmaConfig(**{**SIZES, "pad_token_id": 0}, head_dim=8),
    "bloom": BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4),
    "phi": PhiConfig(**SIZES),
    "mamba": MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0),
}  # fmt: skip
LEFT_ALONE = {
    "mixtral": {"model.layers.*.mlp.experts": "stacked experts", "model.layers.*.mlp.gate": "is no nn.Linear"},
    "gemma": {"model.embed_tokens": "does more than multiply", "lm_head": "tied head"},
    "opt": {"model.decoder.embed_positions": "does more"},
    "mamba": {"backbone.layers.*.mixer.conv1d": "convolution", "backbone.layers.*.mixer": "is no nn.Linear"},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_any_decoder_is_recognised(name):
    model = empty_model(UNKNOWN[name])
    found = recognised(model)
    assert found.generic
    assert (found.depth, found.head, found.tied) == (2, "lm_head", name in ("opt", "gemma", "bloom", "mamba"))
    for module, why in LEFT_ALONE.get(name, {}).items():
        assert why in found.left_alone[module]
        assert module in found.lines()
    linear = {n for n, m in model.named_modules() if type(m) is torch.nn.Linear and not (found.tied and n == "lm_head")}
    assert {view.name for view in sites(model).values() if view.kind == "linear"} == linear
    json.dumps(found.to_dict())


@pytest.mark.parametrize("name", ["mixtral", "gpt_neox", "opt", "phi"])
def test_any_decoder_is_compressed_saved_and_loaded(tmp_path, name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(UNKNOWN[name]).eval()
    wide = [v.name for v in sites(model).values() if v.kind == "linear" and v.shape[0] % 2 == 0]
    entries = [EVERYTHING[0], {"modules": wide, "block": [2, 2]}]
    recipe = read(Recipe, {"name": "x", "stages": [{"name": "x", "compress": entries}]}, "Recipe x")
    student = kf.compress(model, recipe)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(student))
    assert kf.plan(load_config(tmp_path), recipe_again()).teacher == cost(student)
    torch.testing.assert_close(logits(kf.to_dense(loaded)), logits(student), rtol=0, atol=2e-5)


def recipe_again() -> Recipe:
    entry = {"modules": "role:embedding", "block": [1, 2], "permute": "none"}
    return read(Recipe, {"name": "y", "stages": [{"name": "y", "compress": [entry]}]}, "Recipe y")


def test_roles_of_an_unknown_type_go_by_known_names():
    roles = {view.role for view in sites(empty_model(UNKNOWN["mixtral"])).values()}
    assert roles == {"embedding", "attention_in", "attention_out", "head"}


def test_layers_that_compute_something_else_are_left_alone():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = pico.family("llama")
    replace_modules(model, {"model.layers.1.mlp.up_proj": Scaled(32, 48)})
    assert "model.layers.1.mlp.up_proj" not in sites(model)
    assert recognised(model).left_alone["model.layers.*.mlp.up_proj"].startswith("Scaled does more")


def test_nothing_recognised_is_an_error():
    model = pico.family("llama")
    model.config.model_type = "unheard-of"
    model.model.layers = torch.nn.Module()
    with pytest.raises(InputError, match="'unheard-of'.*no list of blocks"):
        sites(model)


def test_the_command_line_shows_what_was_recognised(tmp_path, call):
    def shown_by(*arguments: str) -> str:
        code, out, _ = call(*arguments)
        assert code == 0
        return out

    place = Path(tmp_path)
    UNKNOWN["mixtral"].save_pretrained(place)
    (place / "mine.yaml").write_text(
        "name: mine\nstages:\n  - name: one\n    compress: [{modules: role:attention_in, block: [2, 2]}]\n"
    )
    shown = shown_by("plan", f"config:{place}", "--recipe", str(place / "mine.yaml"))
    assert "stacked experts" in shown.replace("\n", " ")
    assert "model.layers.*.mlp.experts" in shown
    assert json.loads(shown_by("inspect", f"config:{place}", "--json"))["recognised"]["generic"]
    assert "left alone" in shown_by("inspect", f"config:{place}")
    assert "left alone" not in shown_by("inspect", "config:gpt2")
