"""The command line as a person uses it: exit codes, one document on stdout, errors of one paragraph."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

import pico
from kronfold import __version__
from kronfold.base.errors import CheckpointError
from kronfold.cli import terminal


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return pico.model_directory(tmp_path_factory.mktemp("cli") / "model", n_layer=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(pico.TEXT * 60)
    return path


def test_the_package_runs_as_the_command():
    found = subprocess.run([sys.executable, "-m", "kronfold", "--version"], capture_output=True, text=True, check=True)
    assert found.stdout == f"kronfold {__version__}\n"


def test_help_imports_no_torch():
    program = (
        "import sys\nfrom kronfold.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = """demo plan compress heal run eval inspect validate tune pretrain data teach import-tq compare report
        finetune export"""
    for command in commands.split():
        assert command in done.stdout


@pytest.mark.parametrize(("recipe", "held"), [("tqcompressor", 81_336_388), ("tqcompressor-untied", 119_933_764)])
def test_plan_of_gpt2(call, recipe, held):
    code, out, _ = call("plan", "config:gpt2", "--recipe", recipe, "--json")
    document = json.loads(out)
    assert code == 0
    assert (document["held_parameters"], document["teacher_parameters"]) == (held, 124_439_808)
    code, out, _ = call("plan", "config:gpt2", "--recipe", recipe)
    assert f"{held:,}" in out
    assert "124,439,808" in out


def test_compress_inspect_eval_validate(call, model, text, tmp_path):
    out_dir = tmp_path / "small"
    code, out, _ = call("compress", model, "-r", "tqcompressor", "-o", out_dir, "--json")
    compressed = json.loads(out)
    assert code == 0
    assert compressed["held_parameters"] < compressed["teacher"]["held_parameters"]
    assert all(row["relative_error"] > 0 for row in compressed["stages"][1]["rows"])

    code, out, _ = call("inspect", out_dir, "--json")
    inspected = json.loads(out)
    assert code == 0
    assert inspected["held_parameters"] == compressed["held_parameters"]
    assert inspected["modules"]["lm_head"] == {"structure": "tied_head"}
    assert inspected["gathers"] == {**compressed["gathers"], "absorbed": 0}
    assert compressed["gathers"]["absorbed"] == 1
    shown = call("inspect", out_dir)[1]
    assert "kronecker" in shown
    assert f"Gathers: {len(compressed['gathers']['remaining'])} remain ({compressed['index_bytes']:,} bytes)" in shown

    measured = tmp_path / "eval.json"
    code, out, _ = call("eval", out_dir, "--eval-text", text, "-o", measured, "--json")
    found = json.loads(out)
    assert code == 0
    assert {"perplexity", "protocol", "tokens", "words", "bytes", "nll"} <= set(found)
    assert json.loads(measured.read_text()) == found
    assert f"{found['perplexity']:.4f}" in call("eval", out_dir, "--eval-text", text)[1]

    assert call("validate", "tqcompressor", "--model", model)[0] == 0
    plan = tmp_path / "plan.json"
    code, out, _ = call("plan", model, "--no-errors", "-o", plan)
    assert code == 0
    assert "Gathers: 1 absorbed by neighbouring layers" in out
    assert json.loads(plan.read_text())["gathers"] == compressed["gathers"]
    assert "fits" in call("validate", plan, "--model", model)[1]
    assert call("compress", model, "--plan", plan, "-o", tmp_path / "by-plan")[0] == 0


def test_heal_improves_and_reports(call, model, text, tmp_path):
    assert call("compress", model, "-r", "tqcompressor", "-o", tmp_path / "small")[0] == 0
    code, out, _ = call(
        "heal", tmp_path / "small", "--teacher", model, "--train-text", text, "--eval-text", text,
        "--heal-tokens", 8000, "--batch-size", 4, "-o", tmp_path / "healed", "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0
    stage = json.loads(out)["stages"][0]
    assert stage["after_healing"] < stage["before_healing"]
    assert json.loads((tmp_path / "healed" / "results.json").read_text())["stages"][0] == stage
    assert not (tmp_path / "healed.partial").exists()
    found = json.loads(call("eval", tmp_path / "healed", "--eval-text", text, "--json")[1])
    assert found["perplexity"] == pytest.approx(stage["after_healing"], rel=1e-5)


def test_heal_resumes_the_same_student_and_teacher_only(call, model, text, tmp_path, monkeypatch):
    """By their whole content: one number in the middle of one matrix is enough."""
    from safetensors.torch import load_file, save_file

    from kronfold.jobs import heal as healing

    assert call("compress", model, "-r", "tqcompressor", "-o", tmp_path / "small")[0] == 0
    shutil.copytree(model, tmp_path / "teacher")
    given = ("heal", tmp_path / "small", "--teacher", tmp_path / "teacher", "--train-text", text)
    given += ("--heal-tokens", 512, "--batch-size", 4, "-o", tmp_path / "out", "--device", "cpu")
    with monkeypatch.context() as patch:
        patch.setattr(healing, "write_saved", lambda *_: 1 / 0)
        assert call(*given)[0] == 1
    for name in ("small", "teacher"):
        file = tmp_path / name / "model.safetensors"
        before = file.read_bytes()
        weights = load_file(file)
        weights["transformer.h.1.attn.c_attn.weight"][7, 5] += 0.5
        save_file(weights, file, {"format": "pt"})
        code, _, err = call(*given, "--resume")
        assert code == 2
        assert f"other options ({'student' if name == 'small' else 'teacher'})" in " ".join(err.split())
        file.write_bytes(before)
    assert call(*given, "--resume")[0] == 0
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_overwrite_above_the_input_is_refused(call, model, tmp_path):
    """0.3: `compress zoo/teacher -o zoo --overwrite` deletes the teacher and all beside it, exit 0."""
    zoo = tmp_path / "zoo"
    assert call("compress", model, "-r", "svd", "-o", zoo)[0] == 0
    shutil.copytree(model, zoo / "teacher")
    before = sorted(zoo.rglob("*"))
    commands = {
        "compress": (zoo / "teacher", "-r", "svd"), "export": (zoo / "teacher",),
        "compress --stream": (zoo / "teacher", "-r", "svd"),
    }  # fmt: skip
    for command, arguments in commands.items():
        code, _, err = call(*command.split(), *arguments, "-o", zoo, "--overwrite")
        assert code == 2
        assert "did not write: teacher/config.json" in " ".join(err.split())
        code, _, err = call(*command.split(), *arguments, "-o", zoo / "teacher", "--overwrite")
        assert code == 2
        assert sorted(zoo.rglob("*")) == before


def test_inspect_verifies(call, model, tmp_path):
    from safetensors.torch import load_file

    small = tmp_path / "small"
    assert call("compress", model, "-r", "tqcompressor", "-o", small)[0] == 0
    code, out, _ = call("inspect", small, "--verify", "--json")
    assert code == 0
    found = json.loads(out)["verified"]
    assert (found["files"], found["unlisted"]) == (len(list(small.iterdir())) - 1, [])
    assert "verified: " in call("inspect", small, "--verify")[1]
    content = bytearray((small / "model.safetensors").read_bytes())
    factor = next(value for value in load_file(small / "model.safetensors").values() if value.is_floating_point())
    content[content.find(factor.numpy().tobytes())] ^= 1
    (small / "model.safetensors").write_bytes(content)
    assert call("inspect", small)[0] == 0  # a number like any other
    code, out, err = call("inspect", small, "--verify", "--json")
    assert (code, out) == (2, "")
    assert "model.safetensors has the right size and another content" in " ".join(err.split())
    code, _, err = call("inspect", model, "--verify")
    assert (code, "results of version 0.3 and of other tools have none" in " ".join(err.split())) == (2, True)


def test_a_gather_that_is_no_permutation_is_refused(call, model, tmp_path):
    from safetensors.torch import load_file, save_file

    small = tmp_path / "small"
    assert call("compress", model, "-r", "tqcompressor", "-o", small)[0] == 0
    weights = load_file(small / "model.safetensors")
    name = next(name for name, value in weights.items() if value.dtype == torch.int32)
    for wrong in (int(weights[name][1]), -1, len(weights[name])):
        save_file({**weights, name: weights[name].index_fill(0, torch.tensor([0]), wrong)}, small / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"{name} of the checkpoint is no permutation of 0 to"):
            AutoModelForCausalLM.from_pretrained(small)
        code, _, err = call("export", small, "-o", tmp_path / "plain")
        assert (code, "is no permutation" in " ".join(err.split())) == (2, True)


def test_compare_and_report(call, model, text, tmp_path):
    place = tmp_path / "out"
    arguments = ("compare", model, "--recipes", "svd", "--text", text, "--heal-tokens", "2048", "-o", place)
    code, _, err = call(*arguments, "--eval", f"a={text}", "--eval", f"a={text}")
    assert code == 2
    assert "Two texts are called 'a'" in err
    code, out, err = call(*arguments, "--eval", f"own={text}", "--target-ratio", "0.7", "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document == json.loads((place / "results.json").read_text())
    assert [row["recipe"] for row in document["rows"]] == ["svd"]
    assert list(document["teacher"]["perplexities"]) == ["own"]
    code, out, err = call("report", place / "results.json", "-o", tmp_path / "page.html")
    assert code == 0, err
    assert "svd" in out
    assert (tmp_path / "page.html").read_text() == (place / "report.html").read_text()
    code, _, err = call("compare", model, "--objective", "sme", "--text", text, "--eval", text, "-o", tmp_path / "x")
    assert code == 2
    assert "same" in err


def test_export_folds_back(call, model, tmp_path):
    code, _, err = call("compress", model, "-r", "tqcompressor", "-o", tmp_path / "small")
    assert code == 0, err
    code, out, err = call("export", tmp_path / "small", "-o", tmp_path / "plain", "--json")
    assert code == 0, err
    assert json.loads(out)["held_parameters"] > json.loads(out)["source"]["held_parameters"]
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    plain, small = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("plain", "small"))
    ids = pico.ids(plain)
    torch.testing.assert_close(plain(ids).logits, small(ids).logits, rtol=1e-4, atol=1e-5)
    code, _, err = call("export", tmp_path / "small", "-o", tmp_path / "plain")
    assert code == 2
    assert "exists" in err


def test_data_stdlib(call, tmp_path):
    code, out, _ = call("data", "stdlib", "-o", tmp_path / "text", "--json")
    assert code == 0
    assert json.loads(out) == json.loads((tmp_path / "text" / "manifest.json").read_text())


# --- named bad input: exit code 2, one paragraph, files as they were ------------------------------------------------


def _truncated(model, tmp_path):
    place = tmp_path / "cut"
    place.mkdir()
    for file in model.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    weights = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    return place


def _without(model, tmp_path, *names):
    place = tmp_path / "lacking"
    place.mkdir()
    for file in model.iterdir():
        if file.name not in names:
            (place / file.name).write_bytes(file.read_bytes())
    return place


def _mismatched(model, tmp_path, **changes):
    place = _without(model, tmp_path)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, **changes}))
    return place


def _file(tmp_path, name, content: bytes):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


BAD = {
    "truncated weights": (lambda m, t: ["inspect", _truncated(m, t)], "cut short or damaged"),
    "weights lack a layer": (lambda m, t: ["inspect", _mismatched(m, t, n_layer=3)], "config.json.*missing: .*h.2"),
    "weights of another width": (lambda m, t: ["inspect", _mismatched(m, t, n_embd=64)], "config.json.*wrong shape"),
    "weights have a layer more": (lambda m, t: ["inspect", _mismatched(m, t, n_layer=1)], "not in the config: .*h.1"),
    "config of no model": (lambda m, t: ["inspect", _mismatched(m, t, model_type="gpt9")], "Could not open"),
    "no tokenizer": (
        lambda m, t: ["eval", _without(m, t, "tokenizer.json"), "--text", _file(t, "t.txt", b"the fox")],
        "no tokenizer",
    ),
    "no weights": (lambda m, t: ["inspect", _without(m, t, "model.safetensors")], "no .safetensors file"),
    "no config": (lambda m, t: ["inspect", _without(m, t, "config.json")], "no config.json"),
    "empty text": (lambda m, t: ["eval", m, "--text", _file(t, "t.txt", b"")], "no text|empty"),
    "short text": (
        lambda m, t: ["heal", m, "--teacher", m, "--train-text", _file(t, "t.txt", b"the fox"), "-o", t / "out"],
        "3 tokens, less than one block of 64",
    ),
    "not UTF-8": (lambda m, t: ["eval", m, "--text", _file(t, "t.txt", b"caf\xe9 au lait")], "not UTF-8.*offset 3"),
    "no such text": (lambda m, t: ["eval", m, "--text", t / "none.txt"], "does not exist"),
    "no such model": (lambda m, t: ["plan", t / "none"], "no directory"),
    "unknown recipe": (lambda m, t: ["plan", m, "--recipe", "tqcompresor"], "Did you mean 'tqcompressor'"),
    "unknown protocol": (
        lambda m, t: ["eval", m, "--text", _file(t, "t.txt", b"the fox"), "--protocol", "slding"],
        "Did you mean 'sliding'",
    ),
    "unknown dtype": (lambda m, t: ["compress", m, "-o", t / "out", "--dtype", "int4"], "Allowed: float32"),
    "output exists": (lambda m, t: ["compress", m, "-o", m], "exists already.*--overwrite"),
    "output inside a file": (
        lambda m, t: ["compress", m, "-o", _file(t, "f", b"x") / "out"],
        "is a file, not a directory",
    ),
    "no weights in a size": (lambda m, t: ["compress", "config:gpt2", "-o", t / "out"], "names a size, not weights"),
    "no such device": (
        lambda m, t: ["eval", m, "--text", _file(t, "t.txt", b"fox"), "--device", "warp"],
        "cannot be used",
    ),
    "unknown option": (lambda m, t: ["plan", m, "--recipee", "x"], "No such option"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(call, model, tmp_path, case):
    make, message = BAD[case]
    arguments = make(model, tmp_path)
    before = {path: path.read_bytes() for path in [*tmp_path.rglob("*"), *model.iterdir()] if path.is_file()}
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert re.search(message, " ".join(err.split())), err
    after = {path: path.read_bytes() for path in [*tmp_path.rglob("*"), *model.iterdir()] if path.is_file()}
    assert after == before


def test_debug_shows_the_traceback(call, tmp_path):
    code, _, err = call("plan", tmp_path / "none", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_a_fault_of_our_own_is_exit_1(call, monkeypatch):
    import kronfold.planner.recipe

    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(kronfold.planner.recipe, "load_recipe", broken)
    code, _, err = call("validate", "tqcompressor")
    assert code == 1
    assert "planted" in err
    assert "--debug" in err


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_weights_that_cannot_be_fitted(call, tmp_path, value):
    import torch

    model = pico.gpt2(n_layer=2)
    with torch.no_grad():
        weight = model.transformer.h[1].mlp.c_fc.weight
        weight.zero_() if value == 0 else weight[3, 4].fill_(value)
    model.save_pretrained(tmp_path / "bad")
    pico.tokenizer().save_pretrained(tmp_path / "bad")
    code, _, err = call("compress", tmp_path / "bad", "-r", "tqcompressor", "-o", tmp_path / "out")
    assert code == 2
    assert "transformer.h.1.mlp.c_fc" in err
    assert not (tmp_path / "out").exists()


# As the operating system says it, and as safetensors does.
FULL_DISK = [
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


@pytest.mark.parametrize("error", FULL_DISK, ids=["OSError", "SafetensorError"])
def test_a_full_disk_leaves_the_old_checkpoint(call, model, tmp_path, monkeypatch, error):
    assert call("compress", model, "-r", "tqcompressor", "-o", tmp_path / "small")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}

    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    code, _, err = call("compress", model, "-r", "tqcompressor", "-o", tmp_path / "small", "--overwrite")
    assert code == 2
    assert "No space left" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_what_libraries_print_is_no_result(capsys):
    """DeepSpeed, once it is installed, logs on stdout; a JSON document must stand there alone."""
    with terminal.progress_bar():
        print("chatter")
    terminal.emit({"held_parameters": 3}, True)
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"held_parameters": 3}
    assert "chatter" in shown.err
