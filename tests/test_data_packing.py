"""Tokenizer and packing against a naive twin."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from kronfold.base.errors import DataError
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.tokenizer import END_OF_TEXT, train_tokenizer

SENTENCE = "the module reads a file and returns its lines as text while every error is named"
WORDS = SENTENCE.split()


def texts(count: int, seed: int = 0) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 40))) for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(texts(300), 320)


def naive(documents: list[str], tokenizer: PreTrainedTokenizerFast, block: int) -> list[list[int]]:
    flat: list[int] = []
    for document in documents:
        flat += [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    return [flat[start : start + block] for start in range(0, len(flat) - block + 1, block)]


def test_tokenizer_is_lossless_and_deterministic(tokenizer: PreTrainedTokenizerFast, tmp_path) -> None:
    for text in ("the module reads", " Größe\t日本 🙂\n\n\r\n  x", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) <= 320
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id} == {0}
    assert tokenizer.convert_ids_to_tokens(0) == END_OF_TEXT
    assert train_tokenizer(texts(300), 320).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again.encode(texts(1)[0]) == tokenizer.encode(texts(1)[0])


def test_tokenizer_refuses() -> None:
    with pytest.raises(DataError, match="at least 257"):
        train_tokenizer(texts(3), 256)
    with pytest.raises(DataError, match="no text to learn from"):
        train_tokenizer([""], 300)


@pytest.mark.parametrize("count", [40, 600])  # below and above one batch of the tokenizer
def test_pack_equals_the_naive_twin(tokenizer: PreTrainedTokenizerFast, count: int) -> None:
    blocks = pack(iter(texts(count)), tokenizer, 16)
    expected = naive(texts(count), tokenizer, 16)
    assert isinstance(blocks, TokenBlocks)
    assert blocks.ids.dtype == np.uint16
    assert [blocks[i]["input_ids"].tolist() for i in range(len(blocks))] == expected
    assert blocks.tokens == 16 * len(expected)
    item = blocks[0]
    assert item["input_ids"].dtype == torch.int64
    assert torch.equal(item["input_ids"], item["labels"])


def test_max_tokens_cuts_and_stops_reading(tokenizer: PreTrainedTokenizerFast) -> None:
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "the module reads a file"

    whole = pack(texts(600), tokenizer, 16)
    cut = pack(texts(600), tokenizer, 16, max_tokens=100)
    assert np.array_equal(cut.ids, whole.ids[:6])
    assert pack(endless(), tokenizer, 16, max_tokens=1000).tokens == 992
    assert read <= 512


def test_hash_is_of_the_tokens_not_of_their_storage(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack(texts(40), tokenizer, 16)
    assert TokenBlocks(blocks.ids.astype(np.uint32)).sha256 == blocks.sha256
    changed = blocks.ids.copy()
    changed[0, 0] += 1
    assert TokenBlocks(changed).sha256 != blocks.sha256


def test_pack_refuses(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="The text holds 2 tokens, less than one block of 16"):
        pack(["a"], tokenizer, 16)
    with pytest.raises(DataError, match="holds 0 tokens"):
        pack([], tokenizer, 16)
    with pytest.raises(DataError, match="max_tokens is 8"):
        pack(texts(5), tokenizer, 16, max_tokens=8)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-text token"):
        pack(texts(5), bare, 16)
