"""Every structure that a recipe can ask for, on a whole model: counts, checkpoints, generation, dense merge."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base.errors import RecipeError
from kronfold.models.cost import cost
from kronfold.options import read
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import Recipe

ENTRIES = {
    "low_rank on linear layers by rank": [{"modules": "*.mlp.*", "structure": "low_rank", "rank": 5}],
    "low_rank on linear layers by ratio": [{"modules": "*.c_proj", "structure": "low_rank", "ratio": 0.4}],
    "low_rank of full rank": [{"modules": "*.mlp.c_fc", "structure": "low_rank", "ratio": 1.0}],
    "low_rank on fused parts": [{"modules": "*.c_attn.[qk]", "structure": "low_rank", "ratio": 0.5}],
    "low_rank on the embedding": [{"modules": "*.wte", "structure": "low_rank", "ratio": 0.5}],
    "low_rank on the embedding, untied": [
        {"modules": "*.wte", "structure": "low_rank", "rank": 7, "head": "untied"},
    ],
    "an embedding of full rank": [{"modules": "*.wte", "structure": "low_rank", "ratio": 1.0}],
    "tensor trains in the embedding": [{"modules": "*.wte", "structure": "tensor_train", "ratio": 0.5}],
    "tensor trains of three cores, untied": [
        {"modules": "*.wte", "structure": "tensor_train", "ratio": 0.7, "cores": 3, "head": "untied"},
    ],
    "sum on linear layers": [
        {
            "modules": "*.mlp.*",
            "structure": "sum",
            "terms": [
                {"structure": "low_rank", "ratio": 0.3},
                {"structure": "kronecker", "block": [2, 2], "rank": 1, "permute": "none"},
            ],
        }
    ],
    "sum on fused parts, permuted": [
        {
            "modules": "*.c_attn.[qv]",
            "structure": "sum",
            "terms": [{"structure": "kronecker", "block": [1, 2]}, {"structure": "low_rank", "rank": 3}],
        }
    ],
    "low_rank everywhere, Kronecker in one part": [
        {"modules": ["*.wte", "*.mlp.*", "*.attn.c_proj", "*.c_attn.[qv]"], "structure": "low_rank", "ratio": 0.6},
        {"modules": "*.c_attn.k", "block": [2, 2], "rank": 2},
    ],
}


def recipe(entries, *more) -> Recipe:
    stages = [{"name": f"stage-{i}", "compress": entry} for i, entry in enumerate((entries, *more))]
    return read(Recipe, {"name": "mine", "stages": stages}, "Recipe mine")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(pico.ids(model)).logits


@pytest.fixture(scope="module")
def teacher():
    return pico.gpt2(n_layer=2)


@pytest.fixture(scope="module")
def students(teacher):
    return {name: kf.compress(teacher, recipe(entries)) for name, entries in ENTRIES.items()}


each = pytest.mark.parametrize("name", ENTRIES)


@each
def test_plan_counts_what_is_held(teacher, students, tmp_path, name):
    made = kf.plan(teacher, recipe(ENTRIES[name]))
    student = students[name]
    assert made.cost == kf.plan(teacher.config, recipe(ENTRIES[name])).cost
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made.cost == cost(student) == cost(again)
    assert made.held_parameters == sum(p.numel() for p in again.parameters())
    untied = 101 * 32 if "untied" in name else 0
    saved = sum(row.teacher_parameters - row.held_parameters for row in made.rows)
    assert made.held_parameters == made.teacher.held_parameters - saved + untied
    for row in made.rows:
        plain = row.relative_error if row.relative_error_plain is None else row.relative_error_plain
        assert 0 <= row.relative_error <= plain + 1e-12 < 1
        assert (row.relative_error_plain is None) == (row.spec["structure"] != "kronecker")
        assert ("full rank" in name) == (row.relative_error < 1e-6)


@each
def test_round_trip_is_bitwise_and_generates(students, tmp_path, name):
    student = students[name]
    student.save_pretrained(tmp_path / "first")
    first = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert torch.equal(logits(first), logits(student))
    first.save_pretrained(tmp_path / "second")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert torch.equal(logits(second), logits(student))
    configs = [(tmp_path / place / "config.json").read_text() for place in ("first", "second")]
    assert configs[0] == configs[1]
    prompt = pico.ids(student, rows=1, length=5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(second.generate(prompt, **options), second.generate(prompt, use_cache=False, **options))


@each
def test_dense_merge_and_training(teacher, students, name):
    dense = kf.to_dense(students[name])
    torch.testing.assert_close(logits(dense), logits(students[name]), rtol=0, atol=1e-4)
    assert {type(m).__name__ for m in dense.modules()} == {type(m).__name__ for m in teacher.modules()}
    if "full rank" in name:
        torch.testing.assert_close(logits(dense), logits(teacher), rtol=0, atol=1e-4)
    student = kf.compress(students[name], recipe([{"modules": "*.h.1.mlp.c_fc", "block": [1, 2], "permute": "none"}]))
    ids = pico.ids(student)
    student.train()(ids, labels=ids).loss.backward()
    assert all(p.numel() == 0 or (p.grad is not None and p.grad.abs().sum() > 0) for p in student.parameters())


def test_a_later_stage_compresses_what_an_earlier_one_left(teacher):
    first = [{"modules": ["*.wte", "*.c_attn.[qk]"], "structure": "low_rank", "ratio": 0.8}]
    second = [{"modules": ["*.wte", "*.c_attn.[kv]"], "structure": "low_rank", "ratio": 0.4}]
    made = kf.plan(teacher, recipe(first, second), errors=False)
    student = kf.compress(teacher, recipe(first, second))
    assert made.cost == cost(student)
    assert student.transformer.wte.ranks == kf.compress(teacher, recipe(second)).transformer.wte.ranks
    assert student.lm_head.embedding is student.transformer.wte
    torch.testing.assert_close(logits(kf.to_dense(student)), logits(student), rtol=0, atol=1e-4)


def test_sums_without_permutations_and_on_an_embedding(teacher):
    made = recipe(ENTRIES["sum on fused parts, permuted"])
    permuted, plain = kf.plan(teacher, made), kf.plan(teacher, made.without_permutations(), errors=False)
    assert permuted.cost.index_bytes > plain.cost.index_bytes
    assert permuted.held_parameters == plain.held_parameters
    terms = [{"structure": "low_rank", "rank": 2}, {"structure": "kronecker", "block": [1, 2]}]
    with pytest.raises(RecipeError, match="cannot replace an embedding"):
        kf.plan(teacher, recipe([{"modules": "*.wte", "structure": "sum", "terms": terms}]))


REFUSED = [
    ({"structure": "low_rank"}, "either rank: N or ratio: R"),
    ({"structure": "low_rank", "rank": 2, "ratio": 0.5}, "either rank: N or ratio: R"),
    ({"structure": "low_rank", "rank": 33}, "above the smaller side"),
    ({"structure": "low_rank", "rank": 3, "block": [1, 2]}, "not block"),
    ({"structure": "kronecker", "block": [1, 2], "ratio": 0.5}, "not ratio"),
    ({"structure": "sum"}, "needs terms"),
    ({"structure": "sum", "terms": [{"structure": "low_rank", "rank": 2}]}, "two or more terms"),
    ({"structure": "sum", "terms": [{"structure": "fused"}] * 2}, "cannot be a term"),
    ({"structure": "sum", "terms": [{"structure": "sum"}] * 2}, "cannot be a term"),
    ({"structure": "sum", "rank": 2, "terms": [{"structure": "low_rank", "rank": 2}] * 2}, "only terms; say rank"),
    ({"structure": "sum", "terms": [{"structure": "low_rank", "rank": 2}, {"structure": "kronecker"}]}, "a block"),
    ({"structure": "low_rank", "rank": 2, "terms": []}, "terms belong to structure sum"),
    ({"structure": "grouped_embedding", "rank": 3}, "cannot replace a linear layer"),
]


@pytest.mark.parametrize(("entry", "message"), REFUSED)
def test_what_cannot_be_asked_for_is_refused(entry, message):
    with pytest.raises(RecipeError, match=message):
        kf.plan(pico.config(), recipe([{"modules": "*.mlp.c_fc", **entry}]))


def test_a_plan_edited_to_the_wrong_kind_is_refused(teacher, tmp_path):
    kf.plan(teacher, recipe(ENTRIES["low_rank on the embedding"]), errors=False).save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    document["rows"][0]["spec"] = {"structure": "low_rank", "out_features": 101, "in_features": 32, "rank": 3}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(RecipeError, match="cannot replace an embedding; use kronecker, low_rank or tensor_train"):
        kf.compress(teacher, Plan.load(tmp_path / "plan.json"))
