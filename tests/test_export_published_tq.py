"""Published TQCompressedGPT2 state dicts: synthetic ones of those names and shapes, against their described forward."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import kronfold as kf
import pico
from kronfold.base.errors import CheckpointError, InputError
from kronfold.export.published_tq import model_from_tq
from kronfold.jobs.import_tq import import_tq
from kronfold.models.cost import cost
from kronfold.models.place import read_specs


class KnEmbedding(nn.Module):
    """The naive twin, from the description: look up, times B, columns gathered by p."""

    def __init__(self, inside, block):
        super().__init__()
        self.embedding = inside
        width = inside.p.numel() if isinstance(inside, KnEmbedding) else inside.embedding_dim
        self.B = nn.Parameter(torch.randn(1, block))
        self.register_buffer("p", torch.randperm(width * block))

    def forward(self, ids):
        wide = (self.embedding(ids)[..., :, None] * self.B[0]).flatten(-2)
        return torch.index_select(wide, -1, self.p)


class KnPrConv1D(nn.Module):
    """index_select(p_inv) -> x * B -> A -> index_select(q) -> + bias."""

    def __init__(self, rank, n, m):
        super().__init__()
        (n1, n2), (m1, m2) = n, m
        self.A = nn.Parameter(torch.randn(rank, n1, m1) * 0.3)
        self.B = nn.Parameter(torch.randn(rank, m2, n2) * 0.3)
        self.b = nn.Parameter(torch.randn(m1 * m2))
        self.register_buffer("p_inv", torch.randperm(n1 * n2))
        self.register_buffer("q", torch.randperm(m1 * m2))
        self.n = n

    def forward(self, x):
        x = torch.index_select(x, -1, self.p_inv).unflatten(-1, self.n)
        x = torch.einsum("...ij,rlj->...ril", x, self.B)
        x = torch.einsum("...ril,rim->...ml", x, self.A).flatten(-2)
        return torch.index_select(x, -1, self.q) + self.b


CONFIG = {"vocab_size": 101, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}


def published(levels: int = 2) -> GPT2LMHeadModel:
    """A double-precision GPT-2 with these layers in block 1, head dense and apart."""
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(**CONFIG, bos_token_id=0, eos_token_id=0)).eval()
    head = nn.Linear(32, 101, bias=False)
    embedding = nn.Embedding(101, 32 // 2**levels)
    for _ in range(levels):
        embedding = KnEmbedding(embedding, 2)
    model.transformer.wte, model.lm_head = embedding, head
    if levels == 0:
        model.lm_head.weight = embedding.weight
    mlp = model.transformer.h[1].mlp
    mlp.c_fc, mlp.c_proj = KnPrConv1D(4, (16, 2), (32, 4)), KnPrConv1D(4, (32, 4), (16, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double()


def state_of(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("levels", [0, 1, 2])
def test_equal_logits(levels, tmp_path):
    teacher = published(levels)
    state = state_of(teacher)
    model = model_from_tq(state, heads=4)
    ids = pico.ids(model)
    torch.testing.assert_close(logits(model, ids), logits(teacher, ids), rtol=0, atol=1e-10)
    held = {t.data_ptr(): t for t in teacher.state_dict(keep_vars=True).values() if t.is_floating_point()}
    assert cost(model).held_parameters == sum(t.numel() for t in held.values())
    assert model.config.tie_word_embeddings == (levels == 0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again, ids), logits(teacher, ids), rtol=0, atol=1e-10)
    expected = {"transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj", *(["transformer.wte"] if levels else [])}
    assert set(read_specs(again)) == expected
    assert again.lm_head.weight is again.transformer.wte.weight if levels == 0 else True


def test_it_holds_what_the_recipe_of_the_same_shapes_plans():
    model = model_from_tq(state_of(published()), heads=4)
    made = kf.plan(GPT2Config(**CONFIG), "tqcompressor-untied")
    assert cost(model).held_parameters == made.held_parameters
    planned = {row.name: row.spec for row in made.rows if row.name != "transformer.wte"}
    found = {name: spec for name, spec in read_specs(model).items() if name != "transformer.wte"}
    assert {name: ([*spec.a], [*spec.b], spec.rank) for name, spec in planned.items()} == {
        name: (spec["a"], spec["b"], spec["rank"]) for name, spec in found.items()
    }


def test_a_state_dict_without_a_head_is_tied():
    state = state_of(published())
    head = state.pop("lm_head.weight")
    model = model_from_tq(state, heads=4)
    ids = pico.ids(model)
    with torch.no_grad():
        hidden = model.transformer(ids).last_hidden_state
        dense = model.transformer.wte.dense_weight()
    torch.testing.assert_close(logits(model, ids), F.linear(hidden, dense), rtol=0, atol=1e-10)
    assert head.shape == dense.shape


def test_gathers_that_do_nothing_and_masks_are_left_out():
    teacher = published()
    with torch.no_grad():
        teacher.transformer.h[1].mlp.c_fc.q.copy_(torch.arange(128))
        teacher.transformer.wte.p.copy_(torch.arange(32))
    state = state_of(teacher) | {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril()}
    del state["transformer.h.1.mlp.c_proj.p_inv"]
    with torch.no_grad():
        teacher.transformer.h[1].mlp.c_proj.p_inv.copy_(torch.arange(128))
    model = model_from_tq({key.removeprefix("transformer."): value for key, value in state.items()}, heads=4)
    layers = model.transformer.h[1].mlp
    assert layers.c_fc.gather_out is None
    assert layers.c_proj.gather_in is None
    assert model.transformer.wte.levels[0].gather is None
    ids = pico.ids(model)
    torch.testing.assert_close(logits(model, ids), logits(teacher, ids), rtol=0, atol=1e-10)


FC = "transformer.h.1.mlp.c_fc"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(f"{FC}.B"), "c_fc.B is missing"),
        (lambda s: s.update({f"{FC}.B": s[f"{FC}.B"].transpose(1, 2)}), "do not belong together"),
        (lambda s: s.update({f"{FC}.q": torch.zeros(128).long()}), "no permutation of 0 to 127"),
        (lambda s: s.pop("transformer.ln_f.bias"), "missing: transformer.ln_f.bias"),
        (lambda s: s.update({"transformer.extra.weight": torch.ones(2)}), "not understood: transformer.extra.weight"),
        (lambda s: s.pop("transformer.wpe.weight"), "wpe.weight is missing"),
        (lambda s: s.pop("transformer.wte.embedding.embedding.weight"), "embedding.embedding.weight is missing"),
        (lambda s: s.update({"transformer.wte.B": torch.ones(2, 2)}), r"one row \(1, d\)"),
        (lambda s: s.update({"transformer.h.0.mlp.c_proj.weight": torch.ones(3, 3)}), r"shape \(3, 3\), expected"),
    ],
)
def test_damaged_state_dicts_are_refused(change, message):
    state = state_of(published())
    change(state)
    with pytest.raises(CheckpointError, match=message):
        model_from_tq(state, heads=4)


def test_heads_that_do_not_divide():
    with pytest.raises(InputError, match="5 attention heads do not divide the width 32.*--heads"):
        model_from_tq(state_of(published()), heads=5)
    with pytest.raises(InputError, match="0 attention heads"):
        model_from_tq(state_of(published()))  # heads of 64 channels do not exist at width 32


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.bin", "nested.pt"])
def test_from_files(name, tmp_path):
    teacher = published()
    state = {key: value.contiguous() for key, value in state_of(teacher).items()}
    place = tmp_path / "source"
    place.mkdir()
    if name.endswith(".safetensors"):
        save_file(state, place / name)
    else:
        torch.save({"state_dict": state} if name == "nested.pt" else state, place / name)
    teacher.config.save_pretrained(place)
    pico.tokenizer().save_pretrained(place)
    document = import_tq(place, tmp_path / "out")  # heads from the config beside it
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    ids = pico.ids(model)
    torch.testing.assert_close(logits(model, ids), logits(teacher, ids), rtol=0, atol=1e-10)
    assert document["held_parameters"] == cost(model).held_parameters
    assert document["head"] == "untied"
    assert document["tokenizer"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == document


def test_files_that_are_no_state_dict(tmp_path):
    torch.save({"model": KnEmbedding}, tmp_path / "code.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    (tmp_path / "cut.pt").write_bytes(b"123")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    for name, message in (
        ("code.pt", "more than tensors"),
        ("cut.safetensors", "no complete safetensors"),
        ("cut.pt", "cannot be read"),
        ("list.pt", "no state dict"),
    ):
        with pytest.raises(CheckpointError, match=message):
            import_tq(tmp_path / name, tmp_path / "out")
    with pytest.raises(InputError, match="no file or directory"):
        import_tq(tmp_path / "none.pt", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no weights file"):
        import_tq(tmp_path / "empty", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_on_the_command_line(tmp_path, call):
    torch.save(state_of(published()), tmp_path / "weights.pt")
    arguments = ["import-tq", tmp_path / "weights.pt", "-o", tmp_path / "out", "--heads", "4"]
    code, out, _ = call(*arguments, "--dtype", "float32", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == "kronfold/import-tq"
    assert not document["tokenizer"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    code, _, err = call(*arguments)
    assert code == 2
    assert "exists already" in err
