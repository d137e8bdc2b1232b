"""Which way to compute is chosen, where its rates come from, and that every way gives the same."""

from __future__ import annotations

import json
import math
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace

import pytest
import torch

from kronfold.base.errors import InputError
from kronfold.jobs.tune import tune
from kronfold.structures import low_rank
from kronfold.structures import rates as cost
from kronfold.structures.kronecker import KroneckerLinear, matrix
from kronfold.structures.levels import FactorizedEmbedding
from kronfold.structures.low_rank import LowRankLinear
from kronfold.structures.permutations import inverse, permuted
from kronfold.structures.rates import Rates

FREE = Rates(*(1e-30,) * 8)
ORDERS = ("a_first", "b_first", "dense", "dense_blocks")
FFN = ((768, 384), (4, 2), 4)
HALF = ((768, 384), (1, 2), 1)


def _only(**rates) -> Rates:
    """A machine on which nothing else costs anything."""
    return replace(FREE, **rates)


@pytest.mark.parametrize("gathers", ["", "in", "out", "in out"])
@pytest.mark.parametrize(
    ("rank", "a_shape", "b_shape"),
    [(1, (6, 4), (1, 2)), (1, (6, 4), (2, 1)), (4, (6, 5), (4, 2)), (3, (2, 3), (3, 5)), (2, (1, 7), (1, 1))],
)
def test_every_order_is_the_permuted_sum_with_its_gradients(rank, a_shape, b_shape, gathers):
    generator = torch.Generator().manual_seed(5)
    a = torch.randn(rank, *a_shape, dtype=torch.float64, generator=generator)
    b = torch.randn(rank, *b_shape, dtype=torch.float64, generator=generator)
    outs, ins = a_shape[0] * b_shape[0], a_shape[1] * b_shape[1]
    gather_in = torch.randperm(ins, generator=generator).int() if "in" in gathers else None
    gather_out = torch.randperm(outs, generator=generator).int() if "out" in gathers else None
    x = torch.randn(2, 3, ins, dtype=torch.float64, generator=generator)
    bias = torch.randn(outs, dtype=torch.float64, generator=generator)
    target = torch.randn(2, 3, outs, dtype=torch.float64, generator=generator)

    def twin(x, a, b, bias):
        y = (x if gather_in is None else x[..., gather_in.long()]) @ sum(map(torch.kron, a, b)).T
        return (y if gather_out is None else y[..., gather_out.long()]) + bias

    tensors = [t.requires_grad_() for t in (x, a, b, bias)]
    expected = twin(*tensors)
    slopes = torch.autograd.grad((expected * target).sum(), tensors)
    for order in ORDERS:
        y = matrix.apply(x, a, b, order, gather_in, gather_out, bias)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
        for got, slope in zip(torch.autograd.grad((y * target).sum(), tensors), slopes, strict=True):
            torch.testing.assert_close(got, slope, rtol=0, atol=1e-11)
        with torch.no_grad():
            assert torch.equal(matrix.apply(x, a, b, order, gather_in, gather_out, bias), y)
    weight = matrix.dense_weight(a, b, gather_in, gather_out)
    torch.testing.assert_close(x @ weight.T + bias, expected, rtol=0, atol=1e-12)


def test_no_tokens_give_no_outputs():
    a, b = torch.randn(2, 3, 4), torch.randn(2, 2, 2)
    for order in ORDERS:
        assert matrix.apply(torch.empty(0, 8), a, b, order, torch.arange(8), torch.arange(6)).shape == (0, 6)


def test_permuting_and_its_gradient():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    perm = torch.tensor([3, 0, 4, 1, 2], dtype=torch.int32)
    assert torch.equal(permuted(x, perm), x[:, perm.long()])
    assert torch.equal(permuted(x.T, perm, 0), x.T[perm.long()])
    assert torch.equal(inverse(perm).long(), torch.argsort(perm))
    assert inverse(perm).dtype == torch.int32
    assert torch.autograd.gradcheck(lambda x: permuted(x, perm), (x,))
    assert torch.autograd.gradgradcheck(lambda x: permuted(x, perm) ** 2, (x,))
    half = torch.randn(2, 3, 5).bfloat16().requires_grad_()
    assert torch.equal(permuted(half, perm), half[..., perm.long()])
    (slope,) = torch.autograd.grad(permuted(half, perm), half, torch.ones(2, 3, 5).bfloat16().cumsum(-1))
    assert torch.equal(slope[0, 0][perm.long()], torch.arange(1, 6).bfloat16())


