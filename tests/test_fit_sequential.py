"""Block streams against the model's own hidden states, and sequential fits against dense models and planted ones."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import pico
from kronfold.base.errors import DataError, InputError, RecipeError
from kronfold.fit.rows import fit_row
from kronfold.fit.sequential import compress_sequentially
from kronfold.models.block_stream import BlockStream
from kronfold.models.calibrate import calibrate
from kronfold.models.families import family_of
from kronfold.models.linear_view import sites
from kronfold.models.place import fitted_layer, place
from kronfold.planner.plan import PlanRow
from kronfold.structures.grouped_embedding import GroupedEmbeddingSpec
from kronfold.structures.low_rank import LowRankSpec
from kronfold.structures.weighting import corrected_weight


def opt():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = OPTConfig(
        vocab_size=101, max_position_embeddings=64, word_embed_proj_dim=32, bos_token_id=0, eos_token_id=0, **options
    )
    return AutoModelForCausalLM.from_config(config).eval()


def model_of(name: str):
    return (opt() if name == "opt" else pico.family(name)).double()


def row_for(view, rank: int) -> PlanRow:
    numbers = view.shape[0] * view.shape[1]
    if view.kind == "embedding":
        return PlanRow(view.name, GroupedEmbeddingSpec((view.shape[0],), (rank,), 32), numbers, head="tied")
    return PlanRow(view.name, LowRankSpec(*view.shape, rank), numbers)


def rows_for(model, rank: int | None, kinds=("linear", "embedding")) -> list[PlanRow]:
    """Low rank everywhere; None is full rank."""
    views = [view for view in sites(model).values() if view.kind in kinds]
    return [row_for(view, min(view.shape) if rank is None else rank) for view in views]


def independently(model, rows, statistics) -> None:
    """Every row fitted to the dense model's own statistics."""
    views = sites(model)
    layers = []
    for row in rows:
        view = views[row.name]
        fit, _ = fit_row(view.weight(), row, 0, statistics.weighting(view))
        layers.append(fitted_layer(view, row.spec, fit))
    for row, layer in zip(rows, layers, strict=True):
        place(model, views[row.name], layer, row.head)


@torch.no_grad()
def last_hidden(model, windows):
    return model.base_model(input_ids=windows, use_cache=False).last_hidden_state


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "mistral", "qwen2", "gpt_neo", "opt"])
def test_a_stream_gives_the_models_own_hidden_states(name, batch):
    model = model_of(name)
    windows = pico.ids(model, rows=3)
    blocks = list(model.get_submodule(family_of(model).blocks).children())
    seen: list[list[torch.Tensor]] = [[] for _ in range(len(blocks) + 1)]
    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen[i].append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for i, block in enumerate(blocks)
    ]
    handles.append(
        blocks[-1].register_forward_hook(lambda _, a, out: seen[-1].append(out[0] if type(out) is tuple else out))
    )
    with torch.no_grad():
        for part in windows.split(batch):
            model(input_ids=part, use_cache=False)
    for handle in handles:
        handle.remove()
    stream = BlockStream(model, windows, batch)
    stream.start()
    twin = stream.twin()
    for i, block in enumerate(blocks):
        assert all(torch.equal(a, b) for a, b in zip(stream.hidden, seen[i], strict=True))
        stream.advance(block, i)
    assert all(torch.equal(a, b) for a, b in zip(stream.hidden, seen[-1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(twin.hidden, seen[0], strict=True))  # the twin stayed where it was
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_inputs_of_a_layer():
    model = model_of("llama")
    windows = pico.ids(model, rows=4)
    layer, seen = model.model.layers[0].mlp.down_proj, []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for part in windows.split(2):
            model(part)
    handle.remove()
    stream = BlockStream(model, windows, 2)
    stream.start()
    found = list(stream.inputs_of(model.model.layers[0], 0, layer))
    assert all(torch.equal(a, b) for a, b in zip(found, seen, strict=True))
    with pytest.raises(InputError, match="does not run"):
        list(stream.inputs_of(model.model.layers[0], 0, model.model.layers[1].mlp.down_proj))


@pytest.mark.parametrize(("rows", "batch"), [(3, 2), (0, 1)])
def test_batches_must_divide_the_windows(rows, batch):
    model = pico.gpt2(n_layer=1)
    with pytest.raises(InputError, match="does not divide"):
        BlockStream(model, pico.ids(model, rows=rows), batch)


def test_correction_is_least_squares_with_a_ridge():
    chooser = np.random.default_rng(0)
    weight, x = chooser.normal(size=(5, 7)), chooser.normal(size=(40, 7))
    now = x @ chooser.normal(size=(7, 7)) + 0.1 * chooser.normal(size=(40, 7))
    moment, cross = now.T @ now / 40, x.T @ now / 40
    for ridge in (1e-6, 1e-2, 1.0):
        delta = ridge * np.trace(moment) / 7
        # rows for the text, then rows that pull W' towards W
        left = np.concatenate([now / 40**0.5, delta**0.5 * np.eye(7)])
        right = np.concatenate([x @ weight.T / 40**0.5, delta**0.5 * weight.T])
        wanted = np.linalg.lstsq(left, right, rcond=None)[0].T
        found = corrected_weight(*map(torch.from_numpy, (weight, cross, moment)), ridge)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-8, atol=1e-9)
    nothing = torch.zeros(7, 7, dtype=torch.float64)
    assert torch.equal(corrected_weight(torch.from_numpy(weight), nothing, nothing), torch.from_numpy(weight))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "opt"])
