"""Commands about what stands before and after: finetune, export, import-tq, data, pretrain, teach."""

from __future__ import annotations

import typer

from kronfold.cli import terminal as t
from kronfold.cli.command import add_command
from kronfold.options.conversion import ExportOptions, ImportOptions
from kronfold.options.finetune import FineTuneOptions
from kronfold.options.healing import TeachOptions
from kronfold.options.pretraining import PretrainOptions
from kronfold.options.texts import CleanOptions, SampleOptions, StdlibOptions


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    add_command(app, FineTuneOptions, finetune, "finetune")
    add_command(app, ExportOptions, export, "export")
    add_command(app, ImportOptions, import_tq, "import-tq")
    add_command(app, PretrainOptions, pretrain, "pretrain")
    add_command(app, TeachOptions, teach, "teach")
    about = "Training text: clean it, draw a share of it, extract some from Python."
    data = typer.Typer(help=about, no_args_is_help=True)
    add_command(data, StdlibOptions, stdlib, "stdlib")
    add_command(data, CleanOptions, clean, "clean")
    add_command(data, SampleOptions, sample, "sample")
    app.add_typer(data, name="data")


def finetune(options: FineTuneOptions, json: bool) -> None:
    """Fine-tune a model on a task of GLUE, structured layers kept; several seeds, optionally from a teacher."""
    from kronfold.jobs.finetune import finetune as job
    from kronfold.report.tables import finetune_table

    t.prepare(options.device)
    chosen = options.model_copy(update={"model": t.resolve_model(options.model)})
    with t.progress_bar() as report:
        document = job(chosen, name=options.model, report=report)
    t.emit(document, json, finetune_table(document), f"saved in {options.output}/")


def export(options: ExportOptions, json: bool) -> None:
    """Fold all structures into plain weights, for runtimes that know no factors; the size is the dense one again."""
    from kronfold.jobs.export import export_dense

    t.prepare()
    document = export_dense(
        t.resolve_model(options.model), options.output, dtype=options.dtype, overwrite=options.overwrite
    )
    before, after = document["source"]["held_parameters"], document["held_parameters"]
    t.emit(document, json, f"{before:,} held parameters are {after:,} plain ones, saved in {options.output}/")


def import_tq(options: ImportOptions, json: bool) -> None:
    """Read a published TQCompressedGPT2 state dict into a checkpoint that transformers loads, with equal logits."""
    from kronfold.jobs.import_tq import import_tq as convert

    t.prepare()
    document = convert(**dict(options))
    lacks = "" if document["tokenizer"] else "; no tokenizer was found, copy GPT-2's there or pass --tokenizer"
    held, head = document["held_parameters"], document["head"]
    t.emit(document, json, f"{held:,} held parameters, {head} head, saved in {options.output}/{lacks}")


def stdlib(options: StdlibOptions, json: bool) -> None:
    """Extract English prose from this Python installation: topics, docstrings, longer comments. No network."""
    from kronfold.data.stdlib import extract_stdlib

    manifest = extract_stdlib(options.output, overwrite=options.overwrite)
    t.emit(manifest, json, "\n".join(f"{key}: {value}" for key, value in manifest.items()))


def clean(options: CleanOptions, json: bool) -> None:
    """Repair web text, drop markup, boilerplate and duplicates; counts and examples per filter in the manifest."""
    from kronfold.data.clean import clean as run
    from kronfold.report.tables import cleaning_table

    with t.progress_bar() as report:
        document = run(**dict(options), report=report)
    if document.get("submitted"):
        t.emit(document, json, "Submitted to Slurm. When the jobs have ended, run the same command with --resume.")
    else:
        t.emit(document, json, cleaning_table(document), f"saved in {options.output}/")


def sample(options: SampleOptions, json: bool) -> None:
    """Draw a share of the documents, each by its own hash: the same ones in any order, from any machine."""
    from kronfold.data.sample import sample as run

    document = run(**dict(options))
    found, drawn = document["input"], document["output"]
    t.emit(
        document,
        json,
        f"{drawn['documents']:,} of {found['documents']:,} documents ({document['share']['documents']:.2%}), "
        f"{drawn['words']:,} of {found['words']:,} words, saved in {options.output}/",
    )


def pretrain(options: PretrainOptions, json: bool) -> None:
    """Train a GPT-2 from scratch, tokenizer included."""
    from kronfold.jobs.pretrain import pretrain as train

    t.prepare(seed=options.seed)
    with t.progress_bar() as report:
        document = train(**dict(options), progress=lambda step, total, _logs: report("pretrain", step, total))
    t.emit(document, json, f"held-out perplexity {document['perplexity']:.2f}, saved in {options.output}/")


def teach(options: TeachOptions, json: bool) -> None:
    """Run a teacher once over a text and store its likeliest tokens, for `kronfold heal --offline-teacher`."""
    from kronfold.jobs.teach import teach_to

    t.prepare(options.device)
    chosen = options.model_copy(update={"model": t.resolve_model(options.model)})
    with t.progress_bar() as report:
        document = teach_to(chosen, report=report)
    t.emit(
        document,
        json,
        f"{document['tokens']:,} tokens in {document['blocks']:,} blocks, {document['bytes_per_token']} bytes each "
        f"({document['bytes'] / 1e6:,.1f} MB), saved in {options.output}/",
    )
