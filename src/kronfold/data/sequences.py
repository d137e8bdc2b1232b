"""Labelled texts to token sequences of their own lengths, and those to right-padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from kronfold.base.errors import DataError
from kronfold.data.glue import Examples, Task


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
