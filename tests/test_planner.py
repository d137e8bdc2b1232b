"""Recipes, patterns and plans: exact published counts, every fault at once, nothing silent."""

from __future__ import annotations

import json

import pytest
import yaml
from transformers import GPT2Config

import kronfold as kf
import pico
from kronfold.base.errors import RecipeError
from kronfold.models.linear_view import sites
from kronfold.options import read
from kronfold.planner.plan import Plan
from kronfold.planner.planning import check_plan
from kronfold.planner.recipe import Recipe, load_recipe, match, shipped_recipes

# GPT-2 small holds 124,439,808. The tied and untied counts of the released recipe are derived in DESIGN fact 1;
# attention adds 18 matrices of 768² that become 768·384 + 2 each.
PUBLISHED = {
    "tqcompressor": 81_336_388,
    "tqcompressor-untied": 119_933_764,
    "tqcompressor-attention": 81_336_388 - 18 * (768 * 768 - 768 * 384 - 2),
}

FIXED = [name for name in shipped_recipes() if load_recipe(name).auto is None]  # shapes of their own
HALVING = [name for name in FIXED if name.startswith("tqcompressor")]  # they halve every matrix they touch


@pytest.mark.parametrize(("recipe", "held"), PUBLISHED.items())
def test_counts_on_gpt2(recipe, held):
    made = kf.plan(GPT2Config(), recipe)
    assert made.teacher.held_parameters == 124_439_808
    assert made.held_parameters == held
    assert made.cost.bytes_fp32 == 4 * held + made.cost.index_bytes
    assert made.cost.macs_per_token < made.teacher.macs_per_token or recipe == "tqcompressor-untied"


@pytest.mark.parametrize("recipe", HALVING)
@pytest.mark.parametrize(
    "sizes", [{"n_embd": 1280, "n_layer": 36, "n_head": 20}, {"n_embd": 192, "n_layer": 6, "n_head": 4}]
)
def test_recipes_adapt_to_other_widths(recipe, sizes):
    made = kf.plan(GPT2Config(**sizes), recipe)
    for row in made.rows:
        assert row.held_parameters == pytest.approx(row.teacher_parameters / 2, abs=32)


def test_rows_say_what_happens():
    made = kf.plan(pico.config(), "tqcompressor")
    names = [row.name for row in made.rows]
    assert names == [
        "transformer.wte",
        *(f"transformer.h.{i}.mlp.c_fc" for i in (1, 3)),
        *(f"transformer.h.{i}.mlp.c_proj" for i in (1, 3)),
        "transformer.wte",
    ]
    assert made.rows[1].spec.a == (32, 16)
    assert made.rows[1].spec.b == (4, 2)


