"""Commands that make models smaller: demo, plan, compress, heal, run, compare."""

from __future__ import annotations

import shlex
import sys
from typing import Any

import typer

from kronfold.cli import terminal as t
from kronfold.cli.command import add_command
from kronfold.options.compressing import CompareOptions, CompressOptions, DemoOptions, PlanOptions, RunOptions
from kronfold.options.healing import HealOptions


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file, in the order people meet them."""
    add_command(app, DemoOptions, demo, "demo")
    add_command(app, PlanOptions, plan, "plan")
    add_command(app, CompressOptions, compress, "compress")
    add_command(app, HealOptions, heal, "heal")
    add_command(app, RunOptions, run, "run")
    add_command(app, CompareOptions, compare, "compare")


_DEMO = """\
A GPT-2 of 3.5 million parameters is made 29 % smaller in two ways, on this machine, from files inside the package:
  tqcompressor  a published recipe: fixed shapes, Kronecker products with permutations, healed in three stages
  auto          kronfold's planner: ranks chosen where the loss feels it least, fitted to text, at the same size
Both heal by distillation on the same tokens with the same seed, and the same held-out text measures them. Healing the
dense model on those tokens, and the recipe without permutations, show what is the data's merit and what the method's.
"""


def demo(options: DemoOptions, json: bool) -> None:
    """Two ways to the same size on the small GPT-2 inside the package. No network, about 4 minutes on 2 cores."""
    from kronfold import assets

    t.say(_DEMO)
    asked: dict[str, Any] = {
        "model": str(assets.teacher_path()),
        "name": "demo (the GPT-2 inside the package)",
        "recipe": "tqcompressor",
        "train_text": str(assets.heal_text()),
        "eval_text": str(assets.eval_text()),
        "heal_tokens": options.heal_tokens,
        "prompt": assets.PROMPT,
        "beside": "auto",
        "beside_rate": 1e-4,  # auto starts 3 % from the teacher: the 5e-4 that mends the other recipe harms it
    }
    _run(options, asked, None, json)


def plan(options: PlanOptions, json: bool) -> None:
    """Show what a recipe or a budget does to a model: every matrix, exact counts, nothing changed."""
    if options.diff:
        _diff(options.diff, json)
        return
    if options.model is None:
        raise typer.BadParameter("give a MODEL, or two saved plans: --diff A B", param_hint="MODEL")
    from transformers import PretrainedConfig

    from kronfold.base.files import cache_directory
    from kronfold.base.output import Output
    from kronfold.jobs.compress import planned
    from kronfold.models.linear_view import recognised
    from kronfold.models.load import load_config, load_model
    from kronfold.planner.planning import skeleton_of
    from kronfold.planner.training import training_of
    from kronfold.report.plans import plan_table, training_table

    t.prepare(seed=options.seed)
    reads = [options.model, options.recipe, *options.calibration]
    target = Output(options.output, overwrite=options.overwrite, inputs=reads, is_file=True) if options.output else None
    source, budget, changes = t.resolve_model(options.model), t.budget(options), options.changes()
    recipe = options.recipe or ("auto" if budget or options.calibration or changes else "tqcompressor")
    automatic = recipe == "auto"
    with t.progress_bar() as report:
        weights = (options.errors or automatic) and not source.startswith("config:")
        subject = load_model(source) if weights else load_config(source)
        made = planned(
            subject, recipe, t.calibration_or_own(options.calibration) if automatic else [], budget, source=source,
            changes=changes, reading=t.reading(options), errors=options.errors, seed=options.seed,
            cache=cache_directory() if options.cache else None, progress=report,
        )  # fmt: skip
    document = made.to_dict()
    tables: list[Any] = [plan_table(document)]
    if options.train:
        document["training"] = training_of(
            made, subject if isinstance(subject, PretrainedConfig) else subject.config, tokens=options.heal_tokens,
            batch=options.batch_size, micro_batch=options.micro_batch, block=options.block_size,
            processes=options.processes, precision=options.precision, sharded=options.sharded,
        )  # fmt: skip
        tables.append(training_table(document["training"]))
    parts = recognised(skeleton_of(subject))
    if parts.generic:
        document["recognised"] = parts.to_dict()
        tables.append(parts.lines())
    if target:
        target.write_json(document)
    t.emit(document, json, *tables)


def _diff(paths: tuple[str, str], json: bool) -> None:
    from kronfold.planner.plan import Plan, diff
    from kronfold.report.plans import diff_table

    document = diff(Plan.load(paths[0]), Plan.load(paths[1]))
    t.emit(document, json, diff_table(document))


def compress(options: CompressOptions, json: bool) -> None:
    """Make a model smaller and save it, without healing: by default planned for a budget and fitted to text."""
    from kronfold.base.files import cache_directory
    from kronfold.jobs.compress import compress_to
    from kronfold.jobs.stream import check_options, compress_streaming

    t.prepare(seed=options.seed)
    source, budget, changes = t.resolve_model(options.model), t.budget(options), options.changes()
    check_options(options.stream, options.resume, changes)
    shared: dict[str, Any] = {"seed": options.seed, "dtype": options.dtype, "overwrite": options.overwrite}
    texts = options.calibration
    if not options.stream and options.recipe == "auto" and options.plan is None:
        texts = t.calibration_or_own(texts)
    with t.progress_bar() as report:
        shared["progress"] = report
        if options.stream:
            document = compress_streaming(
                source, options.output, options.recipe, options.plan, texts, budget, resume=options.resume, **shared
            )
        else:
            document = compress_to(
                source, options.output, options.recipe, options.plan, texts, budget, changes=changes,
                reading=t.reading(options), cache=cache_directory() if options.cache else None, **shared,
            )  # fmt: skip
    t.emit(document, json, _saved(document, options.output))


def heal(options: HealOptions, json: bool) -> None:
    """Continue training a compressed model by distillation from the original."""
    from kronfold.jobs.heal import heal_to

    t.prepare(options.device, options.seed)
    chosen = options.model_copy(update={"teacher": t.resolve_model(options.teacher)})
    with t.progress_bar() as report:
        document = heal_to(chosen, report=report)
    t.emit(document, json, _saved(document, options.output))


def run(options: RunOptions, json: bool) -> None:
    """The whole job: compress in the recipe's stages, heal each, measure with controls, save, report."""
    from kronfold.base.files import cache_directory
    from kronfold.jobs.run import check_controls

    alike = ("recipe", "train_text", "eval_text", "heal_tokens", "calibration", "protocol", "block_size")
    asked = {name: getattr(options, name) for name in (*alike, "micro_batch", "prompt")}
    asked |= {
        "model": t.resolve_model(options.model),
        "name": options.model,
        "budget": t.budget(options),
        "cache": str(cache_directory()) if options.cache else None,
        "reading": t.reading(options),
        "controls": check_controls([name for name in options.controls if name != "none"]),
    }
    _run(options, asked, options.dtype, json)


