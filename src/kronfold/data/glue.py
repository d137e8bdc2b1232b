"""Labelled texts to token sequences of their own lengths, and those to right-padded batches."""

from __future__ import annotations

import gzip
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kronfold.base.errors import DataError, InputError, suggest


def padding_token(tokenizer: Any) -> int:
    """The id that fills batches: the tokenizer's own, else its end-of-text token, as GPT-2 needs it.

    Raises DataError for a tokenizer with neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise DataError("The tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token.")


def encode_examples(examples: Examples, task: Task, tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """One {"input_ids": list, "labels": number} per example.

    Two texts are joined by the end-of-text token. What exceeds `max_length` tokens is cut from the right, of a pair
    from the longer text, token by token. Raises DataError for a text without any token.
    """
    pad = padding_token(tokenizer)
    between = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    firsts = tokenizer([texts[0] for texts in examples.texts], verbose=False)["input_ids"]
    seconds: list[list[int]] = [[]] * len(examples)
    if len(task.columns) == 2:
        others = [texts[1] for texts in examples.texts]
        seconds = tokenizer(others, add_special_tokens=False, verbose=False)["input_ids"]
    rows = []
    for number, (first, second, label) in enumerate(zip(firsts, seconds, examples.labels, strict=True), 1):
        ids = _fit(list(first), list(second), between if second else [], max_length)
        # transformers reads the answer at the last token that is not padding, so a real one may not look like it.
        while ids and ids[-1] == pad:
            ids.pop()
        if not ids:
            raise DataError(f"Example {number} of {examples.source} has no token. Take it out.")
        rows.append({"input_ids": ids, "labels": int(label) if task.labels else float(label)})
    return rows


def _fit(first: list[int], second: list[int], between: list[int], max_length: int) -> list[int]:
    while len(first) + len(between) + len(second) > max_length:
        (first if len(first) >= len(second) else second).pop()
    return [*first, *between, *second]


def collator(pad: int) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]]:
    """A function from rows to one batch: input_ids and attention_mask (rows, longest), labels (rows,).

    Padding stands on the right, where a causal model's positions and states of real tokens do not notice it. The mask
    follows the lengths, not the ids: the padding token may occur inside a text.
    """

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), pad)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[index, :length] = torch.tensor(row["input_ids"])
            mask[index, :length] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row["labels"] for row in rows])}

    return collate


# GLUE tasks: one record each, read from local TSV files or through `datasets`.
#
# Names of columns and labels, and the numbers of the labels, are those of the data set `nyu-mll/glue`; columns of the
# TSV files of gluebenchmark.com are known beside them.


DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class Task:
    """What a task reads and predicts.

    Attributes:
        columns: of the texts, one or two. label: column of the label.
        labels: names in the order of their numbers; empty where a number is predicted.
        metrics: names in `kronfold.evaluate.glue`; their mean over all dev sets is the task's score.
        dev: name of each dev set ("" if there is only one) to its split.
        aliases: other names of the columns, in the order texts, then label.
        headerless: columns of the original file where that has no header.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    label: str = "label"
    dev: Mapping[str, str] = field(default_factory=lambda: {"": "validation"})
    aliases: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Numbers the head gives: one per label, or the one predicted."""
        return max(1, len(self.labels))


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_TASKS = (
    Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",),
         headerless=("source", "label", "judgement", "sentence")),
    Task("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
    Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"),
         aliases=("#1 String", "#2 String", "Quality")),
    Task("stsb", _PAIR, (), ("pearson", "spearman"), aliases=(*_PAIR, "score")),
    Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"),
         aliases=("question1", "question2", "is_duplicate")),
    Task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",),
         dev={"matched": "validation_matched", "mismatched": "validation_mismatched"},
         aliases=(*_PAIR, "gold_label")),
    Task("qnli", ("question", "sentence"), _ENTAILED, ("accuracy",)),
    Task("rte", _PAIR, _ENTAILED, ("accuracy",)),
    Task("wnli", _PAIR, ("not_entailment", "entailment"), ("accuracy",)),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}


def task_of(name: str) -> Task:
    """The record of a task. Raises InputError with the near names."""
    if name not in TASKS:
        raise InputError(f"Unknown task {name!r}. {suggest(name, TASKS)}")
    return TASKS[name]


@dataclass(frozen=True)
class Examples:
    """Labelled texts of one split: `texts[i]` is (first,) or (first, second), `labels[i]` a number."""

    source: str
    texts: list[tuple[str, ...]]
    labels: list[float]

    def __len__(self) -> int:
        return len(self.texts)

    def to_dict(self) -> dict[str, Any]:
        """Source, number, and the SHA-256 of texts and labels: equal for equal data, wherever it was read."""
        digest = hashlib.sha256()
        for texts, label in zip(self.texts, self.labels, strict=True):
            digest.update("\t".join((*texts, f"{label:g}\n")).encode())
        return {"source": self.source, "examples": len(self), "sha256": digest.hexdigest()}


def read_tsv(path: str | Path, task: Task, columns: Sequence[str] = ()) -> Examples:
    """The examples of a local .tsv file (plain or .gz), one a line, no quoting, as GLUE's files are.

    `columns`: the header's names for the texts, then for the label; without them the task's own and those of the
    original files are looked for. Raises DataError: no such file, no UTF-8, columns missing, rows of another length,
    labels missing or unknown, texts empty; with the line.
    """
    path = Path(path)
    lines = _lines(path)
    header = lines[0] if lines else []
    rows = lines[1:]
    if task.headerless and not columns and task.label not in header and len(header) == len(task.headerless):
        header, rows = list(task.headerless), lines
    chosen = _choose(header, task, columns, path)
    for number, row in enumerate(rows, len(lines) - len(rows) + 1):
        if len(row) != len(header):
            raise DataError(f"{path}, line {number} has {len(row)} columns, the header {len(header)}. Mend the file.")
    places = [header.index(name) for name in chosen]
    table = ([row[place] for place in places] for row in rows)
    return _examples(table, task, str(path.name), len(lines) - len(rows) + 1, "line")


def read_dataset(name: str, task: Task, split: str) -> Examples:
    """The examples of a split, through the `datasets` library. Raises DataError when it cannot be had or read."""
    import datasets

    try:
        rows = datasets.load_dataset(name, task.name, split=split)
    except Exception as error:  # the library raises many kinds, from the network up
        raise DataError(
            f"{name}:{task.name}:{split} cannot be loaded: {str(error).splitlines()[0]}. Check the spelling or the "
            "network, or give local files with --train-file and --dev-file."
        ) from error
    chosen = _choose(list(rows.column_names), task, (), f"{name}:{task.name}")
    table = ([row[column] for column in chosen] for row in rows)
    return _examples(table, task, f"{name}:{task.name}:{split}", 0, "row")


def _lines(path: Path) -> list[list[str]]:
    if not path.is_file():
        raise DataError(f"There is no file {path}. Give a .tsv file with a header, texts and labels.")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte offset {error.start:,}). Convert it first.") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{path} cannot be read: {error}. Get it again.") from error
    # Not splitlines: a text may hold a line separator of Unicode, and that ends no row.
    return [line.rstrip("\r").split("\t") for line in text.rstrip("\r\n").split("\n")] if text.strip() else []


def _choose(header: Sequence[str], task: Task, columns: Sequence[str], place: object) -> list[str]:
    """The columns of texts and label: those given, or the first complete set of names known for the task."""
    count = len(task.columns) + 1
    if columns and len(columns) != count:
        raise InputError(
            f"Task {task.name} needs {count} column names, texts first, label last; given: {', '.join(columns)}."
        )
    known = [tuple(columns)] if columns else [(*task.columns, task.label), task.aliases]
    for names in known:
        if names and all(name in header for name in names):
            return list(names)
    missing = [name for name in known[0] if name not in header]
    raise DataError(
        f"{place} has no column {', '.join(map(repr, missing))}, which task {task.name} needs. Columns found: "
        f"{', '.join(header) or 'none'}. Name yours with --columns, texts first, label last."
    )


def _examples(rows: Iterable[Sequence[Any]], task: Task, source: str, first: int, unit: str) -> Examples:
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for number, (*given, label) in enumerate(rows, first):
        place = f"{source}, {unit} {number}"
        if not all(isinstance(text, str) for text in given):
            raise DataError(f"{place}: a text is {type(given[0]).__name__}, not text.")
        if not any(text.strip() for text in given):
            raise DataError(f"{place} holds no text. Take the row out.")
        texts.append(tuple(given))
        labels.append(_label(label, task, place))
    if not texts:
        raise DataError(f"{source} holds no examples. Give a file with a header and one example a line.")
    return Examples(source, texts, labels)


def _label(given: Any, task: Task, place: str) -> float:
    """A label as a number: by its name or its number; of regression, the number itself."""
    text = str(given).strip()
    if text in task.labels:
        return task.labels.index(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    known = math.isfinite(value) if not task.labels else value in range(len(task.labels))
    if not known:
        allowed = "a number" if not task.labels else ", ".join(f"{i} ({name})" for i, name in enumerate(task.labels))
        shown = f"the label {text!r}" if text and text != "None" else "no label"
        raise DataError(
            f"{place} has {shown}; task {task.name} knows {allowed}. A test set without labels cannot be used here; "
            "give the train or dev file."
        )
    return value