def test_choices_follow_planted_rates():
    def choose(shape, tokens, rates, gathers=(True, True), **how):
        return matrix.fastest_order(*shape, tokens, *gathers, rates, **how)

    # Products alone: B first halves them for a (1, 2) block; A first is 9,216 less than B first per token for the FFN.
    assert choose(HALF, 512, _only(mac=1e-9)) == "b_first"
    assert choose(((1536, 384), (2, 1), 1), 512, _only(mac=1e-9)) == "a_first"
    # Gathers cost whole seconds: with many tokens they go into the weight, with few the tokens are gathered.
    gathers = _only(gather=1.0)
    assert choose(FFN, 10**6, gathers) == "dense"
    assert choose(FFN, 1, gathers, (True, False)) in ("a_first", "b_first", "dense_blocks")
    # Building costs, products are free: never build; a weight that stands ready needs nothing but its product.
    assert choose(HALF, 1, _only(mix=1.0)) == "b_first"
    assert choose(HALF, 1, _only(mix=1.0), kept=True) == "dense"
    # The weight read once per call is all that costs: either order reads half the numbers of the dense weight.
    assert choose(FFN, 1, _only(read=1.0, few=1.0)) in ("a_first", "b_first")


def test_seconds_by_hand():
    rates = Rates(mac=1, read=10, gather=2, row=3, copy=4, mix=5, launch=100, few=11)
    shape = ((3, 2), (1, 2), 1)  # 3 x 4
    # B first, 2 tokens, inputs gathered: 8 gathered, 2·(2+1)·2 mixed, (2 x 2) times (2 x 3).
    b_first = (100 + 8 * 2) + (100 + 12 * 5) + (100 + 6 * (2 + 10))
    assert matrix.seconds("b_first", *shape, 2, True, False, rates) == b_first
    # Dense: 12 built from (1 + 2)·6 numbers, 12 gathered, (2 x 4) times (4 x 3).
    product, mixed, folded = 100 + 12 * (2 + 10), 100 + 18 * 5, 100 + 12 * 2
    assert matrix.seconds("dense", *shape, 2, True, False, rates) == product + mixed + folded
    assert matrix.seconds("dense", *shape, 2, True, False, rates, kept=True) == product
    trained = 3 * (product + mixed) + 2 * (100 + 8 * 2)  # the blocks stay, the tokens are gathered
    assert matrix.seconds("dense_blocks", *shape, 2, True, False, rates, training=True) == trained


def test_few_rows_are_multiplied_weight_first(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    weight, bias = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((6, 8), (6,)))
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=generator)
    calls = {(1,): x[0, 0, :1], (1, 1): x[0, :1, :1], (2, 2): x[:, :2, 0], (3,): x[0, 0], (4,): x[0, :4, 0]}
    expected = {shape: x @ weight.T + bias for shape, x in calls.items()}
    many = x[..., 0, :] @ weight.T
    for slow, fast in ((_only(few=1.0), None), (None, _only(read=1.0))):
        monkeypatch.setattr(cost, "rates_for", lambda x, rates=slow or fast: rates)
        for shape, few in calls.items():
            with torch.no_grad(), nullcontext() if slow else _forbidden(monkeypatch, cost.F, "linear"):
                for b in (bias, None):
                    y = cost.linear(few, weight, b)
                    assert y.shape == (*shape, 6)
                    torch.testing.assert_close(y + (bias if b is None else 0), expected[shape], rtol=0, atol=1e-12)
        torch.testing.assert_close(cost.linear(x[..., 0, :], weight), many, rtol=0, atol=1e-12)
    few = x[0, 0].requires_grad_()
    (slope,) = torch.autograd.grad(cost.linear(few, weight).sum(), few)
    torch.testing.assert_close(slope, weight.sum(0).expand(3, 8))


@contextmanager
def _forbidden(monkeypatch, module, name):
    """No call of `module.name` inside."""
    with monkeypatch.context() as patch:
        patch.setattr(module, name, None)
        yield


