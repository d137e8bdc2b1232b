"""How much of the bare forward rate `kf.perplexity` keeps, and what tokenising costs, once and again.

    python benchmarks/eval_speed.py -o results.json
    python benchmarks/eval_speed.py --model gpt2-wikitext2 --text test.txt -o results.json

Without --model: GPT-2 small's shapes with random weights, and the tokenizer of the model in the package. For both
protocols and several batch sizes the same windows are run in turn, A B A B, after a warm-up:

- bare: `model(input_ids).logits` on batches of the same windows, nothing read from the logits;
- perplexity: `kf.perplexity` on the text as a string, its tokenising included.

The rate is tokens that enter the model per second; sliding windows overlap, so they count twice on both sides. The bar
is 0.95 of the bare rate. Tokenising is timed by itself: without the cache, when the cache is filled, and from it.
Seconds are medians of wall time; processor seconds stand beside them for a machine that does other work.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kronfold.assets import heal_text, teacher_path
from kronfold.base.errors import KronfoldError
from kronfold.base.files import check_output, write_json
from kronfold.base.results import document
from kronfold.data.encode import token_stream
from kronfold.data.sources import documents
from kronfold.data.token_cache import LIMIT
from kronfold.evaluate.perplexity import PROTOCOLS, perplexity
from kronfold.models.load import load_model, load_tokenizer, read_dtype
from kronfold.models.presets import preset_config

BAR = 0.95
Seconds = tuple[float, float]  # wall, processor


def random_model(small: bool, seed: int) -> Any:
    """GPT-2 small's shapes, or a quarter of its width and depth; random weights."""
    from transformers import AutoModelForCausalLM

    config = preset_config("gpt2")
    if small:
        config.n_embd, config.n_layer, config.n_head = 192, 3, 3
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def timed(work: Callable[[], Any], device: str) -> Seconds:
    wall, processor = time.perf_counter(), time.process_time()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - processor


def medians(taken: list[Seconds]) -> dict[str, float]:
    wall, processor = (statistics.median(values) for values in zip(*taken, strict=True))
    return {"wall_seconds": wall, "processor_seconds": processor}


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
    taken: dict[str, list[Seconds]] = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            seconds = timed(work, device)
            if round_:
                taken[name].append(seconds)
    found = {name: medians(values) for name, values in taken.items()}
    ratio = {key: found["bare"][key] / found["perplexity"][key] for key in found["bare"]}
    return {
        "protocol": protocol,
        "batch_size": size,
        "windows": len(windows),
        "tokens_through_the_model": tokens,
        "bare_tokens_per_second": round(tokens / found["bare"]["wall_seconds"], 1),
        "perplexity_tokens_per_second": round(tokens / found["perplexity"]["wall_seconds"], 1),
        "rate_ratio": round(ratio["wall_seconds"], 4),
        "rate_ratio_by_processor_time": round(ratio["processor_seconds"], 4),
        "bar": BAR,
        "ratio_to_bar": round(ratio["wall_seconds"] / BAR, 4),
        **found,
    }


def tokenising(tokenizer: Any, text: str, rounds: int) -> dict[str, Any]:
    """Seconds to turn the text into ids: no cache, an empty one, a filled one; and one plain call of the tokenizer."""

    def stream() -> None:
        for _ in token_stream([text], tokenizer):
            pass

    taken: dict[str, list[Seconds]] = {"plain_call": [], "no_cache": [], "cold": [], "cached": []}
    keep, limit = os.environ["KRONFOLD_CACHE"], os.environ.pop(LIMIT, None)
    for _ in range(rounds):
        plain = timed(lambda: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], "cpu")
        taken["plain_call"].append(plain)
        os.environ[LIMIT] = "0"
        taken["no_cache"].append(timed(stream, "cpu"))
        del os.environ[LIMIT]
        with tempfile.TemporaryDirectory() as place:
            os.environ["KRONFOLD_CACHE"] = place
            taken["cold"].append(timed(stream, "cpu"))
            taken["cached"].append(timed(stream, "cpu"))
        os.environ["KRONFOLD_CACHE"] = keep
    if limit is not None:
        os.environ[LIMIT] = limit
    rows = {name: {key: round(value, 4) for key, value in medians(values).items()} for name, values in taken.items()}
    return {"megabytes": round(len(text.encode()) / 1e6, 3), **rows}


def tables(rows: list[dict[str, Any]], tokens: dict[str, Any]) -> list[Table]:
    shown = Table(title=f"kf.perplexity against the bare forward (bar: {BAR} of its rate)")
    for name in ("protocol", "batch", "windows", "bare tok/s", "perplexity tok/s", "ratio", "to bar", "by processor"):
        shown.add_column(name, justify="left" if name == "protocol" else "right")
    for row in rows:
        shown.add_row(
            row["protocol"],
            str(row["batch_size"]),
            str(row["windows"]),
            f"{row['bare_tokens_per_second']:,.0f}",
            f"{row['perplexity_tokens_per_second']:,.0f}",
            f"{row['rate_ratio']:.3f}",
            f"{row['ratio_to_bar']:.3f}",
            f"{row['rate_ratio_by_processor_time']:.3f}",
        )
    told = Table(title=f"Tokenising {tokens['megabytes']} MB as one text")
    for name in ("way", "wall s", "processor s", "MB/s"):
        told.add_column(name, justify="left" if name == "way" else "right")
    for name in ("plain_call", "no_cache", "cold", "cached"):
        seconds = tokens[name]
        rate = tokens["megabytes"] / max(seconds["wall_seconds"], 1e-9)
        told.add_row(name, f"{seconds['wall_seconds']:.3f}", f"{seconds['processor_seconds']:.3f}", f"{rate:.1f}")
    return [shown, told]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(options.model or teacher_path())
    model = load_model(options.model) if options.model else random_model(options.quick, options.seed)
    model = model.eval().to(device=options.device, dtype=read_dtype(options.dtype))
    whole = "\n\n".join(documents(Path(options.text) if options.text else heal_text()))
    tokens = tokenising(tokenizer, whole, options.rounds)
    text = whole[: options.characters]
    rows = [
        compare(model, tokenizer, text, protocol, size, options.rounds)
        for protocol in PROTOCOLS
        for size in options.batch_sizes
    ]
    settings = {key: getattr(options, key) for key in ("characters", "rounds", "threads", "device", "dtype")}
    settings["model"] = Path(options.model).name if options.model else "random weights"
    Console().print(*tables(rows, tokens))
    return {"settings": settings, "load_average": os.getloadavg(), "rows": rows, "tokenising": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="a model directory or hub id; default: GPT-2 small's shapes, random weights")
    parser.add_argument("--text", help="a text source (.txt, .jsonl, ...); default: the text in the package")
    parser.add_argument("--characters", type=int, default=13_000, help="of the text, for the rates")
    parser.add_argument("--batch-sizes", default="1,4")
    parser.add_argument("--rounds", type=int, default=3, help="after one of warm-up")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: does it run at all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, help="write every figure as JSON")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    options = parser.parse_args()
    options.batch_sizes = [int(size) for size in options.batch_sizes.split(",")]
    if options.quick:
        options.rounds, options.characters, options.batch_sizes = 1, 6_000, [1, 2]
    try:
        if options.output:
            check_output(options.output, options.overwrite)
        with tempfile.TemporaryDirectory() as place:
            os.environ["KRONFOLD_CACHE"] = place  # what lies in the user's own cache must not count
            found = measure(options)
        if options.output:
            write_json(options.output, document("eval-speed", options.seed, **found))
    except KronfoldError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
