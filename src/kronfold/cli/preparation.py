"""Commands that prepare: data, pretrain, teach."""

from __future__ import annotations

from typing import Annotated

import typer

from kronfold.cli import terminal as t

data = typer.Typer(help="Training text: clean it, draw a share of it, extract some from Python.", no_args_is_help=True)


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.add_typer(data, name="data")
    app.command()(pretrain)
    app.command()(teach)


@data.callback()
def _data() -> None:
    """Make training text."""


@data.command()
def stdlib(
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="Directory for train.jsonl, validation.jsonl, manifest.json."),
    ],
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Extract English prose from this Python installation: topics, docstrings, longer comments. No network."""
    from kronfold.data.stdlib import extract_stdlib

    manifest = extract_stdlib(output, overwrite=overwrite)
    t.emit(manifest, json, "\n".join(f"{key}: {value}" for key, value in manifest.items()))


Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help=".txt (one document), .jsonl or .parquet (one per row), also .gz and .zst, a directory, or a datasets id.",
        show_default=False,
    ),
]
Shards = Annotated[str, typer.Option("--output", "-o", help="Directory for the shards and manifest.json.")]
TextColumn = Annotated[str | None, typer.Option(help="Column of the text; default: text.", show_default=False)]


@data.command()
def clean(
    source: Source,
    output: Shards,
    filters: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: unicode, html, boilerplate, language, repetition, quality, exact, key, minhash; "
            "default: all but language.",
            show_default=False,
        ),
    ] = None,
    settings: Annotated[
        str | None, typer.Option(help="YAML file: filters, options of each, executor.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes at once; default: 1.", show_default=False)] = None,
    format: Annotated[str | None, typer.Option(help="jsonl (default) or parquet.", show_default=False)] = None,
    text_column: TextColumn = None,
    max_bad_rows: t.MaxBadRows = None,
    seed: Annotated[int | None, typer.Option(help="Seed of MinHash; default: 0.", show_default=False)] = None,
    resume: t.Resume = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Repair web text, drop markup, boilerplate and duplicates; counts and examples per filter in the manifest."""
    from kronfold.data.clean import clean as run
    from kronfold.report.tables import cleaning_table

    names = [name.strip() for name in filters.split(",") if name.strip()] if filters is not None else None
    with t.progress_bar() as report:
        document = run(
            source, output, settings, filters=names, workers=workers, format=format, text_column=text_column,
            max_bad_rows=max_bad_rows, seed=seed, resume=resume, overwrite=overwrite, report=report,
        )  # fmt: skip
    if document.get("submitted"):
        t.emit(document, json, "Submitted to Slurm. When the jobs have ended, run the same command with --resume.")
    else:
        t.emit(document, json, cleaning_table(document), f"saved in {output}/")


@data.command()
def sample(
    source: Source,
    fraction: Annotated[float, typer.Option(help="Share of the documents, e.g. 0.031.")],
    output: Shards,
    format: Annotated[str, typer.Option(help="jsonl or parquet.")] = "jsonl",
    text_column: TextColumn = None,
    max_bad_rows: t.MaxBadRows = None,
    seed: Annotated[int, typer.Option(help="Which documents are drawn.")] = 0,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Draw a share of the documents, each by its own hash: the same ones in any order, from any machine."""
    from kronfold.data.sample import sample as run

    document = run(
        source, output, fraction, seed=seed, format=format, text_column=text_column or "text",
        max_bad_rows=max_bad_rows, overwrite=overwrite,
    )  # fmt: skip
    found, drawn = document["input"], document["output"]
    t.emit(
        document,
        json,
        f"{drawn['documents']:,} of {found['documents']:,} documents ({document['share']['documents']:.2%}), "
        f"{drawn['words']:,} of {found['words']:,} words, saved in {output}/",
    )


def pretrain(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A pretraining YAML file, or demo.", show_default=False)
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the trained model.")],
    seed: Annotated[int | None, typer.Option(help="Instead of the config's seed.", show_default=False)] = None,
    resume: t.Resume = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Train a GPT-2 from scratch, tokenizer included."""
    from kronfold.jobs.pretrain import pretrain as train

    t.prepare(seed=seed)
    with t.progress_bar() as report:
        document = train(
            config, output, seed=seed, resume=resume, overwrite=overwrite,
            progress=lambda step, total, _logs: report("pretrain", step, total),
        )  # fmt: skip
    t.emit(document, json, f"held-out perplexity {document['perplexity']:.2f}, saved in {output}/")


def teach(
    model: t.Model,
    train_text: t.Text,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for what the teacher says.")],
    tokens: Annotated[int, typer.Option(help="How many tokens of the text; a healing may read them several times.")],
    top_k: Annotated[int, typer.Option(help="Tokens kept of each position; all others are one bucket.")] = 64,
    temperature: Annotated[float, typer.Option(help="Temperature of the KL term that will learn from it.")] = 1.0,
    text_column: t.TextColumnName = "text",
    max_bad_rows: t.MaxBadRows = None,
    block_size: t.BlockSize = None,
    batch_size: Annotated[int, typer.Option(help="Windows that go through the model at once.")] = 8,
    device: t.Device = "auto",
    resume: t.Resume = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Run a teacher once over a text and store its likeliest tokens, for `kronfold heal --offline-teacher`."""
    from kronfold.jobs.teach import teach_to

    device = t.prepare(device)
    with t.progress_bar() as report:
        document = teach_to(
            t.resolve_model(model), train_text, output, tokens=tokens, k=top_k, temperature=temperature,
            reading=t.reading(text_column, max_bad_rows),
            block_size=block_size, batch_size=batch_size, device=device, resume=resume, overwrite=overwrite,
            report=report,
        )  # fmt: skip
    t.emit(
        document,
        json,
        f"{document['tokens']:,} tokens in {document['blocks']:,} blocks, {document['bytes_per_token']} bytes each "
        f"({document['bytes'] / 1e6:,.1f} MB), saved in {output}/",
    )
