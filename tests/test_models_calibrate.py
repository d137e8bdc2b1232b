"""Calibration against naive twins: everything stored, then multiplied out in float64."""

from __future__ import annotations

import copy

import pytest
import torch

import pico
from kronfold.base.errors import CheckpointError, DataError, InputError
from kronfold.base.specs import GroupedEmbeddingSpec, LowRankSpec
from kronfold.decompose.grouped_embedding import grouped_embedding
from kronfold.decompose.low_rank import nearest_low_rank
from kronfold.models.calibrate import calibrate, fingerprint
from kronfold.models.linear_view import sites
from kronfold.models.statistics import MomentFiles, Statistics
from kronfold.models.surgery import build_skeleton
from kronfold.structures.kronecker import KroneckerSpec, nearest_kronecker

FAMILIES = ("gpt2", "llama", "llama-tied")


def model_of(name: str):
    return pico.family(name).double()


@pytest.fixture(scope="module", params=FAMILIES)
def measured(request):
    """(model, windows, statistics) of a family; do not change them."""
    model = model_of(request.param)
    windows = pico.ids(model, rows=5, length=12)
    return model, windows, calibrate(model, windows, gradient_windows=3, seed=7)


def naive(model, windows, gradient_windows: int, seed: int):
    """Inputs of every layer, output gradients of every layer and of the embedding, one token at a time where drawn."""
    modules = {view.module_name: view.module for view in sites(model).values()}
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    probabilities, hidden = [], []
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            inputs[name].append(args[0].detach().reshape(-1, args[0].shape[-1]))
            outputs[name] = output

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    handles.append(
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: hidden.append(args[0][0].detach()))
    )
    for i, window in enumerate(windows):
        logits = model(input_ids=window[None], use_cache=False).logits[0]
        probabilities.append(logits.detach().softmax(-1))
        if i >= gradient_windows:
            continue
        drawn = torch.multinomial(logits.detach().float().softmax(-1), 1, generator=generator)[:, 0]
        names = list(outputs)
        # One loss per token; their gradients at every position add up before the outer product is taken.
        total = [torch.zeros_like(outputs[name]) for name in names]
        for t, target in enumerate(drawn):
            loss = -logits[t].log_softmax(-1)[target]
            found = torch.autograd.grad(loss, [outputs[name] for name in names], retain_graph=True)
            total = [a + b for a, b in zip(total, found, strict=True)]
        for name, gradient in zip(names, total, strict=True):
            gradients[name].append(gradient[0])
    for handle in handles:
        handle.remove()
    joined = {name: torch.cat(kept) for name, kept in inputs.items()}
    return joined, {n: torch.cat(g) for n, g in gradients.items()}, torch.cat(probabilities), torch.cat(hidden)


def close(found, wanted, tolerance: float = 1e-5):
    scale = float(wanted.abs().max())
    assert float((found.double() - wanted).abs().max()) <= tolerance * scale


def test_moments_equal_those_of_stored_activations(measured):
    model, windows, statistics = measured
    inputs, gradients, probabilities, hidden = naive(model, windows, 3, 7)
    embedding = next(view for view in sites(model).values() if view.kind == "embedding").module_name
    for view in sites(model).values():
        if view.kind == "embedding":
            continue
        x = inputs[view.module_name]
        second, first = statistics.input_moments(view.module_name)
        close(second, x.T @ x / len(x))
        close(first, x.mean(0))
        weighting = statistics.weighting(view)
        assert weighting.inputs is not None
        centre = 0 if view.bias() is None else x.mean(0)
        close(weighting.inputs, (x - centre).T @ (x - centre) / len(x))
        if view.role == "head":
            assert torch.equal(weighting.outputs, statistics.token_frequencies())
        else:
            g = gradients[view.module_name][:, view.rows[0] : view.rows[1]]
            close(weighting.outputs, g.T @ g / len(g))
    close(statistics.tensors["predicted"] / statistics.tokens, probabilities.mean(0))
    metric = gradients[embedding].T @ gradients[embedding] / len(gradients[embedding])
    if statistics.tied:
        metric = metric + hidden.T @ hidden / len(hidden)
    close(statistics.column_metric(), metric)


