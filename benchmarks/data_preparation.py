"""How fast text is cleaned, tokenised and packed: MB/s of one worker, and what that means for OpenWebText.

    python benchmarks/data_preparation.py --threads 1 -o data_preparation.json
    python benchmarks/data_preparation.py --source web.jsonl --workers 4 --threads 4 -o data_preparation.json

Without --source it makes web-like text with a seed: pages of 50 to 1,500 words from a Zipf-like vocabulary, one in ten
a copy or an altered copy of an earlier page, one in five with an HTML line. Its words are not English, so the tokenizer
works harder than on real text; figures from --source are worth more. MB are 10^6 bytes of UTF-8 text that went in.
Cleaning goes through datatrove's local executor with --workers processes, as at any size (Slurm and Ray by
configuration, docs/data.md); tokenising uses --threads threads of one process, and is measured without the token cache,
while it is filled, and from it. With one worker, or thread, processor seconds are measured too: on a machine with other
work to do they say more than the clock.
OpenWebText: 39,769,491,688 bytes in 8,013,769 documents, by its dataset card (huggingface.co/datasets/
Skylion007/openwebtext, dataset_info). The extrapolation is linear in bytes; stages that compare all documents with all
(sorting signatures, clustering) take one task each for exact duplicates and clusters, and are not spread further.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from rich.console import Console

from bench import Benchmark, Run, environment, figure, own_cache, table
from kronfold.assets import teacher_path
from kronfold.data.clean import clean
from kronfold.data.encode import encode_documents
from kronfold.data.packing import pack
from kronfold.data.sources import documents
from kronfold.models.load import load_tokenizer

OPENWEBTEXT = {"bytes": 39_769_491_688, "documents": 8_013_769, "from": "its dataset card"}
BLOCK = 1024
_STOP_WORDS = "the of and to in a that is was for with be have on it as by at from this".split()  # noqa: SIM905
_HTML = ("<div class='nav'>home | news</div>", "<li><a href='/x'>more</a></li>", "<p>All rights reserved.</p>")
T = TypeVar("T")


def pages(megabytes: float, seed: int) -> Iterator[str]:
    """Web-like documents, about `megabytes` million bytes in all."""
    draw = random.Random(seed)
    made: dict[str, None] = {}  # words of two to four syllables, the short ones first, as frequent words are short
    while len(made) < 40_000:
        syllables = 2 if len(made) < 4_000 else 3 if len(made) < 20_000 else 4
        made["".join(draw.choice("bcdfghklmnprstvw") + draw.choice("aeiou") for _ in range(syllables))] = None
    words, earlier, written = list(made), [], 0
    while written < megabytes * 1e6:
        kind = draw.random()
        if earlier and kind < 0.1:
            text = draw.choice(earlier)
            if kind < 0.05:
                pieces = text.split(" ")
                pieces[draw.randrange(len(pieces))] = draw.choice(words)
                text = " ".join(pieces)
        else:
            text = _page(draw, words)
            if len(earlier) < 2000:
                earlier.append(text)
        if draw.random() < 0.2:
            text += "\n" + draw.choice(_HTML)
        written += len(text.encode())
        yield text


def _page(draw: random.Random, words: list[str]) -> str:
    count = int(min(1500, max(50, draw.lognormvariate(6, 0.8))))
    picked = [
        draw.choice(_STOP_WORDS) if draw.random() < 0.35 else words[int(len(words) ** draw.random()) - 1]
        for _ in range(count)
    ]
    sentences = []
    while picked:
        length = draw.randint(8, 25)
        sentences.append(" ".join(picked[:length]).capitalize() + ".")
        picked = picked[length:]
    return "\n".join(" ".join(sentences[i : i + 5]) for i in range(0, len(sentences), 5))


def timed(work: Callable[[], T], megabytes: float, workers: int) -> tuple[T, dict[str, float | None]]:
    """What `work` returns, and its rate: MB/s per worker by the clock, and by processor time with one worker; the same
    in hours for OpenWebText."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = work()
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    hours, alone = OPENWEBTEXT["bytes"] / 1e6 / megabytes / 3600, workers == 1
    return found, {
        "seconds": round(clock, 2),
        "cpu_seconds": round(cpu, 2) if alone else None,
        "megabytes_per_second_and_worker": megabytes / clock / workers,
        "megabytes_per_cpu_second": megabytes / cpu if alone else None,
        "openwebtext_worker_hours": round(hours * clock * workers, 2),
        "openwebtext_core_hours": round(hours * cpu, 2) if alone else None,
    }


def measure(run: Run) -> dict[str, Any]:
    options, threads = run.options, torch.get_num_threads()
    parallel = {"TOKENIZERS_PARALLELISM": "true" if threads > 1 else "false", "RAYON_NUM_THREADS": str(threads)}
    with own_cache() as place, environment(**parallel):  # without these one worker is not one core
        source = options.source or place / "web.jsonl"
        if not options.source:
            with source.open("w", encoding="utf-8") as file:
                for text in pages(options.megabytes, options.seed):
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        size = sum(len(text.encode()) for text in documents(source)) / 1e6
        cleaned, steps = place / "clean", {}
        cleaning = {"workers": options.workers, "seed": options.seed, "shard_megabytes": options.shard_megabytes}
        manifest, steps["clean"] = timed(lambda: clean(source, cleaned, **cleaning), size, options.workers)
        left = sum(len(text.encode()) for text in documents(cleaned)) / 1e6
        tokenizer = load_tokenizer(options.tokenizer)
        count = lambda: sum(map(len, encode_documents(documents(cleaned), tokenizer)))  # noqa: E731
        with environment(KRONFOLD_TOKEN_CACHE_GB="0"):
            tokens, steps["read and tokenise"] = timed(count, left, threads)
        blocks, steps["read, tokenise and pack"] = timed(
            lambda: pack(documents(cleaned), tokenizer, BLOCK), left, threads
        )
        _, steps["the same again"] = timed(lambda: pack(documents(cleaned), tokenizer, BLOCK), left, threads)
    title = f"{size:.0f} MB, and OpenWebText ({OPENWEBTEXT['bytes'] / 1e9:.2f} GB) at these rates"
    names = ("step", "seconds", "processor s", "MB/s", "MB per processor s", "hours", "core hours")
    cells = [(name, *("" if v is None else f"{v:.2f}" for v in step.values())) for name, step in steps.items()]
    Console().print(table(title, names, cells))
    dropped = {one["filter"]: one["documents_in"] - one["documents_out"] for one in manifest["filters"]}
    return {
        "figures": [figure(f"{name}: MB/s", step["megabytes_per_second_and_worker"]) for name, step in steps.items()],
        "megabytes": {"read": size, "after_cleaning": left},
        "documents": {"read": manifest["input"]["documents"], "after_cleaning": manifest["output"]["documents"]},
        "tokens": tokens,
        "blocks": len(blocks),
        "steps": steps,
        "dropped": dropped,
        "openwebtext": OPENWEBTEXT,
        "load_average": os.getloadavg(),
    }


def add_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("--source", help="text to prepare instead of made-up text")
    made.add_argument("--megabytes", type=float, default=100, help="of made-up text")
    made.add_argument("--workers", type=int, default=1, help="processes that clean; --threads tokenise")
    made.add_argument("--shard-megabytes", type=float, default=8)
    made.add_argument("--tokenizer", default=str(teacher_path()), help="default: that of the model in the package")


QUICK = {"source": None, "megabytes": 0.2, "workers": 1}
BENCHMARK = Benchmark("data_preparation", __doc__ or "", add_options, measure, QUICK, rounds=1)

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
