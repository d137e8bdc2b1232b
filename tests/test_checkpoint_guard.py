"""Nobody gets a random model: transformers without kronfold refuses our checkpoints by name, and what we save loads."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPTNeoXConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
)
from transformers.utils import logging as hf_logging

import kronfold as kf
import pico
from kronfold.base.errors import CheckpointError
from kronfold.export.checkpoint import verify_written, write_model
from kronfold.export.quantizer import KronfoldConfig
from kronfold.jobs import stream as streaming
from kronfold.jobs.compress import compress_to
from kronfold.jobs.stream import compress_streaming
from kronfold.models.load import load_model
from kronfold.models.place import read_specs
from kronfold.models.weight_files import read_headers
from kronfold.options import read
from kronfold.planner.recipe import Recipe
from kronfold.structures.levels import TiedHead

GOLDEN = Path(__file__).parent / "golden" / "v0.3"
# All but the one that only has fewer blocks, which any transformers reads.
OLD = sorted(path.stem for path in GOLDEN.glob("*.safetensors") if path.stem != "gpt2-distilgpt2")
C_FC = "transformer.h.1.mlp.c_fc"
RECIPE = "tqcompressor-attention"

# Loads every directory named in places.json by every class, as a user without kronfold would, and tells what happened.
STOCK = """
import sys
sys.modules["kronfold"] = None  # an import of it fails, as where it is not installed
import io, json, logging, transformers
told = io.StringIO()
transformers.logging.add_handler(logging.StreamHandler(told))
found = {}
for name, place in json.load(open("places.json")).items():
    for kind in ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification", "ignoring"):
        options = {"ignore_mismatched_sizes": True} if kind == "ignoring" else {}
        factory = getattr(transformers, "AutoModelForCausalLM" if kind == "ignoring" else kind)
        told.seek(0), told.truncate()
        try:
            factory.from_pretrained(place, **options)
            end = "loaded"
        except RuntimeError as error:
            end = str(error)
        found[f"{name} {kind}"] = [end, told.getvalue()]
