"""LAMBADA: does the model guess the last word of a passage (Paperno et al. 2016, in OpenAI's detokenised form)?

The protocol is that of the task `lambada_openai` of lm-eval 0.4, so that numbers may stand beside those of others.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kronfold.base.errors import CheckpointError, DataError, InputError
from kronfold.data.bad_rows import Reading
from kronfold.data.text_files import ending
from kronfold.evaluate.perplexity import in_turn, split_head
from kronfold.evaluate.texts import measured_documents, open_text

_TOKENS_PER_BATCH = 4096  # chosen batch: about this many tokens per forward pass
_DEFAULT_CONTEXT = 2048  # lm-eval's, for a model that names no length
_UNSET_LENGTH = 10**12  # transformers writes 1e30 where a tokenizer knows no length

PROTOCOL = {
    "name": "lambada_openai",
    "version": "1.0 (lm-eval 0.4)",
    "context": "passage up to its last space",
    "target": "the last space and what follows it",
    "accuracy": "share of passages where every target token is the likeliest",
    "averaging": "exp of the mean negative log likelihood of a whole target",
    "truncation": "from the left, so that the target keeps its place",
}


@dataclasses.dataclass(frozen=True)
class LambadaResult:
    """Last-word accuracy (0 to 1, with its standard error) and perplexity per last word, over `passages` passages.

    `nll`: total negative log likelihood of the targets, nats. `target_tokens`: tokens of all targets. `truncated`:
    passages longer than the model's context. `read`: source, split, documents and hash of the passages (see
    `Texts.record`); it takes no part in comparing results for equality.
    """

    accuracy: float
    accuracy_stderr: float
    perplexity: float
    passages: int
    target_tokens: int
    truncated: int
    nll: float
    protocol: dict[str, Any]
    read: dict[str, Any] = dataclasses.field(compare=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary with the field names as keys."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Question:
    inputs: list[int]  # what the model reads, the last target token left out
    targets: list[int]
    truncated: bool


@torch.no_grad()
def lambada(
    model: Any,
    tokenizer: Any,
    source: str | Path | Iterable[str],
    *,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LambadaResult:
    """Last-word accuracy and perplexity of `model` (a `transformers` causal LM), as lm-eval's `lambada_openai`.

    Args:
        source: a .jsonl or .parquet file (also .gz or .zst) with one passage a row in "text", a `datasets` id such as
            `EleutherAI/lambada_openai:default@test`, what `passages` returned, or the passages themselves.
        batch_size: passages per forward pass; changes speed and memory only. Processes under torchrun share the
            batches, and every one must call this.
        progress: called with (passages done, passages in all).

    Raises:
        DataError: no passages, one without a last word, or a target that the context of the model cannot hold.
        InputError: batch_size below 1. CheckpointError: the model's log likelihoods are not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; give at least 1, or leave it out.")
    context = _context(model, tokenizer)
    given, read = measured_documents(passages(source), "documents", lines_are_documents=False)
    asked = [_question(text, number, tokenizer, context) for number, text in enumerate(given, 1)]
    if not asked:
        raise DataError('There are no LAMBADA passages. Give a .jsonl file with one {"text": ...} a line.')
    hits = tokens = 0
    losses = []
    for nll, correct, length in _answers(model, asked, batch_size, progress):
        losses.append(nll)
        hits += correct
        tokens += length
    total = math.fsum(losses)
    if not math.isfinite(total):
        raise CheckpointError("The model's loss on LAMBADA is not finite: its weights hold NaN or inf. Get it again.")
    count = len(asked)
    accuracy = hits / count
    return LambadaResult(
        accuracy=accuracy,
        accuracy_stderr=math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else 0.0,
        perplexity=math.exp(min(total / count, 700.0)),  # a broken model still gives a number, not an overflow
        passages=count,
        target_tokens=tokens,
        truncated=sum(question.truncated for question in asked),
        nll=total,
        protocol={**PROTOCOL, "model_context": context},
        read=read,
    )


def passages(source: str | Path | Iterable[str], reading: Reading = Reading()) -> Iterable[str]:  # noqa: B008 - frozen
    """The passages of a source, one string each. Raises DataError, at the call, for a path that cannot be one."""
    if not isinstance(source, str | Path):
        return source
    if ending(str(source)) == ".txt":
        raise DataError(f'{source} is one text; LAMBADA\'s passages come one {{"text": ...}} a line in a .jsonl file.')
    return open_text(source, reading)


