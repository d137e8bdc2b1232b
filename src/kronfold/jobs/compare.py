"""Many recipes, one table: each brought to the same size, healed on the same tokens, measured on the same texts.

Every finished row stands in `<output>.partial/result` at once, with the table so far; `resume` goes on where an earlier
call stopped, and adds recipes to a comparison that is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import results
from kronfold.base.errors import InputError, suggest
from kronfold.base.files import write_json
from kronfold.base.job import Job
from kronfold.base.progress import Report
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.evaluate.lambada import lambada, passages
from kronfold.evaluate.perplexity import PROTOCOLS, PerplexityResult, perplexity
from kronfold.evaluate.speed import generation_speed
from kronfold.evaluate.texts import open_text
from kronfold.fit.calibration import Calibration
from kronfold.fit.fit import calibrate_on, keep_layers, settings_of
from kronfold.jobs.compare_rows import Objective, Row, check_rows, row_of, with_budget
from kronfold.jobs.run import run_stages
from kronfold.jobs.run_state import Run, RunOptions
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer, on_disk
from kronfold.options.healing import HealConfig
from kronfold.planner.budget import Budget
from kronfold.planner.recipe import Recipe, load_recipe
from kronfold.planner.sizing import Sized
from kronfold.train.heal import heal
from kronfold.train.watch import check_teacher_outputs

# A dense model is near its optimum already; the larger steps that mend a broken one would throw it out.
_DENSE_LEARNING_RATE = 2e-4
_TEXT_ONLY = {"ce": 1.0, "kl": 0.0}
_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class CompareOptions:
    """What a comparison is made of; all but `recipes` must be the same when it is resumed.

    Attributes:
        model: the teacher. recipes: shipped names or YAML files, one row each.
        train_text: all heal on its tokens, in the same order. eval_texts: name to source; the first one is the main
            text, on which models are also measured before healing. lambada: source of the passages, None for none.
        heal_tokens: healing budget of every row. budget: size of every row, None for each recipe's own.
        objective: "own" heals by each recipe's objective, "same" all by the default one.
        calibration: texts that all recipes are fitted to. Without any, those that are planned take the training text,
            and all others are fitted to the weights alone.
        reading, protocol, block_size, seed, device, cache: as in `RunOptions`.
    """

    model: str
    recipes: Sequence[str]
    train_text: str
    eval_texts: Mapping[str, str]
    heal_tokens: int
    lambada: str | None = None
    budget: Budget | None = None
    objective: Objective = "own"
    calibration: Sequence[str] = ()
    block_size: int | None = None
    reading: Reading = Reading()  # noqa: RUF009 - frozen
    protocol: str = "sliding"
    seed: int = 0
    device: str = "cpu"
    cache: str | None = None
    name: str | None = None
    command: str = ""


@dataclass
class _Comparison:
    """What all rows share."""

    options: CompareOptions
    job: Job
    teacher: PreTrainedModel
    tokenizer: Any
    blocks: TokenBlocks
    sizes: Mapping[str, Sized | None]  # by name of the recipe, None for those that are planned
    calibrations: Mapping[str, Calibration]  # by name of the recipes that are fitted to data
    report: Report

    def run_of(self, row: Row) -> Run:
        options = self.options
        shared = RunOptions(
            model=options.model,
            recipe=row.recipe.name,
            train_text=options.train_text,
            eval_text=next(iter(options.eval_texts.values())),
            heal_tokens=options.heal_tokens,
            calibration=options.calibration,
            budget=options.budget,
            cache=options.cache,
            reading=options.reading,
            protocol=options.protocol,
            seed=options.seed,
            device=options.device,
        )
        found = self.calibrations.get(row.recipe.name)
        return Run(
            shared, row.recipe, self.job.result, self.job, self.teacher, self.tokenizer, self.blocks, self.report,
            row.sized.plan, found, measures_stages=False,
        )  # fmt: skip

    def perplexity(self, model: PreTrainedModel, text: str, who: str) -> PerplexityResult:
        def progress(done: int, total: int) -> None:
            self.report(f"evaluate {who} on {text}", done, total)

        source = open_text(self.options.eval_texts[text], self.options.reading)
        return perplexity(model, self.tokenizer, source, self.options.protocol, progress=progress)

    def measure(self, model: PreTrainedModel, who: str) -> dict[str, Any]:
        """Perplexity on every text, and LAMBADA."""
        texts = {text: self.perplexity(model, text, who) for text in self.options.eval_texts}
        found: dict[str, Any] = {
            "perplexities": {text: result.perplexity for text, result in texts.items()},
            "protocol": next(iter(texts.values())).protocol,
            "read": {"eval": {text: result.read for text, result in texts.items()}},
        }
        if self.options.lambada:
            measured = lambada(
                model, self.tokenizer, passages(self.options.lambada, self.options.reading),
                progress=lambda done, total: self.report(f"evaluate {who} on LAMBADA", done, total),
            )  # fmt: skip
            found["read"]["lambada"] = measured.read
            found["lambada"] = {
                "accuracy": measured.accuracy,
                "perplexity": measured.perplexity,
                "passages": measured.passages,
            }
        return found


def compare(
    options: CompareOptions,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda what, done, total: None,
    finish: Callable[[dict[str, Any], Path], object] = lambda document, place: None,
) -> dict[str, Any]:
    """Run every recipe at one size and one healing budget, with the dense teacher and its fine-tuning as controls.

    Args:
        output: directory that receives `results.json` and a checkpoint per row; until all are done they stand, the
            document rewritten after every row, in `<output>.partial/result`.
        resume: go on with an earlier comparison there, finished or not; rows that are done are kept, recipes may be
            added.
        finish: called with the document and the directory whenever it was rewritten, e.g. to draw the page.

    Returns the document (schema `kronfold/compare`).

    Raises InputError, RecipeError, DataError, OutputError: anything given that cannot be used, all before any work.
    """
    reads = [options.model, *options.recipes, options.train_text, *options.eval_texts.values(), options.lambada]
    reads += options.calibration
    with Job.open(output, "compare", inputs=reads, resume=resume, overwrite=overwrite, grows=True) as job:
        _check(options)
        recipes = [with_budget(load_recipe(name), options.heal_tokens, options.objective) for name in options.recipes]
        teacher = load_model(options.model, device=options.device)
        tokenizer = load_tokenizer(options.model)
        amount = options.budget.amount_for(cost(teacher)) if options.budget else None
        sizes = check_rows(teacher, recipes, amount)
        context = getattr(teacher.config, "max_position_embeddings", 1024)
        size = min(options.block_size or 1024, context)
        text = documents(options.train_text, **asdict(options.reading))
        blocks = pack(text, tokenizer, size, max_tokens=options.heal_tokens)
        check_teacher_outputs(teacher, blocks[0]["input_ids"])
        for source in [*options.eval_texts.values(), *([options.lambada] if options.lambada else [])]:
            next(open_text(source, options.reading))  # an unreadable text must not surface after hours
        calibrations = _calibrations(options, recipes, sizes, teacher, tokenizer, report)
        facts, read = _facts(options, blocks)
        if job.begin(facts, **read):
            return job.document()
        state = _Comparison(options, job, teacher, tokenizer, blocks, sizes, calibrations, report)
        document: dict[str, Any] = {}
        for document in _documents(state, recipes, amount):
            write_json(job.result / "results.json", document)
            finish(document, job.result)
        job.finish(document)
    return document


def _documents(state: _Comparison, recipes: Sequence[Recipe], amount: float | None) -> Iterator[dict[str, Any]]:
    """The document after the controls, and after every row."""
    job = state.job
    teacher = job.step("teacher", lambda: {**cost(state.teacher).to_dict(), **state.measure(state.teacher, "teacher")})
    dense = job.step("dense_finetuned", lambda: _dense(state))
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        sized, calibration = state.sizes[recipe.name], state.calibrations.get(recipe.name)
        row = row_of(state.teacher, recipe, sized, amount, calibration, state.report)
        rows.append(_row(state, row, teacher))
        yield _document(state, teacher, dense, rows, len(rows) == len(recipes), amount)


def _row(state: _Comparison, row: Row, teacher: Mapping[str, Any]) -> dict[str, Any]:
    name, sized, run = row.recipe.name, row.sized, state.run_of(row)
    before = state.job.step(f"{row.track}/before", lambda: _before(state, run, name))
    stages = run_stages(run, sized.plan, row.track)
    place = state.job.result / row.track
    last = place / sized.plan.stages[-1].name
    measured = state.job.step(f"{row.track}/measured", lambda: _measured(state, last, name))
    for stage in sized.plan.stages[:-1]:
        state.job.release(f"{row.track}/{stage.name}", place / stage.name)
    main = next(iter(state.options.eval_texts))
    after = measured["perplexities"][main]
    return {
        "recipe": name,
        "description": row.recipe.description,
        "size": {"own": sized.own, "reached": sized.reached, "note": sized.note},
        **({"calibration": run.calibration.to_dict()} if run.calibration else {}),
        **measured["cost"],
        "perplexity_before": before["perplexity"],
        "perplexity_after": after,
        "excess_perplexity": after / teacher["perplexities"][main] - 1,
        "perplexities": measured["perplexities"],
        **({"lambada": measured["lambada"]} if "lambada" in measured else {}),
        "decompose_seconds": sum(stage["decompose_seconds"] for stage in stages),
        "heal_seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "heal_tokens": sum(stage["tokens"] for stage in stages),
        "objective": _objectives(row.recipe),
        "tokens_per_second": measured["speed"]["student"],
        "teacher_tokens_per_second": measured["speed"]["teacher"],
        "losses": [{"stage": stage["name"], **entry} for stage in stages for entry in stage["losses"]],
        "checkpoint": str(last.relative_to(state.job.result)),
    }  # fmt: skip


def _objectives(recipe: Recipe) -> list[dict[str, Any]]:
    """What the healing stages train on, equal ones once."""
    found = [stage.heal.objective.model_dump() for stage in recipe.stages if stage.heal]
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def _before(state: _Comparison, run: Run, name: str) -> dict[str, Any]:
    """All stages at once, nothing trained."""
    student = load_model(state.options.model, device=state.options.device)
    started = time.monotonic()
    student = run.fit(student, run.plan).model
    seconds = round(time.monotonic() - started, 2)
    main = next(iter(state.options.eval_texts))
    return {"perplexity": state.perplexity(student, main, f"{name} before healing").perplexity, "seconds": seconds}


def _measured(state: _Comparison, checkpoint: Path, name: str) -> dict[str, Any]:
    """The saved checkpoint, as anyone would load it."""
    student = load_model(checkpoint, device=state.options.device)
    return {"cost": cost(student).to_dict(), **state.measure(student, name), "speed": _speed(state, student)}


def _speed(state: _Comparison, student: PreTrainedModel) -> dict[str, float]:
    prompt = state.blocks[0]["input_ids"][:_PROMPT_TOKENS][None].to(student.device)
    return generation_speed({"teacher": state.teacher, "student": student}, prompt)


def _dense(state: _Comparison) -> dict[str, Any]:
    """The control: the uncompressed model fine-tuned on the same tokens."""
    options, who = state.options, "the fine-tuned dense model"
    model = load_model(options.model, device=options.device)
    config = HealConfig(
        tokens=options.heal_tokens, learning_rate=_DENSE_LEARNING_RATE, objective=_TEXT_ONLY, seed=options.seed
    )

    def progress(step: int, total: int, _losses: Mapping[str, float]) -> None:
        state.report("fine-tune the dense model", step, total)

    healed = heal(model, None, state.blocks, config=config, device=model.device, progress=progress)
    return {
        **cost(model).to_dict(),
        **state.measure(model, who),
        "learning_rate": _DENSE_LEARNING_RATE,
        "heal_tokens": healed.tokens,
        "heal_seconds": round(healed.seconds_in_all, 1),
        "losses": healed.losses,
    }


def _check(options: CompareOptions) -> None:
    if options.protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol {options.protocol!r}. {suggest(options.protocol, PROTOCOLS)}")
    if options.heal_tokens < 2:
        raise InputError(f"heal_tokens is {options.heal_tokens}; give at least 2.")
    if not options.recipes or not options.eval_texts:
        raise InputError("A comparison needs at least one recipe and one evaluation text.")
    if options.budget and options.budget.unit != "params":
        raise InputError(
            "A comparison is at equal held parameters: give --target-ratio or --target-params, or neither to compare "
            "every recipe at its own size."
        )


def _calibrations(
    options: CompareOptions,
    recipes: Sequence[Recipe],
    sizes: Mapping[str, Sized | None],
    teacher: PreTrainedModel,
    tokenizer: Any,
    report: Report,
) -> dict[str, Calibration]:
    """Statistics for each recipe that is fitted to data, as many windows as it asks for; equal ones are measured
    once. Where a recipe drops blocks, of the teacher without them."""
    texts = options.calibration or [options.train_text]
    measured: dict[Any, Calibration] = {}
    calibrations = {}
    for recipe in recipes:
        if recipe.auto is None and not options.calibration:
            continue
        settings, sized = settings_of(recipe), sizes[recipe.name]
        layers = sized.plan.layers if sized else None
        asked = (settings.windows, settings.window, settings.gradient_windows, settings.sequential, layers)
        if asked not in measured:
            measured[asked] = calibrate_on(
                keep_layers(teacher, layers), tokenizer, texts, settings,
                reading=options.reading, seed=options.seed, cache=options.cache, progress=report,
            )  # fmt: skip
        calibrations[recipe.name] = measured[asked]
    return calibrations


def _facts(options: CompareOptions, blocks: TokenBlocks) -> tuple[dict[str, Any], dict[str, str | Path | None]]:
    """What must be equal when a comparison is resumed, values and files by their content; recipes may be added."""
    names = ("model", "block_size", "lambada", "heal_tokens", "objective", "protocol", "seed")
    facts = {
        **{name: getattr(options, name) for name in names},
        "train_sha256": blocks.sha256,
        "eval_texts": dict(options.eval_texts),
        "budget": asdict(options.budget) if options.budget else None,
        "calibration": list(options.calibration),
        "reading": asdict(options.reading),
    }
    read: dict[str, str | Path | None] = {"model_content": on_disk(options.model), "lambada_content": options.lambada}
    read |= {f"eval_content {name}": source for name, source in options.eval_texts.items()}
    return facts, read | {f"calibration_content_{i}": text for i, text in enumerate(options.calibration)}


def _document(
    state: _Comparison,
    teacher: dict[str, Any],
    dense: dict[str, Any],
    rows: list[dict[str, Any]],
    complete: bool,
    amount: float | None,
) -> dict[str, Any]:
    options = state.options
    teacher, dense = dict(teacher), dict(dense)
    read, _ = teacher.pop("read"), dense.pop("read")  # every model reads the same
    return results.document(
        "compare",
        options.seed,
        command=options.command,
        model=options.name or options.model,
        complete=complete,
        target={"held_parameters": round(amount), "ratio": amount / teacher["held_parameters"]} if amount else None,
        objective=options.objective,
        protocol=teacher["protocol"],
        data={
            "heal": {
                "source": Path(options.train_text).name,
                "tokens": state.blocks.tokens,
                "sha256": state.blocks.sha256,
                "read": state.blocks.read,
            },
            "eval": {name: Path(source).name for name, source in options.eval_texts.items()},
            "lambada": Path(options.lambada).name if options.lambada else None,
            "read": read,
        },
        teacher=teacher,
        controls={"dense_finetuned": dense},
        rows=rows,
        total_seconds=round(state.job.seconds(), 1),
    )
