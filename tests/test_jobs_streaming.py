"""Compressing block by block from files: the same checkpoint, bit for bit, in little memory, and resumable."""

from __future__ import annotations

import gc
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

import kronfold as kf
import pico
from kronfold.base.errors import KronfoldError
from kronfold.jobs import stream as streaming
from kronfold.jobs.compress import compress_to
from kronfold.jobs.stream import compress_streaming
from kronfold.models.load import load_model, preset_config
from kronfold.models.weight_files import WeightFiles
from kronfold.planner.budget import Budget

EVERYTHING = """
name: everything
stages:
  - name: first
    compress:
      - {modules: role:embedding, block: [1, 2], permute: in}
      - {modules: role:attention_in, block: [2, 2], rank: 2, permute: none}
      - {modules: [role:mlp_in, role:mlp_out], blocks: odd, block: [4, 4], rank: 3, permute: none}
  - name: second
    compress:
      - {modules: role:embedding, block: [1, 2], permute: in}
      - {modules: role:attention_out, structure: low_rank, ratio: 0.6}
      - {modules: [role:mlp_out], blocks: odd, structure: low_rank, ratio: 0.4}
"""
HEAD = """
name: head
stages:
  - name: only
    compress:
      - {modules: [role:head, role:mlp_in], structure: low_rank, ratio: 0.5}
"""
SHORTER = """
name: shorter
stages:
  - name: only
    layers: [0, 3]
    compress:
      - {modules: role:mlp_in, blocks: odd, block: [4, 2], rank: 2}
"""
AFTERWARDS = """
name: afterwards
stages:
  - name: only
    compress:
      - {modules: role:attention_out, structure: low_rank, ratio: 0.6}
"""


def save(model, place, size="1GB", dtype=torch.float16):
    """A model directory in shards of at most `size`."""
    model.to(dtype).save_pretrained(place, max_shard_size=size)
    pico.tokenizer().save_pretrained(place)
    return place


def tensors(place):
    return {name: value for file in sorted(place.glob("*.safetensors")) for name, value in load_file(file).items()}


def same(a, b):
    """Equal tensors, bit for bit, and equal files beside them."""
    first, second = tensors(a), tensors(b)
    assert set(first) == set(second)
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (a / name).read_text() == (b / name).read_text()
    found = [json.loads((place / "results.json").read_text()) for place in (a, b)]
    for key in set(found[0]) - {"created", "plan_seconds", "decompose_seconds", "streamed"}:
        assert found[0][key] == found[1][key], key


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A GPT-2 of 4 blocks in many small shards, half precision."""
    return save(pico.gpt2(), tmp_path_factory.mktemp("source") / "gpt2", "20KB")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Name of a recipe -> what stands for it: the recipes above are files."""
    place = tmp_path_factory.mktemp("recipes")
    own = {"everything": EVERYTHING, "head": HEAD, "shorter": SHORTER, "afterwards": AFTERWARDS}
    for name, text in own.items():
        (place / f"{name}.yaml").write_text(text)
    return lambda name: str(place / f"{name}.yaml") if name in own else name


def both(source, place, recipe):
    compress_to(str(source), place / "whole", recipe, seed=3)
    compress_streaming(str(source), place / "parts", recipe, seed=3)
    same(place / "whole", place / "parts")
    assert sorted(path.name for path in place.iterdir()) == ["parts", "whole"]
    assert len(list((place / "parts").glob("*.safetensors"))) > 1


# --- the same as in memory ------------------------------------------------------------------------------------------

NAMES = ["tqcompressor", "kngpt2", "kngpt2-untied", "svd", "tensorgpt", "everything", "shorter", "short-study-3l"]


@pytest.mark.parametrize("name", NAMES)
def test_gpt2_as_in_memory(source, recipe, tmp_path, name):
    assert len(list(source.glob("*.safetensors"))) > 4
    both(source, tmp_path, recipe(name))


FAMILIES = [
    ("llama", "tqcompressor"),
    ("llama", "head"),
    ("llama-tied", "svd"),
    ("llama-tied", "kngpt2"),
    ("llama-tied", "everything"),
    ("gpt_neo", "kngpt2"),
]


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_other_families_as_in_memory(recipe, tmp_path, family, name):
    source = save(pico.family(family), tmp_path / "source", dtype=torch.bfloat16)
    (tmp_path / "out").mkdir()
    both(source, tmp_path / "out", recipe(name))


def test_a_compressed_checkpoint_as_in_memory(source, recipe, tmp_path):
    compress_streaming(str(source), tmp_path / "first", "kngpt2")
    (tmp_path / "out").mkdir()
    both(tmp_path / "first", tmp_path / "out", recipe("afterwards"))
    ids = torch.arange(40).view(2, 20)
    whole, parts = (load_model(tmp_path / "out" / name) for name in ("whole", "parts"))
    assert torch.equal(whole(ids).logits, parts(ids).logits)


