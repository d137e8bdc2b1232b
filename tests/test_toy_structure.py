"""A structure that is defined here and nowhere else, taken through everything the package does with structures.

`column_shared`: neighbouring columns of a weight share one column, `W[:, j] ≈ C[:, g(j)]`. docs/architecture.md says
what adding a structure touches; the last test holds that against what this file imports.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
import report_examples
from kronfold.base.errors import InputError, RecipeError, ShapeError
from kronfold.fit.calibration import Calibration
from kronfold.fit.fit import fit_rows
from kronfold.models.calibrate import calibrate
from kronfold.models.cost import cost
from kronfold.models.linear_view import sites
from kronfold.options import read
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import Recipe
from kronfold.planner.sensitivity import load_curves, save_curves, sensitivity
from kronfold.report import page
from kronfold.report.plans import plan_table
from kronfold.structures.layer import StructuredLinear
from kronfold.structures.registry import STRUCTURES, Structure, register_structure
from kronfold.structures.weighting import Weighting, check_weight

# --- the structure ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ColumnSharedSpec:
    """A weight (out_features, in_features) of `count` different columns."""

    structure = "column_shared"
    out_features: int
    in_features: int
    count: int

    def __post_init__(self):
        if not 1 <= self.count <= self.in_features:
            raise ShapeError(f"{self.count} shared columns for {self.in_features} inputs; give 1 to {self.in_features}")

    @property
    def shape(self):
        return self.out_features, self.in_features

    @property
    def held_parameters(self):
        return self.out_features * self.count

    macs_per_token = held_parameters
    index_count = 0

    def check_weight(self, shape):
        if tuple(shape) != self.shape:
            raise ShapeError(f"column_shared describes a weight {self.shape}, but the weight is {tuple(shape)}.")

    def to_dict(self):
        return {"out_features": self.out_features, "in_features": self.in_features, "count": self.count}

    def label(self):
        return f"{self.count} columns for {self.in_features}"

    @property
    def pooling(self):
        """S (in, count): which column each input reads."""
        group = torch.arange(self.in_features) * self.count // self.in_features
        return nn.functional.one_hot(group, self.count).double()


@dataclass
class ColumnSharedFit:
    spec: ColumnSharedSpec
    shared: torch.Tensor
    relative_error: float

    def to_dense(self):
        return self.shared @ self.spec.pooling.T


def column_shared(weight, spec, weighting=None) -> ColumnSharedFit:
    """min tr((W - C Sᵀ) H (W - C Sᵀ)ᵀ) is solved by C = W H S (Sᵀ H S)⁻¹."""
    weight = check_weight(weight, spec).double()
    metric = (weighting or Weighting()).checked(spec.shape)
    moment = torch.eye(spec.in_features, dtype=torch.float64) if metric.inputs is None else metric.inputs
    pooled = moment @ spec.pooling
    shared = torch.linalg.solve(spec.pooling.T @ pooled, (weight @ pooled).T).T
    fit = ColumnSharedFit(spec, shared, 0.0)
    fit.relative_error = metric.relative_error(weight, fit.to_dense())
    return fit


class ColumnSharedLinear(StructuredLinear):
    structure = "column_shared"

    def __init__(self, spec, bias, device=None, dtype=None):
        super().__init__()
        self.spec, (self.out_features, self.in_features) = spec, spec.shape
        self.shared = nn.Parameter(torch.randn(spec.out_features, spec.count, device=device, dtype=dtype))
        self.add_bias(bias, device, dtype)

    def forward(self, x):
        return nn.functional.linear(x @ self.spec.pooling.to(x), self.shared, self.bias)

    def dense_weight(self):
        return self.shared @ self.spec.pooling.T.to(self.shared)

    @classmethod
    def from_spec(cls, spec, bias, device=None, dtype=None):
        return cls(ColumnSharedSpec(spec["out_features"], spec["in_features"], spec["count"]), bias, device, dtype)

    @classmethod
    def from_fit(cls, fit, bias=None, dtype=None, device=None):
        layer = cls(fit.spec, bias is not None, device, dtype)
        with torch.no_grad():
            layer.shared.copy_(fit.shared)
        layer.set_bias(bias)
        return layer


class ColumnShared(Structure):
    name = "column_shared"
    spec = ColumnSharedSpec
    layer = ColumnSharedLinear
    takes = ("rank",)
    planned = ("linear",)

    def ask(self, shape, entry, kind):
        if entry.get("rank") is None:
            raise RecipeError("structure column_shared needs rank: how many different columns")
        return ColumnSharedSpec(*shape, entry["rank"])

    def sizes(self, spec):
        return [replace(spec, count=count) for count in range(1, spec.in_features)]

    def fit(self, weight, spec, seed=0, weighting=None, init=None):
        return column_shared(weight, spec, weighting)

    def choices(self, shape, kind):
        return [ColumnSharedSpec(*shape, count) for count in range(2, shape[1], 6)]


def register() -> None:
    register_structure(ColumnShared())


# --- what the package does with it --------------------------------------------------------------------------------

ENTRIES = [
    {"modules": ["*.mlp.c_fc", "*.c_attn.k"], "structure": "column_shared", "rank": 12},
    {
        "modules": "*.mlp.c_proj",
        "structure": "sum",
        "terms": [{"structure": "column_shared", "rank": 16}, {"structure": "low_rank", "rank": 3}],
    },
]
RECIPE = {"name": "toy", "stages": [{"name": "one", "compress": ENTRIES}]}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register()
    yield
    STRUCTURES.unregister("column_shared")


@pytest.fixture(scope="module")
def teacher():
    return pico.gpt2(n_layer=2)


@pytest.fixture(scope="module")
def recipe():
    return read(Recipe, RECIPE, "Recipe toy")


@pytest.fixture(scope="module")
def windows(teacher):
    return pico.ids(teacher, rows=12, length=24)


@pytest.fixture(scope="module")
def statistics(teacher, windows):
    return calibrate(teacher, windows)


@torch.no_grad()
def logits(model):
    return model(pico.ids(model)).logits


def test_planned_fitted_blind_saved_and_loaded_in_a_fresh_process(teacher, recipe, tmp_path):
    made = kf.plan(teacher, recipe)
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made
    rows = [row for row in made.rows if row.structure == "column_shared"]
    assert [row.held_parameters for row in rows] == [32 * 12, 128 * 12] * 2
    assert all(0 < row.relative_error < 1 and row.relative_error_plain is None for row in made.rows)
    student = kf.compress(teacher, made)
    layer, weight = student.transformer.h[1].mlp.c_fc, teacher.transformer.h[1].mlp.c_fc.weight.T
    means = torch.stack([weight[:, layer.spec.pooling[:, g] == 1].mean(1) for g in range(12)], 1)  # the blind optimum
    torch.testing.assert_close(layer.shared, means, rtol=0, atol=1e-6)
    student.save_pretrained(tmp_path / "model")
    torch.save(logits(student), tmp_path / "logits.pt")
    assert made.cost == cost(student)
    program = (
        f"import sys, torch; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import kronfold, pico, test_toy_structure; test_toy_structure.register(); torch.set_num_threads(1)\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"expected = torch.load({str(tmp_path / 'logits.pt')!r})\n"
        "sys.exit(not torch.equal(model(pico.ids(model)).logits, expected))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(logits(kf.to_dense(student)), logits(student), rtol=0, atol=1e-5)
    other = program.replace("test_toy_structure.register();", "")
    refused = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "unknown structure 'column_shared'" in refused.stderr


def test_fitted_to_data_together_and_in_sequence(teacher, recipe, windows, statistics):
    """Each way is better, by the outputs on the text it was fitted to, than the one before it."""
    losses = []
    for calibration, sequential in ((None, False), (Calibration(windows, statistics), False),
                                    (Calibration(windows, statistics), True)):  # fmt: skip
        student = copy.deepcopy(teacher)
        rows = fit_rows(student, kf.plan(teacher, recipe, errors=False).rows, calibration, sequential=sequential)
        assert all(row.relative_error > 0 for row in rows)
        with torch.no_grad():
            losses.append(float((student(windows).logits - teacher(windows).logits).square().mean()))
    assert losses[2] < losses[1] < losses[0]


def test_the_planner_chooses_its_sizes(teacher, windows, statistics, tmp_path):
    curves = sensitivity(teacher, statistics, ("column_shared",))
    save_curves(curves, tmp_path / "curves")
    assert [list(curve.losses) for curve in load_curves(tmp_path / "curves")] == [list(c.losses) for c in curves]
    curve = next(curve for curve in curves if curve.site.endswith("1.mlp.c_fc"))
    view = sites(teacher)[curve.site]
    metric = statistics.weighting(view).checked(view.shape)
    for spec, loss in zip(curve.options("params")[1][1:], curve.losses["column_shared"], strict=True):
        fit = column_shared(view.weight(), spec, statistics.weighting(view))
        assert float(loss) == pytest.approx(0.5 * metric.squared_error(view.weight() - fit.to_dense()))
    auto = {"name": "toy-auto", "auto": {"structures": ["column_shared"]}, "stages": [{"name": "one"}]}
    budget = kf.Budget.parse(ratio=0.7)
    found = Calibration(windows, statistics)
    made = kf.plan(teacher, read(Recipe, auto, "Recipe"), found, budget=budget)
    assert {row.structure for row in made.rows} == {"column_shared", "grouped_embedding"}
    student = kf.compress(teacher, made, found)
    assert cost(student) == made.cost
    assert made.held_parameters <= 0.7 * made.teacher.held_parameters


def test_the_commands(call, recipe, tmp_path):
    """plan, compress, compress --stream, inspect: tables and documents."""
    model = pico.model_directory(tmp_path / "model", n_layer=2)
    (tmp_path / "toy.yaml").write_text(json.dumps(RECIPE))
    code, out, _ = call("plan", model, "-r", tmp_path / "toy.yaml")
    assert code == 0
    assert "column_shared" in out
    for way in ((), ("--stream",)):
        place = tmp_path / f"out{len(way)}"
        code, out, _ = call("compress", model, "-r", tmp_path / "toy.yaml", "-o", place, "--json", *way)
        assert code == 0
        assert json.loads(out)["stages"][0]["rows"][0]["label"] == "12 columns for 32"
    whole, streamed = (AutoModelForCausalLM.from_pretrained(tmp_path / f"out{n}") for n in (0, 1))
    assert torch.equal(logits(whole), logits(streamed))
    code, out, _ = call("inspect", tmp_path / "out1", "--json")
    modules = json.loads(out)["modules"]
    assert modules["transformer.h.1.mlp.c_fc"] == {
        "structure": "column_shared", "out_features": 128, "in_features": 32, "count": 12
    }  # fmt: skip
    assert modules["transformer.h.0.attn.c_attn"]["parts"]["k"]["structure"] == "column_shared"
    assert "column_shared" in call("inspect", tmp_path / "out1")[1]


def test_the_report(teacher, recipe):
    made = kf.plan(teacher, recipe)
    document = report_examples.run_document()
    for stage in document["stages"]:
        stage["rows"] = [row.to_dict() for row in made.rows]
    shown = page.render(document)
    for row in made.rows:
        assert row.label in shown
    from rich.console import Console

    console = Console(record=True, width=160, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_table(made.to_dict()))
    assert "12 columns for 32" in console.export_text()


def test_what_does_not_fit_is_refused(teacher):
    def asked(**entry):
        content = {"name": "toy", "stages": [{"name": "one", "compress": [entry]}]}
        return kf.plan(teacher, read(Recipe, content, "Recipe"), errors=False)

    with pytest.raises(RecipeError, match="needs rank: how many"):
        asked(modules="*.c_fc", structure="column_shared")
    with pytest.raises(RecipeError, match="33 shared columns for 32 inputs"):
        asked(modules="*.c_fc", structure="column_shared", rank=33)
    with pytest.raises(RecipeError, match="'column_shared' cannot replace an embedding; use kronecker"):
        asked(modules="*.wte", structure="column_shared", rank=3)
    with pytest.raises(RecipeError, match="Did you mean 'column_shared'"):
        asked(modules="*.c_fc", structure="colum_shared", rank=3)
    with pytest.raises(RecipeError, match="init belongs to structure kronecker, not to column_shared"):
        asked(modules="*.c_fc", structure="column_shared", rank=3, init="pruning")
    with pytest.raises(InputError, match="registered already"):
        register()
    with pytest.raises(InputError, match="does not say its spec, layer"):
        register_structure(type("Nothing", (Structure,), {"name": "nothing"})())


def test_the_list_of_what_a_structure_touches():
    """docs/architecture.md names the files of the room that a structure is written against: those imported here."""
    root = Path(__file__).parent.parent
    tree = ast.parse(Path(__file__).read_text())
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
    used = {name.replace(".", "/") + ".py" for name in imported if name.startswith("kronfold.structures.")}
    text = (root / "docs" / "architecture.md").read_text()
    (entry,) = re.findall(r"^- A structure:.*?(?=^- A )", text, flags=re.S | re.M)
    assert {f"kronfold/{name}" for name in re.findall(r"`(structures/\w+\.py)`", entry)} == used
    sources = [path for path in (root / "src").rglob("*.py") if "column_shared" in path.read_text()]
    assert sources == []
