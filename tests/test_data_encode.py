"""Texts in pieces, in batches and from the token cache give the ids of one plain call of the tokenizer."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from kronfold.base.errors import InputError
from kronfold.data import encode
from kronfold.data.encode import LIMIT, Encoder, TokenCache, encode_documents, may_be_split, pieces, token_stream
from kronfold.evaluate import perplexity

# What pre-tokenizers treat in ways of their own: white space of all kinds and lengths, contractions, digits, marks.
FRAGMENTS = [
    *(" ", " ", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x1c", "\u200b"),
    *("a", "the", "word", "Word", "don't", "we'll", "'s", "'ſ", "'", "1", "1234", "7 8", "é", "e\u0301", "\u0301", "ﬁ"),
    *("日本", "🙂", "!", "...", ".\n", ").\n\n", "x_y", "▁", "▁a", "Ġ", "END", "END ", " END", "<|end|>", " <|end|> "),
    *("the word", "a  b", "İ", "ß", "Σ", "\u0345"),
]
LLAMA_3 = encode._WORDS_LLAMA_3
SPLITS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "gpt2, prefix": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "smollm2": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": lambda: words_then_bytes(LLAMA_3),
    "qwen2": lambda: words_then_bytes(LLAMA_3.replace("{1,3}", "")),
    "metaspace": lambda: pre_tokenizers.Metaspace(),
    "metaspace, first": lambda: pre_tokenizers.Metaspace(prepend_scheme="first"),
    "metaspace, never": lambda: pre_tokenizers.Metaspace(prepend_scheme="never"),
}
WHOLE = {
    "spaces taken away": lambda: pre_tokenizers.WhitespaceSplit(),
    "one word": lambda: pre_tokenizers.Metaspace(split=False),
    "bytes only": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "bytes before words": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
        ]
    ),
    "another pattern": lambda: words_then_bytes(r"\w+\s?|."),
    "words dropped": lambda: pre_tokenizers.Split(Regex(LLAMA_3), "removed"),
    "nothing": lambda: None,
}


def words_then_bytes(pattern: str) -> pre_tokenizers.Sequence:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def adversarial(seed: int, fragments: int = 400) -> str:
    return "".join(random.Random(seed).choices(FRAGMENTS, k=fragments))


def build(pre_tokenizer, normalizer=None, added=(), model: str = "bpe") -> PreTrainedTokenizerFast:
    """A tokenizer trained on such texts; byte-level ones know every byte."""
    core = Tokenizer(models.BPE(unk_token=None) if model == "bpe" else models.Unigram())
    if normalizer is not None:
        core.normalizer = normalizer
    if pre_tokenizer is not None:
        core.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if model == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
        )
    else:
        trainer = trainers.UnigramTrainer(
            vocab_size=150, special_tokens=["<|end|>", "?"], unk_token="?", show_progress=False
        )
    core.train_from_iterator([adversarial(seed) for seed in range(15)], trainer)
    core.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", unk_token="<|end|>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build(pre_tokenizers.ByteLevel(add_prefix_space=False))


@pytest.fixture(autouse=True)
def cache_place(tmp_path, monkeypatch) -> Path:
    """A cache of its own; texts are cut and kept from small sizes on."""
    monkeypatch.setattr(encode, "PIECE", 2_000)
    monkeypatch.setattr(encode, "_FIRST", 1 << 9)
    monkeypatch.setattr(encode, "_MOST", 1 << 14)
    monkeypatch.setattr(encode, "WORTH_KEEPING", 1 << 11)
    monkeypatch.delenv(LIMIT, raising=False)
    monkeypatch.setenv("KRONFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def in_pieces(tokenizer, cut: list[str]) -> list[int]:
    return [id_ for piece in cut for id_ in plain(tokenizer, piece)]


@pytest.mark.parametrize("kind", SPLITS)
def test_pieces_are_exact(kind: str) -> None:
    added = [
        AddedToken("END", single_word=True),
        AddedToken("<m>", lstrip=True, rstrip=True),
        AddedToken("   ", normalized=False),
    ]
    for normalizer in (None, normalizers.NFC(), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])):
        tokenizer = build(SPLITS[kind](), normalizer, added)
        assert may_be_split(tokenizer.backend_tokenizer)
        naive_differs = 0
        for seed in range(12):
            text = adversarial(100 + seed) + "<m>  tail"
            whole = plain(tokenizer, text)
            cut = list(pieces(text, least=1 + seed % 5))
            assert "".join(cut) == text
            assert len(cut) > 5
            assert in_pieces(tokenizer, cut) == whole
            naive_differs += in_pieces(tokenizer, [text[i : i + 7] for i in range(0, len(text), 7)]) != whole
        assert naive_differs == 12  # the texts do tell a bad place


def test_pieces_are_exact_for_unigram() -> None:
    tokenizer = build(pre_tokenizers.Metaspace(), model="unigram")
    assert may_be_split(tokenizer.backend_tokenizer)
    for seed in range(20):
        text = adversarial(seed)
        assert in_pieces(tokenizer, list(pieces(text, least=1))) == plain(tokenizer, text)


@pytest.mark.parametrize("kind", WHOLE)
def test_other_tokenizers_get_their_texts_whole(kind: str) -> None:
    tokenizer = build(WHOLE[kind]())
    assert not may_be_split(tokenizer.backend_tokenizer)
    assert not Encoder(tokenizer).splits


def test_what_else_forbids_pieces() -> None:
    def splits(normalizer=None, added=()) -> bool:
        tokenizer = build(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizer, added)
        text = "the word the END the"
        cut_differs = in_pieces(tokenizer, list(pieces(text, least=1))) != plain(tokenizer, text)
        assert may_be_split(tokenizer.backend_tokenizer) != cut_differs  # these texts show why
        return may_be_split(tokenizer.backend_tokenizer)

    assert splits()
    assert not splits(normalizers.Prepend("x"))
    assert not splits(normalizers.Strip(left=True))
    assert not splits(added=[AddedToken("the word")])
    assert not splits(added=[AddedToken("END", rstrip=True)])
    dropping = build(pre_tokenizers.ByteLevel(add_prefix_space=False))
    dropping.backend_tokenizer.model.dropout = 0.5
    assert not may_be_split(dropping.backend_tokenizer)
    assert Encoder(dropping).fingerprint() == ""


def test_a_text_without_a_place_stays_whole() -> None:
    assert list(pieces("日本" * 500, least=10)) == ["日本" * 500]
    assert list(pieces("", least=10)) == [""]
    assert list(pieces("a b", least=10)) == ["a b"]


def documents() -> list[str]:
    long = "\n".join(adversarial(seed) for seed in range(16))  # several pieces
    assert len(long) > 4 * encode.PIECE
    return ["", *(adversarial(seed, 10) for seed in range(60)), long, "the end", long[:-5], ""]


@pytest.mark.parametrize("kind", ["gpt2", "metaspace", "spaces taken away"])
@pytest.mark.parametrize("limit", ["0", "1"])
def test_streams_equal_the_plain_call(kind: str, limit: str, monkeypatch) -> None:
    monkeypatch.setenv(LIMIT, limit)
    tokenizer = build({**SPLITS, **WHOLE}[kind]())
    tokenizer("x", truncation=True, max_length=1)  # such settings stay in the backend until the next call
    texts = documents()
    expected = [plain(tokenizer, text) for text in texts]
    tokenizer("x", truncation=True, max_length=1)
    assert [ids.tolist() for ids in encode_documents(iter(texts), tokenizer)] == expected
    for end, tail in ((None, []), (5, [5])):
        for _ in range(2):  # the second time from the cache, where there is one
            found = list(token_stream(iter(texts), tokenizer, end))
            assert np.concatenate(found).tolist() == [id_ for ids in expected for id_ in [*ids, *tail]]
            assert {ids.dtype for ids in found} == {np.dtype(np.uint16)}


def test_perplexity_reads_the_ids_of_one_call(tokenizer) -> None:
    texts = documents()
    for name, protocol in perplexity.PROTOCOLS.items():
        ids, words, size = perplexity._encode(iter(texts), tokenizer, protocol)
        joined = "\n\n".join(texts)
        if name == "paper":
            expected = plain(tokenizer, joined)
        else:
            expected = [id_ for text in texts for id_ in [*plain(tokenizer, text), tokenizer.eos_token_id]][:-1]
        assert ids.tolist() == expected
        assert size == sum(len(text.encode()) for text in ([joined] if name == "paper" else texts))
        assert words == sum(len(text.split()) for text in texts)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Characters given to the tokenizer, call by call."""
    made: list[int] = []
    ids = Encoder.ids

    def counted(self, texts):
        made.append(sum(map(len, texts)))
        return ids(self, texts)

    monkeypatch.setattr(Encoder, "ids", counted)
    return made


