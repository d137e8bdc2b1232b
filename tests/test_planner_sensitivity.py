"""Sensitivity curves against the measured divergence from the dense model."""

from __future__ import annotations

import copy

import pytest
import torch

import pico
from kronfold.base.errors import CheckpointError, DataError, RecipeError
from kronfold.models.calibrate import calibrate
from kronfold.models.linear_view import sites
from kronfold.planner.sensitivity import SiteCurve, load_curves, save_curves, sensitivity
from kronfold.structures.grouped_embedding import GroupedEmbeddingSpec, group_sizes, grouped_embedding
from kronfold.structures.low_rank import LowRankSpec, nearest_low_rank
from kronfold.structures.registry import STRUCTURES
from kronfold.structures.weighting import Weighting


@torch.no_grad()
def divergence(model, student, windows) -> float:
    """KL(model ‖ student), nats per token."""
    wanted, found = model(windows).logits.log_softmax(-1), student(windows).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def replaced(model, name: str, weight: torch.Tensor):
    """A copy of a model with nn.Linear layers, with another weight in one of them."""
    student = copy.deepcopy(model)
    with torch.no_grad():
        student.get_submodule(name).weight.copy_(weight)
    return student


@pytest.fixture(scope="module")
def measured():
    """(model, windows, statistics, curves) of a tied Llama with every structure; do not change them."""
    model = pico.family("llama-tied").double()
    windows = pico.ids(model, rows=24, length=24)
    statistics = calibrate(model, windows)
    return model, windows, statistics, sensitivity(model, statistics, ("low_rank", "kronecker"))


