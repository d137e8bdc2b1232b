"""Both protocols against naive twins: one window or one target at a time, straight from the definition."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import pico
from kronfold.base.errors import CheckpointError, DataError, InputError
from kronfold.data.tokenizer import train_tokenizer
from kronfold.evaluate.perplexity import PROTOCOLS, perplexity

TEXT = "The file is read once, and its lines are returned. Größe counts as well. " * 8
DOCUMENTS = ["The file is read.", "", "Its lines are returned at once, without their ends.", "Größe counts."]
CONTEXT = 16
RELATIVE = 1e-5  # float32 on the CPU; measured at most 1.2e-6 for perplexities of 1e5, 1e-7 for nll


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT, *DOCUMENTS], 300)


def make_model(context: int = CONTEXT, seed: int = 0, kind: type[GPT2LMHeadModel] = GPT2LMHeadModel) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=300, n_positions=context, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # far from uniform, so that a wrong context shows
    return model


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return make_model()


@torch.no_grad()
def naive_paper(model: GPT2LMHeadModel, ids: list[int], window: int) -> tuple[float, float, int]:
    """(perplexity, nll, tokens): transformers' own loss of one window after the other."""
    model.eval()
    losses, nll, tokens = [], 0.0, 0
    for start in range(0, len(ids), window):
        piece = torch.tensor([ids[start : start + window]])
        if piece.shape[1] > 1:
            loss = model(input_ids=piece, labels=piece).loss.double().item()
            losses.append(loss)
            nll += loss * (piece.shape[1] - 1)
            tokens += piece.shape[1] - 1
    return math.exp(sum(losses) / len(losses)), nll, tokens


@torch.no_grad()
def naive_sliding(model: GPT2LMHeadModel, ids: list[int], window: int, stride: int) -> tuple[float, float, int]:
    """(perplexity, nll, tokens): each target alone, in the first window that holds it."""
    model.eval()
    nll = 0.0
    for target in range(1, len(ids)):
        start = 0
        while start + window <= target:
            start += stride
        logits = model(input_ids=torch.tensor([ids[start:target]])).logits[0, -1].double()
        nll -= functional.log_softmax(logits, dim=-1)[ids[target]].item()
    return math.exp(nll / (len(ids) - 1)), nll, len(ids) - 1


def naive_scored(tokenizer: PreTrainedTokenizerFast, text: str, left_out) -> tuple[int, int]:
    """(words, bytes) of a text without the tokens at the positions `left_out`, by the tokenizer's own offsets."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = found["offset_mapping"]
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    owners = [next(i for i, (start, end) in enumerate(spans) if start <= place < end) for place in starts]
    # A token of byte-level BPE is written with one character for each byte.
    sizes = [len(token) for token in tokenizer.convert_ids_to_tokens(found["input_ids"])]
    assert sum(sizes) == len(text.encode())
    left = set(left_out)
    return sum(owner not in left for owner in owners), sum(size for i, size in enumerate(sizes) if i not in left)


def of_length(tokens: int, tokenizer: PreTrainedTokenizerFast) -> tuple[str, list[int]]:
    """A text of exactly `tokens` tokens, and them."""
    text = tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)[:tokens])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == tokens
    return text, ids


# One window not full, one exactly full, one token over (no target of its own under `paper`), a short last one, several.
@pytest.mark.parametrize("length", [2, 9, 16, 17, 18, 24, 25, 32, 33, 41, 64, 75])
@pytest.mark.parametrize("protocol", ["paper", "sliding"])
def test_equals_the_naive_twin(model, tokenizer, protocol: str, length: int) -> None:
    text, ids = of_length(length, tokenizer)
    found = perplexity(model, tokenizer, text, protocol, batch_size=2)
    twin = naive_paper(model, ids, CONTEXT) if protocol == "paper" else naive_sliding(model, ids, CONTEXT, CONTEXT // 2)
    assert found.perplexity == pytest.approx(twin[0], rel=RELATIVE)
    assert found.nll == pytest.approx(twin[1], rel=RELATIVE)
    assert found.tokens == twin[2]
    assert found.words == len(text.split())
    assert found.bytes == len(text.encode())
    words, text_bytes = naive_scored(tokenizer, text, range(0, length, CONTEXT) if protocol == "paper" else [0])
    assert (found.scored_words, found.scored_bytes) == (words, text_bytes)
    assert found.perplexity_per_word == pytest.approx(math.exp(twin[1] / max(words, 1)), rel=RELATIVE * 100)
    assert found.perplexity_per_byte == pytest.approx(math.exp(twin[1] / text_bytes), rel=RELATIVE)


def test_the_short_last_window_weighs_as_much_under_paper_only(model, tokenizer) -> None:
    text, ids = of_length(CONTEXT + 2, tokenizer)
    found = perplexity(model, tokenizer, text, "paper")
    assert found.tokens == CONTEXT
    assert abs(found.perplexity / math.exp(found.nll / found.tokens) - 1) > 1e-3
    sliding = perplexity(model, tokenizer, text, "sliding")
    assert sliding.tokens == len(ids) - 1
    assert sliding.perplexity == pytest.approx(math.exp(sliding.nll / sliding.tokens), rel=1e-12)


@pytest.mark.parametrize("protocol", ["paper", "sliding"])
def test_batch_and_chunk_sizes_change_nothing(model, tokenizer, protocol: str, monkeypatch) -> None:
    text, _ = of_length(75, tokenizer)
    expected = perplexity(model, tokenizer, text, protocol).to_dict()
    found = [perplexity(model, tokenizer, text, protocol, batch_size=size).to_dict() for size in (1, 3, 100)]
    monkeypatch.setattr("kronfold.evaluate.perplexity._LOGITS_PER_CHUNK", 3 * 300)
    found.append(perplexity(model, tokenizer, text, protocol).to_dict())
    for other in found:
        assert other["nll"] == pytest.approx(expected["nll"], rel=RELATIVE)
        assert other["perplexity"] == pytest.approx(expected["perplexity"], rel=RELATIVE)
        assert other["protocol"] == expected["protocol"]


class ScaledLogits(GPT2LMHeadModel):
    """A family that does more to its logits than apply its head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits / 3
        return output