def _context(model: Any, tokenizer: Any) -> int:
    """Tokens the model reads at most, found where lm-eval looks for it."""
    config = model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    length = getattr(tokenizer, "model_max_length", None)
    return int(length) if length is not None and length < _UNSET_LENGTH else _DEFAULT_CONTEXT


def _question(text: str, number: int, tokenizer: Any, context: int) -> _Question:
    """Token ids of context and target of one passage, divided and cut as lm-eval does it."""
    before, _, word = text.rpartition(" ")
    # White space before the last word belongs to the word: where it is not one space, tokens differ.
    start = before.rstrip()
    prefix, targets = _encode(start, before[len(start) :] + " " + word, tokenizer)
    if not word.strip() or not targets:
        raise DataError(f"LAMBADA passage {number} has no last word after a space: {text[-60:]!r}. Take it out.")
    if len(targets) > context:
        raise DataError(
            f"The last word of LAMBADA passage {number} takes {len(targets):,} tokens, more than the {context:,} "
            "positions of the model. Take it out."
        )
    whole = [*prefix, *targets]
    return _Question(whole[-(context + 1) : -1], targets, len(whole) > context + 1)


def _encode(before: str, target: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of the context, and those of the target: of the two together, what is beyond the length of the first."""
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise DataError("The tokenizer has neither a first nor a last token of a text; set tokenizer.eos_token.")
    if not before:  # one word alone follows the token that starts a text
        targets = tokenizer.encode(target, add_special_tokens=False)
        return ([first], targets) if targets[:1] != [first] else (targets[:1], targets[1:])
    # A tokenizer that starts every text with a token of its own (Llama's) does so here too, once.
    marked = before.startswith(tokenizer.decode(first))
    options = {"add_special_tokens": False} if marked else {}
    prefix = tokenizer.encode(before, verbose=False, **options)
    return prefix, tokenizer.encode(before + target, verbose=False, **options)[len(prefix) :]


def _answers(
    model: Any, asked: Sequence[_Question], batch_size: int | None, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[float, bool, int]]:
    """(negative log likelihood in nats, every token guessed, target tokens), longest passages first."""
    body, head = split_head(model)
    training = model.training
    model.eval()

    def answers(batch: Sequence[_Question]) -> list[tuple[float, bool, int]]:
        # Padding stands on the right, where a causal model does not look before it is past the targets.
        inputs = torch.zeros(len(batch), len(batch[0].inputs), dtype=torch.long)
        for row, question in zip(inputs, batch, strict=True):
            row[: len(question.inputs)] = torch.tensor(question.inputs)
        states = body(inputs.to(model.device))
        ends = [(len(question.inputs) - len(question.targets), len(question.inputs)) for question in batch]
        read = torch.cat([row[start:end] for row, (start, end) in zip(states, ends, strict=True)])
        return list(_scores(head(read).float(), [question.targets for question in batch]))

    try:
        batches = list(_batches(sorted(asked, key=lambda question: -len(question.inputs)), batch_size))
        for found in in_turn(batches, answers, progress):
            yield from found
    finally:
        model.train(training)


def _batches(asked: Sequence[_Question], batch_size: int | None) -> Iterator[Sequence[_Question]]:
    start = 0
    while start < len(asked):
        size = batch_size or max(1, _TOKENS_PER_BATCH // len(asked[start].inputs))
        yield asked[start : start + size]
        start += size


def _scores(logits: torch.Tensor, targets: Sequence[list[int]]) -> Iterator[tuple[float, bool, int]]:
    """One answer per passage from fp32 logits (all target tokens, vocabulary), passages one after the other."""
    wanted = torch.tensor([token for tokens in targets for token in tokens], device=logits.device)
    likelihoods = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double()
    guessed = logits.argmax(-1) == wanted
    lengths = [len(tokens) for tokens in targets]
    for likelihood, right, length in zip(likelihoods.split(lengths), guessed.split(lengths), lengths, strict=True):
        yield -likelihood.sum().item(), bool(right.all()), length
