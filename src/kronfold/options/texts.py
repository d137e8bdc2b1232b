"""Training text: data clean, data sample, data stdlib."""

from __future__ import annotations

from typing import Literal

from kronfold.options import Options, option
from kronfold.options.shared import ReadsText, Resumable, Seeded, SkipsRows, Written, output

Format = Literal["jsonl", "parquet"]


class _OfSource(Options):
    source: str = option(
        ...,
        ".txt (one document), .jsonl or .parquet (one per row), also .gz and .zst, a directory, or a datasets id.",
        argument=True,
    )


class StdlibOptions(Written):
    """English prose out of this Python installation: `kronfold data stdlib`."""

    output: str = output("Directory for train.jsonl, validation.jsonl, manifest.json.")


class CleanOptions(Resumable, SkipsRows, _OfSource):
    """Text repaired and freed of boilerplate and duplicates: `kronfold data clean`.

    What is None is as the settings file says, or the default of `CleanSettings`.
    """

    output: str = output("Directory for the shards and manifest.json.")
    filters: tuple[str, ...] | None = option(
        None,
        "Comma-separated: unicode, html, boilerplate, language, repetition, quality, exact, key, minhash; default: all "
        "but language.",
        group="How",
        commas=True,
    )
    settings: str | None = option(None, "YAML file: filters, options of each, executor.", group="How")
    workers: int | None = option(None, "Processes at once; default: 1.", group="How", ge=1)
    format: Format | None = option(None, "jsonl (default) or parquet.", group="Output")
    text_column: str | None = option(None, "Column of the text; default: text.", group="How")
    seed: int | None = option(None, "Seed of MinHash; default: 0.", group="How", ge=0, lt=2**32)


class SampleOptions(Written, ReadsText, Seeded, _OfSource):
    """A share of the documents, drawn by their hashes: `kronfold data sample`."""

    fraction: float = option(..., "Share of the documents, e.g. 0.031.", gt=0, le=1)
    output: str = output("Directory for the shards and manifest.json.")
    format: Format = option("jsonl", "jsonl or parquet.", group="Output")
    seed: int = option(0, "Which documents are drawn.", group="How", ge=0, lt=2**32)
