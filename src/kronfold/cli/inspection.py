"""Commands that look and measure: eval, inspect, validate, tune."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kronfold.cli import terminal as t


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command(name="eval")(evaluate)
    app.command()(inspect)
    app.command()(validate)
    app.command()(tune)


def evaluate(
    model: t.Model,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-text",
            "--text",
            help="Text to measure on; files, a directory, or a datasets id. With --suite: NAME=TEXT, may be repeated.",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="lm: perplexity on every --text, and LAMBADA, in one pass.", show_default=False)
    ] = None,
    lambada: Annotated[
        str | None, typer.Option(help="LAMBADA's passages for --suite lm, as .jsonl.", show_default=False)
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval instead, comma-separated (needs the extra 'harness').", show_default=False),
    ] = None,
    task_files: Annotated[
        str | None, typer.Option(help="Directory of further lm-eval task files.", show_default=False)
    ] = None,
    protocol: Annotated[str, typer.Option(help="sliding (default) or paper; see README.")] = "sliding",
    rows: Annotated[
        str,
        typer.Option(
            help="Whether rows are the lines of one text or documents: auto (say which was found), lines, documents."
        ),
    ] = "auto",
    text_column: t.TextColumnName = "text",
    max_bad_rows: t.MaxBadRows = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Windows per forward pass; changes no number.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Take the tokenizer from another model.", show_default=False)
    ] = None,
    output: t.Output = None,
    device: t.Device = "auto",
    dtype: Annotated[str, typer.Option(help="dtype to compute in.")] = "float32",
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Perplexity of a model on a text, by a named protocol; or a suite of measurements; or tasks of lm-eval."""
    from kronfold.base import processes
    from kronfold.base.errors import InputError
    from kronfold.base.output import Output
    from kronfold.evaluate.texts import ROWS, named_texts
    from kronfold.jobs import evaluate as evaluation
    from kronfold.report.tables import suite_table, task_table

    if suite and tasks:
        raise InputError("--suite and --tasks are two measurements; run them one after the other.")
    if lambada and not suite:
        raise InputError("--lambada belongs to a suite; add --suite lm.")
    texts = text or []
    if not (suite or tasks) and len(texts) != 1:
        given = f"{len(texts)} texts" if texts else "no text"
        raise InputError(f"eval was given {given}. Give one --eval-text, or several with --suite lm --lambada PATH.")
    device = t.prepare(device, 0)
    reads = [model, tokenizer, lambada, task_files, *texts]
    target = processes.on_main(
        lambda: Output(output, overwrite=overwrite, inputs=reads, is_file=True) if output else None
    )
    source = t.resolve_model(model)
    options: dict[str, Any] = {"batch_size": batch_size, "tokenizer": tokenizer, "device": device, "dtype": dtype}
    options["name"] = model
    measured: dict[str, Any] = {
        "protocol": protocol,
        "rows": t.one_of("--rows", rows, ROWS),
        "reading": t.reading(text_column, max_bad_rows),
    }
    with t.progress_bar() as report:
        if suite:
            named = named_texts(texts)
            document = evaluation.evaluate_suite(source, suite, named, lambada, report=report, **measured, **options)
            shown: Any = suite_table(document)
        elif tasks:
            document = evaluation.evaluate_tasks(source, tasks.split(","), task_files, **options)
            shown = task_table(document["results"], f"{model}, lm-eval {document['lm_eval']}")
        else:
            document = evaluation.evaluate_text(source, texts[0], report=report, **measured, **options)
            shown = _eval_lines(document)
    if target:
        processes.on_main(lambda: target.write_json(document))
    t.emit(document, json, shown)


def _eval_lines(found: dict[str, Any]) -> str:
    how = ", ".join(f"{key} {value}" for key, value in found["protocol"].items() if value is not None)
    return (
        f"perplexity {found['perplexity']:.4f} per token\n"
        f"  per word {found['perplexity_per_word']:.4f}, per byte {found['perplexity_per_byte']:.4f}\n"
        f"  {found['tokens']:,} tokens, {found['words']:,} words, {found['bytes']:,} bytes, "
        f"nll {found['nll']:,.2f} nats\n"
        f"  protocol: {how}\n"
        f"  text: {_read_line(found['read'])}\n"
        f"  {found['held_parameters']:,} held parameters"
    )


def _read_line(read: dict[str, Any]) -> str:
    said = [f"{read['source']}" + (f", split {read['split']}" if read.get("split") else "")]
    said.append(f"{read['documents']:,} document{'' if read['documents'] == 1 else 's'}")
    said += [f"{joined['rows']:,} rows of {name} are its lines" for name, joined in (read["rows_joined"] or {}).items()]
    if read["skipped_rows"]:
        said.append(f"{read['skipped_rows']:,} rows without text skipped ({read['first_skipped']})")
    if read["replaced_surrogates"]:
        said.append(f"{read['replaced_surrogates']:,} lone surrogates replaced")
    return ", ".join([*said, f"sha256 {read['sha256'][:12]}"])


