"""Save, load with stock transformers, in this process and in a fresh one; refuse what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2LMHeadModel

import kronfold as kf
import pico
from kronfold.base.errors import CheckpointError
from kronfold.export.quantizer import KronfoldConfig
from kronfold.models.cost import cost

each_recipe = pytest.mark.parametrize("recipe", pico.RECIPES)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(pico.ids(model)).logits


@each_recipe
def test_round_trip_is_exact_twice(students, checkpoints, tmp_path, recipe):
    first = AutoModelForCausalLM.from_pretrained(checkpoints[recipe])
    assert type(first) is GPT2LMHeadModel
    assert torch.equal(logits(first), logits(students[recipe]))
    assert cost(first) == cost(students[recipe])
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(second), logits(students[recipe]))
    assert (tmp_path / "again" / "config.json").read_text() == (checkpoints[recipe] / "config.json").read_text()


# kronfold imported before transformers, and after: both must find the loader.
@pytest.mark.parametrize("order", ["import kronfold, transformers", "import transformers.models.auto, kronfold"])
def test_a_fresh_process_gives_bitwise_equal_logits(students, checkpoints, tmp_path, order):
    (tmp_path / "places.json").write_text(json.dumps({recipe: str(place) for recipe, place in checkpoints.items()}))
    save_file({"ids": pico.ids(students["tqcompressor"])}, tmp_path / "ids")
    program = f"""{order}
import json
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
ids = load_file("ids")["ids"]
models = {{r: AutoModelForCausalLM.from_pretrained(p) for r, p in json.load(open("places.json")).items()}}
save_file({{r: model(ids).logits.detach() for r, model in models.items()}}, "logits")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "logits")
    assert all(torch.equal(found[recipe], logits(student)) for recipe, student in students.items())


def test_the_head_is_stored_once(checkpoints, students):
    tied = load_file(checkpoints["tqcompressor"] / "model.safetensors")
    assert not [key for key in tied if key.startswith("lm_head")]
    assert (
        sum(t.numel() for t in tied.values() if t.is_floating_point()) == cost(students["tqcompressor"]).held_parameters
    )
    untied = load_file(checkpoints["tqcompressor-untied"] / "model.safetensors")
    assert untied["lm_head.weight"].shape == (101, 32)
    for recipe, is_tied in (("tqcompressor", True), ("tqcompressor-untied", False)):
        config = json.loads((checkpoints[recipe] / "config.json").read_text())
        assert (config["model_type"], config["tie_word_embeddings"]) == ("gpt2", is_tied)


@each_recipe
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"dtype": torch.bfloat16}, 0.1),
        ({"dtype": torch.float16}, 0.02),
        ({"device_map": "cpu"}, 0),
        ({"dtype": "auto"}, 0),
    ],
)
def test_loading_options(students, checkpoints, recipe, options, tolerance):
    model = AutoModelForCausalLM.from_pretrained(checkpoints[recipe], **options)
    expected = logits(students[recipe])
    assert (logits(model).float() - expected).norm() <= tolerance * expected.norm()
    assert model.dtype == (options["dtype"] if isinstance(options.get("dtype"), torch.dtype) else torch.float32)


def test_sharded_files(students, tmp_path):
    student = students["tqcompressor-attention"]
    student.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student))


def test_meta_device(checkpoints, students):
    """A skeleton without memory, as accelerate makes before it dispatches a large model."""
    config = AutoModelForCausalLM.from_pretrained(checkpoints["tqcompressor"]).config
    from kronfold.planner.planning import skeleton_of

    model = AutoModelForCausalLM.from_pretrained(checkpoints["tqcompressor"], device_map="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert cost(model) == cost(students["tqcompressor"])
    assert skeleton_of(config).device.type == "meta"


@each_recipe
def test_generate_with_cache_is_generate_without(checkpoints, recipe):
    model = AutoModelForCausalLM.from_pretrained(checkpoints[recipe])
    prompt = pico.ids(model, rows=1, length=5)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))


def test_compile(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["tqcompressor-attention"])
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(pico.ids(model)).logits, model(pico.ids(model)).logits)


