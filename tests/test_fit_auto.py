"""The auto recipe from text to checkpoint: budgets met, checkpoints equal, plans editable, errors before any change."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base.errors import DataError, InputError, RecipeError
from kronfold.cli.main import main
from kronfold.models.cost import cost, held_parameters
from kronfold.planner.budget import Budget
from kronfold.planner.plan import Plan


def windows(model, count: int = 6, length: int = 24) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (count, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama-tied", "qwen2"])
def test_a_budget_is_met_and_the_checkpoint_loads(family, tmp_path):
    model = pico.family(family)
    text = windows(model)
    budget = Budget.parse(ratio=0.7)
    made = kf.plan(model, "auto", text, budget=budget)
    student = kf.compress(model, made, text)
    assert held_parameters(student) == made.held_parameters
    assert 0.98 * 0.7 < made.held_parameters / made.teacher.held_parameters <= 0.7
    student.save_pretrained(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = pico.ids(model)
    kept = loaded.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in student.state_dict().items())
    # weights read from a file may lie elsewhere in memory, where a product rounds differently
    torch.testing.assert_close(loaded(ids).logits, student.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    assert held_parameters(loaded) == made.held_parameters
    assert torch.allclose(kf.to_dense(student)(ids).logits, student(ids).logits, atol=1e-4)


@pytest.mark.parametrize("structures", [["low_rank"], ["kronecker"], ["low_rank", "kronecker"]])
def test_structures_the_planner_may_choose(structures):
    recipe = _auto(structures=structures)
    model = pico.gpt2()
    made = kf.plan(model, recipe, windows(model), budget=Budget.parse(ratio=0.75))
    chosen = {row.structure for row in made.rows} - {"grouped_embedding"}
    assert chosen <= set(structures)
    assert chosen


def _auto(**changes):
    from kronfold.planner.recipe import load_recipe

    recipe = load_recipe("auto")
    return recipe.model_copy(update={"auto": recipe.auto.model_copy(update=changes)})


@pytest.mark.parametrize("sequential", [False, True])
def test_data_beats_weights_alone_at_the_same_specs(sequential):
    """The outputs on the calibration text are nearer to the teacher's than those of a fit that saw no text."""
    model = pico.gpt2()
    text = windows(model, 16)
    recipe = _auto(sequential=sequential)
    made = kf.plan(model, recipe, text, budget=Budget.parse(ratio=0.6))
    with torch.no_grad():
        teacher = model(text).logits.log_softmax(-1)

        def divergence(student) -> float:
            return float((teacher.exp() * (teacher - student.eval()(text).logits.log_softmax(-1))).sum(-1).mean())

        seen, blind = kf.compress(model, recipe, text, budget=Budget.parse(ratio=0.6)), kf.compress(model, made)
        assert divergence(seen) < divergence(blind)


def test_edited_plans_are_carried_out(tmp_path):
    model = pico.gpt2()
    made = kf.plan(model, "auto", windows(model), budget=Budget.parse(ratio=0.7))
    made.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    gone = next(row for row in document["rows"] if row["structure"] == "low_rank")
    document["rows"].remove(gone)
    (tmp_path / "edited.json").write_text(json.dumps(document))
    edited = Plan.load(tmp_path / "edited.json")
    student = kf.compress(model, edited, windows(model))
    saved = gone["teacher_parameters"] - gone["held_parameters"]
    assert held_parameters(student) == made.held_parameters + saved


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"budget": Budget("params", 10)}, InputError, "below the floor"),
        ({"budget": Budget("params", 1e9)}, InputError, "nothing to compress"),
        ({"calibration": None}, InputError, "needs calibration text"),
        ({"calibration": torch.zeros(0, 8, dtype=torch.long)}, DataError, "at least 2 tokens"),
        ({"calibration": torch.full((2, 8), 10**6)}, InputError, "the model knows"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments, error, message):
    model = pico.gpt2()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error, match=message):
        kf.compress(model, "auto", **{"calibration": windows(model), **arguments})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_refusals():
    model = pico.gpt2()
    with pytest.raises(RecipeError, match="fixed shapes"):
        kf.plan(model, "tqcompressor", budget=Budget.parse(ratio=0.5))
    with pytest.raises(InputError, match="only a config"):
        kf.plan(model.config, "auto", windows(model))
    student = kf.compress(model, "auto", windows(model))
    with pytest.raises(RecipeError, match="starts from a dense model"):
        kf.plan(student, "auto", windows(model))


def test_statistics_of_another_model_are_refused():
    from kronfold.fit.fit import calibrate_on
    from kronfold.planner.recipe import AutoRecipe

    model = pico.gpt2()
    found = calibrate_on(model, None, windows(model), AutoRecipe())
    with pytest.raises(DataError, match="another model"):
        kf.compress(pico.gpt2(seed=1), "auto", found)