def test_full_rank_reproduces_the_dense_model(name):
    model = model_of(name)
    windows = pico.ids(model, rows=3)
    statistics = calibrate(model, windows)
    student = copy.deepcopy(model)
    rows = rows_for(model, None)[::-1]
    done = compress_sequentially(student, rows, statistics, windows)
    assert [row.name for row in done] == [row.name for row in rows]
    assert all(row.relative_error < 1e-6 for row in done)
    assert not any(view.is_dense for view in sites(student).values())
    with torch.no_grad():
        dense = model(windows).logits
        torch.testing.assert_close(student(windows).logits, dense, rtol=0, atol=1e-6 * float(dense.abs().max()))


@pytest.mark.parametrize(("name", "rank"), [("gpt2", 8), ("llama", 8)])
def test_sequential_fits_are_nearer_than_independent_ones(name, rank):
    model = model_of(name)
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 101, (24, 24), generator=generator)
    statistics = calibrate(model, windows, gradient_windows=0)
    wanted = last_hidden(model, windows)
    errors = []
    for fit in ("sequential", "independent"):
        student = copy.deepcopy(model)
        rows = rows_for(model, rank, kinds=("linear",))
        rows = [row for row in rows if row.name != "lm_head"]
        if fit == "sequential":
            compress_sequentially(student, rows, statistics, windows)
        else:
            independently(student, rows, statistics)
        errors.append(float((last_hidden(student, windows) - wanted).square().mean()))
    assert errors[0] < 0.9 * errors[1]


def test_biases_keep_the_mean_outputs():
    model = model_of("gpt2")
    windows = pico.ids(model, rows=6)
    statistics = calibrate(model, windows, gradient_windows=0)
    student = copy.deepcopy(model)
    compress_sequentially(student, rows_for(model, 6, kinds=("linear",)), statistics, windows)

    def means(of):
        found = {}
        names = sorted({view.module_name for view in sites(model).values() if view.kind == "linear"})
        handles = [
            of.get_submodule(name).register_forward_hook(
                lambda _, args, out, name=name: found.update({name: out.flatten(0, -2).mean(0)})
            )
            for name in names
        ]
        last_hidden(of, windows)
        for handle in handles:
            handle.remove()
        return found

    before, after = means(model), means(student)
    for name, mean in before.items():
        torch.testing.assert_close(after[name], mean, rtol=0, atol=1e-9)


def test_the_bias_of_an_untied_head_is_refitted():
    torch.manual_seed(0)
    model = model_of("llama")
    head = torch.nn.Linear(32, 101, bias=True, dtype=torch.float64)
    model.lm_head = head
    with torch.no_grad():
        model.model.norm.weight.mul_(1 + torch.rand(32))
    windows = pico.ids(model, rows=4)
    statistics = calibrate(model, windows, gradient_windows=0)
    student = copy.deepcopy(model)
    compress_sequentially(student, [row_for(sites(model)["lm_head"], 5)], statistics, windows)
    with torch.no_grad():
        hidden = last_hidden(model, windows)
        torch.testing.assert_close(student.lm_head(hidden).mean((0, 1)), head(hidden).mean((0, 1)), rtol=0, atol=1e-5)


def test_dropout_is_off_and_the_mode_comes_back():
    model = pico.gpt2(n_layer=1, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    windows = pico.ids(model)
    statistics = calibrate(model, windows)
    students = []
    for training in (False, True):
        student = copy.deepcopy(model).train(training)
        compress_sequentially(student, rows_for(model, 4), statistics, windows)
        assert all(module.training == training for module in student.modules())
        students.append(student.state_dict())
    assert all(torch.equal(students[1][name], tensor) for name, tensor in students[0].items())


@pytest.mark.parametrize("fault", ["name", "shape", "windows", "ids", "statistics"])
def test_what_does_not_fit_leaves_the_model_unchanged(fault):
    model = pico.gpt2(n_layer=2)
    windows = pico.ids(model)
    statistics = calibrate(model, windows)
    rows = rows_for(model, 4)
    error, said = RecipeError, "unchanged"
    if fault == "name":
        rows[-1].name = "transformer.h.7.mlp.c_fc"
    elif fault == "shape":
        rows[-1].spec = replace(rows[-1].spec, out_features=rows[-1].spec.out_features + 1)
    elif fault == "windows":
        windows, error, said = windows[:0], DataError, "at least 2 tokens"
    elif fault == "ids":
        windows, error, said = windows + 101, InputError, "the model knows 0 to 100"
    else:
        del statistics.reads["transformer.h.1.mlp.c_proj"]
        error, said = DataError, "nothing about 'transformer.h.1.mlp.c_proj'"
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=said):
        compress_sequentially(model, rows, statistics, windows)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_progress_runs_to_its_end():
    model = pico.gpt2(n_layer=2)
    windows = pico.ids(model)
    calls = []
    statistics = calibrate(model, windows, progress=lambda *call: calls.append(call))
    assert calls[-1] == ("calibrate", 2, 2)
    calls.clear()
    compress_sequentially(model, rows_for(model, 4), statistics, windows, progress=lambda *call: calls.append(call))
    assert [call[1:] for call in calls] == [(0, 2), (1, 2), (2, 2)]
