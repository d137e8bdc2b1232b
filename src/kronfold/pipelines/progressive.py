"""The main job: stage by stage compress and heal, with the controls that make the numbers mean something.

Everything happens in a work directory beside the output, `<output>.partial`; it takes the output's name only when all
is done. A killed run leaves the old output as it was, and `resume=True` goes on from the last finished step.

Under torchrun every process goes through the same steps: healing and measuring are shared, the rest (planning,
calibrating, decomposing, every file) is done by the main process while the others wait.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from kronfold.base import processes, results
from kronfold.base.errors import DivergedError, InputError, suggest
from kronfold.base.files import check_output, explain_write_errors, sha256_of_source, swap_directory, write_json
from kronfold.base.progress import Progress
from kronfold.data.packing import TokenBlocks, pack
from kronfold.data.sources import documents
from kronfold.evaluate.perplexity import PROTOCOLS
from kronfold.evaluate.texts import open_text
from kronfold.export.checkpoint import write_model
from kronfold.export.quantizer import attach
from kronfold.models.cost import cost
from kronfold.models.load import load_model, load_tokenizer
from kronfold.models.surgery import read_specs
from kronfold.options.healing import HealConfig
from kronfold.pipelines.auto import calibrate_on, plan_auto, settings_of
from kronfold.pipelines.beside import SCRATCH, second_recipe, second_samples, second_track
from kronfold.pipelines.calibration import Calibration
from kronfold.pipelines.gathers import absorb_gathers
from kronfold.pipelines.objectives import check_objectives
from kronfold.pipelines.run_state import Control, Report, Run, RunOptions
from kronfold.pipelines.stage import keep_layers
from kronfold.pipelines.steps import StepBook
from kronfold.pipelines.together import made_once
from kronfold.planner import planning
from kronfold.planner.plan import Plan, PlanRow
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
    output = processes.on_main(lambda: check_output(output, overwrite))
    _check_options(options)
    started = time.monotonic()
    recipe = load_recipe(options.recipe).with_heal_tokens(options.heal_tokens)
    check_objectives(recipe)
    second = second_recipe(options, recipe)
    for stage in [*recipe.stages, *(second.stages if second else [])]:
        if stage.heal:
            processes.split_batch(stage.heal.batch_size, options.micro_batch)
    teacher = load_model(options.model, device=options.device)
    tokenizer = load_tokenizer(options.model)
    given = None if recipe.auto else planning.plan(teacher, recipe)
    blocks = processes.on_main(lambda: _blocks(options, recipe, teacher, tokenizer))
    check_teacher_outputs(teacher, blocks[0]["input_ids"])
    found = processes.on_main(lambda: _calibrate(options, recipe, teacher, given, tokenizer, report), share=False)

    def plan_for_budget() -> Plan:
        assert found is not None  # with auto the training text is read where no other is named
        return plan_auto(teacher, found, recipe, options.budget, progress=report)

    plan = given or processes.on_main(plan_for_budget)
    next(open_text(options.eval_text, options.reading))  # an unreadable evaluation text must not surface after hours
    work = output.with_name(output.name + ".partial")
    fingerprint = processes.on_main(lambda: _fingerprint(options, recipe, blocks))
    book = StepBook.open(work, fingerprint, resume, discard=overwrite)
    book.add_seconds_from(started)
    processes.on_main(lambda: plan.save(work / "plan.json"), share=False)
    state = Run(options, recipe, work, book, teacher, tokenizer, blocks, report, plan, found)
    measured = _measure(state)
    beside = second_track(state, second, _heal) if second else None
    student = load_model(work / "stages" / recipe.stages[-1].name, device=options.device)
    document = _finish(state, student, measured, beside)

    def hand_over() -> None:
        finish(document, work)
        with explain_write_errors(output):
            swap_directory(work, output)
        for leftover in ("stages", "plain", SCRATCH, "steps.json"):
            path = output / leftover
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    processes.on_main(hand_over)
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
    options, book, recipe = state.options, state.book, state.recipe
    teacher = book.step("teacher", lambda: _teacher(state))
    unhealed = book.step("unhealed", lambda: _unhealed(state))
    stages = run_stages(state, state.plan, "stages")
    controls: dict[str, Any] = {"compressed_unhealed": unhealed}
    if "dense" in options.controls:
        controls["dense_finetuned"] = book.step("dense_finetuned", lambda: _dense_finetuned(state))
    if "plain" in options.controls and _searches(state):
        plain = run_stages(state, planning.plan(state.teacher, recipe.without_permutations()), "plain")
        controls["plain_kronecker"] = {"held_parameters": plain[-1]["held_parameters"], "stages": plain}
    return {"teacher": teacher, "stages": stages, "controls": controls}


def _searches(state: Run) -> bool:
    """Whether there are permutations to leave out. A planned recipe is fitted to data and has no such control."""
    if state.recipe.auto is not None:
        return False
    plain = planning.plan(state.teacher, state.recipe.without_permutations())
    return [row.spec for row in plain.rows] != [row.spec for row in state.plan.rows]


def _blocks(options: RunOptions, recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any) -> TokenBlocks:
    context = getattr(teacher.config, "max_position_embeddings", 1024)
    size = min(options.block_size or 1024, context)
    budget = sum(stage.heal.tokens or 0 for stage in recipe.stages if stage.heal)
    return pack(documents(options.train_text, **asdict(options.reading)), tokenizer, size, max_tokens=budget or None)


def _fingerprint(options: RunOptions, recipe: Recipe, blocks: TokenBlocks) -> dict[str, Any]:
    free = ("device", "command", "name", "cache", "micro_batch", "dtype")  # dtype: of the last step alone
    fields = {key: value for key, value in asdict(options).items() if key not in free}
    fields["controls"] = sorted(options.controls)
    fields["model_sha256"] = sha256_of_source(options.model)
    fields["eval_sha256"] = sha256_of_source(options.eval_text)
    return {**fields, "recipe": recipe.model_dump(mode="json"), "train_sha256": blocks.sha256}


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
        student = keep_layers(state.teacher, state.plan.layers)
        student = copy.deepcopy(student) if student is state.teacher else student
        for stage in state.plan.stages:
            state.fit(student, stage.rows)
        return student, None

    student, _ = made_once(make, state.work / "unhealed", state.tokenizer, state.options.device)
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
    """Carry out `plan` stage by stage, healing after each; then its model stands in `<work>/<track>/<stage>`."""
    done: list[dict[str, Any]] = []
    previous: str | Path = state.options.model
    for stage in plan.stages:
        place = state.work / track / stage.name
        source, read = previous, sum(entry["tokens"] for entry in done)
        last = stage is plan.stages[-1]
        done.append(
            state.book.step(f"{track}/{stage.name}", lambda: _stage(state, stage, source, place, read, last))  # noqa: B023
        )
        if processes.is_main():
            shutil.rmtree(_trainer_of(place), ignore_errors=True)  # only now is the stage written down
        previous = place
    return done


def _stage(
    state: Run, stage: planning.PlanStage, source: str | Path, place: Path, read: int, last: bool
) -> dict[str, Any]:
    """Compress, heal, measure and save one stage; the last one, which is fitted no more, has its gathers absorbed.

    `read`: tokens the stages before it were healed on.
    """
    started = time.monotonic()

    def make() -> tuple[PreTrainedModel, tuple[list[PlanRow], dict[str, Any]]]:
        student, rows = state.compressed(source, stage)
        return student, (rows, {"gathers": absorb_gathers(student)} if last else {})

    fitted = place.with_name(place.name + ".fitted")
    student, (rows, gathers) = made_once(make, fitted, state.tokenizer, state.options.device)
    decomposed = time.monotonic() - started
    before = _stage_perplexity(state, student, f"{stage.name}, before healing")
    entry: dict[str, Any] = {
        "name": stage.name,
        **({"layers": stage.layers.to_dict()} if stage.layers else {}),
        "rows": [row.to_dict() for row in rows],
        **gathers,
        "held_parameters": cost(student).held_parameters,
        "before_healing": before,
        "after_healing": before,
        "decompose_seconds": round(decomposed, 2),
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
            resume=state.book.resumed and trainer_dir is not None,
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
    """Save the student as it will be loaded, measure exactly that, and write results.json."""
    options = state.options
    dtype = options.dtype or load_model(options.model, dtype="auto").dtype
    if read_specs(student):
        attach(student)
    processes.on_main(lambda: write_model(student, state.tokenizer, state.work, dtype))
    final = state.perplexity(load_model(state.work, device=options.device), "the saved checkpoint")
    teacher, stages, controls = measured["teacher"], measured["stages"], measured["controls"]
    document = results.document(
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
        total_seconds=round(state.book.seconds(), 1),
    )
    processes.on_main(lambda: write_json(state.work / "results.json", document))
    return document


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