def test_a_model_that_scales_its_logits_is_measured_as_it_is(tokenizer) -> None:
    text, ids = of_length(41, tokenizer)
    scaled = make_model(kind=ScaledLogits)
    expected, _, _ = naive_sliding(scaled, ids, CONTEXT, CONTEXT // 2)
    assert perplexity(scaled, tokenizer, text).perplexity == pytest.approx(expected, rel=RELATIVE)
    assert perplexity(make_model(), tokenizer, text).perplexity != pytest.approx(expected, rel=0.01)


def test_uniform_logits_give_the_vocabulary(tokenizer) -> None:
    flat = make_model()
    with torch.no_grad():
        flat.transformer.wte.weight.zero_()
    for protocol in PROTOCOLS:
        assert perplexity(flat, tokenizer, TEXT, protocol).perplexity == pytest.approx(300, rel=1e-5)


def flat(tokenizer, context: int) -> GPT2LMHeadModel:
    """A model to which all tokens are equally likely: every target costs the logarithm of the vocabulary."""
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=context, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    return model


@pytest.mark.parametrize(("protocol", "left_out"), [("paper", 3), ("sliding", 1)])
def test_words_and_bytes_are_those_of_the_targets(protocol: str, left_out: int) -> None:
    """Ten words of one token each: by hand, every scored word costs log(vocabulary), so that is the number per word."""
    reader = pico.tokenizer()
    text = " ".join(pico.TEXT.split()[:10])
    found = perplexity(flat(reader, 4), reader, text, protocol)  # windows of 4, 4 and 2 tokens under `paper`
    assert found.tokens == found.scored_words == 10 - left_out
    assert found.perplexity_per_word == pytest.approx(len(reader), rel=1e-5)


@pytest.mark.parametrize("join", ["documents", "one"])
def test_bytes_of_the_targets(tokenizer, join: str) -> None:
    """Bytes alone (a vocabulary without merges): per byte is then the size of the vocabulary, joins left out."""
    bare = train_tokenizer(["ab"], 258)
    texts = ["zö xy", "qß"] if join == "documents" else ["zö xyqß"]
    found = perplexity(flat(bare, 4), bare, iter(texts), "paper")
    size = len("\n\n".join(texts).encode())
    assert found.scored_bytes == found.tokens == size - -(-size // 4)
    assert found.perplexity_per_byte == pytest.approx(len(bare), rel=1e-5)
    sliding = perplexity(flat(bare, 4), bare, iter(texts))
    assert sliding.scored_bytes == len("".join(texts).encode()) - 1, "a joining token stands for no byte"


def test_words_of_a_sentencepiece_tokenizer() -> None:
    """Its tokens carry their space as a mark, and bytes it does not know one by one."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "g"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    reader = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    text = "ö g gg"
    ids = reader.encode(text, add_special_tokens=False)
    assert reader.convert_ids_to_tokens(ids) == ["▁", "<0xC3>", "<0xB6>", "▁", "g", "▁", "g", "g"]
    found = perplexity(flat(reader, 4), reader, text, "paper")  # the first ▁ and the first g open a window each
    assert found.scored_words == 2  # ö begins in <0xC3>, "gg" in its first g
    assert found.scored_bytes == len(text.encode()) - 1, "the first ▁ is no character of the text"


def test_windows_follow_the_context_and_the_result_says_so(model, tokenizer) -> None:
    short = perplexity(model, tokenizer, TEXT).protocol
    assert (short["window"], short["stride"]) == (16, 8)
    assert "shortened from 1024/512 to the model's context of 16" in short["note"]
    long = make_model(context=1100)
    for name, stride in (("paper", 1024), ("sliding", 512)):
        full = perplexity(long, tokenizer, TEXT * 2, name).protocol
        assert (full["name"], full["window"], full["stride"], full["note"]) == (name, 1024, stride, None)


def test_documents_are_joined_as_the_protocol_says(model, tokenizer) -> None:
    joined = "\n\n".join(DOCUMENTS)
    paper = perplexity(model, tokenizer, iter(DOCUMENTS), "paper")
    assert paper.nll == perplexity(model, tokenizer, joined, "paper").nll
    assert (paper.protocol["join"], paper.bytes) == ("\n\n", len(joined.encode()))

    ids: list[int] = []
    for document in DOCUMENTS:
        ids += [*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id]
    sliding = perplexity(model, tokenizer, iter(DOCUMENTS), "sliding")
    expected, _, tokens = naive_sliding(model, ids[:-1], CONTEXT, CONTEXT // 2)
    assert sliding.perplexity == pytest.approx(expected, rel=RELATIVE)
    assert sliding.tokens == tokens
    assert sliding.protocol["join"] == tokenizer.eos_token
    assert sliding.bytes == sum(len(document.encode()) for document in DOCUMENTS)


def test_files(model, tokenizer, tmp_path: Path) -> None:
    text = " = A title = \n \n The file is read . \n\n Its lines are returned .\n"
    rows = [" = A title = \n", "", " The file is read . \n", "", " Its lines are returned .\n"]
    (tmp_path / "wiki.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": row}) + "\n" for row in DOCUMENTS), encoding="utf-8"
    )

    def same(path: str, expected, protocol: str) -> bool:
        found = perplexity(model, tokenizer, tmp_path / path, protocol)
        return found == perplexity(model, tokenizer, expected, protocol)

    assert same("wiki.txt.gz", rows, "paper"), "lines of a .txt are the documents, as the WikiText rows"
    assert same("wiki.txt.gz", text, "sliding"), "the whole file is one document"
    assert same("rows.jsonl", DOCUMENTS, "paper")
    assert same("rows.jsonl", DOCUMENTS, "sliding")


def test_model_mode_is_left_and_progress_is_told(model, tokenizer) -> None:
    told: list[tuple[int, int]] = []
    model.train()
    before = perplexity(model, tokenizer, TEXT, batch_size=3, progress=lambda done, total: told.append((done, total)))
    assert model.training
    assert told[-1][0] == told[-1][1] == before.protocol["windows"]
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert perplexity(model.eval(), tokenizer, TEXT).nll == pytest.approx(before.nll, rel=RELATIVE), "no dropout"
    json.dumps(before.to_dict(), allow_nan=False)


def test_refusals(model, tokenizer, tmp_path: Path) -> None:
    for text in ("", "a", [], ["", "", ""]):
        with pytest.raises(DataError, match="at least 2"):
            perplexity(model, tokenizer, text)
    with pytest.raises(DataError, match="does not exist"):
        perplexity(model, tokenizer, tmp_path / "missing.txt")
    with pytest.raises(InputError, match="Did you mean 'sliding'"):
        perplexity(model, tokenizer, TEXT, "slidng")
    with pytest.raises(InputError, match="batch_size is 0"):
        perplexity(model, tokenizer, TEXT, batch_size=0)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(DataError, match="no end-of-text token"):
        perplexity(model, bare, DOCUMENTS)
    broken = make_model()
    with torch.no_grad():
        broken.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        perplexity(broken, tokenizer, TEXT)
