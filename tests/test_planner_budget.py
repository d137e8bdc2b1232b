"""Plans that meet a budget: counted on the skeleton, saved, edited, carried out."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import kronfold as kf
import pico
from kronfold.base.errors import InputError, RecipeError
from kronfold.models.cost import cost
from kronfold.models.linear_view import sites
from kronfold.planner.budget import Budget, plan_for_budget
from kronfold.planner.plan import Plan
from kronfold.planner.planning import check_plan, skeleton_of
from kronfold.planner.recipe import load_recipe
from kronfold.planner.sensitivity import SiteCurve
from kronfold.structures.grouped_embedding import group_sizes
from kronfold.structures.registry import STRUCTURES

COUNTED = {"params": "held_parameters", "macs": "macs_per_token", "bytes": "bytes_fp16"}
LLAMA = {
    "vocab_size": 2000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config,
    "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True, mlp_bias=True),
}


def falling(size: int, slope: float, scale: float) -> torch.Tensor:
    """Energies at rank 0 .. size of singular values that fall by a power law."""
    parts = torch.arange(1, size + 1, dtype=torch.float64) ** -slope * scale
    return torch.cat([parts.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])


def curves_of(config, kronecker: bool = False) -> list[SiteCurve]:
    """Synthetic curves for every site of a config, of scattered size and slope."""
    chooser = torch.Generator().manual_seed(4)
    skeleton = skeleton_of(config)
    tied = skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight
    curves = []
    for view in sites(skeleton).values():

        def draw(low, high):
            return low + (high - low) * float(torch.rand(1, generator=chooser))

        if view.kind == "embedding":
            start = 0
            for size in group_sizes(*view.shape):
                energies = falling(view.shape[1], draw(0.3, 1.5), draw(1e-3, 1e-1))
                losses = {"grouped_embedding": energies[1 : min(size, view.shape[1])]}
                curves.append(SiteCurve(view.name, (size, view.shape[1]), (start, size), tied, losses))
                start += size
            continue
        losses = {}
        if kronecker:
            block = (2 - view.shape[0] % 2, 2)
            drawn = {(block, rank): draw(1e-6, 1e-2) for rank in range(1, 2 * block[0])}
            choices = STRUCTURES.get("kronecker").choices(view.shape, "linear")
            points = [drawn.get((spec.b, spec.rank), 1e3) for spec in choices]  # any other costs too much
            losses["kronecker"] = torch.tensor(points, dtype=torch.float64)
        losses["low_rank"] = falling(min(view.shape), draw(0.3, 2), draw(1e-3, 1))[1 : min(view.shape)]
        curves.append(SiteCurve(view.name, view.shape, losses=losses))
    return curves


@pytest.fixture(scope="module")
def prepared():
    """name -> (config, curves, dense cost); do not change them."""
    made = {name: build() for name, build in CONFIGS.items()}
    return {name: (c, curves_of(c, kronecker=name == "llama-tied"), cost(skeleton_of(c))) for name, c in made.items()}


MINE = load_recipe("auto").model_copy(update={"name": "mine"})


def arithmetic(plan: Plan, curves, dense, unit: str) -> float:
    """Cost of a plan by the options' own numbers, from the rows alone."""
    total = float(getattr(dense, COUNTED[unit]))
    rows = {row.name: row.spec for row in plan.rows}
    for curve in curves:
        if curve.site not in rows:
            continue
        options, specs = curve.options(unit)
        spec = rows[curve.site]
        if curve.group is None:
            index = specs.index(spec)
        else:
            start = 0
            for size, rank in zip(spec.sizes, spec.ranks, strict=True):
                if start <= curve.group[0] < start + size:
                    index = next((i for i, s in enumerate(specs) if s is not None and s.ranks == (rank,)), 0)
                    assert index > 0 or rank == curve.shape[1]
                start += size
            total += curve.place_cost(unit)
        total += options.cost[index] - curve.dense_cost(unit)
    return total - (absorbed_bytes(plan) if unit == "bytes" else 0)


def absorbed_bytes(plan: Plan) -> int:
    """Gathers that the planner reckoned with and that absorption then does away with, four bytes an output."""
    remaining = set(plan.gathers["remaining"])
    low_rank = [row for row in plan.rows if row.structure == "low_rank"]
    return sum(4 * row.spec.out_features for row in low_rank if f"{row.name}.gather_out" not in remaining)