def test_names_without_prefix_and_a_head_held_twice(source, tmp_path):
    """As the published GPT-2 files are, and as many tied ones."""
    place = tmp_path / "bare"
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors*"))
    held = {name.removeprefix("transformer."): value for name, value in tensors(source).items()}
    held["lm_head.weight"] = held["wte.weight"].clone()
    save_file(held, place / "model.safetensors", {"format": "pt"})
    compress_streaming(str(source), tmp_path / "a", "kngpt2")
    compress_streaming(str(place), tmp_path / "b", "kngpt2")
    first, second = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert set(first) == set(second)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# --- memory ---------------------------------------------------------------------------------------------------------


def storages():
    """Bytes of every tensor in memory, by address; several views of one storage count once."""
    gc.collect()
    held = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if t.device.type == "cpu"}


class Meter:
    """Notes of every call of `WeightFiles.read` what was read, and what was in memory after it."""

    def __init__(self, monkeypatch):
        self.names, self.sizes, self.live = [], [], []
        before, read = set(storages()), WeightFiles.read

        def metered(files, names):
            found = read(files, names)
            self.names += found
            self.sizes.append(sum(value.numel() * value.element_size() for value in found.values()))
            self.live.append(sum(size for key, size in storages().items() if key not in before))
            return found

        monkeypatch.setattr(WeightFiles, "read", metered)


def test_one_part_is_in_memory_at_a_time(source, tmp_path, monkeypatch):
    meter = Meter(monkeypatch)
    compress_streaming(str(source), tmp_path / "out", "kngpt2")
    assert sorted(meter.names) == sorted(tensors(source))  # each once
    assert len(meter.sizes) == 5
    assert sum(meter.sizes) > 4 * max(meter.sizes) * 0.9
    assert max(meter.live) <= 1.05 * max(meter.sizes)


