"""LAMBADA by kronfold and by lm-eval itself, passage by passage: the same numbers?

    python benchmarks/lambada_check.py MODEL LAMBADA.jsonl.gz [--passages 300] -o result.json

lm-eval runs its own `lambada_openai` from a task file of the same words that reads the passages from disk. A small
model guesses hardly a last word, so a second set puts the model's own greedy next words at the end of every other
passage: there accuracy says something too. A third joins passages by fours, so that they outgrow a short context and
are cut. Exits with 1 when a difference reaches 1e-3 (of accuracies, of
perplexities relative to their size, of single log likelihoods in nats).
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kronfold.base.files import write_json
from kronfold.base.results import machine, versions
from kronfold.data.sources import documents
from kronfold.evaluate.harness import harness
from kronfold.evaluate.lambada import lambada
from kronfold.models.load import load_model, load_tokenizer

LIMIT = 1e-3
TASK = """\
task: lambada_here
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""


@torch.no_grad()
def with_own_endings(passages: list[str], model: Any, tokenizer: Any) -> list[str]:
    """Every other passage with its last word replaced by what the model would say there."""
    changed = list(passages)
    context = model.config.max_position_embeddings
    for index in range(0, len(passages), 2):
        start = passages[index].rpartition(" ")[0]
        ids = tokenizer.encode(start, add_special_tokens=False)[-(context - 1) :]
        likeliest = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True)[:50].tolist()
        words = [tokenizer.decode([token]) for token in likeliest]
        word = next((word for word in words if word.startswith(" ") and word.strip()), " the")
        changed[index] = start + word
    return changed


def compare(passages: list[str], model: Any, tokenizer: Any) -> dict[str, Any]:
    """Both results, their seconds, and the largest differences."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "passages.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in passages), encoding="utf-8")
        (Path(folder) / "task.yaml").write_text(TASK.format(path=path), encoding="utf-8")
        started = time.perf_counter()
        theirs = harness(model, tokenizer, ["lambada_here"], include=folder, samples=True)
        middle = time.perf_counter()
        ours = lambada(model, tokenizer, path)
        ended = time.perf_counter()
    scores = theirs["results"]["lambada_here"]
    records = sorted(theirs["samples"]["lambada_here"], key=lambda record: record["doc_id"])
    alone = [lambada(model, tokenizer, [text]) for text in passages]
    likelihoods = [abs(record["perplexity"] + one.nll) for record, one in zip(records, alone, strict=True)]
    return {
        "passages": len(passages),
        "kronfold": {**ours.to_dict(), "seconds": round(ended - middle, 1)},
        "lm_eval": {
            "accuracy": scores["acc,none"],
            "perplexity": scores["perplexity,none"],
            "seconds": round(middle - started, 1),
        },
        "differences": {
            "accuracy": abs(ours.accuracy - scores["acc,none"]),
            "perplexity_relative": abs(ours.perplexity / scores["perplexity,none"] - 1),
            "log_likelihood_largest": max(likelihoods),
            "passages_judged_otherwise": sum(
                record["acc"] != one.accuracy for record, one in zip(records, alone, strict=True)
            ),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("lambada")
    parser.add_argument("--passages", type=int, default=300)
    parser.add_argument("-o", "--output", required=True)
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model), load_tokenizer(arguments.model)
    passages = list(itertools.islice(documents(arguments.lambada), arguments.passages))
    sets = {
        "first passages": compare(passages, model, tokenizer),
        "half with the model's own endings": compare(with_own_endings(passages, model, tokenizer), model, tokenizer),
        "joined by fours": compare(
            [" ".join(passages[i : i + 4]) for i in range(0, len(passages), 4)], model, tokenizer
        ),
    }
    largest = max(value for found in sets.values() for value in found["differences"].values())
    document = {
        "benchmark": "lambada_check",
        "arguments": {"model": Path(arguments.model).name, "passages": arguments.passages},
        "versions": {**versions(), "lm_eval": version("lm_eval")},
        "machine": machine(),
        "sets": sets,
        "largest_difference": largest,
        "limit": LIMIT,
    }
    write_json(arguments.output, document)
    for name, found in sets.items():
        for who in ("kronfold", "lm_eval"):
            one = found[who]
            print(f"{name:34s} {who:9s} accuracy {one['accuracy']:.6f}  perplexity {one['perplexity']:.6f}")
    print(f"largest difference {largest:.2e}, limit {LIMIT:g}")
    sys.exit(largest >= LIMIT)


if __name__ == "__main__":
    main()
