"""Commands that make models smaller: demo, plan, compress, heal, run."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from kronfold.cli import terminal as t


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file, in the order people meet them."""
    for command in (demo, plan, compress, heal, run):
        app.command()(command)


_DEMO = """\
A GPT-2 of 3.5 million parameters is made 29 % smaller in two ways, on this machine, from files inside the package:
  tqcompressor  a published recipe: fixed shapes, Kronecker products with permutations, healed in three stages
  auto          kronfold's planner: ranks chosen where the loss feels it least, fitted to text, at the same size
Both heal by distillation on the same tokens with the same seed, and the same held-out text measures them. Healing the
dense model on those tokens, and the recipe without permutations, show what is the data's merit and what the method's.
"""


def demo(
    output: Annotated[str, typer.Option("--output", "-o", help="Where the results go.")] = "kronfold-demo",
    heal_tokens: Annotated[int, typer.Option(help="Healing budget of each track, in tokens.")] = 200_000,
    seed: t.Seed = 0,
    device: t.Device = "auto",
    overwrite: t.Overwrite = False,
    resume: t.Resume = False,
    json: t.Json = False,
) -> None:
    """Two ways to the same size on the small GPT-2 inside the package. No network, about 4 minutes on 2 cores."""
    from kronfold import assets

    t.say(_DEMO)
    options: dict[str, Any] = {
        "model": str(assets.teacher_path()),
        "name": "demo (the GPT-2 inside the package)",
        "recipe": "tqcompressor",
        "train_text": str(assets.heal_text()),
        "eval_text": str(assets.eval_text()),
        "heal_tokens": heal_tokens,
        "prompt": assets.PROMPT,
        "beside": "auto",
        "seed": seed,
    }
    _run(options, output, device=device, dtype=None, overwrite=overwrite, resume=resume, json=json)


