"""Commands that look and measure: report, eval, inspect, validate, tune."""

from __future__ import annotations

from typing import Any

import typer

from kronfold.cli import terminal as t
from kronfold.cli.command import add_command
from kronfold.options.conversion import ReportOptions, ValidateOptions
from kronfold.options.measuring import EvalOptions, InspectOptions, TuneOptions


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    add_command(app, ReportOptions, report, "report")
    add_command(app, EvalOptions, evaluate, "eval")
    add_command(app, InspectOptions, inspect, "inspect")
    add_command(app, ValidateOptions, validate, "validate")
    add_command(app, TuneOptions, tune, "tune")


def report(options: ReportOptions, json: bool) -> None:
    """Draw the HTML page of a result file anew."""
    from kronfold.base.output import Output
    from kronfold.base.results import read
    from kronfold.report.comparison import comparison_table
    from kronfold.report.page import render, render_comparison
    from kronfold.report.tables import run_summary

    page = Output(options.output, overwrite=options.overwrite, inputs=[options.results], is_file=True)
    document = read(options.results, "run", "compare")
    compared = document["schema"] == "kronfold/compare"
    page.write(render_comparison(document) if compared else render(document))
    shown: Any = comparison_table(document) if compared else run_summary(document)
    t.emit(document, json, shown)
    t.say(f"The page is {options.output}")


def evaluate(options: EvalOptions, json: bool) -> None:
    """Perplexity of a model on a text, by a named protocol; or a suite of measurements; or tasks of lm-eval."""
    from kronfold.base import processes
    from kronfold.base.output import Output
    from kronfold.evaluate.texts import named_texts
    from kronfold.jobs import evaluate as evaluation
    from kronfold.report.tables import suite_table, task_table

    device = t.prepare(options.device, 0)
    texts = options.eval_text
    reads = [options.model, options.tokenizer, options.lambada, options.task_files, *texts]
    target = processes.on_main(
        lambda: (
            Output(options.output, overwrite=options.overwrite, inputs=reads, is_file=True) if options.output else None
        )
    )
    source = t.resolve_model(options.model)
    subject: dict[str, Any] = {name: getattr(options, name) for name in ("batch_size", "tokenizer", "dtype")}
    subject |= {"name": options.model, "device": device}
    measured: dict[str, Any] = {"protocol": options.protocol, "rows": options.rows, "reading": t.reading(options)}
    with t.progress_bar() as report:
        if options.suite:
            document = evaluation.evaluate_suite(
                source, options.suite, named_texts(texts), options.lambada, report=report, **measured, **subject
            )
            shown: Any = suite_table(document)
        elif options.tasks:
            document = evaluation.evaluate_tasks(source, options.tasks, options.task_files, **subject)
            shown = task_table(document["results"], f"{options.model}, lm-eval {document['lm_eval']}")
        else:
            document = evaluation.evaluate_text(source, texts[0], report=report, **measured, **subject)
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


def inspect(options: InspectOptions, json: bool) -> None:
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

    source = t.resolve_model(options.model)
    checked = {"verified": verified(source)} if options.verify else {}
    whole = [_verified_line(checked["verified"])] if options.verify else []
    if options.verify and not (Path(source) / "config.json").exists():
        t.emit(results.document("inspect", None, model=options.model, **checked), json, *whole)
        return
    t.prepare()
    subject = skeleton_of(load_config(source)) if source.startswith("config:") else load_model(source, dtype="auto")
    specs = read_specs(subject)
    parts = recognised(subject)
    document = results.document(
        "inspect",
        None,
        model=options.model,
        model_type=subject.config.model_type,
        dtype=str(subject.dtype).removeprefix("torch."),
        **cost(subject).to_dict(),
        gathers=gathers_of(subject),
        modules=specs,
        recognised=parts.to_dict(),
        **checked,
    )
    table = Table("module", "structure", "spec", title=f"{options.model}: {len(specs)} structured modules")
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


def validate(options: ValidateOptions, json: bool) -> None:
    """Check a recipe or plan and list every fault at once; exit code 2 if there is any."""
    from kronfold.base import results
    from kronfold.planner.plan import Plan
    from kronfold.planner.recipe import load_recipe

    if options.recipe.endswith(".json"):
        made = Plan.load(options.recipe)
        document = results.document("validate", None, recipe=made.recipe, stages=[stage.name for stage in made.stages])
    else:
        loaded = load_recipe(options.recipe)
        document = results.document(
            "validate", None, recipe=loaded.name, stages=[stage.name for stage in loaded.stages]
        )
    fits = ""
    if options.model:
        from kronfold.models.load import load_config
        from kronfold.planner import planning

        t.prepare()
        config = load_config(t.resolve_model(options.model))
        if options.recipe.endswith(".json"):
            document["held_parameters"] = planning.check_plan(made, config).held_parameters
        else:
            document["held_parameters"] = planning.plan_of_shapes(config, loaded).held_parameters
        fits = f" and fits {options.model}"
    t.emit(document, json, f"{document['recipe']}: valid{fits}, stages {', '.join(document['stages'])}")


def tune(options: TuneOptions, json: bool) -> None:
    """Measure this machine for a few seconds, so that structured layers choose the fastest way to compute on it."""
    from kronfold.jobs.tune import tune as measure
    from kronfold.report.tables import simple_table

    document = measure(t.prepare(options.device), options.dtypes, options.threads, save=options.save)
    table = simple_table("Nanoseconds", ("rate", *(row["dtype"] for row in document["rows"])), 1)
    for name in document["rows"][0]["rates"]:
        cells = (f"{row['rates'][name] * 1e9:.4g} ({row['built_in'][name] * 1e9:.4g})" for row in document["rows"])
        table.add_row(name, *cells)
    row = document["rows"][0]
    threaded = f", {row['threads']} threads" if row["threads"] else ""
    place = f"saved in {document['path']}" if document["path"] else "not saved"
    t.emit(document, json, table, f"{row['device']}{threaded}; in brackets the built-in rates; {place}")
