"""How a causal model is run to be measured: logits only where a number is read from them, batches shared out."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn import functional

from kronfold.base import processes
from kronfold.base.errors import CheckpointError, DataError, InputError, suggest
from kronfold.data.encode import token_stream
from kronfold.distill.chunked import cached_rows
from kronfold.distill.pairs import check_head
from kronfold.evaluate.texts import ROWS, Rows, measured_documents, open_text

T = TypeVar("T")


def split_head(model: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]:
    """The model as two functions, token ids to states and states to logits, so that only targets get logits.

    A model that does more to its logits than apply its head (scales or caps them) is taken in one piece.
    """

    def forward(part: Any, inputs: torch.Tensor) -> Any:
        return part(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)

    try:
        check_head(model)
    except InputError:
        return lambda inputs: forward(model, inputs).logits, lambda logits: logits
    return lambda inputs: forward(model.base_model, inputs).last_hidden_state, model.get_output_embeddings()


def in_turn(
    batches: Sequence[Sequence[Any]],
    measure: Callable[[Any], T],
    progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """`measure` of each batch, in order, on every process; of several processes each does every n-th batch.

    `progress(done, total)`, in items of the batches, is called by the main process alone.
    """
    count, total, done = processes.count(), sum(map(len, batches)), 0
    own = []
    for start in range(0, len(batches), count):
        share = batches[start : start + count]  # one batch for each process, the last time perhaps fewer
        if processes.index() < len(share):
            own.append(measure(share[processes.index()]))
        done += sum(map(len, share))
        if progress and processes.is_main():
            progress(done, total)
    by_process = processes.gather(own)
    return [by_process[i % count][i // count] for i in range(len(batches))]


# Perplexity of a causal language model under the two named protocols, `paper` and `sliding`.


_TOKENS_PER_BATCH = 4096  # chosen batch: about this many tokens per forward pass
_TOKENS_BEFORE = 8  # read to see whether a word begins in a token
_LOGITS_PER_CHUNK = 1 << 24  # at most about this many logits (64 MiB in fp32) at once


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a text becomes windows and windows become one number. Lengths in tokens."""

    name: str
    window: int
    stride: int
    join: str | None  # string between documents; None: the tokenizer's end-of-text token
    averaging: str


