"""The bridge to lm-eval, on a task of our own read from disk, against the numbers of our own LAMBADA."""

from __future__ import annotations

import builtins
import json

import pytest
import torch

import kronfold as kf
import pico
from kronfold.base.errors import InputError
from kronfold.evaluate.harness import harness
from kronfold.evaluate.lambada import lambada

pytest.importorskip("lm_eval")
PASSAGES = ["the quick brown fox jumps over the lazy dog", "the other dog sleeps under the old brown tree", "the fox"]
TASK = """\
task: pico_lambada
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A directory with one task."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pico.yaml").write_text(TASK.format(path=path))
    return tmp_path / "tasks"


def test_its_lambada_is_ours_on_dense_and_structured_models(teacher, tasks, capsys) -> None:
    tokenizer = pico.tokenizer()
    for model in (teacher, kf.compress(pico.gpt2(n_layer=2), "tqcompressor")):
        before = model(pico.ids(model)).logits
        found = harness(model, tokenizer, ["pico_lambada"], include=tasks)
        ours = lambada(model, tokenizer, PASSAGES)
        scores = found["results"]["pico_lambada"]
        assert scores["perplexity,none"] == pytest.approx(ours.perplexity, rel=1e-5)
        assert scores["acc,none"] == ours.accuracy
        assert torch.equal(model(pico.ids(model)).logits, before)
    assert tokenizer.pad_token is None  # what the harness sets, it sets on a copy
    assert capsys.readouterr().out == ""


def test_bad_input(teacher, tasks, monkeypatch) -> None:
    from lm_eval import tasks as theirs

    class Known:  # reading all of lm-eval's own task files takes ten seconds
        all_tasks = ("arc_easy", "pico_lambada")

        def __init__(self, **_: object) -> None: ...

    monkeypatch.setattr(theirs, "TaskManager", Known)
    with pytest.raises(InputError, match="'arc_eazy': Did you mean 'arc_easy'"):
        harness(teacher, pico.tokenizer(), ["arc_eazy"], include=tasks)
    with pytest.raises(InputError, match="at least one task"):
        harness(teacher, pico.tokenizer(), [], include=tasks)
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("lm_eval"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'kronfold\[harness\]'"):
        harness(teacher, pico.tokenizer(), ["arc_easy"])
