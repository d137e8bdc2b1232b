"""The main job: stage by stage compress and heal, with the controls that make the numbers mean something.

A killed run leaves the old output as it was, and `resume=True` goes on from the last finished step (`base/job.py`).

Under torchrun every process goes through the same steps: healing and measuring are shared, the rest (planning,
calibrating, decomposing, every file) is done by the main process while the others wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import processes, results
from kronfold.base.errors import DivergedError, InputError, suggest
from kronfold.base.job import Job
from kronfold.base.progress import Progress, Report
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.evaluate.perplexity import PROTOCOLS
from kronfold.evaluate.texts import open_text
from kronfold.export.checkpoint import write_model
from kronfold.fit.calibration import Calibration
from kronfold.fit.compress import check_objectives
from kronfold.fit.fit import calibrate_on, keep_layers, plan_auto, settings_of
from kronfold.jobs.beside import second_recipe, second_samples, second_track
from kronfold.jobs.run_state import Control, Run, RunOptions, made_once
from kronfold.models.cost import cost
from kronfold.models.load import dtype_of, load_model, load_tokenizer, on_disk
from kronfold.options.healing import HealConfig
from kronfold.planner import planning
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import Recipe, load_recipe
from kronfold.train.heal import HealResult, heal
from kronfold.train.watch import check_teacher_outputs


def run(
    options: RunOptions,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = lambda what, done, total: None,
    finish: Callable[[dict[str, Any], Path], object] = lambda document, place: None,
) -> dict[str, Any]:
    """Compress and heal in the stages of a recipe, measure the controls, save everything.

    Args:
        output: directory that receives the checkpoint (its root loads with `AutoModelForCausalLM.from_pretrained`),
            `results.json` and `plan.json`.
        resume: continue `<output>.partial` of an earlier, interrupted run with the same options.
        report: progress callback (what, done, total).
        finish: called with the results and the directory before it takes its final name, e.g. to add a report.

    Returns the results document (schema `kronfold/run`).

    Raises:
        OutputError: the output exists (and no `overwrite`) or cannot be written. InputError and its kin: anything
            given that cannot be used. All are raised before any work starts.
    """
    processes.start(options.device)
    reads = [options.model, options.recipe, options.beside, options.train_text, options.eval_text, *options.calibration]
    with Job.open(output, "run", inputs=reads, resume=resume, overwrite=overwrite, together=True) as job:
        _check_options(options)
        recipe = load_recipe(options.recipe).with_heal_tokens(options.heal_tokens)
        check_objectives(recipe)
        second = second_recipe(options, recipe)
        for stage in [*recipe.stages, *(second.stages if second else [])]:
            if stage.heal:
                processes.split_batch(stage.heal.batch_size, options.micro_batch)
        teacher = load_model(options.model, device=options.device)
        tokenizer = load_tokenizer(options.model)
        given = None if recipe.auto else planning.plan_of_shapes(teacher, recipe)
        blocks = processes.on_main(lambda: _blocks(options, recipe, teacher, tokenizer))
        check_teacher_outputs(teacher, blocks[0]["input_ids"])
        found = processes.on_main(lambda: _calibrate(options, recipe, teacher, given, tokenizer, report), share=False)

        def plan_for_budget() -> Plan:
            assert found is not None  # with auto the training text is read where no other is named
            return plan_auto(teacher, found, recipe, options.budget, progress=report)

        plan = given or processes.on_main(plan_for_budget)
        next(open_text(options.eval_text, options.reading))  # an unreadable text must not surface after hours
        facts, read = _facts(options, recipe, blocks)
        if job.begin(facts, **read):
            return job.document()
        state = Run(options, recipe, job.work, job, teacher, tokenizer, blocks, report, plan, found)
        measured = _measure(state)
        tokens = sum(stage["tokens"] for stage in measured["stages"])
        beside = second_track(state, second, tokens, _heal) if second else None
        student = load_model(job.work / "stages" / recipe.stages[-1].name, device=options.device)
        document = _finish(state, student, measured, beside)

        def complete() -> None:
            plan.save(job.result / "plan.json")
            finish(document, job.result)

        processes.on_main(complete)
        job.finish(document)
    return document


def _calibrate(
    options: RunOptions, recipe: Recipe, teacher: PreTrainedModel, plan: Plan | None, tokenizer: Any, report: Report
) -> Calibration | None:
    """Statistics of the teacher, without the blocks the plan drops, on the calibration texts; `auto` uses the training
    text when none are named."""
    texts = options.calibration or ([options.train_text] if recipe.auto else [])
    if not texts:
        return None
    settings = recipe.auto or settings_of(None)
    teacher = keep_layers(teacher, plan.layers if plan else None)
    return calibrate_on(
        teacher, tokenizer, texts, settings,
        reading=options.reading, seed=options.seed, cache=options.cache, progress=report,
    )  # fmt: skip


def _check_options(options: RunOptions) -> None:
    if options.protocol not in PROTOCOLS:
        raise InputError(f"Unknown protocol {options.protocol!r}. {suggest(options.protocol, PROTOCOLS)}")
    for name in ("block_size", "heal_tokens"):
        value = getattr(options, name)
        if value is not None and value < 2:
            raise InputError(f"{name} is {value}; give at least 2, or leave it out.")


def _measure(state: Run) -> dict[str, Any]:
    """All steps, each done once: teacher, the recipe, then its controls."""
    options, job, recipe = state.options, state.job, state.recipe
    teacher = job.step("teacher", lambda: _teacher(state))
    unhealed = job.step("unhealed", lambda: _unhealed(state))
    stages = run_stages(state, state.plan, "stages")
    controls: dict[str, Any] = {"compressed_unhealed": unhealed}
    if "dense" in options.controls:
        controls["dense_finetuned"] = job.step("dense_finetuned", lambda: _dense_finetuned(state))
    if "plain" in options.controls and _searches(state):
        plain = run_stages(state, planning.plan_of_shapes(state.teacher, recipe.without_permutations()), "plain")
        controls["plain_kronecker"] = {"held_parameters": plain[-1]["held_parameters"], "stages": plain}
    return {"teacher": teacher, "stages": stages, "controls": controls}


def _searches(state: Run) -> bool:
    """Whether there are permutations to leave out. A planned recipe is fitted to data and has no such control."""
    if state.recipe.auto is not None:
        return False
    plain = planning.plan_of_shapes(state.teacher, state.recipe.without_permutations())
    return [row.spec for row in plain.rows] != [row.spec for row in state.plan.rows]


def _blocks(options: RunOptions, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any) -> TokenBlocks:
    context = getattr(teacher.config, "max_position_embeddings", 1024)
    size = min(options.block_size or 1024, context)
    budget = sum(stage.heal.tokens or 0 for stage in recipe.stages if stage.heal)
    return pack(documents(options.train_text, **asdict(options.reading)), tokenizer, size, max_tokens=budget or None)


def _facts(
    options: RunOptions, recipe: Recipe, blocks: TokenBlocks
) -> tuple[dict[str, Any], dict[str, str | Path | None]]:
    """What must be equal when a run is resumed: values, and files by their whole content."""
    free = ("device", "command", "name", "cache", "micro_batch", "dtype")  # dtype: of the last step alone
    fields = {key: value for key, value in asdict(options).items() if key not in free}
    fields["controls"] = sorted(options.controls)
    facts = {**fields, "recipe": recipe.model_dump(mode="json"), "train_sha256": blocks.sha256}
    read: dict[str, str | Path | None] = {"model_content": on_disk(options.model), "eval_content": options.eval_text}
    return facts, read | {f"calibration_content_{i}": text for i, text in enumerate(options.calibration)}


def _teacher(state: Run) -> dict[str, Any]:
    found = state.perplexity(state.teacher, "the teacher")
    return {
        **cost(state.teacher).to_dict(),
        "perplexity": found["perplexity"],
        "evaluation": found,
        "sample": state.text(state.teacher),
    }


def _unhealed(state: Run) -> dict[str, Any]:
    def make() -> tuple[PreTrainedModel, None]:
        return state.fit(state.teacher, state.plan, in_place=False).model, None

    student, _ = made_once(make, state.place / "unhealed", state.tokenizer, state.options.device)
    found = state.perplexity(student, "the compressed model before healing")
    return {"perplexity": found["perplexity"], "sample": state.text(student), **cost(student).to_dict()}


def _dense_finetuned(state: Run) -> dict[str, Any]:
    """The control every distillation result needs: the uncompressed model, same data, same tokens, CE only."""
    model = load_model(state.options.model, device=state.options.device)
    losses: list[dict[str, float]] = []
    tokens, seconds, recipe = 0, 0.0, None
    for stage in state.recipe.stages:
        if stage.heal is None:
            continue
        recipe = stage.heal.model_copy(update={"objective": stage.heal.objective.from_labels_alone()})
        healed = _heal(state, model, recipe, f"fine-tune the dense model, stage {stage.name}", None, tokens)
        losses += [{**entry, "tokens": entry["tokens"] + tokens} for entry in healed.losses]
        tokens, seconds = tokens + healed.tokens, seconds + healed.seconds_in_all
    found = state.perplexity(model, "the fine-tuned dense model")
    return {
        "perplexity": found["perplexity"],
        "tokens": tokens,
        "learning_rate": recipe.learning_rate if recipe else None,
        "seconds": seconds,
        "held_parameters": cost(model).held_parameters,
        "losses": losses,
    }


def run_stages(state: Run, plan: Plan, track: str) -> list[dict[str, Any]]:
    """Carry out `plan` stage by stage, healing after each; then its model stands in `<place>/<track>/<stage>`."""
    done: list[dict[str, Any]] = []
    previous: str | Path = state.options.model
    for stage in plan.stages:
        place = state.place / track / stage.name
        source, read = previous, sum(entry["tokens"] for entry in done)
        last = stage is plan.stages[-1]
        work = partial(_stage, state, stage, source, place, f"{track}/{stage.name}", read, last)
        done.append(state.job.step(f"{track}/{stage.name}", work, [place]))
        if stage.heal:  # only now is the stage written down
            state.job.release(f"{track}/{stage.name}, fitted", _fitted(place), _trainer_of(place))
        previous = place
    return done


def _stage(
    state: Run, stage: planning.PlanStage, source: str | Path, place: Path, name: str, read: int, last: bool
) -> dict[str, Any]:
    """Compress, heal, measure and save one stage; the last one, which is fitted no more, has its gathers absorbed.

    `read`: tokens the stages before it were healed on.
    """

    def make() -> tuple[PreTrainedModel, dict[str, Any]]:
        started = time.monotonic()
        fitted = state.compressed(source, stage, last=last)
        rows = [row.to_dict() for row in fitted.stages[0].rows]
        gathers = {"gathers": fitted.gathers} if last else {}
        return fitted.model, {"rows": rows, **gathers, "decompose_seconds": round(time.monotonic() - started, 2)}

    fitted = _fitted(place)
    if stage.heal:  # what a resumed healing starts from must be this very model, on whatever machine it goes on

        def save() -> dict[str, Any]:
            student, facts = make()
            write_model(student, state.tokenizer, fitted)
            return facts

        facts = state.job.step(f"{name}, fitted", lambda: processes.on_main(save), [fitted])
        student = load_model(fitted, device=state.options.device)
    else:
        student, facts = made_once(make, fitted, state.tokenizer, state.options.device)
    before = _stage_perplexity(state, student, f"{stage.name}, before healing")
    entry: dict[str, Any] = {
        "name": stage.name,
        **({"layers": stage.layers.to_dict()} if stage.layers else {}),
        **{key: value for key, value in facts.items() if key != "decompose_seconds"},
        "held_parameters": cost(student).held_parameters,
        "before_healing": before,
        "after_healing": before,
        "decompose_seconds": facts["decompose_seconds"],
        "tokens": 0,
        "seconds": 0.0,
        "losses": [],
    }
    if stage.heal:
        healed = _heal(state, student, stage.heal, f"heal {stage.name}", _trainer_of(place), read)
        entry.update(
            after_healing=_stage_perplexity(state, student, f"{stage.name}, healed"),
            learning_rate=stage.heal.learning_rate,
            tokens=healed.tokens,
            seconds=healed.seconds_in_all,
            losses=healed.losses,
        )
    entry["sample"] = state.text(student)
    processes.on_main(lambda: write_model(student, state.tokenizer, place))
    return entry


def _stage_perplexity(state: Run, student: PreTrainedModel, what: str) -> float | None:
    return state.perplexity(student, what)["perplexity"] if state.measures_stages else None


def _fitted(place: Path) -> Path:
    """Where the model of the stage in `place` stands before it is healed."""
    return place.with_name(place.name + ".fitted")


def _trainer_of(place: Path) -> Path:
    """Where the healing of the stage in `place` keeps the checkpoints it can resume from."""
    return place.with_name(place.name + ".trainer")


def _heal(
    state: Run, student: PreTrainedModel, recipe: HealConfig, what: str, trainer_dir: Path | None, read: int
) -> HealResult:
    progress = Progress.of(state.report).step(what)
    tokens = recipe.batch_size * len(state.blocks[0]["input_ids"])  # of one step

    def told(step: int, total: int, logs: dict[str, float] | None = None) -> None:
        progress.update(step, total, loss=(logs or {}).get("loss"), tokens=step * tokens)

    options = state.options
    own = {"seed": options.seed, "start_tokens": read, "micro_batch": options.micro_batch}
    try:
        return heal(
            student,
            state.teacher,
            state.blocks,
            config=recipe.model_copy(update=own),
            device=student.device,
            output_dir=trainer_dir,
            resume=state.job.resumed and trainer_dir is not None,
            progress=told,
        )
    except DivergedError as error:
        raise DivergedError(
            f"{what}: {error.finding} A recipe's learning rate belongs to the run: set learning_rate in the stages' "
            "`heal` entries of a copy of the recipe, and start again with --overwrite.",
            since=error.since,
        ) from error


def _finish(
    state: Run, student: PreTrainedModel, measured: dict[str, Any], beside: dict[str, Any] | None
) -> dict[str, Any]:
    """Save the student as it will be loaded, measure exactly that, and describe it."""
    options = state.options
    dtype = options.dtype or dtype_of(options.model)
    result = state.job.result
    processes.on_main(lambda: write_model(student, state.tokenizer, result, dtype))
    final = state.perplexity(load_model(result, device=options.device), "the saved checkpoint")
    teacher, stages, controls = measured["teacher"], measured["stages"], measured["controls"]
    return results.document(
        "run",
        options.seed,
        command=options.command,
        model=options.name or options.model,
        recipe={"name": state.recipe.name, "description": state.recipe.description},
        complete=True,
        protocol=teacher["evaluation"]["protocol"],
        data={
            "calibration": state.calibration.to_dict() if state.calibration else None,
            "heal": {
                "source": Path(options.train_text).name,
                "tokens": state.blocks.tokens,
                "sha256": state.blocks.sha256,
                "read": state.blocks.read,
            },
            "eval": {
                "source": Path(options.eval_text).name,
                **{key: teacher["evaluation"][key] for key in ("tokens", "words", "bytes", "read")},
            },
        },
        teacher={key: value for key, value in teacher.items() if key not in ("sample", "evaluation")},
        **cost(student).to_dict(),
        gathers=stages[-1]["gathers"],
        perplexity=final["perplexity"],
        saved_dtype=str(dtype).removeprefix("torch."),
        stages=[_without_sample(stage) for stage in stages],
        controls={name: _without_sample(entry) for name, entry in controls.items()},
        budget=state.plan.budget,
        **({"beside": _without_sample(beside)} if beside else {}),
        samples=[*_samples(options, teacher, stages, controls), *second_samples(options, beside)],
        total_seconds=round(state.job.seconds(), 1),
    )


def _without_sample(entry: dict[str, Any]) -> dict[str, Any]:
    clean = {key: value for key, value in entry.items() if key not in ("sample", "gathers")}
    if "stages" in clean:
        clean["stages"] = [_without_sample(stage) for stage in clean["stages"]]
    return clean


def _samples(
    options: RunOptions, teacher: dict[str, Any], stages: list[dict[str, Any]], controls: dict[str, Any]
) -> list[dict[str, str]]:
    if options.prompt is None:
        return []
    texts = {
        "teacher": teacher["sample"],
        "compressed, before healing": controls["compressed_unhealed"]["sample"],
        "healed": stages[-1]["sample"],
    }
    if "plain_kronecker" in controls:
        texts["plain Kronecker, healed"] = controls["plain_kronecker"]["stages"][-1]["sample"]
    return [{"who": who, "prompt": options.prompt, "text": text} for who, text in texts.items()]


def check_controls(names: Sequence[str]) -> tuple[Control, ...]:
    """The names as controls. Raises InputError for an unknown one."""
    unknown = sorted(set(names) - {"dense", "plain"})
    if unknown:
        raise InputError(f"Unknown control {', '.join(unknown)}. Allowed: dense, plain.")
    return tuple(name for name in ("dense", "plain") if name in names)