def plan(
    model: t.OptionalModel = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            "-r",
            show_default=False,
            help="Shipped recipe or YAML file; default: auto with a budget or calibration text, else tqcompressor.",
        ),
    ] = None,
    calibration: t.Calibration = None,
    target_params: t.TargetParams = None,
    target_ratio: t.TargetRatio = None,
    target_macs: t.TargetMacs = None,
    target_bytes: t.TargetBytes = None,
    structures: t.Structures = None,
    calibration_windows: t.CalibrationWindows = None,
    output: t.Output = None,
    diff: Annotated[
        tuple[str, str] | None, typer.Option(metavar="A B", help="Compare two saved plans.", show_default=False)
    ] = None,
    errors: Annotated[bool, typer.Option(help="With weights at hand, also fit them and show relative errors.")] = True,
    train: t.Train = False,
    heal_tokens: t.HealTokens = None,
    batch_size: t.BatchSize = None,
    micro_batch: t.MicroBatch = None,
    block_size: t.BlockSize = None,
    processes: t.Processes = 1,
    precision: t.Precision = "bf16",
    sharded: t.Sharded = False,
    cache: t.Cache = True,
    text_column: t.TextColumnName = "text",
    max_bad_rows: t.MaxBadRows = None,
    seed: t.Seed = 0,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Show what a recipe or a budget does to a model: every matrix, exact counts, nothing changed."""
    if diff:
        _diff(diff, json)
        return
    if model is None:
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

    t.prepare(seed=seed)
    reads = [model, recipe, *(calibration or [])]
    target = Output(output, overwrite=overwrite, inputs=reads, is_file=True) if output else None
    source = t.resolve_model(model)
    budget = t.budget(target_params, target_ratio, target_macs, target_bytes)
    changes = t.planner_changes(calibration_windows, structures)
    recipe = recipe or ("auto" if budget or calibration or changes else "tqcompressor")
    automatic = recipe == "auto"
    with t.progress_bar() as report:
        weights = (errors or automatic) and not source.startswith("config:")
        subject = load_model(source) if weights else load_config(source)
        made = planned(
            subject, recipe, t.calibration_or_own(calibration) if automatic else [], budget, source=source,
            changes=changes, reading=t.reading(text_column, max_bad_rows), errors=errors, seed=seed,
            cache=cache_directory() if cache else None,
            progress=report,
        )  # fmt: skip
    document = made.to_dict()
    tables: list[Any] = [plan_table(document)]
    if train:
        document["training"] = training_of(
            made, subject if isinstance(subject, PretrainedConfig) else subject.config, tokens=heal_tokens,
            batch=batch_size, micro_batch=micro_batch, block=block_size, processes=processes, precision=precision,
            sharded=sharded,
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


def compress(
    model: t.Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the compressed checkpoint.")],
    recipe: t.RecipeName = "auto",
    plan: Annotated[
        str | None, typer.Option(help="A saved plan to carry out instead of a recipe.", show_default=False)
    ] = None,
    calibration: t.Calibration = None,
    target_params: t.TargetParams = None,
    target_ratio: t.TargetRatio = None,
    target_macs: t.TargetMacs = None,
    target_bytes: t.TargetBytes = None,
    structures: t.Structures = None,
    calibration_windows: t.CalibrationWindows = None,
    sequential: Annotated[
        bool | None,
        typer.Option(
            "--sequential/--together",
            help="Fit each layer to what the compressed ones before it give (slower, better where much is cut), or all "
            "to the dense model; default: as the recipe says.",
            show_default=False,
        ),
    ] = None,
    adapt: Annotated[
        bool | None,
        typer.Option("--adapt", help="In sequence, also refit the layers that stay dense.", show_default=False),
    ] = None,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Work block by block from the files of a local checkpoint into new ones, for models that do not fit "
            "into memory; recipes of fixed shapes, no calibration text.",
        ),
    ] = False,
    cache: t.Cache = True,
    text_column: t.TextColumnName = "text",
    max_bad_rows: t.MaxBadRows = None,
    seed: t.Seed = 0,
    dtype: t.Dtype = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --stream: continue after the last block done.")
    ] = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Make a model smaller and save it, without healing: planned for a budget and fitted to text, unless told other."""
    from kronfold.base.files import cache_directory
    from kronfold.jobs.compress import compress_to
    from kronfold.jobs.stream import check_options, compress_streaming

    t.prepare(seed=seed)
    budget = t.budget(target_params, target_ratio, target_macs, target_bytes)
    changes = t.planner_changes(calibration_windows, structures, sequential, adapt)
    check_options(stream, resume, changes)
    if stream:
        with t.progress_bar() as report:
            document = compress_streaming(
                t.resolve_model(model), output, recipe, plan, calibration or [], budget, seed=seed, dtype=dtype,
                resume=resume, overwrite=overwrite, progress=report,
            )  # fmt: skip
        t.emit(document, json, _saved(document, output))
        return
    needs_text = recipe == "auto" and plan is None
    texts = t.calibration_or_own(calibration) if needs_text else calibration or []
    with t.progress_bar() as report:
        document = compress_to(
            t.resolve_model(model), output, recipe, plan, texts, budget, changes=changes,
            reading=t.reading(text_column, max_bad_rows),
            cache=cache_directory() if cache else None, seed=seed, dtype=dtype, overwrite=overwrite,
            progress=report,
        )  # fmt: skip
    t.emit(document, json, _saved(document, output))