@pytest.mark.parametrize("share", [0.5, 0.85])
@pytest.mark.parametrize("unit", ["params", "macs", "bytes"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_budget_is_met_from_below_and_counted_right(name, unit, share, prepared):
    config, curves, dense = prepared[name]
    whole = getattr(dense, COUNTED[unit])
    plan = plan_for_budget(config, curves, Budget(unit, share * whole))
    counted = getattr(plan.cost, COUNTED[unit])
    # A few Kronecker shapes beside the ranks leave what they do not need.
    slack = 0.02 if name == "llama-tied" else 0.002
    given_back = absorbed_bytes(plan) if unit == "bytes" else 0
    assert (1 - slack) * share * whole - given_back <= counted <= share * whole
    assert counted == plan.budget["met_by"] == getattr(check_plan(plan, config), COUNTED[unit])
    assert plan.teacher == dense
    structures = {row.structure for row in plan.rows}
    assert structures >= ({"kronecker"} if name == "llama-tied" else {"low_rank"})
    for other in COUNTED:
        assert arithmetic(plan, curves, dense, other) == getattr(plan.cost, COUNTED[other])
    losses = sum(row.predicted_loss for row in plan.rows)
    assert losses == pytest.approx(plan.budget["predicted_loss"], rel=1e-9)
    assert set(plan.budget["left_dense"]) == {curve.site for curve in curves} - {row.name for row in plan.rows}
    assert plan.budget["optimality_gap"] <= 0.15 * plan.budget["predicted_loss"]


def test_a_ratio_is_a_share_of_the_held_parameters(prepared):
    config, curves, dense = prepared["gpt2"]
    by_ratio = plan_for_budget(config, curves, Budget.parse(ratio=0.65))
    by_number = plan_for_budget(config, curves, Budget("params", 0.65 * dense.held_parameters))
    assert by_ratio.to_dict() == by_number.to_dict()
    assert 0.648 * dense.held_parameters <= by_ratio.held_parameters <= 0.65 * dense.held_parameters


def test_a_generous_budget_in_bytes_holds_no_places_for_nothing(prepared):
    config, curves, dense = prepared["llama-tied"]
    plan = plan_for_budget(config, curves, Budget("bytes", 0.99 * dense.bytes_fp16))
    embedding = [row for row in plan.rows if row.structure == "grouped_embedding"]
    for row in embedding:
        assert min(row.spec.ranks) < row.spec.embedding_dim
    assert plan.cost.bytes_fp16 <= 0.99 * dense.bytes_fp16
    # An embedding that cannot pay for its places stays as it is.
    dear = [
        dataclasses.replace(c, losses={name: own * (1e9 if c.group else 1) for name, own in c.losses.items()})
        for c in curves
    ]
    plan = plan_for_budget(config, dear, Budget("bytes", 0.9 * dense.bytes_fp16))
    assert not [row for row in plan.rows if row.structure == "grouped_embedding"]
    assert arithmetic(plan, dear, dense, "bytes") == plan.cost.bytes_fp16


def test_saved_edited_and_read_again(prepared, tmp_path):
    config, curves, dense = prepared["llama-tied"]
    plan = plan_for_budget(config, curves, Budget("params", 0.6 * dense.held_parameters), recipe=MINE)
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.budget == plan.budget
    content = json.loads((tmp_path / "plan.json").read_text())
    assert all(row["why"] and row["predicted_loss"] >= 0 for row in content["rows"])
    row = next(row for row in content["rows"] if row["structure"] == "low_rank")
    saved = row["spec"]["rank"] * (row["spec"]["out_features"] + row["spec"]["in_features"] - row["spec"]["rank"])
    row["spec"]["rank"] = 1
    (tmp_path / "plan.json").write_text(json.dumps(content))
    edited = check_plan(Plan.load(tmp_path / "plan.json"), config)
    fewer = saved - (row["spec"]["out_features"] + row["spec"]["in_features"] - 1)
    assert edited.held_parameters == plan.held_parameters - fewer
    row["spec"]["rank"] = 10_000
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match="Rank 10000"):
        check_plan(Plan.load(tmp_path / "plan.json"), config)


@pytest.mark.parametrize(
    ("given", "unit", "amount"),
    [
        ({"params": "81M"}, "params", 81e6),
        ({"params": "81_000_000"}, "params", 81e6),
        ({"params": "81,000,000"}, "params", 81e6),
        ({"params": "1.5e6"}, "params", 1.5e6),
        ({"params": "0.5B"}, "params", 5e8),
        ({"macs": " 60 m "}, "macs", 60e6),
        ({"bytes_": "160MB"}, "bytes", 160e6),
        ({"bytes_": "160MiB"}, "bytes", 160 * 2**20),
        ({"bytes_": "1000B"}, "bytes", 1000),
        ({"bytes_": "2G"}, "bytes", 2e9),
    ],
)
def test_amounts_as_people_write_them(given, unit, amount):
    assert Budget.parse(**given) == Budget(unit, amount)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "Give one budget"),
        ({"params": "8M", "ratio": 0.5}, "Give one budget"),
        ({"params": "8M", "macs": "8M"}, "Give one budget"),
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"ratio": 1.0}, "between 0 and 1"),
        ({"params": "many"}, "--target-params 'many' is no number"),
        ({"params": "-5M"}, "is no number"),
        ({"params": "8MB"}, "for example 81M"),
        ({"bytes_": "8 parsecs"}, "for example 160MB"),
    ],
)
def test_budgets_that_cannot_be_read(given, said):
    with pytest.raises(InputError, match=said):
        Budget.parse(**given)


