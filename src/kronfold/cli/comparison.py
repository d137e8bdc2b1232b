"""Commands that set models side by side: compare, report."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from kronfold.cli import terminal as t

DEFAULT_RECIPES = "auto,svd,tqcompressor,kngpt2,distilgpt2,short-study-alt,krony-pt"


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(compare)
    app.command()(report)


def compare(
    model: t.Model,
    train_text: Annotated[str, typer.Option("--text", "--train-text", help="Text that every recipe heals on.")],
    eval_text: Annotated[
        list[str],
        typer.Option("--eval", "--eval-text", help="Text to measure on, NAME=PATH or PATH; the first is the main one."),
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for results.json, table.md, report.html.")],
    recipes: Annotated[
        str, typer.Option("--recipes", "-r", help="Recipes or YAML files, comma-separated.")
    ] = DEFAULT_RECIPES,
    heal_tokens: Annotated[int, typer.Option(help="Healing budget of every row, in tokens.")] = 1_000_000,
    lambada: Annotated[
        str | None, typer.Option(help="LAMBADA passages (.jsonl) to measure the last word on.", show_default=False)
    ] = None,
    target_ratio: t.TargetRatio = None,
    target_params: t.TargetParams = None,
    text_column: t.TextColumnName = "text",
    max_bad_rows: t.MaxBadRows = None,
    objective: Annotated[
        str, typer.Option(help="own: each recipe's objective; same: the default one for all.")
    ] = "own",
    calibration: t.Calibration = None,
    cache: t.Cache = True,
    protocol: Annotated[str, typer.Option(help="Perplexity protocol: sliding or paper.")] = "sliding",
    block_size: Annotated[int | None, typer.Option(help="Training window in tokens.", show_default=False)] = None,
    seed: t.Seed = 0,
    device: t.Device = "auto",
    resume: t.Resume = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Bring every recipe to one size, heal all on the same tokens, measure them beside the dense controls.

    Rows stand in OUTPUT.partial/result as they are done; --resume goes on there, and may add recipes to a finished one.
    """
    from kronfold.base.output import check_output

    check_output(output, overwrite, allow_existing=resume)
    from kronfold.base.files import cache_directory
    from kronfold.evaluate.texts import named_texts
    from kronfold.jobs.compare import CompareOptions
    from kronfold.jobs.compare import compare as run_comparison
    from kronfold.report.comparison import comparison_table
    from kronfold.report.page import write_comparison

    device = t.prepare(device, seed)
    options = CompareOptions(
        model=t.resolve_model(model),
        name=model,
        recipes=[name for name in recipes.split(",") if name],
        train_text=train_text,
        eval_texts=named_texts(eval_text),
        lambada=lambada,
        heal_tokens=heal_tokens,
        budget=t.budget(target_params, target_ratio, None, None),
        objective=t.one_of("--objective", objective, ("own", "same")),
        calibration=calibration or [],
        cache=str(cache_directory()) if cache else None,
        reading=t.reading(text_column, max_bad_rows),
        protocol=protocol,
        block_size=block_size,
        seed=seed,
        device=device,
        command=shlex.join(["kronfold", *sys.argv[1:]]),
    )
    with t.progress_bar() as progress:
        document = run_comparison(
            options, output, resume=resume, overwrite=overwrite, report=progress, finish=write_comparison
        )
    t.emit(document, json, comparison_table(document))
    t.say(f"results.json, table.md, report.html and a checkpoint per row are in {output}/")


def report(
    results: Annotated[
        str, typer.Argument(metavar="RESULTS", help="results.json of run, demo or compare.", show_default=False)
    ],
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML page to write.")] = "report.html",
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Draw the HTML page of a result file anew."""
    from kronfold.base.output import Output
    from kronfold.base.results import read
    from kronfold.report.comparison import comparison_table
    from kronfold.report.page import render, render_comparison
    from kronfold.report.tables import run_summary

    page = Output(output, overwrite=overwrite, inputs=[results], is_file=True)
    document = read(results, "run", "compare")
    compared = document["schema"] == "kronfold/compare"
    page.write(render_comparison(document) if compared else render(document))
    shown: Any = comparison_table(document) if compared else run_summary(document)
    t.emit(document, json, shown)
    t.say(f"The page is {output}")
