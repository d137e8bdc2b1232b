"""What the offline teacher loses: the KL over k tokens and a bucket beside the full one, on held text, for several k.

    python benchmarks/offline_bias.py STUDENT --teacher MODEL --text held.txt -o results.json

The figures are those of `kronfold.evaluate.bucket_bias`: divergences in nats per token, the mass that the teacher gives
to all but its k likeliest tokens, and how far the gradient by the student's logits is from the true one. The last
column is what one token takes on disk.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from kronfold.base.errors import KronfoldError
from kronfold.base.files import write_json
from kronfold.base.results import document
from kronfold.data.packing import pack
from kronfold.data.sources import documents
from kronfold.distill.stored import Manifest
from kronfold.evaluate.bucket_bias import bucket_bias
from kronfold.models.load import load_model, load_tokenizer
from timing import parser, prepare


def options_of() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    made = parser(__doc__)
    made.add_argument("student")
    made.add_argument("--teacher", required=True)
    made.add_argument("--text", required=True, help="a text neither was trained on")
    made.add_argument("--tokens", type=int, default=16384)
    made.add_argument("--length", type=int, default=256, help="tokens per block, at most the models' context")
    made.add_argument("--top-k", default="8,16,32,64,128,256", help="values of k, comma-separated")
    made.add_argument("--temperature", type=float, default=1.0)
    return made, made.parse_args()


def main() -> None:
    made, options = options_of()
    try:
        prepare(options)
        student, teacher = (load_model(source, device=options.device) for source in (options.student, options.teacher))
        tokens = 1024 if options.quick else options.tokens
        length = min(options.length, teacher.config.max_position_embeddings)
        blocks = pack(documents(options.text), load_tokenizer(options.teacher), length, max_tokens=tokens)
        ks = [int(k) for k in options.top_k.split(",")]
        rows = bucket_bias(student, teacher, blocks, ks, temperature=options.temperature)
        width = teacher.config.vocab_size
        for row in rows:
            facts = Manifest("", "", 1, 1, width, row["top_k"], options.temperature, 1, 1, False)
            row["bytes_per_token"] = facts.bytes_per_token
        shown = Table(title=f"{blocks.tokens:,} tokens, T = {options.temperature:g}, full KL {rows[0]['kl']:.4f}")
        names = ("top_k", "bucketed", "stored", "bias", "tail_mass", "gradient_error", "bytes_per_token")
        for name in names:
            shown.add_column(name.replace("_", " "), justify="right")
        for row in rows:
            shown.add_row(*(f"{row[name]:.4g}" for name in names))
        Console().print(shown)
        if options.output:
            content = {
                "student": Path(options.student).name,
                "teacher": Path(options.teacher).name,
                "text": {"source": Path(options.text).name, "tokens": blocks.tokens, "sha256": blocks.sha256},
                "temperature": options.temperature,
                "rows": rows,
            }
            write_json(options.output, document("offline_bias", options.seed, **content))
    except KronfoldError as error:
        made.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
