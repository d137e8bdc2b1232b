"""Reading GLUE tasks: columns found and named, labels as names and numbers, faults told with their line."""

from __future__ import annotations

import gzip
import re
import sys
import types

import pytest

import pico
from kronfold.base.errors import DataError, InputError
from kronfold.data.glue import TASKS, collator, encode_examples, padding_token, read_dataset, read_tsv, task_of


def file(tmp_path, content: str | bytes, name: str = "train.tsv"):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_the_nine_tasks() -> None:
    """Numbers of columns, outputs and dev sets of the GLUE paper's table 1 (WNLI included)."""
    shapes = {name: (len(task.columns), task.outputs, len(task.dev)) for name, task in TASKS.items()}
    assert shapes == {
        "cola": (1, 2, 1), "sst2": (1, 2, 1), "mrpc": (2, 2, 1), "stsb": (2, 1, 1), "qqp": (2, 2, 1),
        "mnli": (2, 3, 2), "qnli": (2, 2, 1), "rte": (2, 2, 1), "wnli": (2, 2, 1),
    }  # fmt: skip
    with pytest.raises(InputError, match="Unknown task 'colla'. Did you mean 'cola'"):
        task_of("colla")


def test_a_tsv_has_no_quoting_and_keeps_odd_characters(tmp_path) -> None:
    rows = 'sentence\tlabel\nSusan whispered "Shut up\t1\r\n"Über\u2028 alles", he said\t0\n'
    found = read_tsv(file(tmp_path, "\ufeff" + rows), TASKS["cola"])
    assert found.texts == [('Susan whispered "Shut up',), ('"Über\u2028 alles", he said',)]
    assert found.labels == [1, 0]
    packed = read_tsv(file(tmp_path, gzip.compress(rows.encode()), "dev.tsv.gz"), TASKS["cola"])
    assert (packed.texts, packed.labels) == (found.texts, found.labels)
    assert found.to_dict()["sha256"] == packed.to_dict()["sha256"]
    assert found.to_dict()["examples"] == 2


