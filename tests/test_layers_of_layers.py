"""Factors that are plain products are `nn.Linear` modules: other tools find them, replace them and listen to them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base.errors import KronfoldError
from kronfold.export.checkpoint import check_tensors
from kronfold.jobs.compress import compress_to
from kronfold.jobs.stream import compress_streaming
from kronfold.models.families import empty_model
from kronfold.models.place import build_skeleton
from kronfold.models.weight_files import WeightFiles, read_headers
from kronfold.structures.grouped_embedding import GroupedEmbedding
from kronfold.structures.kronecker import KroneckerLinear
from kronfold.structures.layer import StructuredEmbedding, product_weight, structured_modules
from kronfold.structures.levels import TiedHead
from kronfold.structures.low_rank import LowRankLinear
from kronfold.structures.sums import SumLinear

GOLDEN = Path(__file__).parent / "golden" / "v0.3"
TOKENS = (1, 3, 16, 900)  # each has a way of computing of its own


class Adapter(nn.Module):
    """LoRA by hand, as a tool would put it around any `nn.Linear` it finds: `W x + U D x`."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        where = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.down = nn.Linear(base.in_features, rank, **where)
        self.up = nn.Linear(rank, base.out_features, **where)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base.weight += self.up.weight @ self.down.weight
        return self.base


def inner(module: nn.Module) -> dict[str, nn.Linear]:
    """What `all-linear` of such a tool meets inside the structured layers of a module."""
    return {
        f"{name}.{own}" if name else own: found
        for name, layer in structured_modules(module)
        for own, found in layer.named_modules()
        if type(found) is nn.Linear and own not in layer.parts  # a part that is still dense is no factor
    }


def replace(module: nn.Module, change) -> None:
    """Put `change(old)` in place of every child that it changes."""
    for name, child in list(module.named_children()):
        if (new := change(child)) is not child:
            setattr(module, name, new)
        else:
            replace(child, change)


def adapt(module: nn.Module) -> None:
    module.requires_grad_(False)
    replace(module, lambda child: Adapter(child) if type(child) is nn.Linear else child)


def merge(module: nn.Module) -> None:
    replace(module, lambda child: child.merged() if isinstance(child, Adapter) else child)


def _kronecker(bias=True):
    return KroneckerLinear((6, 4), (2, 3), 3, True, True, bias, dtype=torch.float64)


def _low_rank(bias=True):
    return LowRankLinear(12, 12, 5, bias, dtype=torch.float64)