json.dump(found, open("found.json", "w"))
"""


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(pico.ids(model)).logits


def guarded(place: Path) -> set[str]:
    """Modules whose guard lies in the files."""
    return {
        name.removesuffix(".weight")
        for name, shape in read_headers(place.glob("*.safetensors")).items()
        if shape == (1,) and name.endswith(".weight")
    }


@pytest.fixture(scope="module")
def saved(students, tmp_path_factory):
    """The same kind of model saved in every way there is: name -> directory."""
    root = tmp_path_factory.mktemp("saved")
    source = pico.model_directory(root / "source")
    student = students[RECIPE]
    student.save_pretrained(root / "plain")
    student.save_pretrained(root / "sharded", max_shard_size="8KB")
    AutoModelForCausalLM.from_pretrained(root / "plain", dtype=torch.bfloat16).save_pretrained(root / "again")
    AutoModel.from_pretrained(root / "plain").save_pretrained(root / "body")
    AutoModelForSequenceClassification.from_pretrained(root / "plain", pad_token_id=0).save_pretrained(root / "classes")
    compress_to(str(source), root / "command", "tqcompressor")
    compress_streaming(str(source), root / "streamed", "tqcompressor")
    for name in OLD:
        AutoModelForCausalLM.from_pretrained(GOLDEN / name).save_pretrained(root / f"old-{name}")
    return {path.name: path for path in sorted(root.iterdir()) if path.name != "source"}


def test_transformers_without_kronfold_refuses_by_name(saved, tmp_path):
    (tmp_path / "places.json").write_text(json.dumps({name: str(place) for name, place in saved.items()}))
    done = subprocess.run([sys.executable, "-c", STOCK], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 4 * len(saved) == 4 * (7 + 9)
    for case, (end, told) in found.items():
        kind = case.split()[1]
        assert re.search(r"((layers|h)\..+|wte)\.weight +\| MISMATCH", told), case
        if kind == "ignoring":
            assert end == "loaded", case  # asked for; every compressed weight is still named
        else:
            assert "ignore_mismatched_sizes" in end, case


def test_every_compressed_weight_is_guarded(saved):
    for name, place in saved.items():
        model = AutoModel.from_pretrained(place) if name == "body" else AutoModelForCausalLM.from_pretrained(place)
        specs = read_specs(model)
        own = {key.removesuffix(".weight") for key in model.state_dict() if key.endswith(".weight")}
        follows = {key for key in specs if isinstance(model.get_submodule(key), TiedHead)}
        assert guarded(place) == set(specs) - own - follows, name
        assert guarded(place) or set(specs) & own, name
        content = json.loads((place / "config.json").read_text())["quantization_config"]
        assert "import kronfold" in content["load_with"]
        assert content["format_version"] == 2


def test_with_kronfold_it_loads_and_nothing_is_said(saved, students):
    told = io.StringIO()
    handler = hf_logging.logging.StreamHandler(told)
    hf_logging.add_handler(handler)
    try:
        for name in ("plain", "sharded", "command", "streamed"):
            model, info = AutoModelForCausalLM.from_pretrained(saved[name], output_loading_info=True)
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
            like = RECIPE if name in ("plain", "sharded") else "tqcompressor"
            assert torch.equal(logits(model), logits(students[like])), name
        AutoModel.from_pretrained(saved["plain"])
    finally:
        hf_logging.remove_handler(handler)
    assert told.getvalue() == ""


def test_a_body_saved_alone_becomes_a_language_model_again(saved, students):
    """The head follows the embedding, which the body's config says; a classifier's body alike."""
    for name in ("body", "classes"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(saved[name])), logits(students[RECIPE])), name
    body = AutoModel.from_pretrained(saved["classes"])
    ids = pico.ids(students[RECIPE])
    assert torch.equal(body(ids).last_hidden_state, students[RECIPE].transformer(ids).last_hidden_state)


@pytest.mark.parametrize(
    "options", [{"dtype": torch.float16}, {"ignore_mismatched_sizes": True}, {"device_map": "cpu"}]
)
def test_loading_options_leave_the_guard_out(saved, students, options):
    model = AutoModelForCausalLM.from_pretrained(saved["plain"], **options)
    assert not [key for key, value in model.state_dict().items() if value.shape == (1,)]
    torch.testing.assert_close(logits(model).float(), logits(students[RECIPE]), rtol=0.02, atol=0.02)


def test_a_guard_is_no_leave_to_hide_a_mismatch(saved, tmp_path):
    """A weight under a dense name that is no guard, and factors that do not fit, are refused also when ignoring."""
    config = (saved["plain"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    weights = load_file(saved["plain"] / "model.safetensors")
    save_file({**weights, f"{C_FC}.weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{C_FC}.weight: not part of this structure"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_configs_with_and_without_the_hint_are_read():
    old = {"quant_method": "kronfold", "format_version": 1, "kronfold_version": "0.3.0", "specs": {}}
    assert KronfoldConfig.from_dict(dict(old)).specs == {}
    new = KronfoldConfig({}).to_dict()
    assert KronfoldConfig.from_dict(dict(new)).to_dict() == new


def test_a_dense_export_has_no_guard(saved, tmp_path):
    kf.to_dense(AutoModelForCausalLM.from_pretrained(saved["plain"])).save_pretrained(tmp_path)
    assert guarded(tmp_path) == set()
    verify_written(tmp_path)


# --- what is written is tried before it counts ------------------------------------------------------------------


def _edited(place: Path, tmp_path: Path, change) -> Path:
    for file in place.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.ln_f.weight"), "missing: transformer.ln_f.weight"),
        (lambda w: w.update({"transformer.wpe.weight": torch.zeros(64, 31)}), "wrong shape: transformer.wpe.weight"),
        (lambda w: w.pop(f"{C_FC}.a.weight"), rf"{C_FC}.a.weight: missing"),
        (lambda w: w.pop(f"{C_FC}.weight"), rf"no guard: {C_FC}.weight"),
        (lambda w: w.update({"transformer.h.9.ln_1.weight": torch.zeros(32)}), "not in the config: .*h.9.ln_1"),
    ],
)
def test_what_would_not_load_is_told_by_name(checkpoints, tmp_path, change, message):
    verify_written(checkpoints["tqcompressor"])
    with pytest.raises(CheckpointError, match=f"(?s)would not load.*{message}"):
        verify_written(_edited(checkpoints["tqcompressor"], tmp_path, change))


def test_a_shard_that_is_cut_short_or_gone(saved, tmp_path):
    for file in saved["sharded"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match="would not load.*cut short"):
        verify_written(tmp_path)
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"would not load.*lacks the shards {shard.name}"):
        verify_written(tmp_path)


def test_a_save_that_loses_a_tensor_replaces_nothing(tmp_path, monkeypatch):
    source, output = pico.model_directory(tmp_path / "source"), tmp_path / "out"
    compress_to(str(source), output, "tqcompressor")
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    real = PreTrainedModel.save_pretrained

    def losing(model, place, **options):
        real(model, place, **options)
        weights = load_file(Path(place) / "model.safetensors")
        del weights[f"{C_FC}.b"]
        save_file(weights, Path(place) / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", losing)
    with pytest.raises(CheckpointError, match=rf"{C_FC}.b: missing"):
        compress_to(str(source), output, "tqcompressor", overwrite=True)
    monkeypatch.undo()
    write = streaming.write_shard
    monkeypatch.setattr(
        streaming,
        "write_shard",
        lambda path, tensors, dtype: write(path, {k: v for k, v in tensors.items() if k != f"{C_FC}.b"}, dtype),
    )
    with pytest.raises(CheckpointError, match=rf"{C_FC}.b: missing"):
        compress_streaming(str(source), output, "tqcompressor", overwrite=True)
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


# --- families whose files have other names than the model -------------------------------------------------------

_SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_EXPERTS = {**_SMALL, "num_key_value_heads": 2, "num_experts_per_tok": 2}
RENAMED = {
    "gpt_neox": (lambda: GPTNeoXConfig(**_SMALL), r"^embed_out\."),
    "gpt_neox-tied": (lambda: GPTNeoXConfig(**_SMALL, tie_word_embeddings=True), r"^gpt_neox\."),
    "mixtral": (lambda: MixtralConfig(**_EXPERTS, num_local_experts=3), r"block_sparse_moe\.experts\.2\.w3\.weight"),
    "qwen2_moe": (
        lambda: Qwen2MoeConfig(
            **_EXPERTS, num_experts=3, moe_intermediate_size=16, shared_expert_intermediate_size=16
        ),
        r"mlp\.experts\.2\.up_proj\.weight",
    ),
    "phimoe": (lambda: PhimoeConfig(**_EXPERTS, num_local_experts=3), r"block_sparse_moe\.gate\.weight"),
}  # fmt: skip


def _joined_files():
    """hrm_text: gate and up projection, and all that reads the attention's input, are one tensor each in the files."""
    config = pytest.importorskip("transformers.models.hrm_text").HrmTextConfig
    return config(**{**_SMALL, "num_key_value_heads": 4, "head_dim": 8})