@pytest.mark.parametrize(
    ("task", "content", "texts", "labels"),
    [
        ("mrpc", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta b\tc d\n", [("a b", "c d")], [1]),
        ("qqp", "id\tquestion1\tquestion2\tis_duplicate\n0\twho?\twhat?\t0\n", [("who?", "what?")], [0]),
        ("mnli", "index\tsentence1\tsentence2\tgold_label\n0\ta\tb\tneutral\n", [("a", "b")], [1]),
        ("rte", "sentence2\tlabel\tsentence1\nb\tnot_entailment\ta\n", [("a", "b")], [1]),
        ("stsb", "sentence1\tsentence2\tscore\na\tb\t3.75\n", [("a", "b")], [3.75]),
        ("cola", "gj04\t1\t\tit is\ngj04\t0\t*\tis it it\n", [("it is",), ("is it it",)], [1, 0]),  # no header
    ],
)
def test_original_files_are_known(tmp_path, task, content, texts, labels) -> None:
    found = read_tsv(file(tmp_path, content), TASKS[task])
    assert found.texts == texts
    assert found.labels == labels


def test_named_columns(tmp_path) -> None:
    path = file(tmp_path, "why\twhat\thow\n1\tsome text\tx\n")
    assert read_tsv(path, TASKS["sst2"], ("what", "why")).texts == [("some text",)]
    with pytest.raises(InputError, match="needs 2 column names"):
        read_tsv(path, TASKS["sst2"], ("what",))
    with pytest.raises(DataError, match="no column 'whom'.*Columns found: why, what, how"):
        read_tsv(path, TASKS["sst2"], ("whom", "why"))


BAD = {
    "no file": (None, "no file"),
    "empty": ("", "no column 'sentence', 'label'.*Columns found: none"),
    "header only": ("sentence\tlabel\n", "holds no examples"),
    "no label column": ("sentence\tmark\na\t1\n", "no column 'label', which task sst2 needs.*--columns"),
    "short row": ("sentence\tlabel\na\t1\nb\n", "line 3 has 1 columns, the header 2"),
    "label of no task": ("sentence\tlabel\na\t1\nb\t2\n", "line 3 has the label '2'; task sst2 knows 0 .negative., 1"),
    "half a label": ("sentence\tlabel\na\t0.5\n", "line 2 has the label '0.5'"),
    "test set": ("sentence\tlabel\na\t-1\n", "label '-1'.*without labels"),
    "no label": ("sentence\tlabel\na\t\n", "line 2 has no label"),
    "no text": ("sentence\tlabel\n  \t1\n", "line 2 holds no text"),
    "not UTF-8": (b"sentence\tlabel\ncaf\xe9\t1\n", "not UTF-8 text .byte offset 18"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path, case) -> None:
    content, message = BAD[case]
    path = tmp_path / "train.tsv" if content is None else file(tmp_path, content)
    with pytest.raises(DataError) as caught:
        read_tsv(path, TASKS["sst2"])
    assert re.search(message, str(caught.value)), caught.value


def test_regression_takes_any_number(tmp_path) -> None:
    rows = "sentence1\tsentence2\tlabel\na\tb\tnan\n"
    with pytest.raises(DataError, match="label 'nan'; task stsb knows a number"):
        read_tsv(file(tmp_path, rows), TASKS["stsb"])


class Rows(list):
    column_names = ("idx", "question1", "question2", "label")


def test_through_datasets(monkeypatch) -> None:
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "none":
            raise ConnectionError("no network\nat all")
        return Rows([{"idx": 0, "question1": "who?", "question2": "", "label": 1}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = read_dataset("nyu-mll/glue", TASKS["qqp"], "validation")
    assert asked == [("nyu-mll/glue", "qqp", "validation")]
    assert found.texts == [("who?", "")]
    assert found.labels == [1]
    with pytest.raises(DataError, match=r"none:qqp:train cannot be loaded: no network\. .*--train-file"):
        read_dataset("none", TASKS["qqp"], "train")
    with pytest.raises(DataError, match="no column 'sentence1', 'sentence2'"):
        read_dataset("nyu-mll/glue", TASKS["mrpc"], "train")


def test_encoding_and_padding(tmp_path) -> None:
    tokenizer = pico.tokenizer()
    the, fox, dog = (tokenizer.convert_tokens_to_ids(word) for word in ("the", "fox", "dog"))
    assert padding_token(tokenizer) == tokenizer.eos_token_id == 0
    rows = "sentence1\tsentence2\tlabel\nthe fox\tdog\t0\nthe the the the\tdog dog\t1\nfox\t\t1\n"
    pairs = read_tsv(file(tmp_path, rows), TASKS["rte"])
    encoded = encode_examples(pairs, TASKS["rte"], tokenizer, 5)
    # The separator between; cut to 5, from the longer text first; none after a single text.
    assert [row["input_ids"] for row in encoded] == [[the, fox, 0, dog], [the, the, 0, dog, dog], [fox]]
    batch = collator(0)(encoded)
    assert batch["input_ids"].tolist() == [[the, fox, 0, dog, 0], [the, the, 0, dog, dog], [fox, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5, [1, 0, 0, 0, 0]]
    assert batch["labels"].tolist() == [0, 1, 1]
    # A text that ends in the padding token would be read one token early, so that token goes.
    ended = read_tsv(file(tmp_path, "sentence\tlabel\nthe fox <|endoftext|>\t1\n"), TASKS["sst2"])
    assert encode_examples(ended, TASKS["sst2"], tokenizer, 9)[0]["input_ids"] == [the, fox]
    nothing = read_tsv(file(tmp_path, "sentence\tlabel\n<|endoftext|>\t1\n"), TASKS["sst2"])
    with pytest.raises(DataError, match=r"Example 1 of train\.tsv has no token"):
        encode_examples(nothing, TASKS["sst2"], tokenizer, 9)
    tokenizer.eos_token = tokenizer.pad_token = None
    with pytest.raises(DataError, match="neither a padding nor an end-of-text token"):
        padding_token(tokenizer)