def test_exact_for_one_softmax_layer():
    """With the weight at 0 the prediction is uniform whatever x is: G and H are independent, K-FAC is exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    step = 1e-3 * torch.randn(9, 6, generator=generator, dtype=torch.float64)
    gradient = torch.eye(9, dtype=torch.float64) / 9 - torch.full((9, 9), 1 / 81, dtype=torch.float64)
    predicted = 0.5 * Weighting(x.T @ x / 500, gradient).squared_error(step)
    uniform = torch.full((500, 9), 1 / 9, dtype=torch.float64)
    measured = float((uniform * (uniform.log() - (x @ step.T).log_softmax(-1))).sum(-1).mean())
    assert predicted == pytest.approx(measured, rel=1e-2)


@pytest.mark.parametrize("layer", ["self_attn.o_proj", "mlp.down_proj", "mlp.up_proj"])
def test_the_measured_rise_where_the_factors_are_independent(layer):
    """One token again and again: every position has the same x, so G and H factor; the last block's errors stay in
    their own positions. What remains is the noise of the drawn targets."""
    model = pico.family("llama-tied").double()
    windows = torch.full((64, 48), 17)
    statistics = calibrate(model, windows)
    name = f"model.layers.1.{layer}"
    view = sites(model)[name]
    generator = torch.Generator().manual_seed(1)
    step = 1e-3 * torch.randn(view.shape, generator=generator, dtype=torch.float64)
    predicted = 0.5 * statistics.weighting(view, damping=0).checked(view.shape).squared_error(step)
    found = divergence(model, replaced(model, name, view.weight() + step), windows[:1])
    assert predicted == pytest.approx(found, rel=0.15)


def test_predictions_rank_sites_and_ranks_as_measured(measured):
    model, windows, statistics, curves = measured
    predicted, found = [], []
    for curve in curves:
        if curve.group is not None:
            continue
        view = sites(model)[curve.site]
        weighting = statistics.weighting(view)
        for rank in (min(view.shape) - 2, min(view.shape) - 8):
            fit = nearest_low_rank(view.weight(), LowRankSpec(*view.shape, rank), weighting)
            spent = 0.5 * weighting.checked(view.shape).squared_error(view.weight() - fit.to_dense())
            assert float(curve.losses["low_rank"][rank - 1]) == pytest.approx(spent, rel=1e-6)
            predicted.append(spent)
            found.append(divergence(model, replaced(model, curve.site, fit.to_dense()), windows))
    predicted, found = torch.tensor(predicted).log(), torch.tensor(found).log()
    ranks = torch.stack([predicted.argsort().argsort(), found.argsort().argsort()]).double()
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.8
    assert float((predicted - found).abs().median()) < 1  # within a factor of e


def test_curves_are_what_the_solvers_reach(measured):
    model, _, statistics, curves = measured
    for curve in curves:
        ranked = curve.losses["grouped_embedding" if curve.group else "low_rank"]
        assert ranked.shape == (min(curve.shape) - 1,)
        assert bool((ranked.diff() <= 0).all())
        assert 0 < float(ranked[-1]) < float(ranked[0])
        assert ("kronecker" in curve.losses) == (curve.group is None)
        by_block: dict = {}
        choices = STRUCTURES.get("kronecker").choices(curve.shape, curve.kind) if curve.group is None else []
        for spec, loss in zip(choices, curve.losses.get("kronecker", []), strict=True):
            assert float(loss) <= by_block.get(spec.b, (0, float(ranked[0]) * 10))[1] * 1.5
            assert spec.rank == by_block.get(spec.b, (0, 0))[0] + 1
            by_block[spec.b] = (spec.rank, float(loss))
    groups = [curve for curve in curves if curve.group]
    assert [curve.group[0] for curve in groups] == [sum(c.shape[0] for c in groups[:i]) for i in range(len(groups))]
    view = sites(model)[groups[0].site]
    sizes = [curve.shape[0] for curve in groups]
    weighting = statistics.weighting(view)
    fit = grouped_embedding(view.weight(), GroupedEmbeddingSpec(tuple(sizes), (9,) * len(sizes), 32), weighting)
    residual = view.weight() - fit.to_dense()
    metric = weighting.checked(view.shape).inputs
    spent = 0.5 * float((weighting.outputs[:, None] * residual * (residual @ metric)).sum())
    assert sum(float(curve.losses["grouped_embedding"][8]) for curve in groups) == pytest.approx(spent, rel=1e-6)


def test_an_untied_head_counts_its_rows_by_frequency():
    model = pico.family("llama").double()
    statistics = calibrate(model, pico.ids(model))
    curve = next(curve for curve in sensitivity(model, statistics) if curve.site == "lm_head")
    head, frequencies = model.lm_head, statistics.token_frequencies()
    fit = nearest_low_rank(head.weight, LowRankSpec(101, 32, 7), statistics.weighting(sites(model)["lm_head"]))
    residual = head.weight.detach() - fit.to_dense()
    second = statistics.input_moments("lm_head")[0].double()
    spent = 0.5 * float(torch.einsum("v,vi,ij,vj->", frequencies, residual, second, residual))
    assert float(curve.losses["low_rank"][6]) == pytest.approx(spent, rel=1e-2)  # but for the damping


@pytest.mark.parametrize("vocabulary", [1, 20, 101, 1000, 50257])
@pytest.mark.parametrize("width", [1, 32, 768])
def test_groups_of_tokens(vocabulary, width):
    sizes = group_sizes(vocabulary, width)
    assert sum(sizes) == vocabulary
    assert min(sizes) >= min(width, vocabulary)


def test_every_option_can_be_planned(measured):
    for curve in measured[3]:
        for unit in ("params", "macs", "bytes"):
            options, specs = curve.options(unit)
            assert len(options.cost) == len(options.loss) == len(specs)
            assert options.loss[0] == 0
            assert options.cost[0] == curve.dense_cost(unit)
            if curve.group is None and unit == "params":
                assert [s.held_parameters for s in specs[1:]] == options.cost[1:].tolist()
                assert all(s.shape == curve.shape for s in specs[1:])
                assert options.cost.argmax() == 0


@pytest.mark.parametrize("structures", [("low_rank",), ("kronecker",), ("low_rank", "kronecker")])
def test_saved_curves_are_the_same(structures, tmp_path):
    model = pico.gpt2(n_layer=1)
    curves = sensitivity(model, calibrate(model, pico.ids(model)), structures)
    if structures == ("kronecker",):
        curves = [curve for curve in curves if not curve.group]
        assert all(set(curve.losses) == {"kronecker"} for curve in curves)
    save_curves(curves, tmp_path / "new" / "curves")
    for found, curve in zip(load_curves(tmp_path / "new" / "curves"), curves, strict=True):
        assert {k: v for k, v in vars(found).items() if k != "losses"} == {
            k: v for k, v in vars(curve).items() if k != "losses"
        }
        assert list(found.losses) == list(curve.losses)
        assert all(torch.equal(own, curve.losses[name]) for name, own in found.losses.items())
        assert found.key == curve.key


@pytest.mark.parametrize("damage", ["missing", "json", "cut"])
def test_damaged_curves_are_refused(damage, tmp_path):
    if damage != "missing":
        save_curves([SiteCurve("a", (4, 4), losses={"low_rank": torch.zeros(3, dtype=torch.float64)})], tmp_path / "c")
    if damage == "json":
        (tmp_path / "c.json").write_text("[]")
    if damage == "cut":
        (tmp_path / "c.safetensors").write_bytes(b"12")
    with pytest.raises(CheckpointError, match="plan again"):
        load_curves(tmp_path / "c")


def test_what_cannot_be_answered(measured):
    model, windows, statistics, _ = measured
    with pytest.raises(RecipeError, match="cannot choose \\['kroneker'\\].*kronecker"):
        sensitivity(model, statistics, ("low_rank", "kroneker"))
    with pytest.raises(RecipeError, match="among no structures"):
        sensitivity(model, statistics, ())
    with pytest.raises(RecipeError, match="gradient_windows above 0"):
        sensitivity(model, calibrate(model, windows[:1], gradient_windows=0))
    with pytest.raises(DataError, match="another model"):
        sensitivity(pico.family("llama-tied", seed=1), statistics)
