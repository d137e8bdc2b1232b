"""Commands for downstream tasks: finetune."""

from __future__ import annotations

from typing import Annotated

import typer

from kronfold.cli import terminal as t


def add_to(app: typer.Typer) -> None:
    """Register the commands of this file."""
    app.command()(finetune)


def finetune(
    model: t.Model,
    task: Annotated[str, typer.Option(help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.")],
    output: Annotated[str, typer.Option("--output", "-o", help="Directory for the best model.")],
    train_file: Annotated[
        str | None, typer.Option(help="Local .tsv with a header; default: --dataset.", show_default=False)
    ] = None,
    dev_file: Annotated[
        list[str] | None, typer.Option(help="The same to measure on; twice for mnli.", show_default=False)
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Columns of the texts, then of the label, comma-separated.", show_default=False),
    ] = None,
    dataset: Annotated[str, typer.Option(help="A datasets id laid out as GLUE is.")] = "nyu-mll/glue",
    teacher: Annotated[
        str | None, typer.Option(help="A classifier fine-tuned on the task, to learn from.", show_default=False)
    ] = None,
    method: Annotated[str, typer.Option(help="Distillation method, with --teacher.")] = "kd",
    method_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of the method; may be repeated.", show_default=False),
    ] = None,
    kl: Annotated[float, typer.Option(help="Weight of the KL divergence to the teacher.")] = 1.0,
    ce: Annotated[float, typer.Option(help="Weight of the labels' cross entropy, with --teacher.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Temperature of the KL divergence.")] = 2.0,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.")] = 3,
    batch_size: Annotated[int, typer.Option(help="Examples per step.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="The highest; small models want more.")] = 5e-5,
    dropout: Annotated[bool, typer.Option(help="Keep the model's own dropout on.")] = True,
    max_length: Annotated[int, typer.Option(help="Tokens per example, the rest is cut.")] = 128,
    seeds: Annotated[str, typer.Option(help="One fine-tuning each, comma-separated.")] = "0",
    device: t.Device = "auto",
    dtype: t.Dtype = None,
    resume: t.Resume = False,
    overwrite: t.Overwrite = False,
    json: t.Json = False,
) -> None:
    """Fine-tune a model on a task of GLUE, structured layers kept; several seeds, optionally from a teacher."""
    from kronfold.base.errors import InputError
    from kronfold.jobs import finetune as pipeline
    from kronfold.options.finetune import LABELS_ONLY, FineTuneConfig
    from kronfold.options.healing import ObjectiveConfig
    from kronfold.report.tables import finetune_table

    if not teacher and (method != "kd" or method_option):
        raise InputError("--method and --method-option say how to learn from a teacher; give --teacher too.")
    objective = LABELS_ONLY
    if teacher:
        extra = t.named_values(method_option, "--method-option")
        objective = ObjectiveConfig(method=method, kl=kl, ce=ce, temperature=temperature, **extra)
    options = pipeline.FineTuneOptions(
        model=t.resolve_model(model),
        task=task,
        train_file=train_file,
        dev_files=tuple(dev_file or ()),
        dataset=dataset,
        columns=tuple(pipeline.column_names(columns)),
        teacher=teacher,
        settings=FineTuneConfig(
            epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, dropout=dropout, objective=objective
        ),
        seeds=pipeline.parse_seeds(seeds),
        max_length=max_length,
    )
    device = t.prepare(device)
    with t.progress_bar() as report:
        document = pipeline.finetune(
            options, output, name=model, device=device, dtype=dtype, resume=resume, overwrite=overwrite, report=report
        )
    t.emit(document, json, finetune_table(document), f"saved in {output}/")
