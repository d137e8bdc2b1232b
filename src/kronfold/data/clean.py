"""Web text made fit for training: repaired, without markup, boilerplate and duplicates, by a `datatrove` pipeline."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kronfold.base import results
from kronfold.base.errors import CheckpointError, DataError
from kronfold.base.files import explain_write_errors
from kronfold.base.job import Job
from kronfold.data.clean_settings import DUPLICATES, FILTERS, CleanSettings, load_settings
from kronfold.data.clean_stages import make_stages
from kronfold.data.executors import check_executor, run_stages
from kronfold.data.shards import described, spool
from kronfold.data.sources import documents

Progress = Callable[[str, int, int], None]


def clean(
    source: str | Path,
    output: str | Path,
    settings: CleanSettings | str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Progress | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Clean the documents of `source` into `output`: shards that `documents` reads, and manifest.json (returned).

    `settings`: CleanSettings, a YAML file of its fields, or None for the defaults; `changes` replace single fields.
    The same source, settings and seed give the same bytes, whatever the number of workers. Until all is done the work
    lies in `<output>.partial`, from which `resume` continues; finished tasks are not repeated. With Slurm the call
    returns once the jobs are submitted ({"submitted": True}); call with `resume` when they have ended.
    With more than one worker a calling script needs `if __name__ == "__main__":`, as for any process pool.

    Raises DataError (source; nothing left), InputError (filters, options, executor, missing packages), OutputError
    (place taken, unfinished run there), CheckpointError (`resume` with other settings or another source).
    """
    chosen = load_settings(settings, **changes)
    check_executor(chosen)
    inputs = [source, settings if isinstance(settings, (str, Path)) else None]
    with Job.open(output, "clean", inputs=inputs, apart=[source], resume=resume, overwrite=overwrite) as job:
        next(documents(source, text_column=chosen.text_column))  # a source that cannot be read leaves nothing behind
        if job.begin({"source": str(source), **chosen.shaping()}, content=source):
            return job.document()
        started = time.perf_counter()
        try:
            with explain_write_errors(output):
                found = _read(job, source, chosen, report)
                stages = make_stages(job.work, chosen, found["shards"])
                if not run_stages(stages, chosen, job, report):
                    partial = str(job.work)
                    return {"schema": "kronfold/clean", "submitted": True, "partial": partial, "tasks": _tasks(stages)}
                filters = _filters(job.work, chosen, found)
                if filters[-1]["documents_out"] == 0:
                    raise Nothing(_nothing_left(source, filters))
                _add_up(job, filters, chosen)
                document = _manifest(source, job.result, chosen, found, filters, time.perf_counter() - started)
        except Nothing:
            job.discard()
            raise
        job.finish(document, "manifest.json")
    return document


class Nothing(DataError):
    """There is no text to work on, so an unfinished job would never be finished."""


def _read(job: Job, source: str | Path, settings: CleanSettings, report: Progress | None) -> dict[str, Any]:
    """The spooled source, as `spool` describes it."""
    place = job.work / "shards"

    def work() -> dict[str, Any]:
        shutil.rmtree(place, ignore_errors=True)
        if report:
            report("clean: read", 0, 1)
        try:
            return spool(
                source, place, int(settings.shard_megabytes * 1e6),
                text_column=settings.text_column, max_bad_rows=settings.max_bad_rows,
            )  # fmt: skip
        except DataError as error:
            raise Nothing(str(error)) from error

    return job.step("read", work, [place])


def _add_up(job: Job, filters: list[dict[str, Any]], settings: CleanSettings) -> None:
    """Raise CheckpointError unless the shards hold as many documents as the counts of the last filter say."""
    wanted = filters[-1]["documents_out"]
    found = sum(1 for _ in documents(job.result))
    if found != wanted:
        raise CheckpointError(
            f"The unfinished run in {job.work} is damaged: its shards hold {found:,} documents and its counts say "
            f"{wanted:,}. Start anew with --overwrite."
        )


def _tasks(stages: Any) -> dict[str, int]:
    return {stage.name: stage.tasks for stage in stages}


def _statistics(partial: Path) -> dict[str, dict[str, int]]:
    """Totals over all tasks by name of the block, from the files datatrove leaves per task."""
    totals: dict[str, dict[str, int]] = {}
    for file in sorted((partial / "logs").glob("*/stats/*.json")):
        for block in json.loads(file.read_text(encoding="utf-8")):
            mine = totals.setdefault(block["name"], {})
            for key, value in block["stats"].items():
                number = value["total"] if isinstance(value, dict) else value
                mine[key] = mine.get(key, 0) + int(number)
    return totals


def _filters(partial: Path, settings: CleanSettings, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Per filter, in the order of action: what came in and went out, why documents and lines went, examples."""
    totals = _statistics(partial)
    before = {key: found[key] for key in ("documents", "characters", "words")}
    listed = []
    for name in (*(n for n in FILTERS if n in settings.filters and n not in DUPLICATES), "empty",
                 *(n for n in DUPLICATES if n in settings.filters)):  # fmt: skip
        after = {key: totals[f"count: {name}"].get(key, 0) for key in before}
        entry: dict[str, Any] = {"filter": name}
        for key in before:
            entry |= {f"{key}_in": before[key], f"{key}_out": after[key]}
        block = next((stats for label, stats in totals.items() if label.endswith(f"[{name}]")), {})
        entry |= _details(block)
        entry["examples"] = _examples(partial / "drops" / name, settings.examples)
        listed.append(entry)
        before = after
    return listed


def _details(block: dict[str, int]) -> dict[str, Any]:
    reasons = {k.removeprefix("dropped_"): v for k, v in sorted(block.items()) if k.startswith("dropped_")}
    lines = {k.removeprefix("line-filter-"): v for k, v in sorted(block.items()) if k.startswith("line-filter-")}
    found: dict[str, Any] = {}
    if "changed" in block:
        found["documents_changed"] = block["changed"]
    if reasons:
        found["documents_dropped_for"] = reasons
    if lines:
        found["lines_dropped"] = lines
    return found


def _examples(place: Path, count: int) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for file in sorted(place.glob("*.jsonl")):
        rows += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if len(rows) >= count:
            break
    return rows[:count]


def _nothing_left(source: str | Path, filters: list[dict[str, Any]]) -> str:
    dropped = {entry["filter"]: entry["documents_in"] - entry["documents_out"] for entry in filters}
    told = ", ".join(f"{name} {count}" for name, count in dropped.items() if count)
    reasons = {key for entry in filters for key in entry.get("documents_dropped_for", {})}
    told += f" (reasons: {', '.join(sorted(reasons))})" if reasons else ""
    return (
        f"Nothing is left of {source}; documents dropped: {told}. A .txt file is one document: give .jsonl or .parquet "
        "with one per row, leave a filter out (--filters), or relax its options."
    )


def _manifest(
    source: str | Path,
    result: Path,
    settings: CleanSettings,
    found: dict[str, Any],
    filters: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    counts = ("documents", "characters", "words")
    files = sorted(path for path in result.iterdir() if path.suffix in (".gz", ".parquet"))
    return results.document(
        "clean",
        settings.seed,
        versions=results.versions() | {name: importlib.metadata.version(name) for name in ("datatrove", "ftfy")},
        settings=settings.shaping(),
        workers=settings.workers,
        executor=settings.executor,
        seconds=round(seconds, 2),
        input=found,
        output={key: filters[-1][f"{key}_out"] for key in counts} | {"files": described(files, result)},
        filters=filters,
    )