LAYERS = {
    "low rank": (_low_rank, {"pivots": (5, 12), "mix": (7, 5)}),
    "low rank of full rank": (lambda: LowRankLinear(12, 6, 6, dtype=torch.float64), {"pivots": (6, 12), "mix": (0, 6)}),
    "kronecker": (_kronecker, {"a": (18, 4)}),
    "sum": (
        lambda: SumLinear([_low_rank(False), _kronecker(False)], dtype=torch.float64),
        {"terms.0.pivots": (5, 12), "terms.0.mix": (7, 5), "terms.1.a": (18, 4)},
    ),
    "grouped embedding": (
        lambda: GroupedEmbedding([12, 20], [12, 5], 12, dtype=torch.float64),
        {"groups.1.mix": (5, 7)},  # the first group is of full rank: one table
    ),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """(layer with random gathers and bias, the weights expected inside)."""
    torch.manual_seed(0)
    make, shapes = LAYERS[request.param]
    layer = make().eval()
    with torch.no_grad():
        for buffer in layer.buffers():
            buffer.copy_(torch.randperm(buffer.numel()))
        if getattr(layer, "bias", None) is not None:
            layer.bias.normal_()
    return layer, shapes


def outputs(layer: nn.Module, tokens: int) -> list[torch.Tensor]:
    """All that a layer computes: an embedding looks up and makes logits."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, 12, dtype=torch.float64, generator=generator)
    if isinstance(layer, StructuredEmbedding):
        ids = torch.randint(layer.num_embeddings, (tokens,), generator=generator)
        return [layer(ids), TiedHead(layer)(x)]
    return [layer(x)]


def by_dense(layer: nn.Module, tokens: int) -> list[torch.Tensor]:
    generator, weight = torch.Generator().manual_seed(1), layer.dense_weight()
    x = torch.randn(tokens, 12, dtype=torch.float64, generator=generator)
    if isinstance(layer, StructuredEmbedding):
        return [weight[torch.randint(len(weight), (tokens,), generator=generator)], x @ weight.T]
    return [nn.functional.linear(x, weight, layer.bias)]


def close(found, expected, atol=1e-11):
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=atol)


def test_factors_are_linear_modules(case):
    layer, shapes = case
    found = inner(layer)
    assert {name: tuple(linear.weight.shape) for name, linear in found.items()} == shapes
    for linear in found.values():
        assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)
        assert linear.bias is None


def test_making_a_layer_draws_each_number_once():
    """Not twice, first as `nn.Linear` does: models made from one seed stay what they are."""
    torch.manual_seed(5)
    layer = LowRankLinear(12, 9, 4)
    torch.manual_seed(5)
    assert torch.equal(layer.pivots.weight, torch.empty(4, 12).normal_(std=(1 / 36) ** 0.5))
    assert torch.equal(layer.mix.weight, torch.empty(5, 4).normal_(std=0.5))


@pytest.mark.parametrize("tokens", TOKENS)
def test_an_adapter_trains_and_merges_into_the_factor(case, tokens):
    layer, shapes = case
    plain = outputs(layer, tokens)
    adapt(layer)
    adapters = [module for module in layer.modules() if isinstance(module, Adapter)]
    assert len(adapters) == len(shapes)
    close(outputs(layer, tokens), plain)  # an adapter begins as nothing
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):  # the first step moves U alone, for it was zero
        optimizer.zero_grad()
        sum((found - 1).square().mean() for found in outputs(layer, tokens)).backward()
        optimizer.step()
    for adapter in adapters:
        assert adapter.base.weight.grad is None
        moved = [adapter.up.weight.abs().sum(), adapter.down.weight.grad.abs().sum()]
        assert adapter.up.weight.numel() == 0 or min(moved) > 0
    with torch.no_grad():
        trained = outputs(layer, tokens)
        assert not any(torch.allclose(new, old) for new, old in zip(trained, plain, strict=True))
        close(by_dense(layer, tokens), trained)
        merge(layer)
        assert set(inner(layer)) == set(shapes)
        close(outputs(layer, tokens), trained)
        close(by_dense(layer, tokens), trained)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_hooks_fire_for_every_number_of_tokens(case, tokens, gradients):
    """Also where the layer would else compute past its factors: by a kept weight, or by a dense one for the call."""
    layer, shapes = case
    kf.cache_dense(layer)
    with torch.set_grad_enabled(gradients):
        before, fired = outputs(layer, tokens), []
        for kind in ("register_forward_hook", "register_forward_pre_hook"):
            handles = [
                getattr(linear, kind)(lambda *_, name=name: fired.append(name)) for name, linear in inner(layer).items()
            ]
            fired.clear()
            close(outputs(layer, tokens), before)
            assert set(fired) == set(shapes)
            for handle in handles:
                handle.remove()
        fired.clear()
        assert all(torch.equal(*pair) for pair in zip(outputs(layer, tokens), before, strict=True))
        assert not fired


def test_a_kept_weight_is_left_once_a_factor_is_replaced(case):
    layer, _ = case
    kf.cache_dense(layer)
    with torch.no_grad():
        outputs(layer, 900)
        adapt(layer)
        for adapter in (module for module in layer.modules() if isinstance(module, Adapter)):
            adapter.up.weight.fill_(0.3)
        close(outputs(layer, 900), by_dense(layer, 900))
    assert kf.dense_cache_bytes(layer) == 0


def test_backward_hooks_fire_too():
    torch.manual_seed(0)
    for make in (_low_rank, _kronecker):
        layer, fired = make(), list[nn.Module]()
        for linear in inner(layer).values():
            linear.register_full_backward_hook(lambda module, *_, fired=fired: fired.append(module))
        layer(torch.randn(3, 12, dtype=torch.float64, requires_grad=True)).sum().backward()
        assert len(fired) == len(inner(layer))


def test_weights_that_are_fetched_for_the_call():
    """accelerate keeps numbers elsewhere and puts a forward of its own over the module's, which brings them."""
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = nn.Sequential(_low_rank(), _kronecker()).eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert all(parameter.is_meta for parameter in model.parameters())
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("recipe", ["svd", "tqcompressor", "kngpt2"])
def test_dynamic_quantisation_reaches_every_factor(teacher, recipe):
    student = kf.compress(teacher, recipe)
    factors = inner(student)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch points to its successor
        quantised = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, dtype=torch.qint8)
    found = {name for name, module in quantised.named_modules() if type(module) is torch.ao.nn.quantized.dynamic.Linear}
    assert found >= set(factors)
    assert factors
    with torch.no_grad():
        expected, logits = student(pico.ids(student)).logits, quantised(pico.ids(student)).logits
        assert 0 < (logits - expected).norm() < 0.06 * expected.norm()  # 8 bits, 49 factors in svd
        name = next(iter(factors))
        error = product_weight(quantised.get_submodule(name), factors[name].in_features) - factors[name].weight
        assert error.abs().max() < 0.02 * factors[name].weight.abs().max()
        folded = kf.to_dense(quantised)(pico.ids(student)).logits  # the inputs are not quantised there
    assert (folded - expected).norm() < 0.04 * expected.norm()


