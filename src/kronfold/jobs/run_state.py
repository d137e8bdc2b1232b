"""What a run is asked for, and what it carries from step to step."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel

from kronfold.base import processes
from kronfold.base.job import Job
from kronfold.base.progress import Report
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import TokenBlocks
from kronfold.evaluate.perplexity import perplexity
from kronfold.evaluate.samples import sample
from kronfold.evaluate.texts import open_text
from kronfold.export.checkpoint import write_model
from kronfold.export.dense import to_dense
from kronfold.fit.calibration import Calibration
from kronfold.fit.fit import Fitted, calibrate_on, fit, plan_auto, settings_of
from kronfold.models.cost import cost
from kronfold.models.load import load_model
from kronfold.planner.budget import Budget
from kronfold.planner.plan import Plan, PlanStage
from kronfold.planner.recipe import Recipe

Control = Literal["dense", "plain"]


@dataclass(frozen=True)
class RunOptions:
    """What one run is made of; equal options and inputs give the same run, and only those may be resumed.

    Attributes:
        model: the teacher. recipe: name or YAML file. train_text, eval_text: text sources; they must not overlap.
        heal_tokens: healing budget over all stages, None for the recipe's own.
        calibration: texts to fit to; the recipe `auto` takes the training text when there are none, any other recipe
            is then fitted to the weights alone. budget: for `auto`. cache: directory for statistics, None for none.
        block_size: training window in tokens, None for the model's context (at most 1024). micro_batch: the most blocks
            a process takes through the models at once, None for its share of the step.
        reading: how all texts are read.
        protocol: of every perplexity. controls: "dense" fine-tunes the teacher on the same data, "plain" repeats the
            recipe without permutations; equal tokens and seed. beside: a recipe that is planned for the size which
            `recipe` reaches, healed on the same tokens, measured alike; None for none. beside_rate: its
            peak learning rate, None for the recipe's own.
        prompt: start of the text samples, None for no samples.
        dtype: of the saved weights, None for the teacher's own.
    """

    model: str
    recipe: str
    train_text: str
    eval_text: str
    heal_tokens: int | None = None
    calibration: Sequence[str] = ()
    budget: Budget | None = None
    cache: str | None = None
    block_size: int | None = None
    micro_batch: int | None = None
    reading: Reading = Reading()  # noqa: RUF009 - frozen
    protocol: str = "sliding"
    controls: Sequence[Control] = ("dense", "plain")
    beside: str | None = None
    beside_rate: float | None = None
    prompt: str | None = None
    sample_tokens: int = 48
    seed: int = 0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    name: str | None = None
    command: str = ""


@dataclass
class Run:
    """One run in progress: the options, what was loaded, and the job with its finished steps.

    Attributes:
        place: directory of the models between the stages.
        measures_stages: perplexity is measured before and after the healing of every stage.
    """

    options: RunOptions
    recipe: Recipe
    place: Path
    job: Job
    teacher: PreTrainedModel
    tokenizer: Any
    blocks: TokenBlocks
    report: Report
    plan: Plan
    calibration: Calibration | None
    measures_stages: bool = True

    def fit(
        self, student: PreTrainedModel, plan: Plan | PlanStage, *, last: bool = True, in_place: bool = True
    ) -> Fitted:
        """`fit` as the recipe says, to data where the run has calibration text."""
        settings = settings_of(self.recipe)
        return fit(
            student, plan, self.calibration, sequential=settings.sequential, adapt=settings.adapt,
            seed=self.options.seed, last=last, in_place=in_place, progress=self.report,
        )  # fmt: skip

    def compressed(self, source: str | Path, stage: PlanStage, *, last: bool) -> Fitted:
        """The model of a stage, made from the one in `source`. `last`: no stage follows."""
        student = load_model(source, device=self.options.device)
        if stage.reach is None:
            return self.fit(student, stage, last=last)
        auto, options = self.recipe.auto, self.options
        assert auto is not None  # only recipes that plan say how far a stage reaches
        calibration = self.calibration
        if str(source) != options.model or calibration is None:  # the first stage meets the model that was calibrated
            student = to_dense(student)
            calibration = calibrate_on(
                student, self.tokenizer, options.calibration or [options.train_text], auto,
                reading=options.reading, seed=options.seed, cache=options.cache, progress=self.report,
            )  # fmt: skip
        target = options.budget or Budget("params", ratio=auto.target_ratio)
        budget = target.on_the_way(cost(self.teacher), stage.reach)
        plan = plan_auto(student, calibration, self.recipe, budget, progress=self.report)
        return replace(self, calibration=calibration).fit(student, replace(stage, rows=plan.rows), last=last)

    def perplexity(self, model: PreTrainedModel, what: str) -> dict[str, Any]:
        def progress(done: int, total: int) -> None:
            self.report(f"evaluate {what}", done, total)

        text = open_text(self.options.eval_text, self.options.reading)
        return perplexity(model, self.tokenizer, text, self.options.protocol, progress=progress).to_dict()

    def text(self, model: PreTrainedModel) -> str | None:
        if self.options.prompt is None:
            return None
        return sample(model, self.tokenizer, self.options.prompt, self.options.sample_tokens, self.options.seed)


# What pipelines of several processes share: a model made once.


T = TypeVar("T")


def made_once(
    make: Callable[[], tuple[PreTrainedModel, T]], place: Path, tokenizer: Any, device: str
) -> tuple[PreTrainedModel, T]:
    """(model, facts) of `make` on every process; only the main one makes them, the others read the model from `place`.

    A permutation search on all at once would share the same cores, and machines of different kinds may round
    differently and so choose different permutations; a file is equal for all. `place`, which all must see, is gone
    afterwards.
    """
    if processes.count() == 1:
        return make()
    own: list[PreTrainedModel] = []

    def work() -> T:
        model, facts = make()
        write_model(model, tokenizer, place)
        own.append(model)
        return facts

    facts = processes.on_main(work)
    model = own[0] if own else load_model(place, device=device)
    processes.barrier()  # all have read it
    processes.on_main(lambda: shutil.rmtree(place))
    return model, facts
