"""Commands that bring checkpoints in and out: export, import-tq."""

from __future__ import annotations

from typing import Annotated

import typer

from kronfold.cli import terminal as t


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(export)
    app.command("import-tq")(import_tq)


def export(
    model: t.Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the plain checkpoint.")],
    dtype: t.Dtype = None,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Fold all structures into plain weights, for runtimes that know no factors; the size is the dense one again."""
    from kronfold.jobs.export import export_dense

    t.prepare()
    document = export_dense(t.resolve_model(model), output, dtype=dtype, overwrite=overwrite)
    before, after = document["source"]["held_parameters"], document["held_parameters"]
    t.emit(document, json, f"{before:,} held parameters are {after:,} plain ones, saved in {output}/")


def import_tq(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="State dict (.safetensors, .pt, .bin) or its folder.", show_default=False),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the kronfold checkpoint.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Model to take the tokenizer from; default: files beside PATH.", show_default=False),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads; default: config.json's, else of 64 channels.", min=1)
    ] = None,
    dtype: t.Dtype = None,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Read a published TQCompressedGPT2 state dict into a checkpoint that transformers loads, with equal logits."""
    from kronfold.jobs.import_tq import import_tq as convert

    t.prepare()
    document = convert(path, output, tokenizer=tokenizer, heads=heads, dtype=dtype, overwrite=overwrite)
    lacks = "" if document["tokenizer"] else "; no tokenizer was found, copy GPT-2's there or pass --tokenizer"
    said = f"{document['held_parameters']:,} held parameters, {document['head']} head, saved in {output}/{lacks}"
    t.emit(document, json, said)