PROTOCOLS = {
    "paper": Protocol("paper", 1024, 1024, "\n\n", "mean of window means, the last short window weighs as much"),
    "sliding": Protocol("sliding", 1024, 512, None, "mean over tokens, each counted once with context"),
}


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """A measured perplexity with everything needed to compare it.

    `perplexity`: per token, as `protocol` averages. `tokens`: targets counted. `words`, `bytes`: of the joined
    text (words: separated by white space; bytes: UTF-8; end-of-text joins count in neither). `nll`: total negative
    log likelihood of the targets, nats. `scored_words`, `scored_bytes`: words that begin and bytes that stand in the
    targets (the first token of a text, under `paper` of every window, is none); per word and per byte are
    exp(nll / scored_words) and exp(nll / scored_bytes).
    `read`: source, split, documents, hash and what else there is to say of the text measured; see `Texts.record`. It
    takes no part in comparing results for equality.
    """

    perplexity: float
    protocol: dict[str, Any]
    tokens: int
    words: int
    bytes: int
    nll: float
    perplexity_per_word: float
    perplexity_per_byte: float
    scored_words: int
    scored_bytes: int
    read: dict[str, Any] = dataclasses.field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with the field names as keys."""
        return dataclasses.asdict(self)


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Path | Iterable[str],
    protocol: str = "sliding",
    *,
    rows: Rows = "auto",
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity of `model` (a `transformers` causal LM) on `text`.

    `text`: a string (one document), a Path (see `kronfold.data.sources.documents`), what `open_text` returned, or
    documents. Rows that are lines of one text are put together again first, so that the container changes no number
    (`rows`: "auto" finds out by `lines_of_one_text`, "lines" and "documents" say it). Protocols:

    - `paper` (the published tables): documents joined by a blank line; the documents of a .txt file are its lines
      as the Hugging Face WikiText rows have them (a line keeps its newline, a blank line is ""); windows of 1024
      tokens side by side; labels shift inside each window, so its first token is no target; mean of window means.
    - `sliding` (the default): documents joined by the end-of-text token; windows of 1024 every 512; every token but
      the very first is a target once, with at least 512 tokens of context away from the start.

    A model with a shorter context uses its own length as window, stride alike, and `protocol["note"]` says so.
    `batch_size` (windows per forward pass) changes speed and memory only. `progress(done, total)`: windows.
    Under torchrun every process must call this: they share the batches, and each gets the number one process would.
    Raises DataError (fewer than 2 tokens, unreadable text), InputError (unknown protocol, bad batch size),
    CheckpointError (the model's loss is not finite).
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol '{protocol}'. {suggest(protocol, PROTOCOLS)}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give at least 1, or leave it out.")
    chosen, note = _fit_context(PROTOCOLS[protocol], model)
    if rows not in ROWS:
        raise InputError(f"rows is {rows!r}. {suggest(rows, ROWS)}")
    texts, read = measured_documents(
        open_text(text) if isinstance(text, Path) else text, rows, lines_are_documents=chosen.name == "paper"
    )
    ids, words, text_bytes = _encode(texts, tokenizer, chosen)
    if len(ids) < 2 or not text_bytes:
        raise DataError(f"The text has {len(ids)} token(s); perplexity needs at least 2. Give more text.")
    windows = list(_windows(len(ids), chosen))
    means, nll, tokens = [], 0.0, 0
    for total, count in _window_losses(model, ids, windows, batch_size, progress):
        means.append(total / count)
        nll += total
        tokens += count
    if not math.isfinite(nll):
        raise CheckpointError("The model's loss on this text is not finite: its weights hold NaN or inf. Get it again.")
    mean = math.fsum(means) / len(means) if chosen.name == "paper" else nll / tokens
    first = [0] if chosen.name == "sliding" else list(range(0, len(ids), chosen.stride))
    left_words, left_bytes = _unscored(ids, first, tokenizer, tokenizer.eos_token_id if chosen.join is None else None)
    join = chosen.join if chosen.join is not None else tokenizer.eos_token
    described = {
        **dataclasses.asdict(chosen),
        "join": join,
        "unit": "token",
        "windows": len(windows),
        "note": note,
    }
    return PerplexityResult(
        _exp(mean),
        described,
        tokens,
        words,
        text_bytes,
        nll,
        _exp(nll / max(words - left_words, 1)),
        _exp(nll / max(text_bytes - left_bytes, 1)),
        words - left_words,
        text_bytes - left_bytes,
        read,
    )


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # a broken model still gives a number, not an overflow


def _fit_context(protocol: Protocol, model: Any) -> tuple[Protocol, str | None]:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None or context >= protocol.window:
        return protocol, None
    stride = max(1, protocol.stride * context // protocol.window)
    note = f"window and stride shortened from {protocol.window}/{protocol.stride} to the model's context of {context}"
    return dataclasses.replace(protocol, window=context, stride=stride), note


def _encode(texts: Iterable[str], tokenizer: Any, protocol: Protocol) -> tuple[np.ndarray, int, int]:
    """The token ids of the joined text (1-D), its words and its UTF-8 bytes."""
    texts = list(texts)
    if protocol.join is not None:
        texts = [protocol.join.join(texts)]
    elif tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-text token to join documents with; set tokenizer.eos_token.")
    words, text_bytes = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    end = tokenizer.eos_token_id if protocol.join is None else None
    pieces = list(token_stream(texts, tokenizer, end=end))
    joined = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.uint16)
    return joined if end is None else joined[:-1], words, text_bytes


def _unscored(ids: np.ndarray, positions: list[int], tokenizer: Any, end: int | None) -> tuple[int, int]:
    """Words that begin and UTF-8 bytes that stand in the tokens at `positions`, ascending; joins (`end`) have none."""
    content = _token_bytes(tokenizer)
    words = text_bytes = 0
    for position in positions:
        token = int(ids[position])
        if token == end:
            continue
        before: list[int] = []
        for earlier in ids[max(0, position - _TOKENS_BEFORE) : position].tolist():
            before = [] if earlier == end else [*before, earlier]
        own = content(before, token)
        text = b"".join(content(before[:i], earlier) for i, earlier in enumerate(before))
        # A word belongs to the token in which it begins, so that over all tokens each is counted once.
        words += len(_read(text + own).split()) - len(_read(text).split())
        text_bytes += len(own)
    return words, text_bytes


def _read(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _token_bytes(tokenizer: Any) -> Callable[[list[int], int], bytes]:
    """A function from the tokens before and a token to the bytes of text that the token stands for."""
    from transformers.convert_slow_tokenizer import (
        bytes_to_unicode,
    )  # here: its import may load DeepSpeed, which prints

    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.decoder.__getstate__()) if backend is not None and backend.decoder else {}
    kinds = {part["type"] for part in described.get("decoders", [described]) if part}
    added = tokenizer.added_tokens_decoder
    of_character = {character: byte for byte, character in bytes_to_unicode().items()}

    def content(before: list[int], token: int) -> bytes:
        if token in added:
            return added[token].content.encode()
        name = tokenizer.convert_ids_to_tokens(token)
        if "ByteLevel" in kinds and all(character in of_character for character in name):
            return bytes(of_character[character] for character in name)
        if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):
            return bytes.fromhex(byte[1])
        # Decoded behind another, since a space at the start of a text may be dropped.
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        start = tokenizer.decode(before[-1:], **options)
        return tokenizer.decode([*before[-1:], token], **options)[len(start) :].encode()

    return content


def _windows(length: int, protocol: Protocol) -> Iterator[tuple[int, int, int]]:
    """(start, end, first target) per window; the targets are the positions first..end-1, each predicted from start."""
    counted = 1
    for start in range(0, length, protocol.stride):
        end = min(start + protocol.window, length)
        first = start + 1 if protocol.name == "paper" else counted
        if first < end:
            yield start, end, first
            counted = end
        if end == length:
            return


def _window_losses(
    model: Any,
    ids: np.ndarray,
    windows: list[tuple[int, int, int]],
    batch_size: int | None,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[float, int]]:
    """(summed loss, targets) of each window, in order.

    Processes take whole batches in turn, the very batches of a single process, so the sums are equal to the last bit.
    """
    body, head = split_head(model)
    rows = max(1, _LOGITS_PER_CHUNK // model.config.get_text_config().vocab_size)
    training = model.training
    model.eval()

    def losses(batch: list[tuple[int, int, int]]) -> list[tuple[float, int]]:
        read = np.stack([ids[start:end] for start, end, _ in batch]).astype(np.int64)
        inputs = torch.from_numpy(read).to(model.device)
        return [
            (_loss(states[first - start - 1 : -1], head, tokens[first - start :], rows), end - first)
            for states, tokens, (start, end, first) in zip(body(inputs), inputs, batch, strict=True)
        ]

    try:
        for found in in_turn(list(_batches(windows, batch_size)), losses, progress):
            yield from found
    finally:
        model.train(training)


def _batches(windows: list[tuple[int, int, int]], batch_size: int | None) -> Iterator[list[tuple[int, int, int]]]:
    """Windows of one length share a batch, so nothing is padded."""
    for width, group in groupby(windows, key=lambda window: window[1] - window[0]):
        equal = iter(list(group))
        while batch := list(islice(equal, batch_size or max(1, _TOKENS_PER_BATCH // width))):
            yield batch


def _loss(
    states: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets: torch.Tensor, rows: int
) -> float:
    """Summed cross entropy in nats of (tokens, width) against (tokens,); logits of `rows` tokens at a time, in fp32."""
    total = 0.0
    for piece, wanted in zip(states.split(rows), targets.split(rows), strict=True):
        logits = head(piece)
        few = cached_rows(logits)  # the passes of the softmax are several times slower from memory
        for part, labels in zip(logits.split(few), wanted.split(few), strict=True):
            total += functional.cross_entropy(part.float(), labels, reduction="none").double().sum().item()
    return total