def test_counts_and_frequencies(measured):
    model, _, statistics = measured
    assert (statistics.tokens, statistics.gradient_tokens) == (60, 36)
    assert statistics.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    frequencies = statistics.token_frequencies()
    assert float(frequencies.sum()) == pytest.approx(1, abs=1e-12)
    predicted = statistics.tensors["predicted"].double()
    assert torch.allclose(statistics.token_frequencies(prior=0), predicted / predicted.sum())
    zipf = statistics.token_frequencies(prior=1)
    assert torch.equal(zipf, zipf.sort(descending=True).values)


def test_layers_with_the_same_input_share_an_entry():
    model = model_of("llama")
    statistics = calibrate(model, pico.ids(model), gradient_windows=0)
    block = "model.layers.1."
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({statistics.reads[block + name] for name in names}) == 1
    keys = set(statistics.reads.values())
    assert len(keys) == 2 * 4 + 1  # per block: normed twice, heads' values, hidden units; and the untied head
    assert {name for name in statistics.tensors if name.startswith("input/")} == {
        f"input/{key}/{which}" for key in keys for which in ("first", "second")
    }
    assert not any(name.startswith("output/") for name in statistics.tensors)


def test_groups_of_blocks_give_the_same_and_leave_nothing_stale(tmp_path):
    model = model_of("llama-tied")
    windows = pico.ids(model, rows=3)
    whole = calibrate(model, windows)
    for blocks in (1, 2):  # the second run leaves fewer files than the first
        parts = calibrate(model, windows, blocks_per_pass=blocks, directory=tmp_path / "sums")
        assert len(list((tmp_path / "sums").glob("moments-*"))) == 2 // blocks
        for found in (parts, Statistics.load(tmp_path / "sums")):
            assert set(found.tensors) == set(whole.tensors)
            assert found.reads == whole.reads
            assert found.header() == whole.header()
            for name, tensor in whole.tensors.items():
                torch.testing.assert_close(found.tensors[name], tensor)
    other = calibrate(model, windows[:1], blocks_per_pass=2, directory=tmp_path / "sums")
    assert other.tokens == windows.shape[1]
    torch.testing.assert_close(other.tensors["head"], calibrate(model, windows[:1]).tensors["head"])


def test_save_and_load(measured, tmp_path):
    statistics = measured[2].with_about(note="kept")
    statistics.save(tmp_path / "saved")
    loaded = Statistics.load(tmp_path / "saved")
    assert isinstance(loaded.tensors, MomentFiles)
    assert len(loaded.tensors) == len(statistics.tensors)
    assert loaded.header() == statistics.header()
    assert loaded.about["note"] == "kept"
    assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in statistics.tensors.items())
    loaded.save(tmp_path / "saved", overwrite=True)  # reads from the place it writes to
    again = Statistics.load(tmp_path / "saved")
    assert torch.equal(again.tensors["predicted"], statistics.tensors["predicted"])


@pytest.mark.parametrize("damage", ["header", "schema", "newer", "moments", "cut"])
def test_damaged_statistics_are_refused(damage, tmp_path):
    model = pico.family("gpt2")
    calibrate(model, pico.ids(model)).save(tmp_path / "s")
    header, moments = tmp_path / "s" / "statistics.json", tmp_path / "s" / "moments.safetensors"
    if damage == "header":
        header.write_text("[]")
    elif damage == "moments":
        moments.unlink()
    elif damage == "cut":
        moments.write_bytes(moments.read_bytes()[:1000])
    else:
        old, new = {"schema": ("kronfold/statistics", "other"), "newer": ('version": 1', 'version": 99')}[damage]
        header.write_text(header.read_text().replace(old, new))
    with pytest.raises(CheckpointError, match="Calibrate again"):
        Statistics.load(tmp_path / "s")