def test_other_heads_take_the_body(students, checkpoints):
    body = AutoModel.from_pretrained(checkpoints["tqcompressor"])
    ids = pico.ids(students["tqcompressor"])
    expected = students["tqcompressor"].transformer(ids).last_hidden_state
    assert torch.equal(body(ids).last_hidden_state, expected)
    classifier = AutoModelForSequenceClassification.from_pretrained(checkpoints["tqcompressor"], pad_token_id=0)
    assert classifier(ids).logits.shape == (2, 2)


def test_a_loaded_model_trains_and_changes_dtype(checkpoints):
    model = AutoModelForCausalLM.from_pretrained(checkpoints["tqcompressor-attention"])
    ids = pico.ids(model)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.shape != (64, 32))
    assert model.half().float().dtype == torch.float32


@each_recipe
def test_to_dense_is_a_plain_model_with_the_same_logits(students, tmp_path, recipe):
    dense = kf.to_dense(students[recipe])
    torch.testing.assert_close(logits(dense), logits(students[recipe]), rtol=0, atol=1e-5)
    is_tied = recipe != "tqcompressor-untied"
    assert (dense.lm_head.weight is dense.transformer.wte.weight) == is_tied
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(dense))
    assert cost(dense).held_parameters == cost(pico.gpt2()).held_parameters + (0 if is_tied else 101 * 32)
    torch.testing.assert_close(logits(students[recipe].dequantize()), logits(dense))


# --- what does not fit is refused -------------------------------------------------------------------------------


def _broken(checkpoint, tmp_path, change_config=None, change_weights=None):
    config = json.loads((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    if change_config:
        change_config(config["quantization_config"])
    if change_weights:
        change_weights(weights)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


C_FC = "transformer.h.1.mlp.c_fc"
CONFIG_FAULTS = {
    "newer format": (lambda q: q.update(format_version=3), "format version 3.*reads up to 2.*Upgrade"),
    "unknown key": (lambda q: q.update(colour="red"), "unknown keys.*colour"),
    "no specs": (lambda q: q.pop("specs"), "not a mapping"),
    "unknown structure": (lambda q: q["specs"][C_FC].update(structure="kroneker"), "unknown structure.*'kronecker'"),
    "other shape": (lambda q: q["specs"][C_FC].update(a=[16, 16]), r"describes a weight \(64, 32\)"),
    "other module": (lambda q: q["specs"].update({"transformer.h.9.x": q["specs"][C_FC]}), "no such module"),
}
A = f"{C_FC}.a.weight"  # the terms one below the other
WEIGHT_FAULTS = {
    "missing factor": (lambda w: w.pop(A), f"{A}: missing, expected shape"),
    "missing gather": (lambda w: w.pop("transformer.wte.weight"), "transformer.wte.weight: missing"),
    "wrong rank": (lambda w: w.update({f"{C_FC}.b": w[f"{C_FC}.b"][:2].clone()}), r"shape \(2, .*expected \(4, "),
    "lost terms": (lambda w: w.update({A: w[A][:2].clone()}), r"shape \(2, .*expected \(128, "),
    "dense weight": (lambda w: w.update({f"{C_FC}.weight": torch.zeros(2)}), "not part of this structure"),
}


@pytest.mark.parametrize("fault", CONFIG_FAULTS)
def test_a_config_that_does_not_fit_is_refused(checkpoints, tmp_path, fault):
    change, message = CONFIG_FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(_broken(checkpoints["tqcompressor"], tmp_path, change))


@pytest.mark.parametrize("fault", WEIGHT_FAULTS)
def test_weights_that_do_not_fit_are_refused(checkpoints, tmp_path, fault):
    change, message = WEIGHT_FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(_broken(checkpoints["tqcompressor"], tmp_path, None, change))


def test_config_object_round_trip():
    config = KronfoldConfig({"x": {"structure": "kronecker"}})
    again = KronfoldConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert config.to_dict()["quant_method"] == "kronfold"


def test_import_is_light():
    program = "import sys, kronfold; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