def test_reading_is_measured_on_weights_that_are_not_in_the_cache(monkeypatch):
    """As in decoding: every layer has a weight of its own, read once per token."""
    read = []
    linear, jobs = torch.nn.functional.linear, {}
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, w: read.append(w.data_ptr()) or linear(x, w))
    monkeypatch.setattr(cost, "interleaved", lambda found, *_: jobs.update(found) or dict.fromkeys(found, 1.0))
    cost.measure_rates("cpu", torch.float32, rounds=1, tokens=8, width=16)
    for _ in range(2 * cost.COPIES):
        jobs["read"]()
    assert len(set(read)) == cost.COPIES
    assert read[: cost.COPIES] == read[cost.COPIES :]


def test_seconds_of_few_rows():
    rates = Rates(mac=1, read=10, gather=2, row=3, copy=4, mix=5, launch=100, few=7)
    assert rates.product(4, 3, 2) == 100 + 6 * 7
    assert rates.product(5, 3, 2) == 100 + 6 * 15
    assert rates.product(4, 3, 2, in_one=False) == 100 + 6 * 14
    assert rates.product(1, 2000, 2) == 100 + 4000 * 11
    assert replace(rates, few=10).product(1, 3, 2) == 100 + 6 * 11


def test_low_rank_ways_agree_and_follow_planted_rates():
    generator = torch.Generator().manual_seed(1)
    pivots, mix = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((3, 8), (7, 3)))
    x, bias = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((5, 8), (10,)))
    for gather in (None, torch.randperm(10, generator=generator).int()):
        tensors = [t.requires_grad_() for t in (x, pivots, mix, bias)]
        gathered = low_rank.apply_gathered(x, pivots, mix, gather, bias)
        by_factor = low_rank.apply_factor(x, pivots, low_rank.output_factor(mix, gather), bias)
        torch.testing.assert_close(gathered, by_factor, rtol=0, atol=1e-12)
        for one, other in zip(
            torch.autograd.grad(gathered.square().sum(), tensors),
            torch.autograd.grad(by_factor.square().sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)
    assert low_rank.factor_is_faster(768, 300, 4096, True, _only(gather=1.0))
    assert not low_rank.factor_is_faster(768, 300, 4096, True, _only(mac=1.0))
    assert not low_rank.factor_is_faster(768, 300, 1, False, _only(row=1.0))
    assert low_rank.factor_is_faster(768, 300, 1, False, _only(row=1.0), kept=True)


def test_the_embedding_is_the_same_for_few_and_for_many_tokens():
    embedding = FactorizedEmbedding(
        11, 12, [{"block": 2, "rank": 2, "permute": True}, {"block": 3, "permute": True}], dtype=torch.float64
    )
    for level in embedding.levels:
        torch.nn.init.normal_(level.b)
        level.gather.copy_(torch.randperm(level.gather.numel()))
    ids, hidden = torch.arange(11), torch.randn(11, 12, dtype=torch.float64)
    few = torch.stack([embedding(i) for i in ids]), torch.stack([embedding.project(h) for h in hidden])
    assert len(ids) >= embedding.weight.shape[1] > 1
    torch.testing.assert_close(embedding(ids), few[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(embedding.project(hidden), few[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(few[0], embedding.dense_weight(), rtol=0, atol=1e-12)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A cache directory of its own, read for rates; returns the file they are saved in."""
    monkeypatch.setenv("KRONFOLD_CACHE", str(tmp_path))
    monkeypatch.delenv("KRONFOLD_RATES")
    cost.forget()
    yield cost.rates_path()
    monkeypatch.undo()
    cost.forget()


def test_tests_use_the_built_in_rates(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONFOLD_CACHE", str(tmp_path))
    threads = torch.get_num_threads()
    cost.save_rates(cost.rates_path(), {cost.key("cpu", torch.float32, threads): _only(mac=0.5)})
    assert cost.rates_of("cpu", torch.float32) == cost.built_in("cpu", torch.float32)


def test_saved_rates_are_read_for_the_same_machine_dtype_and_threads(saved):
    threads = torch.get_num_threads()
    measured = Rates(1e-11, 2e-11, 3e-10, 4e-10, 5e-10, 6e-10, 7e-6, 8e-11)
    cost.save_rates(saved, {cost.key("cpu", torch.float32, threads): measured})
    other = replace(measured, mac=9e-11)
    cost.save_rates(saved, {cost.key("cpu", torch.float32, threads + 1): other})
    assert cost.rates_of("cpu", torch.float32) == measured
    assert cost.rates_of("cpu", torch.bfloat16) == cost.built_in("cpu", torch.bfloat16)
    assert {row["threads"] for row in json.loads(saved.read_text())["rows"]} == {threads, threads + 1}
    layer, x = KroneckerLinear((96, 48), (1, 2), 1, True), torch.randn(4, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cost.rates_for(x) == cost.built_in("cpu", torch.bfloat16)
    before = layer(x)
    cost.save_rates(saved, {cost.key("cpu", torch.float32, threads): _only(mix=0.5)})
    assert cost.rates_for(x).mix == 0.5
    torch.testing.assert_close(layer(x), before)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format_version": 99}', '{"format_version": 1, "rows": [{"device": "x"}]}', "negative"]
)
def test_damaged_rates_are_left_aside_with_a_warning(saved, content):
    if content == "negative":
        rates = {**asdict(FREE), "mac": -1.0}
        row = {"device": "x", "dtype": "float32", "threads": 1, "rates": rates}
        content = json.dumps({"format_version": 1, "rows": [row]})
    saved.write_text(content)
    with pytest.warns(UserWarning, match="kronfold tune"):
        assert cost.rates_of("cpu", torch.float32) == cost.built_in("cpu", torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cost.rates_of("cpu", torch.float32)  # once is enough


def test_measuring_gives_rates_for_every_part():
    for dtype in (torch.float32, torch.bfloat16):
        rates = cost.measure_rates("cpu", dtype, rounds=1, tokens=8, width=16)
        assert all(0 < value < 1 and math.isfinite(value) for value in asdict(rates).values())


def test_tune_saves_what_it_measured_and_restores_the_threads(saved, monkeypatch):
    measured = Rates(1e-11, 2e-11, 3e-10, 4e-10, 5e-10, 6e-10, 7e-6, 8e-11)
    seen = []
    monkeypatch.setattr(
        cost, "measure_rates", lambda device, dtype, rounds: seen.append(torch.get_num_threads()) or measured
    )
    before = torch.get_num_threads()
    document = tune("cpu", ("float32",), before + 1)
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
    assert document["path"] == str(saved)
    assert document["rows"][0]["rates"] == asdict(measured)
    assert cost.rates_of("cpu", torch.float32) == cost.built_in("cpu", torch.float32)
    tune("cpu", ("float32",))
    assert cost.rates_of("cpu", torch.float32) == measured
    saved.unlink()
    assert tune("cpu", ("float32",), save=False)["path"] is None
    assert not saved.exists()
    with pytest.raises(InputError, match="bfloat16"):
        tune("cpu", ("bfloat61",))
    with pytest.raises(InputError, match="1 or more"):
        tune("cpu", threads=0)


def test_tune_prints_one_document(saved, monkeypatch, capsys):
    from kronfold.cli.main import main

    monkeypatch.setattr(cost, "measure_rates", lambda *_args, **_how: cost.built_in("cpu", torch.float32))
    with pytest.raises(SystemExit) as stopped:
        main(["tune", "--json"])
    assert not stopped.value.code
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "kronfold/tune"
    assert [row["dtype"] for row in document["rows"]] == ["float32", "bfloat16"]
    with pytest.raises(SystemExit):
        main(["tune", "--no-save"])
    shown = capsys.readouterr().out
    assert "launch" in shown
    assert "not saved" in shown


def test_layers_choose_on_the_meta_device():
    with torch.device("meta"):
        for layer in (KroneckerLinear(*FFN, True, True), LowRankLinear(768, 768, 300)):
            for tokens in (1, 512, 4096):
                assert layer(torch.empty(tokens, 768)).shape == (tokens, layer.out_features)
            assert layer.dense_weight().shape == (layer.out_features, 768)
            layer.kept_shape()


def test_a_compiled_layer_reads_the_rates_without_a_graph_break(saved):
    layer = KroneckerLinear((6, 5), (4, 2), 4, True, True)
    with torch.no_grad():
        layer.gather_in.copy_(torch.randperm(10))
        layer.gather_out.copy_(torch.randperm(24))
    cost.save_rates(saved, {cost.key("cpu", torch.float32, torch.get_num_threads()): _only(launch=1e-6)})
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 10, requires_grad=True)
    torch.testing.assert_close(compiled(x), layer(x))
    slopes = [torch.autograd.grad(f(x).square().sum(), [x, layer.a.weight, layer.b]) for f in (compiled, layer)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other)