RENAMED["hrm_text"] = (_joined_files, r"attn\.o_proj")


@pytest.fixture(params=RENAMED)
def renamed(request, tmp_path):
    """(directory of a pico model saved by transformers, what a name in its files looks like)."""
    make, pattern = RENAMED[request.param]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(tmp_path / "source")
    pico.tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source", pattern


def test_renamed_families_compress_save_and_load(renamed, tmp_path):
    source, pattern = renamed
    assert any(re.search(pattern, name) for name in read_headers(source.glob("*.safetensors")))
    teacher = load_model(source)
    student = kf.compress(teacher, "svd")
    write_model(student, None, tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(student))
    again = load_model(tmp_path / "saved")
    write_model(again, None, tmp_path / "again")
    assert torch.equal(logits(load_model(tmp_path / "again")), logits(student))
    compress_streaming(str(source), tmp_path / "streamed", "svd")
    assert torch.equal(logits(load_model(tmp_path / "streamed")), logits(student))
    # And back to plain weights, in the names that the family's files have.
    plain = kf.to_dense(again)
    write_model(plain, None, tmp_path / "plain")
    assert any(re.search(pattern, name) for name in read_headers((tmp_path / "plain").glob("*.safetensors")))
    torch.testing.assert_close(logits(load_model(tmp_path / "plain")), logits(student), rtol=0, atol=1e-4)


def test_a_head_that_files_name_otherwise(tmp_path):
    """GPT-NeoX with its head itself compressed: the factors and the guard carry the files' name."""
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(RENAMED["gpt_neox"][0]()).eval()
    entry = {"modules": "role:head", "block": [1, 2], "permute": "in"}
    recipe = {"name": "head", "stages": [{"name": "all", "compress": [entry]}]}
    student = kf.compress(teacher, read(Recipe, recipe, "Recipe head"))
    write_model(student, None, tmp_path)
    assert {name for name in read_headers(tmp_path.glob("*.safetensors")) if name.startswith("embed_out.")} >= {
        "embed_out.a.weight", "embed_out.b", "embed_out.weight"
    }  # fmt: skip
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(student))


def test_no_command_speaks_of_deepspeed(tmp_path):
    """accelerate loads DeepSpeed, where it is installed, when a model is saved; its news is none of ours."""
    pytest.importorskip("deepspeed", reason="pip install kronfold[deepspeed]")
    source = pico.model_directory(tmp_path / "source", n_layer=2)
    command = [sys.executable, "-m", "kronfold", "compress", str(source), "-r", "svd", "-o", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "accelerator" not in done.stdout + done.stderr