@pytest.mark.parametrize("unit", COUNTED)
def test_too_much_and_too_little(unit, prepared):
    config, curves, dense = prepared["llama-tied"]
    whole = getattr(dense, COUNTED[unit])
    with pytest.raises(InputError, match="nothing to compress"):
        plan_for_budget(config, curves, Budget(unit, whole))
    with pytest.raises(InputError, match="below the floor of this model, [0-9,]+:") as caught:
        plan_for_budget(config, curves, Budget(unit, 10))
    floor = float(str(caught.value).split("floor of this model, ")[1].split(":")[0].replace(",", ""))
    plan = plan_for_budget(config, curves, Budget(unit, floor))
    assert plan.budget["floor"] == floor
    assert getattr(plan.cost, COUNTED[unit]) == floor - (absorbed_bytes(plan) if unit == "bytes" else 0)
    with pytest.raises(InputError, match="below the floor"):
        plan_for_budget(config, curves, Budget(unit, floor - 1))


@pytest.mark.parametrize("change", ["site", "shape", "vocabulary", "width", "gap", "none"])
def test_curves_of_another_model_are_refused(change, prepared):
    config, curves, dense = prepared["llama-tied"]
    groups = [curve for curve in curves if curve.group]
    linear = [curve for curve in curves if not curve.group]
    if change == "site":
        linear[0] = dataclasses.replace(linear[0], site="model.layers.99.mlp.up_proj")
    elif change == "shape":
        linear[0] = dataclasses.replace(linear[0], shape=(4, 4))
    elif change == "vocabulary":
        groups.pop()
    elif change == "gap":
        groups.pop(0)
    elif change == "width":
        groups = [dataclasses.replace(curve, shape=(curve.shape[0], 64)) for curve in groups]
    changed = [] if change == "none" else groups + linear
    with pytest.raises(RecipeError, match="another model"):
        plan_for_budget(config, changed, Budget("params", 0.6 * dense.held_parameters))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied"])
def test_a_plan_carried_out_holds_what_it_says(name, tmp_path):
    model = pico.family(name)
    curves = curves_of(model.config, kronecker=True)
    dense = cost(model)
    plan = plan_for_budget(model, curves, Budget("params", 0.7 * dense.held_parameters))
    student = kf.compress(model, plan)
    assert cost(student) == plan.cost
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert cost(loaded) == plan.cost
    windows = pico.ids(model)
    with torch.no_grad():
        assert torch.equal(loaded(windows).logits, student(windows).logits)
    # A second plan for what is left dense keeps the count right on a model that is partly structured.
    left = [curve for curve in curves if curve.site in plan.budget["left_dense"]]
    if left:
        with pytest.raises(RecipeError, match="no dense"):
            plan_for_budget(student, curves, Budget("params", 0.9 * cost(student).held_parameters))