class Largest(TorchDispatchMode):
    """The largest tensor made outside the meta device, in numbers."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if isinstance(found, torch.Tensor) and found.device.type != "meta":
            self.size = max(self.size, found.numel())
        return found


def test_a_plan_allocates_no_weights():
    with Largest() as largest:
        made = kf.plan(preset_config("gpt2"), "tqcompressor")
        torch.zeros(7)
    assert made.held_parameters == 81_336_388
    assert 7 <= largest.size < 10_000


# --- interrupted and resumed ------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def kill_at(monkeypatch, part):
    """Let writing of the shard with this number (from 1) be the end of the process."""
    write = streaming.write_shard

    def stop(path, *arguments):
        if f"-0000{part}-of" in path.name:
            raise Killed
        return write(path, *arguments)

    monkeypatch.setattr(streaming, "write_shard", stop)


# recipe, whether the source is compressed already, shard that is not written, blocks of the source that are read again
KILLS = [("kngpt2", False, 4, "023"), ("afterwards", True, 4, "023"), ("shorter", False, 3, "03")]


@pytest.mark.parametrize(("name", "compressed", "last", "again"), KILLS)
def test_killed_and_resumed(source, recipe, tmp_path, monkeypatch, name, compressed, last, again):
    if compressed:
        compress_streaming(str(source), tmp_path / "source", "kngpt2")
        source = tmp_path / "source"
    arguments = (str(source), tmp_path / "out", recipe(name))
    compress_streaming(str(source), tmp_path / "whole", recipe(name))
    with monkeypatch.context() as patch:
        kill_at(patch, last)
        with pytest.raises(Killed):
            compress_streaming(*arguments)
    partial = tmp_path / "out.partial"
    assert not (tmp_path / "out").exists()
    shards = sorted((partial / "result").glob("*.safetensors"))
    assert [shard.name[:11] for shard in shards] == [f"model-0000{i}" for i in range(1, last)]
    with pytest.raises(KronfoldError, match="unfinished run.*--resume"):
        compress_streaming(*arguments)
    with pytest.raises(KronfoldError, match="other options .*seed"):
        compress_streaming(*arguments, seed=8, resume=True)
    shards[1].write_bytes(b"cut")  # block 0 has to be done again
    meter = Meter(monkeypatch)
    compress_streaming(*arguments, resume=True)
    assert {re.search(r"h\.(\d)", key)[1] for key in meter.names} == set(again)
    same(tmp_path / "whole", tmp_path / "out")
    assert not partial.exists()
    assert not {path.name for path in (tmp_path / "out").iterdir()} & {"job.json", "lock"}
    with pytest.raises(KronfoldError, match="nothing to resume"):
        compress_streaming(*arguments, resume=True, overwrite=True)


# --- what is refused ------------------------------------------------------------------------------------------------


def _copy(source, place, without=()):
    return shutil.copytree(source, place / "copy", ignore=shutil.ignore_patterns(*without))


def _changed(source, place, **changes):
    copy = _copy(source, place)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def _other_head(source, place):
    copy = _copy(source, place, ["*.safetensors*"])
    held = tensors(source)
    save_file({**held, "lm_head.weight": held["transformer.wte.weight"] + 1}, copy / "model.safetensors")
    return copy


def _pickled(source, place):
    copy = _copy(source, place, ["*.safetensors*"])
    torch.save(tensors(source), copy / "pytorch_model.bin")
    return copy


BAD = {
    "a shard is missing": (lambda s, t: [_copy(s, t, ["*00002-of*"])], {}, "lacks the shards model-00002"),
    "another width": (lambda s, t: [_changed(s, t, n_embd=64)], {}, "wrong shape: transformer.wte.weight .101, 32"),
    "a layer more": (lambda s, t: [_changed(s, t, n_layer=5)], {}, "missing: transformer.h.4"),
    "a layer less": (lambda s, t: [_changed(s, t, n_layer=3)], {}, "not in the config: transformer.h.3"),
    "two heads": (lambda s, t: [_other_head(s, t)], {}, "are one tensor, and the files hold different ones"),
    "pickled": (lambda s, t: [_pickled(s, t)], {}, "holds no .safetensors file.*save_pretrained"),
    "no weights": (lambda s, t: ["config:gpt2"], {}, "names a size, not weights"),
    "gguf": (lambda s, t: [t / "model.gguf"], {}, "cannot be read block by block"),
    "not downloaded": (lambda s, t: ["some/model"], {}, "not on this machine. Download it first"),
    "no tokenizer": (lambda s, t: [_copy(s, t, ["tokenizer.json"])], {}, "no tokenizer"),
    "output exists": (lambda s, t: [s, s], {}, "exists already.*--overwrite"),
    "planned recipe": (lambda s, t: [s, t / "out", "auto"], {}, "Recipe 'auto' needs the whole model.*fixed shapes"),
    "text": (lambda s, t: [s], {"calibration": ["a.txt"]}, "Calibration text needs the whole model"),
    "budget": (lambda s, t: [s], {"budget": Budget("params", ratio=0.5)}, "A budget needs the whole model"),
    "unknown recipe": (lambda s, t: [s, t / "out", "tqcompresor"], {}, "Did you mean 'tqcompressor'"),
    "unknown dtype": (lambda s, t: [s], {"dtype": "int4"}, "Allowed: float32"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(source, tmp_path, case):
    make, options, message = BAD[case]
    given = make(source, tmp_path)
    model, output, recipe = given + [None, tmp_path / "out", "tqcompressor"][len(given) :]
    before = sorted(path for path in tmp_path.rglob("*"))
    with pytest.raises(KronfoldError) as caught:
        compress_streaming(str(model), output, recipe, **options)
    assert re.search(message, " ".join(str(caught.value).split()))
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_weight_that_cannot_be_fitted_leaves_what_is_done(source, tmp_path):
    held = tensors(source)
    held["transformer.h.3.mlp.c_fc.weight"][2, 5] = float("nan")
    copy = _copy(source, tmp_path, ["*.safetensors*"])
    save_file(held, copy / "model.safetensors")
    with pytest.raises(KronfoldError, match="transformer.h.3.mlp.c_fc"):
        compress_streaming(str(copy), tmp_path / "out", "kngpt2")
    assert len(list((tmp_path / "out.partial" / "result").glob("*.safetensors"))) == 4
    assert not (tmp_path / "out").exists()


# --- command ----------------------------------------------------------------------------------------------------------


def test_command(source, tmp_path, call):
    given = ("compress", source, "-o", tmp_path / "out")
    code, out, err = call(*given, "--stream", "-r", "kngpt2-untied", "--dtype", "float32", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document == json.loads((tmp_path / "out" / "results.json").read_text())
    assert document["streamed"]["parts"] == 5
    written = tensors(tmp_path / "out").values()
    assert {value.dtype for value in written if value.shape != (1,)} == {torch.float32}
    assert {value.dtype for value in written if value.shape == (1,)} == {torch.uint8}  # the guards
    code, _, err = call(*given, "--resume", "-r", "tqcompressor", "--overwrite")
    assert (code, "Only a compression with --stream" in " ".join(err.split())) == (2, True)
    code, _, err = call(*given, "--stream", "-r", "tqcompressor", "--overwrite", "--sequential")
    assert (code, "takes no sequential" in " ".join(err.split())) == (2, True)
    code, _, err = call(*given, "--stream", "--overwrite")
    assert (code, "Recipe 'auto' needs" in " ".join(err.split())) == (2, True)
