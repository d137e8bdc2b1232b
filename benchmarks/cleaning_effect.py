"""What cleaning is worth: one compressed model healed on clean, on dirtied and on cleaned text, with equal tokens.

    python benchmarks/cleaning_effect.py MODEL --train train.txt --eval valid.txt -o results.json

Sections of --train (split at headings like "= Title ="), as many as hold --pool-tokens tokens, are the clean text.
It is dirtied with a seed: --share (30 %) of the documents come back as a copy, an altered copy (one word in 40
replaced) or a copy with other punctuation, at random places; as many documents get one to three lines of HTML. That
text is cleaned by `kronfold data clean`, and what it removed is held against what was injected. The pool is about as
large as the healing budget: with more text than budget a repeat would hardly ever be met. Each row heals a copy of
the same compressed model; rows that are in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import hashlib
import itertools
import json
import random
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import kronfold as kf
from kronfold.base.errors import InputError
from kronfold.base.files import sha256_of, write_json
from kronfold.base.results import document
from kronfold.data.clean import clean
from kronfold.data.encode import encode_documents
from kronfold.data.packing import pack
from kronfold.data.sources import documents
from kronfold.distill import ObjectiveConfig
from kronfold.models.load import load_model, load_tokenizer

_HEADING = re.compile(r"^ *=+ .+ =+ *$", re.MULTILINE)
_ALTERED = 40  # words per replaced word of an altered copy
_FRAGMENTS = (
    '<div class="ad-slot" id="{0}">{1} {2}</div>',
    '<li><a href="/{0}/{1}.html">{2} {0}</a></li>',
    '<script type="text/javascript">var {0} = "{1}"; load({0});</script>',
    '<img src="/images/{0}-{1}.jpg" alt="{2}" width="640">',
    "</td><td>{0}</td><td>{1} {2}</td></tr>",
    '<p style="font-size: 11px">Share this: {0} | {1} | {2}</p>',
)
OBJECTIVES = {"kd": ObjectiveConfig(ce=0.1, kl=1.0), "ce": ObjectiveConfig(ce=1.0, kl=0.0)}
Row = dict[str, Any]


def sections(text: str) -> list[str]:
    """The text cut before each heading; sections of less than 50 words joined to the next."""
    starts = [0, *(match.start() for match in _HEADING.finditer(text)), len(text)]
    found, held = [], ""
    for start, end in itertools.pairwise(starts):
        held += text[start:end]
        if len(held.split()) >= 50:
            found.append(held.strip())
            held = ""
    return found


def pool(texts: list[str], tokenizer: Any, tokens: int) -> list[str]:
    """The first documents that hold `tokens` tokens together."""
    count = 0
    for index, ids in enumerate(encode_documents(texts, tokenizer)):
        count += len(ids) + 1
        if count >= tokens:
            return texts[: index + 1]
    raise InputError(f"--train holds {count} tokens, less than --pool-tokens {tokens}.")


def dirtied(texts: list[str], share: float, seed: int) -> list[Row]:
    """Documents {"text", "of", "kind", "html"}: `of` is the place of the original, `html` the lines injected."""
    draw = random.Random(seed)
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})
    rows: list[Row] = [{"text": text, "of": i, "kind": "original", "html": []} for i, text in enumerate(texts)]
    count = round(share * len(texts))
    for number, index in enumerate(draw.sample(range(len(texts)), count)):
        kind = ("copy", "altered", "punctuation")[number % 3]
        text = texts[index]
        if kind == "altered":
            pieces = text.split(" ")
            for place in draw.sample(range(len(pieces)), max(1, len(pieces) // _ALTERED)):
                pieces[place] = draw.choice(words)
            text = " ".join(pieces)
        elif kind == "punctuation":
            text = text.replace(",", ";").replace(". ", " - ")
        rows.insert(draw.randrange(len(rows) + 1), {"text": text, "of": index, "kind": kind, "html": []})
    for index in draw.sample(range(len(rows)), count):
        lines = rows[index]["text"].split("\n")
        for _ in range(draw.randint(1, 3)):
            line = draw.choice(_FRAGMENTS).format(*draw.sample(words, 3))
            rows[index]["html"].append(line)
            lines.insert(draw.randrange(len(lines) + 1), line)
        rows[index]["text"] = "\n".join(lines)
    return rows


def removal(rows: list[Row], kept: dict[int, str]) -> Row:
    """Precision and recall of what cleaning removed against what was injected.

    A copy is found when its group (the original and its copies) is down to one document. Wrongly removed is a group
    of which nothing is left, and a line of the clean text that is in no kept document of its group any more.
    """
    groups = Counter(row["of"] for row in rows)
    left = Counter(rows[index]["of"] for index in kept)
    injected = len(rows) - len(groups)
    missed = sum(count - 1 for count in left.values())
    lost = len(groups) - len(left)
    removed = len(rows) - len(kept)
    by_kind = {}
    for kind in ("copy", "altered", "punctuation"):
        mine = [row["of"] for row in rows if row["kind"] == kind]
        by_kind[kind] = {"injected": len(mine), "found": sum(left[of] <= 1 for of in mine)}
    html_in = sum(len(rows[index]["html"]) for index in kept)
    html_left = sum(kept[index].split("\n").count(line) for index in kept for line in rows[index]["html"])
    lines_lost = 0
    for index, text in kept.items():
        own = Counter(line.strip() for line in rows[index]["text"].split("\n"))
        own -= Counter(line.strip() for line in rows[index]["html"])
        lines_lost += sum((own - Counter(line.strip() for line in text.split("\n"))).values())
    found = html_in - html_left
    return {
        "documents": {
            "injected": injected, "removed": removed, "missed": missed, "wrongly_removed": lost,
            "precision": (removed - lost) / removed if removed else None,
            "recall": (injected - missed) / injected if injected else None,
            "by_kind": by_kind,
        },
        "html_lines_in_kept_documents": {
            "injected": html_in, "missed": html_left, "wrongly_removed": lines_lost,
            "precision": found / (found + lines_lost) if found + lines_lost else None,
            "recall": found / html_in if html_in else None,
        },
    }  # fmt: skip


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def prepare(options: argparse.Namespace, tokenizer: Any) -> tuple[dict[str, list[str]], Row]:
    """The three texts by name, and what cleaning did."""
    clean_texts = pool(sections("\n".join(documents(options.train))), tokenizer, options.pool_tokens)
    rows = dirtied(clean_texts, options.share, options.seed)
    with tempfile.TemporaryDirectory() as place:
        source = write_texts(Path(place) / "dirty.jsonl", [row["text"] for row in rows])
        manifest = clean(source, Path(place) / "out", seed=options.seed)
        found = [
            json.loads(line)
            for file in sorted((Path(place) / "out").glob("*.jsonl.gz"))
            for line in _unzipped(file).splitlines()
        ]
    kept = {int(row["id"]): row["text"] for row in found}
    texts = {
        "clean": clean_texts,
        "dirtied": [row["text"] for row in rows],
        "cleaned": [row["text"] for row in found],
    }
    counts = {
        name: {
            "documents": len(mine),
            "words": sum(len(text.split()) for text in mine),
            "sha256": hashlib.sha256("\n".join(mine).encode()).hexdigest(),
        }
        for name, mine in texts.items()
    }
    filters = [{key: value for key, value in entry.items() if key != "examples"} for entry in manifest["filters"]]
    return texts, {"texts": counts, "removal": removal(rows, kept), "filters": filters}


def _unzipped(file: Path) -> str:
    return gzip.decompress(file.read_bytes()).decode()


def heal_row(student: Any, teacher: Any, blocks: Any, options: argparse.Namespace, objective: str) -> Row:
    """Heal a copy and measure it."""
    subject = copy.deepcopy(student)
    torch.manual_seed(options.seed)
    healed = kf.heal(
        subject,
        teacher if objective == "kd" else None,
        blocks,
        device="cpu",
        tokens=options.heal_tokens,
        batch_size=8,
        objective=OBJECTIVES[objective],
        seed=options.seed,
    )
    return {
        "perplexity": options.measure(subject),
        "tokens": healed.tokens,
        "blocks": len(blocks),
        "blocks_sha256": blocks.sha256,
        "seconds": round(healed.seconds, 1),
        "last_loss": healed.losses[-1]["loss"],
    }


def run(options: argparse.Namespace) -> Row:
    """All rows, each written as soon as it is measured."""
    tokenizer = load_tokenizer(options.model)
    teacher = load_model(options.model).float().eval()
    output = Path(options.output)
    texts, cleaning = prepare(options, tokenizer)
    window = min(1024, teacher.config.n_positions)
    asked = {
        **{
            key: getattr(options, key)
            for key in ("recipe", "heal_tokens", "pool_tokens", "eval_words", "share", "seed")
        },
        "protocol": "sliding",
        "model": Path(options.model).name,
        "train": {"name": Path(options.train).name, "sha256": sha256_of(options.train)},
        "eval": {"name": Path(options.eval).name, "sha256": sha256_of(options.eval)},
        "texts": {name: entry["sha256"] for name, entry in cleaning["texts"].items()},
    }
    rows: Row = {}
    if output.exists():
        before = json.loads(output.read_text(encoding="utf-8"))
        if before["settings"] != asked:
            raise InputError(f"{output} holds results of other settings. Choose another -o.")
        rows = before["rows"]
    options.measure = _meter(tokenizer, Path(options.eval), options.eval_words)
    student = kf.compress(teacher, options.recipe, seed=options.seed)

    def keep(name: str, make: Callable[[], Row]) -> None:
        if name in rows:
            return
        started = time.perf_counter()
        rows[name] = make()
        rows[name]["seconds_in_all"] = round(time.perf_counter() - started, 1)
        print(name, rows[name], flush=True)
        command = "python benchmarks/cleaning_effect.py " + options.shown
        write_json(
            output,
            document("cleaning-effect", options.seed, command=command, settings=asked, cleaning=cleaning, rows=rows),
        )

    keep("teacher", lambda: {"perplexity": options.measure(teacher)})
    keep("compressed, not healed", lambda: {"perplexity": options.measure(student)})
    for objective in options.objectives:
        for name, mine in texts.items():
            blocks = pack(mine, tokenizer, window)
            keep(f"{objective}: {name}", lambda b=blocks, o=objective: heal_row(student, teacher, b, options, o))
    return json.loads(output.read_text(encoding="utf-8"))


def _meter(tokenizer: Any, text: Path, words: int | None) -> Callable[[Any], float]:
    held = list(documents(text))
    if words:
        held = [" ".join("\n".join(held).split(" ")[:words])]
    return lambda model: float(kf.perplexity(model.eval(), tokenizer, held, "sliding").perplexity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--recipe", default="tqcompressor")
    parser.add_argument("--heal-tokens", type=int, default=400_000)
    parser.add_argument("--pool-tokens", type=int, default=400_000)
    parser.add_argument("--eval-words", type=int, help="measure on the first so many words only")
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--objectives", nargs="+", choices=sorted(OBJECTIVES), default=["kd", "ce"])
    parser.add_argument("-o", "--output", required=True)
    options = parser.parse_args()
    options.shown = " ".join(
        [Path(options.model).name, "--train", Path(options.train).name, "--eval", Path(options.eval).name]
        + [f"--{key.replace('_', '-')} {getattr(options, key)}" for key in ("recipe", "heal_tokens", "pool_tokens")]
        + ([f"--eval-words {options.eval_words}"] if options.eval_words else [])
        + [f"--share {options.share} --seed {options.seed} --objectives {' '.join(options.objectives)}"]
        + [f"-o {Path(options.output).name}"]
    )
    run(options)


if __name__ == "__main__":
    main()
