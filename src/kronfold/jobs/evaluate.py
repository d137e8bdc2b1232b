"""Measure one model: a text, a suite in one pass, tasks of lm-eval. Each returns a result document."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kronfold.base import processes, results
from kronfold.base.errors import DataError, InputError, suggest
from kronfold.data.bad_rows import Reading
from kronfold.evaluate.harness import harness
from kronfold.evaluate.lambada import lambada, passages
from kronfold.evaluate.perplexity import PROTOCOLS, perplexity
from kronfold.evaluate.texts import Rows, open_text
from kronfold.models.cost import held_parameters
from kronfold.models.load import load_model, load_tokenizer, read_dtype

SUITES = ("lm",)
Report = Callable[[str, int, int], None]


def evaluate_text(
    model: str,
    text: str,
    protocol: str = "sliding",
    *,
    rows: Rows = "auto",
    reading: Reading = Reading(),  # noqa: B008 - frozen
    batch_size: int | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    name: str | None = None,
    report: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Perplexity of the checkpoint `model` on one text source.

    Args:
        rows: whether rows are lines of one text, see `kronfold.evaluate.perplexity`. reading: how the source is read.

    Raises InputError, DataError, CheckpointError.
    """
    opened = open_text(text, reading)  # what is wrong with the place is said before the model is loaded
    subject, reader = _open(model, tokenizer, device, dtype)
    found = perplexity(
        subject, reader, opened, protocol, rows=rows, batch_size=batch_size,
        progress=lambda done, total: report("evaluate", done, total),
    )  # fmt: skip
    return results.document(
        "eval",
        None,
        model=name or model,
        text=Path(text).name,
        dtype=dtype,
        held_parameters=held_parameters(subject),
        **found.to_dict(),
    )


def evaluate_suite(
    model: str,
    suite: str,
    texts: Mapping[str, str],
    lambada_source: str | None,
    *,
    protocol: str = "sliding",
    rows: Rows = "auto",
    reading: Reading = Reading(),  # noqa: B008 - frozen
    batch_size: int | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    name: str | None = None,
    report: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Suite `lm`: perplexity on each of `texts` by `protocol`, and LAMBADA, with the model loaded once.

    Args:
        texts: name to text source. lambada_source: passages, see `kronfold.evaluate.lambada`.
        rows, reading: as in `evaluate_text`, for all texts.
        name: what the document calls the model, default `model` itself.

    Returns the result document. Raises InputError, DataError, CheckpointError; what is missing is said before the
    model is loaded.
    """
    if suite not in SUITES:
        raise InputError(f"Unknown suite {suite!r}. {suggest(suite, SUITES)}")
    if protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol '{protocol}'. {suggest(protocol, PROTOCOLS)}")
    lacking = [] if texts else ["one or more texts (--text NAME=PATH)"]
    lacking += [] if lambada_source else ["LAMBADA's passages (--lambada lambada_test.jsonl)"]
    if lacking:
        raise DataError(f"Suite lm measures perplexity on texts, and LAMBADA. Give {' and '.join(lacking)} too.")
    opened = {text: open_text(source, reading) for text, source in texts.items()}
    asked = passages(str(lambada_source), reading)
    subject, reader = _open(model, tokenizer, device, dtype)

    def shown(what: str) -> Callable[[int, int], None]:
        return lambda done, total: report(f"evaluate {what}", done, total)

    measured = {
        text: {
            "source": Path(texts[text]).name,
            **perplexity(
                subject, reader, source, protocol, rows=rows, batch_size=batch_size, progress=shown(text)
            ).to_dict(),
        }
        for text, source in opened.items()
    }  # fmt: skip
    words = lambada(subject, reader, asked, batch_size=batch_size, progress=shown("lambada"))
    return results.document(
        "eval-suite",
        None,
        model=name or model,
        suite=suite,
        dtype=dtype,
        protocol=protocol,
        held_parameters=held_parameters(subject),
        texts=measured,
        lambada={"source": Path(str(lambada_source)).name, **words.to_dict()},
    )


def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    task_files: str | None = None,
    *,
    batch_size: int | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    name: str | None = None,
) -> dict[str, Any]:
    """Scores of lm-eval's tasks, see `kronfold.evaluate.harness`. Raises InputError, DataError, CheckpointError."""
    subject, reader = _open(model, tokenizer, device, dtype)
    # lm-eval takes a model that is already loaded for that of a single process
    found = processes.on_main(lambda: harness(subject, reader, tasks, include=task_files, batch_size=batch_size or 16))
    return results.document(
        "eval-tasks",
        None,
        model=name or model,
        dtype=dtype,
        held_parameters=held_parameters(subject),
        lm_eval=found["version"],
        results=found["results"],
    )


def _open(model: str, tokenizer: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """The model, and its own or another's tokenizer."""
    processes.start(device)
    return load_model(model, dtype=read_dtype(dtype), device=device), load_tokenizer(tokenizer or model)
