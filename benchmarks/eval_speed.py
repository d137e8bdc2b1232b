"""How much of the bare forward rate `kf.perplexity` keeps, and what tokenising costs, once and again.

    python benchmarks/eval_speed.py -o eval_speed.json
    python benchmarks/eval_speed.py --model gpt2-wikitext2 --text test.txt -o eval_speed.json

Without --model: GPT-2 small's shapes with random weights, and the tokenizer of the model in the package. For both
protocols and several batch sizes the same windows are run in turn:

- bare: `model(input_ids).logits` on batches of the same windows, nothing read from the logits;
- perplexity: `kf.perplexity` on the text as a string, its tokenising included.

The rate is tokens that enter the model per second; sliding windows overlap, so they count twice on both sides. The bar
is 0.95 of the bare rate. Tokenising is timed by itself: one plain call of the tokenizer, without the cache, when the
cache is filled, and from it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

import kronfold as kf
from bench import Benchmark, Run, environment, figure, gpt2, interleaved, medians, own_cache
from kronfold.assets import heal_text, teacher_path
from kronfold.data.encode import LIMIT, token_stream
from kronfold.data.sources import documents
from kronfold.evaluate.perplexity import PROTOCOLS
from kronfold.models.load import load_model, load_tokenizer, read_dtype

BAR = 0.95
Window = tuple[int, int]


def windows_of(protocol: str, tokens: int, context: int) -> list[Window]:
    """Start and end of the windows of a text of so many tokens, as the protocols are described."""
    chosen = PROTOCOLS[protocol]
    window = min(chosen.window, context)
    stride = max(1, chosen.stride * window // chosen.window)
    found = []
    for start in range(0, tokens, stride):
        found.append((start, min(start + window, tokens)))
        if start + window >= tokens:
            break
    return [(start, end) for start, end in found if end - start > 1]  # a window of one token holds no target


@torch.no_grad()
def bare(model: Any, ids: torch.Tensor, windows: list[Window], size: int) -> None:
    """Forward passes over windows of one length, `size` at a time."""
    batch: list[Window] = []
    for window in [*windows, None]:
        full = len(batch) == size or (batch and window and window[1] - window[0] != batch[0][1] - batch[0][0])
        if batch and (full or window is None):
            inputs = torch.stack([ids[start:end] for start, end in batch]).to(model.device)
            _ = model(input_ids=inputs, use_cache=False).logits
            batch = []
        if window:
            batch.append(window)


def compare(model: Any, tokenizer: Any, text: str, protocol: str, size: int, rounds: int) -> dict[str, Any]:
    """One row: bare forward and perplexity in turn on the same windows."""
    ids = torch.cat([torch.as_tensor(part, dtype=torch.long) for part in token_stream([text], tokenizer)])
    windows = windows_of(protocol, len(ids), model.config.max_position_embeddings)
    tokens = sum(end - start for start, end in windows)
    works = {
        "bare": lambda: bare(model, ids, windows, size),
        "perplexity": lambda: kf.perplexity(model, tokenizer, text, protocol, batch_size=size),
    }
    seconds = medians(interleaved(works, rounds, model.device.type))
    return {
        "protocol": protocol,
        "batch_size": size,
        "windows": len(windows),
        "tokens_through_the_model": tokens,
        "seconds": seconds,
        "tokens_per_second": {name: tokens / taken for name, taken in seconds.items()},
    }


def tokenising(tokenizer: Any, text: str, rounds: int, cache: Path) -> dict[str, Any]:
    """Seconds to turn the text into ids, each way."""

    def stream(limit: str) -> None:
        with environment(**{LIMIT: limit}):
            for _ in token_stream([text], tokenizer):
                pass

    def cold() -> None:
        shutil.rmtree(cache / "tokens", ignore_errors=True)
        stream("1")

    ways = {
        "plain call": lambda: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        "no cache": lambda: stream("0"),
        "cold": cold,
        "cached": lambda: stream("1"),
    }
    return {"megabytes": len(text.encode()) / 1e6, "seconds": medians(interleaved(ways, rounds))}


def measure(run: Run) -> dict[str, Any]:
    options = run.options
    tokenizer = load_tokenizer(options.model or teacher_path())
    model = load_model(options.model) if options.model else gpt2(options.quick, options.seed, vocab_size=50257)
    model = model.eval().to(device=options.device, dtype=read_dtype(options.dtype))
    whole = "\n\n".join(documents(Path(options.text) if options.text else heal_text()))
    text = whole[: options.characters]
    with own_cache() as place:
        tokens = tokenising(tokenizer, whole[:200_000] if options.quick else whole, options.rounds, place / "cache")
        rows = [
            compare(model, tokenizer, text, protocol, int(size), options.rounds)
            for protocol in PROTOCOLS
            for size in options.batch_sizes.split(",")
        ]
    figures = []
    for row in rows:
        rate = row["seconds"]["bare"] / row["seconds"]["perplexity"]
        figures.append(figure(f"{row['protocol']}, batch {row['batch_size']}: rate over bare", rate, BAR))
    for way, taken in tokens["seconds"].items():
        figures.append(figure(f"tokenise, {way}: MB/s", tokens["megabytes"] / taken))
    return {"figures": figures, "characters": len(text), "rows": rows, "tokenising": tokens}


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--model", help="a model directory or hub id; default: GPT-2 small's shapes, random weights")
    made.add_argument("--text", help="a text source (.txt, .jsonl, ...); default: the text in the package")
    made.add_argument("--characters", type=int, default=13_000, help="of the text, for the rates")
    made.add_argument("--batch-sizes", default="1,4")
    made.add_argument("--dtype", default="float32")


QUICK = {"model": None, "text": None, "characters": 4_000, "batch_sizes": "2"}
BENCHMARK = Benchmark("eval_speed", __doc__ or "", add_options, measure, QUICK, rounds=3)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