def inspect(
    model: t.Model,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check every file against the hash it was written with; any result directory, also an unfinished one.",
        ),
    ] = False,
    json: t.Json = False,
) -> None:
    """What a checkpoint holds: structures by module, sizes, multiply-accumulates, where it came from."""
    from pathlib import Path

    from rich.table import Table

    from kronfold.base import results
    from kronfold.base.marker import verified
    from kronfold.fit.fit import gathers_of
    from kronfold.models.cost import cost
    from kronfold.models.linear_view import recognised
    from kronfold.models.load import load_config, load_model
    from kronfold.models.place import read_specs
    from kronfold.planner.planning import skeleton_of
    from kronfold.report.tables import gathers_line

    source = t.resolve_model(model)
    checked = {"verified": verified(source)} if verify else {}
    whole = [_verified_line(checked["verified"])] if verify else []
    if verify and not (Path(source) / "config.json").exists():
        t.emit(results.document("inspect", None, model=model, **checked), json, *whole)
        return
    t.prepare()
    subject = skeleton_of(load_config(source)) if source.startswith("config:") else load_model(source, dtype="auto")
    specs = read_specs(subject)
    parts = recognised(subject)
    document = results.document(
        "inspect",
        None,
        model=model,
        model_type=subject.config.model_type,
        dtype=str(subject.dtype).removeprefix("torch."),
        **cost(subject).to_dict(),
        gathers=gathers_of(subject),
        modules=specs,
        recognised=parts.to_dict(),
        **checked,
    )
    table = Table("module", "structure", "spec", title=f"{model}: {len(specs)} structured modules")
    for name, spec in specs.items():
        detail = ", ".join(f"{key} {value}" for key, value in spec.items() if key != "structure")
        table.add_row(name, spec["structure"], detail)
    sizes = (
        f"{document['held_parameters']:,} held parameters, "
        f"{document['macs_per_token']:,} multiply-accumulates per token, "
        f"{document['bytes_fp16']:,} bytes at fp16, {document['bytes_fp32']:,} at fp32, stored as {document['dtype']}"
    )
    shown = [table] if specs else ["No structured modules: a dense model."]
    gathers = [gathers_line(document["gathers"])] if specs else []
    t.emit(document, json, *shown, sizes, *gathers, *([parts.lines()] if parts.generic else []), *whole)


def _verified_line(found: dict[str, Any]) -> str:
    more = f"; {len(found['unlisted'])} files beside them have no hash" if found["unlisted"] else ""
    return f"verified: {found['files']:,} files, {found['bytes']:,} bytes, all as they were written{more}"


def validate(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE", help="A shipped recipe, a .yaml recipe, or a saved plan (.json)."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Also check that it fits this MODEL (config:gpt2 needs no weights).")
    ] = None,
    json: t.Json = False,
) -> None:
    """Check a recipe or plan and list every fault at once; exit code 2 if there is any."""
    from kronfold.base import results
    from kronfold.planner.plan import Plan
    from kronfold.planner.recipe import load_recipe

    if recipe.endswith(".json"):
        made = Plan.load(recipe)
        document = results.document("validate", None, recipe=made.recipe, stages=[stage.name for stage in made.stages])
    else:
        loaded = load_recipe(recipe)
        document = results.document(
            "validate", None, recipe=loaded.name, stages=[stage.name for stage in loaded.stages]
        )
    fits = ""
    if model:
        from kronfold.models.load import load_config
        from kronfold.planner import planning

        t.prepare()
        config = load_config(t.resolve_model(model))
        if recipe.endswith(".json"):
            document["held_parameters"] = planning.check_plan(made, config).held_parameters
        else:
            document["held_parameters"] = planning.plan_of_shapes(config, loaded).held_parameters
        fits = f" and fits {model}"
    t.emit(document, json, f"{document['recipe']}: valid{fits}, stages {', '.join(document['stages'])}")


def tune(
    device: t.Device = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(help="Threads that models will run with; default: as torch has it.", show_default=False),
    ] = None,
    dtypes: Annotated[str, typer.Option(help="float32, bfloat16, float16; comma-separated.")] = "float32,bfloat16",
    save: Annotated[bool, typer.Option(help="Keep the rates in $KRONFOLD_CACHE (~/.cache/kronfold).")] = True,
    json: t.Json = False,
) -> None:
    """Measure this machine for a few seconds, so that structured layers choose the fastest way to compute on it."""
    from kronfold.jobs.tune import tune as measure
    from kronfold.report.tables import simple_table

    document = measure(t.prepare(device), dtypes.split(","), threads, save=save)
    table = simple_table("Nanoseconds", ("rate", *(row["dtype"] for row in document["rows"])), 1)
    for name in document["rows"][0]["rates"]:
        cells = (f"{row['rates'][name] * 1e9:.4g} ({row['built_in'][name] * 1e9:.4g})" for row in document["rows"])
        table.add_row(name, *cells)
    row = document["rows"][0]
    threaded = f", {row['threads']} threads" if row["threads"] else ""
    place = f"saved in {document['path']}" if document["path"] else "not saved"
    t.emit(document, json, table, f"{row['device']}{threaded}; in brackets the built-in rates; {place}")
