"""How much of the bare forward rate `kf.perplexity` keeps, and what tokenising costs, once and again.

    python benchmarks/eval_speed.py -o results.json
    python benchmarks/eval_speed.py --model gpt2-wikitext2 --text test.txt -o results.json

Without --model: GPT-2 small's shapes with random weights, and the tokenizer of the model in the package. For both
protocols and several batch sizes the same windows are run in turn, A B A B, after a warm-up:

- bare: `model(input_ids).logits` on batches of the same windows, nothing read from the logits;
- perplexity: `kf.perplexity` on the text as a string, its tokenising included.

The rate is tokens that enter the model per second; sliding windows overlap, so they count twice on both sides. The bar
is 0.95 of the bare rate. Tokenising is timed by itself: without the cache, when the cache is filled, and from it.
Seconds are medians of wall time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kronfold.assets import heal_text, teacher_path
from kronfold.base.cache import cache_directory
from kronfold.base.errors import KronfoldError
from kronfold.data.encode import token_stream
from kronfold.data.sources import documents
from kronfold.data.token_cache import LIMIT
from kronfold.evaluate.perplexity import PROTOCOLS, perplexity
from kronfold.models.load import load_model, load_tokenizer, read_dtype
from kronfold.models.presets import preset_config
from timing import figure, finish, interleaved, medians, parser, prepare

BAR = 0.95


def random_model(small: bool, seed: int) -> Any:
    """GPT-2 small's shapes, or a quarter of its width and depth; random weights."""
    from transformers import AutoModelForCausalLM

    config = preset_config("gpt2")
    if small:
        config.n_embd, config.n_layer, config.n_head = 192, 3, 3
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def windows_of(protocol: str, tokens: int, context: int) -> list[tuple[int, int]]:
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


def batches(windows: list[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    """Windows of one length, `size` at a time."""
    batch: list[tuple[int, int]] = []
    for window in windows:
        if batch and (len(batch) == size or window[1] - window[0] != batch[0][1] - batch[0][0]):
            yield batch
            batch = []
        batch.append(window)
    yield batch


@torch.no_grad()
def bare(model: Any, ids: torch.Tensor, windows: list[tuple[int, int]], size: int) -> None:
    for batch in batches(windows, size):
        inputs = torch.stack([ids[start:end] for start, end in batch]).to(model.device)
        _ = model(input_ids=inputs, use_cache=False).logits


def compare(model: Any, tokenizer: Any, text: str, protocol: str, size: int, rounds: int) -> dict[str, Any]:
    """One row: bare forward and perplexity in turn on the same windows."""
    device = str(model.device)
    ids = torch.from_numpy(np.concatenate(list(token_stream([text], tokenizer))).astype(np.int64))
    windows = windows_of(protocol, len(ids), model.config.max_position_embeddings)
    tokens = sum(end - start for start, end in windows)
    works = {
        "bare": lambda: bare(model, ids, windows, size),
        "perplexity": lambda: perplexity(model, tokenizer, text, protocol, batch_size=size),
    }
    seconds = medians(interleaved(works, rounds, device))
    ratio = seconds["bare"] / seconds["perplexity"]
    return {
        "protocol": protocol,
        "batch_size": size,
        "windows": len(windows),
        "tokens_through_the_model": tokens,
        "seconds": seconds,
        "bare_tokens_per_second": tokens / seconds["bare"],
        "perplexity_tokens_per_second": tokens / seconds["perplexity"],
        "rate_ratio": ratio,
    }


def tokenising(tokenizer: Any, text: str, rounds: int) -> dict[str, Any]:
    """Seconds to turn the text into ids: one plain call of the tokenizer; no cache, an empty one, a filled one."""

    def stream(limit: str) -> None:
        os.environ[LIMIT] = limit
        for _ in token_stream([text], tokenizer):
            pass

    def cold() -> None:
        shutil.rmtree(cache_directory() / "tokens", ignore_errors=True)
        stream("1")

    ways = {
        "plain call": lambda: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        "no cache": lambda: stream("0"),
        "cold": cold,
        "cached": lambda: stream("1"),
    }
    return {"megabytes": len(text.encode()) / 1e6, "seconds": medians(interleaved(ways, rounds))}


def figures(rows: list[dict[str, Any]], tokens: dict[str, Any]) -> list[dict[str, Any]]:
    """What the table shows: the rates' ratio of every row, and MB/s of every way to tokenise."""
    rates = [figure(f"{row['protocol']}, batch {row['batch_size']}: rate", row["rate_ratio"], BAR) for row in rows]
    ways = tokens["seconds"].items()
    return rates + [figure(f"tokenise, {way}: MB/s", tokens["megabytes"] / taken) for way, taken in ways]


def measure(options: argparse.Namespace) -> None:
    prepare(options)
    sizes = [1, 2] if options.quick else [int(size) for size in options.batch_sizes.split(",")]
    rounds = 1 if options.quick else options.rounds or 3
    tokenizer = load_tokenizer(options.model or teacher_path())
    model = load_model(options.model) if options.model else random_model(options.quick, options.seed)
    model = model.eval().to(device=options.device, dtype=read_dtype(options.dtype))
    whole = "\n\n".join(documents(Path(options.text) if options.text else heal_text()))
    tokens = tokenising(tokenizer, whole, rounds)
    text = whole[: 6_000 if options.quick else options.characters]
    rows = [compare(model, tokenizer, text, protocol, size, rounds) for protocol in PROTOCOLS for size in sizes]
    settings = {"characters": len(text), "rounds": rounds, "dtype": options.dtype}
    settings["model"] = Path(options.model).name if options.model else "random weights"
    finish("eval_speed", options, figures(rows, tokens), settings=settings, rows=rows, tokenising=tokens)


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--model", help="a model directory or hub id; default: GPT-2 small's shapes, random weights")
    made.add_argument("--text", help="a text source (.txt, .jsonl, ...); default: the text in the package")
    made.add_argument("--characters", type=int, default=13_000, help="of the text, for the rates")
    made.add_argument("--batch-sizes", default="1,4")
    made.add_argument("--dtype", default="float32")
    options = made.parse_args()
    try:
        with tempfile.TemporaryDirectory() as place:
            os.environ["KRONFOLD_CACHE"] = place  # what lies in the user's own cache must not count
            measure(options)
    except KronfoldError as error:
        made.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