def test_plan_changes_nothing_and_gives_errors_when_weights_are_there():
    model = pico.gpt2(n_layer=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = kf.plan(model, "tqcompressor")
    assert all(0 < row.relative_error <= row.relative_error_plain + 1e-12 < 1 for row in made.rows)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all((after[key] == before[key]).all() for key in before)


def test_plan_saves_and_loads(tmp_path):
    made = kf.plan(pico.config(), "tqcompressor-attention")
    made.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == made
    assert check_plan(again, pico.config()) == made.cost
    document = json.loads((tmp_path / "plan.json").read_text())
    assert {"held_parameters", "teacher_parameters", "macs_per_token", "bytes_fp16", "rows"} <= set(document)


def test_a_compressed_checkpoint_is_planned_as_it_is(students, checkpoints):
    """From its config alone as from its weights: the embedding gets a third level, the head stays tied."""
    from kronfold.models.load import load_config

    entry = {"modules": "*.wte", "block": [1, 2], "permute": "none"}
    third = read(Recipe, recipe(stage={"compress": [entry]}), "Recipe third")
    by_config = kf.plan(load_config(checkpoints["tqcompressor"]), third)
    again = kf.compress(students["tqcompressor"], third)
    assert by_config.cost == kf.plan(students["tqcompressor"], third, errors=False).cost
    assert by_config.held_parameters == sum(p.numel() for p in again.parameters())
    untied = read(Recipe, recipe(stage={"compress": [{**entry, "head": "untied"}]}), "Recipe untied")
    parted = kf.compress(students["tqcompressor"], untied)
    assert parted.lm_head.weight.shape == (101, 32)
    assert kf.plan(students["tqcompressor"], untied, errors=False).held_parameters == sum(
        p.numel() for p in parted.parameters()
    )


def test_an_edited_plan_is_carried_out_and_counted_anew(teacher, tmp_path):
    made = kf.plan(teacher, "tqcompressor", errors=False)
    made.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    document["rows"] = [row for row in document["rows"] if ".h.3." not in row["name"]]
    document["rows"][1]["spec"]["rank"] = 2
    (tmp_path / "plan.json").write_text(json.dumps(document))
    edited = Plan.load(tmp_path / "plan.json")
    student = kf.compress(teacher, edited)
    assert student.transformer.h[1].mlp.c_fc.a.weight.shape == (64, 16)
    assert type(student.transformer.h[3].mlp.c_fc).__name__ == "Conv1D"
    assert check_plan(edited, teacher).held_parameters == sum(p.numel() for p in student.parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no kronfold plan"),
        ("{}", "no kronfold plan.*kronfold plan MODEL"),
        ('{"schema": "kronfold/plan", "schema_version": 99}', "version 99.*up to 1"),
        ('{"schema": "kronfold/eval", "schema_version": 1}', "kronfold/eval"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, content, message):
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(RecipeError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_of_another_model_is_refused_with_all_faults(teacher):
    made = kf.plan(pico.config(n_embd=64, n_layer=6), "tqcompressor")
    with pytest.raises(RecipeError, match=r"(?s)which is unchanged.*describes a weight") as caught:
        kf.compress(teacher, made)
    assert str(caught.value).count("\n") >= 1


# --- recipes ----------------------------------------------------------------------------------------------------


def recipe(**changes) -> dict:
    entry = {"modules": "*.mlp.c_fc", "block": [1, 2]}
    stage = {"name": "one", "compress": [{**entry, **changes.pop("entry", {})}], **changes.pop("stage", {})}
    return {"name": "mine", "stages": [stage], **changes}


def test_all_schema_faults_come_at_once_with_near_names():
    bad = recipe(entry={"rnk": 2, "block": [0, 2]}, stage={"heal": {"tokens": -5, "learning_rte": 1}}, stagess=[])
    with pytest.raises(RecipeError) as caught:
        read(Recipe, bad, "Recipe mine")
    text = str(caught.value)
    for part in ("5 faults", "'rank'", "block.0", "tokens", "'learning_rate'", "'stages'"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entry": {"modules": "*.mlp.c_fcc"}}, "match nothing.*c_fc"),
        ({"entry": {"modules": "re:(("}}, "no regular expression"),
        ({"entry": {"blocks": [7]}}, r"blocks \[7\].*0 to 3"),
        ({"entry": {"blocks": []}}, "match nothing"),
        ({"entry": {"block": [1, 5]}}, "does not divide.*nearest allowed: 1, 2, 4, 8"),
        ({"entry": {"block": [1, 2], "rank": 3}}, "maximum 2"),
        ({"entry": {"structure": "kroneker"}}, "Unknown structure 'kroneker'.*'kronecker'"),
        ({"entry": {"structure": "fused"}}, "cannot be asked for.*kronecker"),
        ({"entry": {"modules": "*.wte", "block": [101, 1]}}, "one row per token"),
        ({"entry": {"modules": ["*.c_fc", "*.wte"], "blocks": "odd"}, "stage": {}}, None),
    ],
)
def test_recipes_against_a_model(changes, message):
    made = read(Recipe, recipe(**changes), "Recipe mine")
    if message is None:
        assert {row.name for row in kf.plan(pico.config(), made).rows} == {
            f"transformer.h.{i}.mlp.c_fc" for i in (1, 3)
        }
        return
    with pytest.raises(RecipeError, match=message):
        kf.plan(pico.config(), made)


def test_a_site_named_twice_in_a_stage_is_a_fault():
    entry = recipe()["stages"][0]["compress"][0]
    made = read(Recipe, recipe(stage={"compress": [entry, entry]}), "Recipe mine")
    with pytest.raises(RecipeError, match="matched by two entries"):
        kf.plan(pico.config(), made)


def test_unknown_recipe_names_the_near_one(tmp_path):
    with pytest.raises(RecipeError, match="'tqcompressor'"):
        load_recipe("tqcompresor")
    with pytest.raises(RecipeError, match="no recipe file"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe()))
    assert load_recipe(tmp_path / "mine.yaml").name == "mine"


@pytest.mark.parametrize("name", FIXED)
def test_shipped_recipes_survive_yaml_and_rescale(name):
    shipped = load_recipe(name)
    assert read(Recipe, yaml.safe_load(yaml.safe_dump(shipped.model_dump(mode="json"))), name) == shipped
    rescaled = shipped.with_heal_tokens(3000)
    healed = [stage.heal.tokens for stage in rescaled.stages if stage.heal]
    assert all(tokens == 3000 // len(healed) for tokens in healed)
    assert [bool(stage.heal) for stage in rescaled.stages] == [bool(stage.heal) for stage in shipped.stages]
    plain = shipped.without_permutations()
    assert {entry.permute for stage in plain.stages for entry in stage.compress} <= {"none"}


def test_patterns():
    views = list(sites(pico.gpt2()).values())
    assert [view.name for view in match(views, ["*.mlp.c_fc"], "odd")] == [
        f"transformer.h.{i}.mlp.c_fc" for i in (1, 3)
    ]
    assert len(match(views, ["re:.*c_attn\\.[qk]"], [0, 2])) == 4
    assert [view.name for view in match(views, ["*.wte"])] == ["transformer.wte"]


def test_the_auto_recipe_survives_yaml():
    shipped = load_recipe("auto")
    assert read(Recipe, yaml.safe_load(yaml.safe_dump(shipped.model_dump(mode="json"))), "auto") == shipped
    assert shipped.with_heal_tokens(3000).stages[0].heal.tokens == 3000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": [{"name": "a"}, {"name": "b"}]}, "reach further"),
        ({"stages": [{"name": "a", "reach": 0.9}, {"name": "b", "reach": 0.5}]}, "reach further"),
        ({"stages": [{"name": "a", "reach": 0.5}]}, "the last 1"),
        ({"stages": [{"name": "a", "layers": "alt"}]}, "no compress entries, no layers"),
        ({"auto": None}, "needs compress entries"),
        ({"auto": {"target_ratio": 1.5}}, "less than 1"),
        ({"auto": {"sequental": True}}, "unknown key.*sequential"),
    ],
)
def test_recipes_that_mix_planning_and_shapes_are_refused(changes, message):
    document = {**load_recipe("auto").model_dump(mode="json"), **changes}
    with pytest.raises(RecipeError, match=message):
        read(Recipe, document, "Recipe auto")