def heal(
    model: Annotated[
        str, typer.Argument(metavar="STUDENT", help="Directory of the compressed model.", show_default=False)
    ],
    teacher: Annotated[str, typer.Option(help="The original model to learn from.")],
    train_text: t.Text,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the healed checkpoint.")],
    eval_text: Annotated[str | None, typer.Option(help="Text to measure on, before and after.")] = None,
    heal_tokens: Annotated[int, typer.Option(help="Training budget in tokens.")] = 10_000_000,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate (AdamW, cosine).")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Windows per step, over all processes.")] = 16,
    micro_batch: t.MicroBatch = None,
    offline_teacher: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="What `kronfold teach` stored of TEACHER on this text; the teacher is then not run.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Temperature of the KL term.")] = 1.0,
    ce: Annotated[float, typer.Option(help="Weight of the cross entropy with the text.")] = 0.1,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the teacher.")] = 1.0,
    method: Annotated[
        str,
        typer.Option(help="Distillation method: kd, intermediate, rail, ...; see docs/distillation.md."),
    ] = "kd",
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the method; may be repeated.", show_default=False),
    ] = None,
    protocol: Annotated[str, typer.Option(help="Perplexity protocol: sliding or paper.")] = "sliding",
    text_column: t.TextColumnName = "text",
    max_bad_rows: t.MaxBadRows = None,
    seed: t.Seed = 0,
    device: t.Device = "auto",
    dtype: t.Dtype = None,
    resume: t.Resume = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Continue training a compressed model by distillation from the original."""
    from kronfold.jobs.heal import heal_to
    from kronfold.options import read
    from kronfold.options.healing import HealConfig

    device = t.prepare(device, seed)
    recipe = read(
        HealConfig,
        {
            "tokens": heal_tokens,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "micro_batch": micro_batch,
            "objective": {
                **t.named_values(method_option, "--method-option"),
                "ce": ce,
                "kl": kl,
                "temperature": temperature,
                "method": method,
            },
        },
        "These options",
    )
    with t.progress_bar() as report:
        document = heal_to(
            model, t.resolve_model(teacher), train_text, output, recipe, eval_text=eval_text, protocol=protocol,
            seed=seed, device=device, dtype=dtype, offline_teacher=offline_teacher,
            reading=t.reading(text_column, max_bad_rows), resume=resume, overwrite=overwrite, report=report,
        )  # fmt: skip
    t.emit(document, json, _saved(document, output))


def run(
    model: t.Model,
    train_text: t.Text,
    eval_text: t.Text,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for checkpoint, results.json and report.")],
    recipe: t.RecipeName = "tqcompressor",
    heal_tokens: t.HealTokens = None,
    calibration: t.Calibration = None,
    target_params: t.TargetParams = None,
    target_ratio: t.TargetRatio = None,
    target_macs: t.TargetMacs = None,
    target_bytes: t.TargetBytes = None,
    cache: t.Cache = True,
    protocol: Annotated[str, typer.Option(help="Perplexity protocol: sliding or paper.")] = "sliding",
    controls: Annotated[
        str,
        typer.Option(help="dense (fine-tune the teacher alike), plain (no permutations), or none; comma-separated."),
    ] = "dense,plain",
    block_size: t.BlockSize = None,
    micro_batch: t.MicroBatch = None,
    prompt: Annotated[
        str | None, typer.Option(help="Start of the text samples in the report.", show_default=False)
    ] = None,
    text_column: t.TextColumnName = "text",
    max_bad_rows: t.MaxBadRows = None,
    seed: t.Seed = 0,
    device: t.Device = "auto",
    dtype: t.Dtype = None,
    resume: t.Resume = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """The whole job: compress in the recipe's stages, heal each, measure with controls, save, report."""
    from kronfold.base.files import cache_directory
    from kronfold.jobs.run import check_controls

    options: dict[str, Any] = {
        "model": t.resolve_model(model),
        "name": model,
        "recipe": recipe,
        "train_text": train_text,
        "eval_text": eval_text,
        "heal_tokens": heal_tokens,
        "calibration": calibration or [],
        "budget": t.budget(target_params, target_ratio, target_macs, target_bytes),
        "cache": str(cache_directory()) if cache else None,
        "reading": t.reading(text_column, max_bad_rows),
        "protocol": protocol,
        "block_size": block_size,
        "micro_batch": micro_batch,
        "prompt": prompt,
        "seed": seed,
        "controls": check_controls([name for name in controls.split(",") if name not in ("", "none")]),
    }
    _run(options, output, device=device, dtype=dtype, overwrite=overwrite, resume=resume, json=json)


def _run(
    options: dict[str, Any],
    output: str,
    *,
    device: str,
    dtype: str | None,
    overwrite: bool,
    resume: bool,
    json: bool,
) -> None:
    from kronfold.base import processes
    from kronfold.base.output import check_output

    if processes.is_main() and not resume:
        check_output(output, overwrite)
    from kronfold.jobs.run import RunOptions
    from kronfold.jobs.run import run as run_recipe
    from kronfold.models.load import read_dtype
    from kronfold.report.page import write_report
    from kronfold.report.tables import run_summary

    device = t.prepare(device, options["seed"])
    options |= {
        "device": device,
        "dtype": read_dtype(dtype) if dtype else None,
        "command": shlex.join(["kronfold", *sys.argv[1:]]),
    }
    with t.progress_bar() as report:
        document = run_recipe(
            RunOptions(**options), output, resume=resume, overwrite=overwrite, report=report,
            finish=lambda found, place: write_report(found, place / "report.html"),
        )  # fmt: skip
    t.emit(document, json, run_summary(document))
    beside = document.get("beside")
    also = f", {beside['recipe']['name']}'s checkpoint in {output}/{beside['checkpoint']}/" if beside else ""
    t.say(f"Checkpoint, results.json and report.html are in {output}/{also}")


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