def _run(options: DemoOptions | RunOptions, asked: dict[str, Any], dtype: str | None, json: bool) -> None:
    from kronfold.base import processes
    from kronfold.base.output import check_output

    output = options.output
    if processes.is_main() and not options.resume:
        check_output(output, options.overwrite)
    from kronfold.jobs import run as job
    from kronfold.models.load import read_dtype
    from kronfold.report.page import write_report
    from kronfold.report.tables import run_summary

    chosen = job.RunOptions(
        **asked,
        seed=options.seed,
        device=t.prepare(options.device, options.seed),
        dtype=read_dtype(dtype) if dtype else None,
        command=shlex.join(["kronfold", *sys.argv[1:]]),
    )
    with t.progress_bar() as report:
        document = job.run(
            chosen, output, resume=options.resume, overwrite=options.overwrite, report=report,
            finish=lambda found, place: write_report(found, place / "report.html"),
        )  # fmt: skip
    t.emit(document, json, run_summary(document))
    beside = document.get("beside")
    also = f", {beside['recipe']['name']}'s checkpoint in {output}/{beside['checkpoint']}/" if beside else ""
    t.say(f"Checkpoint, results.json and report.html are in {output}/{also}")


def compare(options: CompareOptions, json: bool) -> None:
    """Bring every recipe to one size, heal all on the same tokens, measure them beside the dense controls.

    Rows stand in OUTPUT.partial/result as they are done; --resume goes on there, and may add recipes to a finished one.
    """
    from kronfold.base.output import check_output

    check_output(options.output, options.overwrite, allow_existing=options.resume)
    from kronfold.base.files import cache_directory
    from kronfold.evaluate.texts import named_texts
    from kronfold.jobs import compare as job
    from kronfold.report.comparison import comparison_table
    from kronfold.report.page import write_comparison

    device = t.prepare(options.device, options.seed)
    alike = ("train_text", "lambada", "heal_tokens", "objective", "calibration", "protocol", "block_size", "seed")
    chosen = job.CompareOptions(
        **{name: getattr(options, name) for name in alike},
        model=t.resolve_model(options.model),
        name=options.model,
        recipes=list(options.recipes),
        eval_texts=named_texts(options.eval_text),
        budget=t.budget(options),
        cache=str(cache_directory()) if options.cache else None,
        reading=t.reading(options),
        device=device,
        command=shlex.join(["kronfold", *sys.argv[1:]]),
    )
    with t.progress_bar() as progress:
        document = job.compare(
            chosen, options.output, resume=options.resume, overwrite=options.overwrite, report=progress,
            finish=write_comparison,
        )  # fmt: skip
    t.emit(document, json, comparison_table(document))
    t.say(f"results.json, table.md, report.html and a checkpoint per row are in {options.output}/")


def _saved(document: dict[str, Any], output: str) -> str:
    from kronfold.report.tables import gathers_line

    before, after = document["teacher"]["held_parameters"], document["held_parameters"]
    lines = [f"{after:,} held parameters ({after / before:.1%} of {before:,}), saved in {output}/"]
    if document.get("gathers"):
        lines.append(gathers_line(document["gathers"]))
    stage = document.get("stages", [{}])[0]
    if stage.get("before_healing"):
        lines.append(f"perplexity {stage['before_healing']:.2f} before healing, {stage['after_healing']:.2f} after")
    return "\n".join(lines)
