"""Realistic result documents for the report tests: a 3.4 M teacher, three stages, all controls."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

HTML = '<script>alert("x")</script> & <b>bold</b>'


def _losses(rng: random.Random, tokens: int, kl: float, ce: float) -> list[dict[str, Any]]:
    records = []
    for step in range(10, tokens // 2048 + 1, 10):
        decay = math.exp(-step / 60)
        now_kl, now_ce = (
            kl * (0.35 + 0.65 * decay) + rng.gauss(0, 0.02),
            ce * (0.8 + 0.2 * decay) + rng.gauss(0, 0.03),
        )
        records.append({"step": step, "tokens": step * 2048, "loss": now_kl + now_ce, "kl": now_kl, "ce": now_ce})
    return records


def _kronecker(a: list[int], b: list[int], rank: int, permute: bool = True) -> dict[str, Any]:
    return {
        "structure": "kronecker",
        "a": a,
        "b": b,
        "rank": rank,
        "permute_in": permute,
        "permute_out": permute,
    }


def _stages(rng: random.Random, plain: bool) -> list[dict[str, Any]]:
    def row(name: str, a: list[int], b: list[int], rank: int, error: float) -> dict[str, Any]:
        held = rank * (a[0] * a[1] + b[0] * b[1])
        found = {
            "name": f"transformer.{name}",
            "structure": "kronecker",
            "spec": _kronecker(a, b, rank, not plain),
        }
        sizes = {"held_parameters": held, "teacher_parameters": a[0] * a[1] * b[0] * b[1]}
        errors = (
            {"relative_error": error + 0.07}
            if plain
            else {"relative_error": error, "relative_error_plain": error + 0.07}
        )
        return {**found, **sizes, **errors}

    blocks = [(h, part) for h in (1, 3, 5) for part in ("c_fc", "c_proj")]
    rows = [
        [row("wte", [4096, 96], [1, 2], 1, 0.5612)],
        [
            row(
                f"h.{h}.mlp.{part}",
                *(([192, 96], [4, 2]) if part == "c_fc" else ([96, 192], [2, 4])),
                4,
                0.43 + rng.random() / 10,
            )
            for h, part in blocks
        ],
        [row("wte", [2048, 96], [2, 2], 2, 0.4129)],
    ]
    scale = 1.17 if plain else 1.0
    figures = [
        (212.4, 34.11, 2_785_152, 11.3),
        (97.62, 36.87, 2_342_016, 41.9),
        (64.05, 38.42, 2_145_408, 12.8),
    ]
    return [
        {
            "name": name,
            "held_parameters": held,
            "rows": stage_rows,
            "before_healing": before * scale,
            "after_healing": after * scale,
            "tokens": 409_600,
            "seconds": seconds,
            "decompose_seconds": 0.4 if plain else 3.7,
            "losses": _losses(rng, 409_600, 1.9 * scale, 4.0 * scale),
        }
        for name, stage_rows, (before, after, held, seconds) in zip(
            ("embedding", "feed-forward", "embedding-again"), rows, figures, strict=True
        )
    ]


_PROMPT = "The exec statement"
_TEXTS = {
    "teacher": " is used to execute a compound statement. If the object is a string, it is parsed "
    "as a suite of Python statements which is then executed (unless a syntax error occurs).",
    "compressed, before healing": " of of the the a method, returns returns if is a class of of the module",
    "healed": " is used to call a function. If the argument is a string, it is parsed and then executed as a "
    "statement; otherwise a TypeError is raised.",
    "plain Kronecker, healed": " is a function that is used for the the value of the string. If it is not a "
    "string, the value is returned.",
}


def run_document() -> dict[str, Any]:
    """A complete run with every optional part."""
    rng = random.Random(7)
    return copy.deepcopy(
        {
            "schema": "kronfold/run",
            "schema_version": 1,
            "created": "2026-03-01T12:00:00+00:00",
            "seed": 1234,
            "versions": {
                "python": "3.11.4",
                "kronfold": "0.1.0",
                "torch": "2.13.0",
                "transformers": "5.23.0",
            },
            "machine": {"machine": "x86_64", "system": "Linux", "cores": 2},
            "model": "kronfold-stdlib-3m",
            "recipe": {
                "name": "tqcompressor",
                "description": "Embedding halved, odd feed-forwards rank 4, embedding again.",
            },
            "complete": True,
            "protocol": {"name": "sliding", "window": 256, "stride": 128},
            "data": {
                "heal": {"source": "stdlib (train)", "tokens": 1_901_337, "sha256": "ab" * 32},
                "eval": {"source": "stdlib (held out)", "tokens": 48_211, "sha256": "cd" * 32},
            },
            "teacher": {
                "held_parameters": 3_473_280,
                "macs_per_token": 3_424_128,
                "bytes_fp16": 6_946_560,
                "perplexity": 27.31,
            },
            "held_parameters": 2_145_408,
            "macs_per_token": 2_097_000,
            "bytes_fp16": 4_290_816,
            "index_bytes": 15_360,
            "stages": _stages(rng, plain=False),
            "controls": {
                "dense_finetuned": {
                    "perplexity": 25.87,
                    "tokens": 1_228_800,
                    "held_parameters": 3_473_280,
                    "losses": [
                        {key: value for key, value in record.items() if key != "kl"}
                        for record in _losses(rng, 1_228_800, 0.0, 3.6)
                    ],
                },
                "plain_kronecker": {"held_parameters": 2_145_408, "stages": _stages(rng, plain=True)},
            },
            "samples": [{"who": who, "prompt": _PROMPT, "text": text} for who, text in _TEXTS.items()],
            "total_seconds": 203.4,
            "command": "kronfold demo",
        }
    )


def bare_document() -> dict[str, Any]:
    """The same run without any optional part."""
    document = run_document()
    for key in ("controls", "samples"):
        del document[key]
    for stage in document["stages"]:
        stage["losses"] = []
        for row in stage["rows"]:
            row.pop("relative_error_plain", None)
    return document


def unfinished_document() -> dict[str, Any]:
    """Killed while the second stage was healing: nothing after its compression is known."""
    document = run_document()
    document["complete"] = False
    document["stages"] = document["stages"][:2]
    document["stages"][1].update(after_healing=None, tokens=0, seconds=None, losses=[])
    del document["controls"], document["samples"], document["total_seconds"]
    return document


def beside_document() -> dict[str, Any]:
    """A run with `auto` beside it, as the demo writes it: every row says its learning rate."""
    document = run_document()
    for stages in (document["stages"], document["controls"]["plain_kronecker"]["stages"]):
        for stage in stages:
            stage["learning_rate"] = 5e-4
    document["controls"]["dense_finetuned"]["learning_rate"] = 2e-4
    rows = [
        {
            "name": f"transformer.h.{h}.mlp.c_fc", "structure": "low_rank", "label": "rank 40 of 192",
            "spec": {"structure": "low_rank", "rank": 40}, "held_parameters": 37_440, "teacher_parameters": 147_456,
            "relative_error": 0.31, "predicted_loss": 0.004,
        }
        for h in range(6)
    ]  # fmt: skip
    document["beside"] = {
        "recipe": {"name": "auto", "description": "Planned."},
        "held_parameters": 2_145_001, "macs_per_token": 2_001_000, "bytes_fp16": 4_290_002, "index_bytes": 0,
        "stages": [
            {
                "name": "auto", "rows": rows, "held_parameters": 2_145_001, "before_healing": 29.44,
                "after_healing": 28.13, "learning_rate": 1e-4, "tokens": 1_228_800, "seconds": 99.5,
                "decompose_seconds": 7.25, "losses": _losses(random.Random(8), 1_228_800, 0.2, 3.4),
            }
        ],
        "checkpoint": "auto",
    }  # fmt: skip
    for when, text in (("before healing", " is used to execute a function."), ("healed", " is used to run a string.")):
        document["samples"].append({"who": f"auto, {when}", "prompt": _PROMPT, "text": text})
    return document
