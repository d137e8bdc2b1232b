"""One to many rows times a weight: `F.linear`, and weight first, `weight @ rows.T` (`structures.rates.linear`).

    python benchmarks/few_rows.py -o benchmarks/results/few_rows.json

The weights of GPT-2 small's compressed layers and heads. Calls go round copies of a weight that do not fit the cache
together, as the layers of a model do; one row goes twice. Medians of interleaved rounds; the rate of reading is bytes
of the weight over seconds. The bar is 1: a call that `few_rows` would send weight first must not be slower for it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional as F

from kronfold.base.errors import KronfoldError
from kronfold.structures.rates import FEW, FEW_INNER, interleaved
from timing import figure, finish, parser, prepare

SHAPES = ((768, 384), (3072, 384), (1536, 768), (313, 768), (768, 3072), (50257, 192), (50257, 384))  # (out, in)
WORKING_SET = 128e6  # bytes


def measure(shape: tuple[int, int], rows: int, rounds: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Seconds of both ways for one shape and number of rows."""
    copies = max(2, round(WORKING_SET / (shape[0] * shape[1] * dtype.itemsize)))
    weights = itertools.cycle([torch.randn(*shape, device=device, dtype=dtype) for _ in range(copies)])
    x = torch.randn(rows, shape[1], device=device, dtype=dtype)
    padded = x if rows > 1 else x.expand(2, -1).contiguous()
    jobs = {
        "linear": lambda: F.linear(x, next(weights)),
        "weight first": lambda: (next(weights) @ padded.t())[:, :rows].t().contiguous(),
    }
    with torch.no_grad():
        seconds = interleaved(jobs, device, rounds)
    size = shape[0] * shape[1] * dtype.itemsize
    reads = {way: size / taken / 1e9 for way, taken in seconds.items()}
    return {"shape": shape, "rows": rows, "seconds": seconds, "gigabytes_per_second": reads}


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    made.add_argument("--rows", default="1,2,4,8,16", help="comma-separated")
    options = made.parse_args()
    rounds = 1 if options.quick else options.rounds or 9
    try:
        prepare(options)
        counts = [1, 2] if options.quick else [int(count) for count in options.rows.split(",")]
        dtype = getattr(torch, options.dtype)
        found = [measure(shape, rows, rounds, dtype, options.device) for shape in SHAPES for rows in counts]
        figures = []
        for row in found:
            (out, inner), rows, seconds = row["shape"], row["rows"], row["seconds"]
            what = f"({out}, {inner}), {rows} rows: linear / weight first, seconds"
            bar = 1.0 if rows <= FEW and inner <= FEW_INNER else None
            figures.append(figure(what, seconds["linear"] / seconds["weight first"], bar))
        finish("few_rows", options, figures, dtype=options.dtype, rows=found)
    except KronfoldError as error:
        made.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