def test_the_cache_is_used_and_a_damaged_entry_replaced(tmp_path):
    model = pico.gpt2()
    seen: list[str] = []
    arguments = {"budget": Budget.parse(ratio=0.7), "cache": tmp_path}

    def plan() -> dict:
        seen.clear()
        return kf.plan(
            model, "auto", windows(model), **arguments, progress=lambda what, done, total: seen.append(what)
        ).to_dict()["rows"]

    first = plan()
    assert any(what.startswith("calibrate") for what in seen)
    assert plan() == first
    assert not seen
    entry = next((tmp_path / "calibration").iterdir())
    flipped = (entry / "moments.safetensors").read_bytes()
    (entry / "statistics.json").write_text("{")
    assert plan() == first
    assert any(what.startswith("calibrate") for what in seen)
    middle = len(flipped) // 2
    (entry / "moments.safetensors").write_bytes(flipped[:middle] + bytes([flipped[middle] ^ 1]) + flipped[middle + 1 :])
    assert plan() == first
    assert any(what.startswith("calibrate") for what in seen)
    for curves in entry.glob("curves-*"):
        content = curves.read_bytes()
        curves.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert plan() == first
        assert seen  # the curves are made anew, the calibration is not
        assert not any(what.startswith("calibrate") for what in seen)
    assert plan() == first
    assert not seen


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    """0.3: an internal error after all the calibration."""
    model = pico.gpt2()
    (tmp_path / "cache").write_text("a file where the directory should be")
    arguments = (model, "auto", windows(model))
    expected = kf.plan(*arguments, budget=Budget.parse(ratio=0.7)).to_dict()["rows"]
    found = kf.plan(*arguments, budget=Budget.parse(ratio=0.7), cache=tmp_path / "cache")
    assert found.to_dict()["rows"] == expected
    assert "The calibration is not kept for the next time" in caplog.text


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONFOLD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(pico.TEXT * 60)
    return pico.model_directory(tmp_path / "model"), tmp_path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_commands(files, capsys):
    model, place = files
    data = ("--calibration", place / "text.txt", "--calibration-windows", 8)
    for name, ratio in (("a", 0.7), ("b", 0.6)):
        assert run("plan", model, "--target-ratio", ratio, *data, "-o", place / f"{name}.json") == 0
    out = capsys.readouterr().out
    assert "by kind of matrix" in out
    assert "Predicted loss increase" in " ".join(out.split())
    assert run("plan", "--diff", place / "a.json", place / "b.json", "--json") == 0
    difference = json.loads(capsys.readouterr().out)
    assert difference["rows"]
    assert difference["a"]["held_parameters"] > difference["b"]["held_parameters"]
    assert run("compress", model, "--plan", place / "a.json", *data, "-o", place / "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    planned = json.loads((place / "a.json").read_text())
    assert document["held_parameters"] == planned["held_parameters"]
    assert document["calibration"]["windows"] == 8


def test_run_heals_a_planned_model(files, capsys):
    model, place = files
    text = place / "text.txt"
    options = ("--train-text", text, "--eval-text", text, "--heal-tokens", 512, "--calibration", text)
    recipe = place / "mine.yaml"
    recipe.write_text(
        "name: mine\nauto: {target_ratio: 0.7, windows: 8, gradient_windows: 4}\n"
        "stages: [{name: only, heal: {tokens: 512, batch_size: 4}}]\n"
    )
    assert run("run", model, "-r", recipe, *options, "--controls", "dense", "-o", place / "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["held_parameters"] <= 0.7 * document["teacher"]["held_parameters"]
    assert document["data"]["calibration"]["windows"] == 8
    assert document["budget"]["predicted_loss"] > 0
    loaded = AutoModelForCausalLM.from_pretrained(place / "out")
    assert held_parameters(loaded) == document["held_parameters"]


def test_shrink_heal_shrink(files, capsys):
    """In two stages: the first goes half of the way, the second plans anew from what was healed."""
    model, place = files
    text, recipe = place / "text.txt", place / "staged.yaml"
    recipe.write_text(
        "name: staged\nauto: {windows: 8, gradient_windows: 4}\nstages:\n"
        "  - {name: half, reach: 0.5, heal: {tokens: 512, batch_size: 4}}\n"
        "  - {name: whole, heal: {tokens: 512, batch_size: 4}}\n"
    )
    options = ("--train-text", text, "--eval-text", text, "--target-ratio", 0.6, "--controls", "none")
    assert run("run", model, "-r", recipe, *options, "-o", place / "out", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    dense = document["teacher"]["held_parameters"]
    half, whole = document["stages"]
    assert 0.77 * dense < half["held_parameters"] <= 0.8 * dense
    assert 0.57 * dense < whole["held_parameters"] <= 0.6 * dense
    assert [stage["tokens"] for stage in document["stages"]] == [512, 512]
    planned = json.loads((place / "out" / "plan.json").read_text())["rows"]
    assert {row["stage"] for row in planned} == {"whole"}
    assert [row["spec"] for row in whole["rows"]] != [row["spec"] for row in planned]  # another model, another plan
    loaded = AutoModelForCausalLM.from_pretrained(place / "out")
    assert held_parameters(loaded) == document["held_parameters"] == whole["held_parameters"]


def test_budgets_on_the_way():
    dense = cost(pico.gpt2())
    for budget in (Budget("params", ratio=0.5), Budget("params", 0.5 * dense.held_parameters)):
        assert budget.on_the_way(dense, 0.5).amount == pytest.approx(0.75 * dense.held_parameters)
        assert budget.on_the_way(dense, 1.0).amount == pytest.approx(0.5 * dense.held_parameters)
    assert Budget("macs", 0.5 * dense.macs_per_token).on_the_way(dense, 0.2).amount == pytest.approx(
        0.9 * dense.macs_per_token
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-ratio", "0.5", "--target-params", "1M"), "one budget"),
        (("--target-ratio", "1.5"), "between 0 and 1"),
        (("--target-params", "many"), "no number"),
        (("--target-params", "10"), "below the floor"),
        (("--target-ratio", "0.7", "--structures", "lowrank"), "low_rank"),
        (("--target-ratio", "0.7", "--calibration-windows", "9999"), "windows of"),
    ],
)
def test_commands_that_cannot_be_carried_out(files, capsys, arguments, message):
    model, place = files
    windows_given = () if "--calibration-windows" in arguments else ("--calibration-windows", 8)
    code = run("plan", model, *arguments, "--calibration", place / "text.txt", *windows_given)
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())