# --- names in files: format version 2, and version 1 as 0.3 wrote it ---------------------------------------------


def test_saved_loaded_and_streamed_under_the_names_of_modules(tmp_path):
    source = pico.model_directory(tmp_path / "source")
    for recipe in ("svd", "tqcompressor"):
        compress_to(str(source), tmp_path / recipe, recipe)
        compress_streaming(str(source), tmp_path / f"{recipe}-streamed", recipe)
        whole, streamed = (
            {name: tensor for file in place.glob("*.safetensors") for name, tensor in load_file(file).items()}
            for place in (tmp_path / recipe, tmp_path / f"{recipe}-streamed")
        )
        assert whole.keys() == streamed.keys()
        assert all(torch.equal(whole[name], streamed[name]) for name in whole)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / recipe, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert {f"{name}.weight" for name in inner(model)} <= whole.keys()
        assert not [name for name in whole if re.search(r"\.(a|pivots|mix)$", name)]
        for name, linear in inner(model).items():
            assert torch.equal(linear.weight, whole[f"{name}.weight"])


OLD = ("llama", "gpt2-svd", "gpt2-sums", "gpt2-tqcompressor-attention")


@pytest.mark.parametrize("name", OLD)
def test_version_1_becomes_version_2_number_by_number(name, tmp_path):
    """Every factor of the files of 0.3 is the weight of a module, read by transformers and by our own reader alike."""
    old = load_file(GOLDEN / name / "model.safetensors")
    model, info = AutoModelForCausalLM.from_pretrained(GOLDEN / name, output_loading_info=True, dtype="auto")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    factors = inner(model)
    assert factors
    for key, linear in factors.items():
        assert torch.equal(linear.weight, old[key].flatten(0, -2))
        assert f"{key}.weight" not in old
    config = AutoConfig.from_pretrained(GOLDEN / name)
    skeleton = empty_model(config)
    build_skeleton(skeleton, config.quantization_config["specs"])
    check_tensors(skeleton, config.quantization_config["specs"], [GOLDEN / name / "model.safetensors"])
    read = WeightFiles(GOLDEN / name, skeleton).read([f"{key}.weight" for key in factors])
    assert all(torch.equal(read[f"{key}.weight"], linear.weight.float()) for key, linear in factors.items())
    model.save_pretrained(tmp_path)
    new = read_headers(tmp_path.glob("*.safetensors"))
    assert {f"{key}.weight" for key in factors} <= new.keys()
    assert not set(factors) & new.keys()


def test_a_damaged_version_1_file_is_named(tmp_path):
    for file in (GOLDEN / "gpt2-sums").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    key = next(key for key in weights if key.endswith(".a"))
    save_file({**weights, key: weights[key][..., :-1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(KronfoldError, match=rf"{re.escape(key)}.weight: shape .*expected"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    del weights[key]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(KronfoldError, match=rf"{re.escape(key)}.weight: missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
