"""Every command is its options class: help, groups, defaults, limits."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from kronfold.base.errors import InputError
from kronfold.cli.command import GROUPS
from kronfold.cli.main import app
from kronfold.options import Options, fields_of, read

# command: (class, what must be given)
COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "demo": ("compressing:DemoOptions", {}),
    "plan": ("compressing:PlanOptions", {}),
    "compress": ("compressing:CompressOptions", {"model": "m", "output": "o"}),
    "heal": ("healing:HealOptions", {"model": "m", "teacher": "t", "train_text": "x", "output": "o"}),
    "run": ("compressing:RunOptions", {"model": "m", "train_text": "x", "eval_text": "y", "output": "o"}),
    "compare": ("compressing:CompareOptions", {"model": "m", "train_text": "x", "eval_text": ["y"], "output": "o"}),
    "report": ("conversion:ReportOptions", {"results": "r"}),
    "eval": ("measuring:EvalOptions", {"model": "m", "eval_text": ["x"]}),
    "inspect": ("measuring:InspectOptions", {"model": "m"}),
    "validate": ("conversion:ValidateOptions", {"recipe": "svd"}),
    "tune": ("measuring:TuneOptions", {}),
    "finetune": ("finetune:FineTuneOptions", {"model": "m", "task": "cola", "output": "o"}),
    "export": ("conversion:ExportOptions", {"model": "m", "output": "o"}),
    "import-tq": ("conversion:ImportOptions", {"path": "p", "output": "o"}),
    "pretrain": ("pretraining:PretrainOptions", {"config": "demo", "output": "o"}),
    "teach": ("healing:TeachOptions", {"model": "m", "train_text": "x", "tokens": 9, "output": "o"}),
    "data stdlib": ("texts:StdlibOptions", {"output": "o"}),
    "data clean": ("texts:CleanOptions", {"source": "s", "output": "o"}),
    "data sample": ("texts:SampleOptions", {"source": "s", "fraction": 0.5, "output": "o"}),
}


def leaves(command: Any, words: tuple[str, ...] = ()) -> dict[str, Any]:
    children = getattr(command, "commands", None)
    if children is None:
        return {" ".join(words): command}
    return {name: leaf for word, child in children.items() for name, leaf in leaves(child, (*words, word)).items()}


FOUND = leaves(typer.main.get_command(app))


def class_of(command: str) -> type[Options]:
    module, name = COMMANDS[command][0].split(":")
    return getattr(importlib.import_module(f"kronfold.options.{module}"), name)


def values(options: Options) -> dict[str, Any]:
    """Every value by the last part of its name, through classes inside; the outer one where two are called alike."""
    inner = [values(value) for _, value in options if isinstance(value, Options)]
    return {name: value for found in [*reversed(inner), dict(options)] for name, value in found.items()}


def test_every_command_has_its_class():
    assert set(FOUND) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_help_and_a_group(command):
    for parameter in FOUND[command].params:
        if parameter.name == "help":
            continue
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.name
        if parameter.param_type_name == "option":
            assert parameter.rich_help_panel in GROUPS, parameter.name


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_shown_are_those_of_the_class(command):
    given = COMMANDS[command][1]
    expected = values(class_of(command)(**given))
    for parameter in FOUND[command].params:
        if parameter.name in ("help", "json"):
            continue
        if parameter.name in given:
            assert parameter.required or parameter.default in (None, [], ()), parameter.name
            continue
        default = expected[parameter.name]
        if isinstance(default, (tuple, list)):
            default = ",".join(map(str, default))
        assert not parameter.required, parameter.name
        assert (parameter.default or None) == (default or None), parameter.name


def test_help_of_every_command_imports_no_torch():
    program = (
        "import sys\nfrom kronfold.cli.main import main\n"
        f"for words in {[name.split() for name in ('', *COMMANDS)]}:\n"
        "    try: main([*words, '--help'])\n    except SystemExit as end: assert not end.code\n"
        "    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for group in GROUPS:
        assert f"─ {group} ─" in done.stdout
    order = [done.stdout.index(f"─ {group} ─", done.stdout.index("{STUDENT}")) for group in GROUPS]
    assert order == sorted(order)


HEAL = ("heal", "m", "--teacher", "t", "--train-text", "x", "-o", "o")
OUT_OF_RANGE = {
    "plan": ("plan", "config:gpt2", "--seed", "-1"),
    "demo": ("demo", "-o", "o", "--seed", str(2**32)),
    "run": ("run", "m", "--train-text", "x", "--eval-text", "x", "-o", "o", "--seed", "-1"),
    "sample": ("data", "sample", "s", "--fraction", "0.5", "-o", "o", "--seed", "-1"),
    "heal": (*HEAL, "--seed", "-7"),
    "fine-tuning": ("finetune", "m", "--task", "cola", "-o", "o", "--seeds", "0,-1"),
}


@pytest.mark.parametrize("case", OUT_OF_RANGE)
def test_a_seed_out_of_range(call, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*OUT_OF_RANGE[case])
    assert (code, out, list(tmp_path.iterdir())) == (2, "", [])
    assert "These options have 1 fault:" in err
    assert "seed" in err.splitlines()[1]


def test_all_faults_of_a_command_at_once(call):
    code, _, err = call(*HEAL, "--heal-tokens", 0, "--learning-rate", "inf", "--ce", -1, "--schedule", "cosin")
    assert code == 2
    assert "These options have 3 faults:" in err
    for words in ("healing.tokens", "healing.learning_rate", "healing.objective.ce"):
        assert words in err
    code, _, err = call(*HEAL, "--schedule", "cosin")
    assert (code, "Did you mean 'cosine'" in err) == (2, True)


def test_the_verb_agrees_with_what_has_the_faults():
    class Two(Options):
        a: int
        b: int

    for label, expected in (
        ("These options", "These options have 2 faults:"),
        ("Recipe mine.yaml", "Recipe mine.yaml has 2 faults:"),
        ("Recipe settings", "Recipe settings has 2 faults:"),
        ("These cleaning settings", "These cleaning settings have 2 faults:"),
    ):
        with pytest.raises(InputError, match=f"^{expected}"):
            read(Two, {}, label)
    with pytest.raises(InputError, match="^These options have 1 fault:"):
        read(Two, {"a": 1}, "These options")
    with pytest.raises(InputError, match="^Config x has 1 fault:"):
        read(Two, {"a": 1}, "Config x")


def test_paths_are_given_as_they_come(tmp_path):
    options = class_of("finetune")(
        model=tmp_path, task="cola", output=tmp_path / "o", train_file=tmp_path / "a", dev_files=[tmp_path / "b"]
    )
    assert (options.model, options.dev_files) == (str(tmp_path), (str(tmp_path / "b"),))


def test_what_a_class_says_itself_comes_first():
    assert list(fields_of(class_of("heal")))[:4] == ["model", "teacher", "train_text", "eval_text"]


@pytest.fixture(scope="module")
def hooks():
    place = Path(__file__).parents[1] / "scripts" / "docs_hooks.py"
    spec = importlib.util.spec_from_file_location("docs_hooks", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", COMMANDS)
def test_docs_list_every_class_and_command(hooks, command):
    docs = Path(__file__).parents[1] / "docs"
    options, commands = ((docs / f"{name}.md").read_text() for name in ("options", "commands"))
    mark = f"kronfold.options.{COMMANDS[command][0]}"
    table = hooks.on_page_markdown(f"{{{{ options {mark} }}}}")
    assert f"\n## {command}\n" in options
    assert f"{{{{ options {mark} }}}}" in options
    for name in fields_of(class_of(command)):
        assert f"| `{name}` |" in table
    page = hooks.on_page_markdown(commands)
    section = page.partition(f"## kronfold {command}\n")[2].partition("\n## ")[0]
    for parameter in FOUND[command].params:
        if parameter.param_type_name == "option" and parameter.name != "help":
            assert f"`{parameter.opts[0]}`" in section
