"""LAMBADA against a naive twin: one passage at a time, full logits, float64, straight from lm-eval's definition."""

from __future__ import annotations

import gzip
import json
import math

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import pico
from kronfold.base.errors import CheckpointError, DataError, InputError
from kronfold.data.tokenizer import train_tokenizer
from kronfold.evaluate.lambada import lambada

CONTEXT = 24
PASSAGES = [
    "The quick brown fox jumps over the lazy dog",
    "the dog",
    "dog",  # one word alone: it follows the token that starts a text
    "Twice  spaced before the last  word",
    "A line ends here\n and the next one starts with Größe",
    'He asked, "where does the other dog sleep?"\n\nUnder the tree',
    "The file is read once and its lines are returned, " * 3 + "unabridged",  # longer than the context
    "It ends with a word never seen: Zwölfboxkämpfer",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([pico.TEXT, *PASSAGES], 330)


@pytest.fixture(scope="module")
def model():
    return sharp(pico.gpt2(vocab_size=330, n_positions=CONTEXT, n_layer=2))


def sharp(model):
    """Far from uniform, so that a wrong context or a wrong target shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


@torch.no_grad()
def naive(model, tokenizer, passages: list[str], context: int) -> tuple[float, float, int]:
    """(accuracy, perplexity, passages cut): every passage alone, every logit in float64."""
    total, hits, cut = 0.0, 0, 0
    for text in passages:
        words = text.split(" ")
        start, target = " ".join(words[:-1]), " " + words[-1]
        while start and start[-1].isspace():
            start, target = start[:-1], start[-1] + target
        if start:
            first = tokenizer.encode(start)
            wanted = tokenizer.encode(start + target)[len(first) :]
        else:
            first, wanted = [tokenizer.bos_token_id], tokenizer.encode(target, add_special_tokens=False)
        ids = first + wanted
        cut += len(ids) > context + 1
        logits = model(torch.tensor([ids[-(context + 1) :][:-1]])).logits[0].double()
        rows = logits[len(logits) - len(wanted) :]
        total += sum(rows[i].log_softmax(-1)[token].item() for i, token in enumerate(wanted))
        hits += all(rows[i].argmax().item() == token for i, token in enumerate(wanted))
    return hits / len(passages), math.exp(-total / len(passages)), cut


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_equals_the_naive_twin(model, tokenizer, batch_size) -> None:
    found = lambada(model, tokenizer, PASSAGES, batch_size=batch_size)
    accuracy, perplexity, cut = naive(model, tokenizer, PASSAGES, CONTEXT)
    assert found.accuracy == accuracy
    assert found.perplexity == pytest.approx(perplexity, rel=1e-5)
    assert found.truncated == cut
    assert 0 < cut < len(PASSAGES)
    assert found.passages == len(PASSAGES)
    assert found.perplexity == pytest.approx(math.exp(found.nll / found.passages), rel=1e-12)
    assert found.protocol["name"] == "lambada_openai"
    assert found.protocol["model_context"] == CONTEXT


def test_counts_a_guess_only_when_every_token_is_right(model, tokenizer) -> None:
    """Passages that end as the model itself goes on are right; with one letter more in the last word, wrong."""
    starts = [text.rpartition(" ")[0] for text in PASSAGES[:2]]
    planted = sharp(pico.gpt2(vocab_size=330, n_positions=CONTEXT, n_layer=2))
    with torch.no_grad():
        head = planted.get_output_embeddings()
        token = tokenizer.encode(" the", add_special_tokens=False)
        assert len(token) == 1
        # A head of its own that answers " the" whatever it sees.
        planted.config.tie_word_embeddings = False
        planted.lm_head = torch.nn.Linear(head.in_features, head.out_features)
        planted.lm_head.weight.zero_()
        planted.lm_head.bias.zero_()[token[0]] = 5.0
    right = lambada(planted, tokenizer, [start + " the" for start in starts])
    assert right.accuracy == 1
    assert right.accuracy_stderr == 0
    assert right.perplexity == pytest.approx((math.exp(5) + 329) / math.exp(5), rel=1e-5)
    mixed = lambada(planted, tokenizer, [starts[0] + " the", starts[1] + " then"])
    assert mixed.accuracy == 0.5
    assert mixed.accuracy_stderr == pytest.approx(0.5)  # sqrt(0.25 / (2 - 1))


def test_a_tokenizer_that_starts_every_text_with_a_token(model) -> None:
    from tokenizers import processors

    tokenizer = train_tokenizer([pico.TEXT, *PASSAGES], 330)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    passages = [PASSAGES[0], PASSAGES[3]]
    found = lambada(model, tokenizer, passages)
    assert found.perplexity == pytest.approx(naive(model, tokenizer, passages, CONTEXT)[1], rel=1e-5)
    twice = lambada(model, tokenizer, ["<|endoftext|>" + text for text in passages])
    assert twice.perplexity == pytest.approx(found.perplexity, rel=1e-6)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_reads_files_and_reports_progress(model, tokenizer, tmp_path, ending) -> None:
    path = tmp_path / ("passages" + ending)
    content = "".join(json.dumps({"text": text}) + "\n" for text in PASSAGES).encode()
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    calls: list[tuple[int, int]] = []
    model.train()
    found = lambada(model, tokenizer, str(path), batch_size=3, progress=lambda *seen: calls.append(seen))
    assert model.training
    model.eval()
    assert found == lambada(model, tokenizer, PASSAGES, batch_size=3)
    assert calls == [(3, 8), (6, 8), (8, 8)]


def test_bad_input(model, tokenizer, tmp_path) -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        lambada(model, tokenizer, PASSAGES, batch_size=0)
    with pytest.raises(DataError, match="no LAMBADA passages"):
        lambada(model, tokenizer, [])
    with pytest.raises(DataError, match="passage 2 has no last word.*'ends in a space '"):
        lambada(model, tokenizer, ["a fox", "ends in a space "])
    with pytest.raises(DataError, match="passage 1 takes .* tokens, more than the 24 positions"):
        lambada(model, tokenizer, ["a " + "q" * 60])
    (tmp_path / "one.txt").write_text("a fox")
    with pytest.raises(DataError, match="is one text.*jsonl"):
        lambada(model, tokenizer, tmp_path / "one.txt")
    with pytest.raises(DataError, match="does not exist"):
        lambada(model, tokenizer, tmp_path / "none.jsonl")
    broken = pico.gpt2(vocab_size=330, n_positions=CONTEXT, n_layer=1)
    with torch.no_grad():
        broken.transformer.wpe.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        lambada(broken, tokenizer, PASSAGES)