def test_large_batches_are_kept_and_small_ones_not(tokenizer, calls, cache_place) -> None:
    texts = documents()
    first = np.concatenate(list(token_stream(texts, tokenizer, 0)))
    tokenised = sum(calls)
    assert tokenised == sum(map(len, texts))
    kept = list(cache_place.glob("*.npy"))
    assert kept
    calls.clear()
    assert np.array_equal(np.concatenate(list(token_stream(texts, tokenizer, 0))), first)
    assert 0 < sum(calls) < tokenised / 2
    assert max(calls) < encode.WORTH_KEEPING
    assert any(isinstance(ids, np.memmap) for ids in token_stream(texts, tokenizer, 0))
    for small in cache_place.glob("*"):
        small.unlink()
    list(token_stream([texts[1]], tokenizer, 0))
    assert not list(cache_place.glob("*"))


def test_entries_of_other_text_tokenizer_or_end_are_not_taken(tokenizer, calls) -> None:
    text = documents()[61]
    list(token_stream([text], tokenizer, 0))
    other = build(pre_tokenizers.ByteLevel(add_prefix_space=False), added=["thewordthe"])
    for changed in (
        ([text], tokenizer, 1),
        ([text], tokenizer, None),
        ([text.upper()], tokenizer, 0),
        ([text], other, 0),
    ):
        calls.clear()
        list(token_stream(*changed))
        assert sum(calls) == sum(map(len, changed[0]))
    assert Encoder(tokenizer).fingerprint() == Encoder(build(SPLITS["gpt2"]())).fingerprint()
    tokenizer.split_special_tokens, before = True, Encoder(tokenizer).fingerprint()
    try:
        assert Encoder(tokenizer).fingerprint() != before
    finally:
        tokenizer.split_special_tokens = False


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "shape"])
def test_a_damaged_entry_is_made_anew(tokenizer, calls, cache_place, damage: str) -> None:
    text = documents()[61]
    whole = np.concatenate(list(token_stream([text], tokenizer)))
    for path in cache_place.glob("*.npy"):
        content = bytearray(path.read_bytes())
        if damage == "shape":
            np.save(path, np.load(path).reshape(1, -1))
            continue
        content[len(content) // 2] ^= 255
        path.write_bytes({"cut": content[:-100], "flipped": content, "emptied": b""}[damage])
    calls.clear()
    assert np.array_equal(np.concatenate(list(token_stream([text], tokenizer))), whole)
    assert sum(calls) == len(text)
    calls.clear()
    assert np.array_equal(np.concatenate(list(token_stream([text], tokenizer))), whole)
    assert sum(calls) < len(text) / 2


def test_tokenizers_in_python_work_and_are_kept(calls, cache_place) -> None:
    slow = ByT5Tokenizer()
    text = "the word " * 2_000
    for _ in range(2):
        assert np.concatenate(list(token_stream([text], slow))).tolist() == plain(slow, text)
    assert len(calls) == 1
    assert len(list(cache_place.glob("*.npy"))) == 1


def test_the_cache_is_bounded_and_the_oldest_go(tmp_path) -> None:
    import os

    cache = TokenCache(tmp_path, limit=3_500)
    for number in range(5):
        cache.put(str(number), np.full(400, number, dtype=np.uint16))
        os.utime(tmp_path / f"{number}.npy", (1_000 + number, 1_000 + number))
    assert cache.get("0", np.dtype(np.uint16)) is not None  # used: now the youngest
    abandoned = tmp_path / "x.tmp"
    abandoned.write_bytes(b"1")
    os.utime(abandoned, (1, 1))
    cache.trim()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy", "3.npy", "4.npy"]


def test_writers_and_readers_at_once_see_whole_entries(tmp_path) -> None:
    expected = np.arange(50_000, dtype=np.uint16)
    wrong: list[object] = []

    def work() -> None:
        cache = TokenCache(tmp_path, limit=1 << 30)
        for _ in range(20):
            cache.put("key", expected)
            found = cache.get("key", expected.dtype)
            if found is None or not np.array_equal(found, expected):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [path.name for path in tmp_path.iterdir()] == ["key.npy"]


def test_a_place_that_cannot_be_written_changes_nothing(tokenizer, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("KRONFOLD_CACHE", str(tmp_path / "file"))
    text = documents()[61]
    assert np.concatenate(list(token_stream([text], tokenizer))).tolist() == plain(tokenizer, text)
    monkeypatch.setenv(LIMIT, "much")
    with pytest.raises(InputError, match="'much'; give a number of gigabytes"):
        list(token_stream([text], tokenizer))
