"""How fast text is cleaned, tokenised and packed: MB/s of one worker, and what that means for OpenWebText.

    python benchmarks/data_preparation.py -o results.json
    python benchmarks/data_preparation.py --source web.jsonl --workers 4 --threads 4 -o results.json

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
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from kronfold.assets import teacher_path
from kronfold.base.files import write_json
from kronfold.base.output import check_output
from kronfold.base.results import document
from kronfold.data.clean import clean
from kronfold.data.encode import encode_documents
from kronfold.data.packing import pack
from kronfold.data.sources import documents
from kronfold.models.load import load_tokenizer

OPENWEBTEXT_BYTES = 39_769_491_688
OPENWEBTEXT_DOCUMENTS = 8_013_769
BLOCK = 1024
STEPS = ("clean", "read_and_tokenise", "read_tokenise_and_pack", "read_and_pack_again")
_STOP_WORDS = "the of and to in a that is was for with be have on it as by at from this".split()  # noqa: SIM905
_HTML = ("<div class='nav'>home | news</div>", "<li><a href='/x'>more</a></li>", "<p>All rights reserved.</p>")
T = TypeVar("T")


def vocabulary(draw: random.Random, size: int = 40_000) -> list[str]:
    """Made-up words of two to four syllables, the short ones first, as frequent words are short."""
    made: dict[str, None] = {}
    while len(made) < size:
        syllables = 2 if len(made) < size // 10 else 3 if len(made) < size // 2 else 4
        made["".join(draw.choice("bcdfghklmnprstvw") + draw.choice("aeiou") for _ in range(syllables))] = None
    return list(made)


def pages(megabytes: float, seed: int) -> Iterator[str]:
    """Web-like documents, about `megabytes` million bytes in all."""
    draw = random.Random(seed)
    words = vocabulary(draw)
    earlier: list[str] = []
    written = 0
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


Seconds = tuple[float, float]


def timed(work: Callable[[], T]) -> tuple[T, Seconds]:
    """What `work` returns, and seconds: by the clock, of this process's processor time."""
    clock, cpu = time.perf_counter(), time.process_time()
    found = work()
    return found, (time.perf_counter() - clock, time.process_time() - cpu)


def rate(megabytes: float, seconds: Seconds, workers: int) -> dict[str, float | None]:
    """MB/s per worker by the clock, and by processor time with one worker; the same in hours for OpenWebText."""
    clock = megabytes / seconds[0] / workers
    cpu = megabytes / seconds[1] if workers == 1 else None
    return {
        "seconds": round(seconds[0], 2),
        "cpu_seconds": round(seconds[1], 2) if cpu else None,
        "megabytes_per_second_and_worker": round(clock, 4),
        "megabytes_per_cpu_second": round(cpu, 4) if cpu else None,
        "openwebtext_worker_hours": round(OPENWEBTEXT_BYTES / 1e6 / clock / 3600, 2),
        "openwebtext_core_hours": round(OPENWEBTEXT_BYTES / 1e6 / cpu / 3600, 2) if cpu else None,
    }


def table(found: dict[str, Any]) -> Table:
    """The rates, and what they mean for OpenWebText."""
    title = f"{found['megabytes']:.0f} MB, and OpenWebText ({OPENWEBTEXT_BYTES / 1e9:.2f} GB) at these rates"
    shown = Table(title=title)
    for name in ("step", "seconds", "processor s", "MB/s", "MB per processor s", "hours", "core hours"):
        shown.add_column(name, justify="left" if name == "step" else "right")
    for step in STEPS:
        values = list(found[step].values())
        shown.add_row(step.replace("_", " "), *("" if value is None else f"{value:.2f}" for value in values))
    return shown


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All rates of one source."""
    source = options.source
    if source is None:
        source = work / "web.jsonl"
        with source.open("w", encoding="utf-8") as file:
            for text in pages(options.megabytes, options.seed):
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    size = sum(len(text.encode()) for text in documents(source)) / 1e6
    manifest, cleaning = timed(
        lambda: clean(
            source, work / "clean", workers=options.workers, seed=options.seed, shard_megabytes=options.shard_megabytes
        )
    )
    cleaned = work / "clean"
    left = sum(len(text.encode()) for text in documents(cleaned)) / 1e6
    tokenizer = load_tokenizer(options.tokenizer)
    tokens, tokenising = timed(lambda: sum(map(len, encode_documents(documents(cleaned), tokenizer))))
    blocks, packing = timed(lambda: pack(documents(cleaned), tokenizer, BLOCK))
    _, again = timed(lambda: pack(documents(cleaned), tokenizer, BLOCK))
    threads = options.threads
    return {
        "megabytes": round(size, 3),
        "megabytes_after_cleaning": round(left, 3),
        "documents": manifest["input"]["documents"],
        "documents_after_cleaning": manifest["output"]["documents"],
        "tokens": tokens,
        "blocks": len(blocks),
        "clean": rate(size, cleaning, options.workers),
        "read_and_tokenise": rate(left, tokenising, threads),
        "read_tokenise_and_pack": rate(left, packing, threads),
        "read_and_pack_again": rate(left, again, threads),
        "dropped": {
            entry["filter"]: entry["documents_in"] - entry["documents_out"] for entry in manifest["filters"]
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="text to prepare instead of made-up text")
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--workers", type=int, default=1, help="processes that clean")
    parser.add_argument("--threads", type=int, default=1, help="threads that tokenise")
    parser.add_argument("--quick", action="store_true", help="2 MB: does it run at all")
    parser.add_argument("--shard-megabytes", type=float, default=8)
    parser.add_argument("--tokenizer", default=str(teacher_path()), help="default: that of the model in the package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", required=True)
    options = parser.parse_args()
    output = check_output(options.output, overwrite=True)
    if options.quick:
        options.megabytes = 2.0
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if options.threads > 1 else "false"  # else one worker is one core
    os.environ["RAYON_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as work:
        os.environ["KRONFOLD_CACHE"] = str(Path(work) / "cache")  # what lies in the user's own cache must not count
        found = measure(options, Path(work))
    settings = {key: getattr(options, key) for key in ("megabytes", "workers", "threads", "shard_megabytes", "seed")}
    settings["source"] = Path(options.source).name if options.source else "made up"
    reference = {"bytes": OPENWEBTEXT_BYTES, "documents": OPENWEBTEXT_DOCUMENTS, "from": "its dataset card"}
    write_json(
        output,
        document(
            "data-preparation",
            options.seed,
            settings=settings,
            load_average=os.getloadavg(),
            openwebtext=reference,
            **found,
        ),
    )
    Console().print(table(found))


if __name__ == "__main__":
    main()
