"""Calibration windows: which tokens they hold and in what order."""

from __future__ import annotations

import random

import pytest
import torch

import pico
from kronfold.base.errors import DataError
from kronfold.data.packing import READ_AHEAD, calibration_windows

WORDS = list(dict.fromkeys(pico.TEXT.split()))
WINDOW = 6


@pytest.fixture(scope="module")
def tokenizer():
    return pico.tokenizer()


def text_file(place, words: int, seed: int, vocabulary=WORDS):
    chooser = random.Random(seed)
    place.write_text(" ".join(chooser.choice(vocabulary) for _ in range(words)))
    return place


def windows_of(path, tokenizer) -> list[tuple[int, ...]]:
    ids = [*tokenizer(path.read_text(), add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return [tuple(ids[i : i + WINDOW]) for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def test_windows_are_drawn_without_replacement(tokenizer, tmp_path):
    path = text_file(tmp_path / "a.txt", 40 * WINDOW, 1)
    every = windows_of(path, tokenizer)
    drawn = calibration_windows([path], tokenizer, count=len(every), window=WINDOW)
    assert drawn.dtype == torch.int64
    assert sorted(map(tuple, drawn.tolist())) == sorted(every)
    assert [tuple(row) for row in drawn.tolist()] != every  # also the first few stand for the whole text


def test_seeds(tokenizer, tmp_path):
    path = text_file(tmp_path / "a.txt", 60 * WINDOW, 1)
    first, again, other = (
        calibration_windows([path], tokenizer, count=8, window=WINDOW, seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    every = set(windows_of(path, tokenizer))
    assert {tuple(row) for row in first.tolist()} <= every


def test_sources_take_turns(tokenizer, tmp_path):
    one = text_file(tmp_path / "a.txt", 30 * WINDOW, 1, WORDS[:6])
    two = text_file(tmp_path / "b.txt", 30 * WINDOW, 2, WORDS[6:])
    drawn = calibration_windows([one, two], tokenizer, count=7, window=WINDOW)
    known = [set(windows_of(one, tokenizer)), set(windows_of(two, tokenizer))]
    assert [tuple(row) in known[1] for row in drawn.tolist()] == [False, True, False, True, False, True, False]
    few = calibration_windows([one, two], tokenizer, count=1, window=WINDOW)
    assert tuple(few[0].tolist()) in known[0]


def test_only_so_much_is_read(tokenizer, tmp_path):
    path = text_file(tmp_path / "a.txt", 3 * READ_AHEAD * WINDOW, 1)
    early = set(windows_of(path, tokenizer)[:READ_AHEAD])
    for seed in range(10):
        drawn = calibration_windows([path], tokenizer, count=1, window=WINDOW, seed=seed)
        assert tuple(drawn[0].tolist()) in early


def test_short_texts_name_what_they_hold(tokenizer, tmp_path):
    path = text_file(tmp_path / "short.txt", 3 * WINDOW, 1)
    with pytest.raises(DataError, match="short.txt holds 3 windows of 6 tokens; 5 are wanted.*--calibration-windows 3"):
        calibration_windows([path], tokenizer, count=5, window=WINDOW)
    long = text_file(tmp_path / "long.txt", 30 * WINDOW, 1)
    with pytest.raises(DataError, match="--calibration-windows 6"):
        calibration_windows([long, path], tokenizer, count=8, window=WINDOW)
    assert len(calibration_windows([long, path], tokenizer, count=6, window=WINDOW)) == 6
    with pytest.raises(DataError, match="short.txt: The text holds 19 tokens"):
        calibration_windows([path], tokenizer, count=1, window=100)
    with pytest.raises(DataError, match="^[^:]*missing.txt does not exist"):
        calibration_windows([tmp_path / "missing.txt"], tokenizer, count=1, window=WINDOW)


@pytest.mark.parametrize(("count", "window", "texts"), [(0, 6, 1), (1, 1, 1), (1, 6, 0)])
def test_impossible_requests(count, window, texts, tokenizer, tmp_path):
    paths = [text_file(tmp_path / "a.txt", 60, 1)] * texts
    with pytest.raises(DataError, match="at least 1 window of 2 tokens from 1 text"):
        calibration_windows(paths, tokenizer, count=count, window=window)
