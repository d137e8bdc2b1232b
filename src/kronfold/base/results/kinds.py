"""What each kind of result document holds: one class per kind, checked on writing and on reading."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from kronfold.base.results.parts import (
    Beside,
    CompareControls,
    CompareData,
    ComparedModel,
    ComparedRow,
    Count,
    Counts,
    DiffRow,
    Document,
    Filter,
    Gathers,
    HealStage,
    LambadaInFull,
    Layers,
    Measured,
    Named,
    PlanBudget,
    PlannedRow,
    PlanTotals,
    Positive,
    Rates,
    RunControls,
    RunData,
    Sample,
    Seconds,
    SeedResult,
    Size,
    Stage,
    Target,
    Teacher,
    Training,
)


class Run(Document):
    """`run`, `demo`."""

    model: str
    recipe: Named
    complete: bool = True
    protocol: dict[str, Any]
    data: RunData | None = None
    teacher: Teacher
    held_parameters: Count
    index_bytes: Count = 0
    macs_per_token: Count | None = None
    bytes_fp16: Count | None = None
    gathers: Gathers | None = None
    perplexity: float | None = None
    stages: list[Stage]
    controls: RunControls = RunControls()
    beside: Beside | None = None
    samples: list[Sample] = Field(default_factory=list)
    total_seconds: Seconds | None = None


class Compress(Size, Document):
    """`compress`."""

    model: str
    recipe: Named
    teacher: Size
    layers: Layers | None = None
    gathers: Gathers | None = None
    stages: list[Stage]
    budget: dict[str, Any] | None = None
    plan_seconds: Seconds
    decompose_seconds: Seconds


class Heal(Size, Document):
    """`heal`."""

    model: str
    objective: dict[str, Any]
    protocol: Any = None
    teacher: Teacher
    stages: Annotated[list[HealStage], Field(min_length=1)]


class Eval(Measured, Document):
    """`eval` on one text."""

    model: str
    held_parameters: Count


class EvalSuite(Document):
    """`eval --suite`."""

    model: str
    suite: str
    held_parameters: Count
    texts: dict[str, Measured]
    lambada: LambadaInFull


class EvalTasks(Document):
    """`eval --tasks`: lm-eval's scores."""

    model: str
    held_parameters: Count
    lm_eval: str
    results: dict[str, dict[str, Any]]


class Compare(Document):
    """`compare`."""

    model: str
    complete: bool
    target: Target | None = None
    objective: str
    protocol: dict[str, Any]
    data: CompareData
    teacher: ComparedModel
    controls: CompareControls
    rows: Annotated[list[ComparedRow], Field(min_length=1)]
    total_seconds: Seconds

    @model_validator(mode="after")
    def _one_set_of_texts(self) -> Compare:
        texts, lambada = list(self.teacher.perplexities), self.teacher.lambada is not None
        if not texts:
            raise ValueError("teacher.perplexities: names no text")
        others = {"controls.dense_finetuned": self.controls.dense_finetuned}
        others |= {f"rows.{number}": row for number, row in enumerate(self.rows)}
        for where, model in others.items():
            if lacking := [name for name in texts if name not in model.perplexities]:
                raise ValueError(f"{where}.perplexities: lacks the teacher's texts {', '.join(lacking)}")
            if lambada and model.lambada is None:
                raise ValueError(f"{where}.lambada: is missing, and the teacher has it")
        return self


class Plan(Document):
    """`plan`; the file that `--plan` takes."""

    recipe: Any = None
    held_parameters: Count
    teacher_parameters: Count
    macs_per_token: Count | None = None
    teacher_macs_per_token: Count | None = None
    bytes_fp16: Count | None = None
    bytes_fp32: Count | None = None
    index_bytes: Count = 0
    rows: list[PlannedRow]
    heal: dict[str, Any] = Field(default_factory=dict)
    layers: Layers | None = None
    budget: PlanBudget | None = None
    gathers: Gathers | None = None
    training: Training | None = None

    @model_validator(mode="after")
    def _planned_rows_have_a_price(self) -> Plan:
        for number, row in enumerate(self.rows):
            if self.budget and row.predicted_loss is None:
                raise ValueError(f"rows.{number}.predicted_loss: is missing, and the plan was made for a budget")
        return self


class PlanDiff(Document):
    """`plan --diff`."""

    a: PlanTotals
    b: PlanTotals
    rows: list[DiffRow]
    equal_rows: Count


class Inspect(Size, Document):
    """`inspect`."""

    model: str
    model_type: str
    dtype: str
    gathers: Gathers
    modules: dict[str, dict[str, Any]]


class Validate(Document):
    """`validate`."""

    recipe: str
    stages: list[str]
    held_parameters: Count | None = None


class Teach(Document):
    """`teach`: what a teacher said, stored."""

    tokens: Count
    blocks: Count
    bytes_per_token: Count
    bytes: Count


class Clean(Document):
    """`data clean`: the manifest; or, with Slurm, what was submitted."""

    submitted: bool = False
    partial: str | None = None
    input: Counts | None = None
    output: Counts | None = None
    filters: list[Filter] = Field(default_factory=list)
    seconds: Seconds | None = None

    @model_validator(mode="after")
    def _done_or_submitted(self) -> Clean:
        needed = ("partial",) if self.submitted else ("input", "output", "seconds")
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"{key}: is missing")
        return self


class SampleOfText(Document):
    """`data sample`: the manifest."""

    input: Counts
    output: Counts
    share: dict[str, float]


class Finetune(Size, Document):
    """`finetune`: one entry per seed, then mean and deviation of every metric."""

    model: str
    task: str
    seeds: Annotated[list[SeedResult], Field(min_length=1)]
    summary: dict[str, dict[str, Any]]
    saved_seed: int
    teacher: dict[str, Any] | None = None
    seconds: Seconds


class Pretrain(Document):
    """`pretrain`."""

    perplexity: Positive
    config: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]
    held_parameters: Count
    evaluation: Measured


class Tune(Document):
    """`tune`: seconds per unit of work on this machine."""

    path: str | None = None
    rows: Annotated[list[Rates], Field(min_length=1)]


class Export(Size, Document):
    """`export`."""

    model: str
    source: Size


class ImportTQ(Size, Document):
    """`import-tq`."""

    source: dict[str, Any]
    head: str
    structured: list[str]
    tokenizer: bool


KINDS: dict[str, type[Document]] = {
    "run": Run, "compress": Compress, "heal": Heal, "eval": Eval, "eval-suite": EvalSuite, "eval-tasks": EvalTasks,
    "compare": Compare, "plan": Plan, "plan-diff": PlanDiff, "inspect": Inspect, "validate": Validate, "teach": Teach,
    "clean": Clean, "sample": SampleOfText, "finetune": Finetune, "pretrain": Pretrain, "tune": Tune,
    "export": Export, "import-tq": ImportTQ,
}  # fmt: skip