def test_the_model_is_as_it_was():
    model = pico.gpt2(attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3, n_layer=2).double()
    windows = pico.ids(model)
    quiet = calibrate(model, windows)
    model.train()
    model.transformer.h[0].eval()  # a mixture of modes comes back as it was
    frozen = model.transformer.wpe.weight
    frozen.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    statistics = calibrate(model, windows)
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in quiet.tensors.items():  # without dropout
        assert torch.equal(statistics.tensors[name], tensor)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad == (p is not frozen) and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_model_is_as_it_was_after_a_failure():
    model = pico.gpt2(n_layer=1)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    model.train()
    with pytest.raises(InputError, match="NaN or infinite logits"):
        calibrate(model, pico.ids(model))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("windows", "options", "error", "said"),
    [
        (torch.zeros(0, 8, dtype=torch.long), {}, DataError, "at least 2 tokens"),
        (torch.zeros(3, 1, dtype=torch.long), {}, DataError, "at least 2 tokens"),
        (torch.zeros(8, dtype=torch.long), {}, DataError, "at least 2 tokens"),
        (torch.full((1, 8), 101), {}, InputError, "0 to 100"),
        (torch.full((1, 8), -1), {}, InputError, "0 to 100"),
        (torch.zeros(1, 65, dtype=torch.long), {}, InputError, "64"),
        (torch.zeros(1, 8, dtype=torch.long), {"blocks_per_pass": 1}, InputError, "directory"),
        (torch.zeros(1, 8, dtype=torch.long), {"blocks_per_pass": 0, "directory": "x"}, InputError, "at least 1"),
        (torch.zeros(1, 8, dtype=torch.long), {"gradient_windows": -1}, InputError, "gradient_windows"),
    ],
)
def test_impossible_requests(windows, options, error, said):
    with pytest.raises(error, match=said):
        calibrate(pico.gpt2(n_layer=1), windows, **options)


def test_mixed_dtypes_are_refused():
    model = pico.gpt2(n_layer=1)
    model.transformer.h[0].half()
    with pytest.raises(InputError, match="mixes torch.float16, torch.float32"):
        calibrate(model, pico.ids(model))


def test_statistics_of_another_model(measured):
    model, _, statistics = measured
    statistics.check_model(fingerprint(model))
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(other.parameters()).add_(0.01)
    with pytest.raises(DataError, match="another model"):
        statistics.check_model(fingerprint(other))
    with pytest.raises(DataError, match="nothing about 'transformer.h.9.mlp.c_fc'"):
        statistics.input_moments("transformer.h.9.mlp.c_fc")


def test_fewer_tokens_than_features_can_still_be_fitted():
    model = pico.gpt2(n_layer=1).double()
    statistics = calibrate(model, pico.ids(model, rows=1, length=5))
    for view in sites(model).values():
        weighting, (rows, columns) = statistics.weighting(view), view.shape
        if view.kind == "embedding":
            spec = GroupedEmbeddingSpec((40, 61), (20, 4), 32)
            fits = [grouped_embedding(view.weight(), spec, weighting)]
        else:
            kronecker = KroneckerSpec.for_weight(view.shape, (2, 2), 2)
            fits = [nearest_low_rank(view.weight(), LowRankSpec(rows, columns, 6), weighting)]
            fits.append(nearest_kronecker(view.weight(), kronecker, weighting))
        for fit in fits:
            assert torch.isfinite(fit.to_dense()).all()
            assert 0 <= fit.relative_error < 1


def test_a_feature_that_never_changes_has_no_variance():
    """Centring cancels to rounding; no variance may become negative for it."""
    model = pico.gpt2(n_layer=1)
    with torch.no_grad():
        model.transformer.h[0].ln_2.weight[:8] = 0
        model.transformer.h[0].ln_2.bias[:8] = torch.tensor([1.1, 3.7, 0.3, 23.4, -5.3, 0.7, 11.9, -2.1])
    statistics = calibrate(model, pico.ids(model, rows=7, length=13))
    view = sites(model)["transformer.h.0.mlp.c_fc"]
    weighting = statistics.weighting(view)
    assert weighting.inputs is not None
    assert float(weighting.inputs.diagonal().min()) >= 0
    fit = nearest_low_rank(view.weight(), LowRankSpec(128, 32, 24), weighting)
    assert fit.relative_error < 5e-3  # 24 features vary


def test_a_compressed_model_can_be_calibrated():
    student = pico.family("gpt2")
    embedding = {"structure": "grouped_embedding", "sizes": [40, 61], "ranks": [20, 8], "embedding_dim": 32}
    layer = {"structure": "low_rank", "out_features": 128, "in_features": 32, "rank": 9}
    specs = {"transformer.wte": embedding, "lm_head": {"structure": "tied_head"}, "transformer.h.0.mlp.c_fc": layer}
    build_skeleton(student, specs)
    statistics = calibrate(student, pico.ids(student))
    assert statistics.tied
    assert {view.module_name for view in sites(student).values() if view.kind == "linear"} == set(statistics.reads)
