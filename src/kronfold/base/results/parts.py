"""The parts that result documents are made of.

A field without a default is in every document of its kind, those of 0.2 and 0.3 too; one with a default was added later
or is only there at times. Keys that are not named here are kept as they are: keys are only ever added. Types are meant
strictly, since JSON has numbers, strings and booleans of its own; a `float` takes whole numbers too.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


class Part(BaseModel):
    """A part of a document: the named keys are checked, any other is let through."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Size(Part):
    """What a model costs (`models.cost.Cost`): numbers held, multiply-accumulates per token, bytes."""

    held_parameters: Count
    index_bytes: Count = 0
    macs_per_token: Count
    bytes_fp16: Count
    bytes_fp32: Count | None = None


class Gathers(Part):
    """Gathers absorbed by neighbouring layers, the names of those that remain, and their bytes."""

    absorbed: Count
    remaining: list[str]
    bytes: Count


class Layers(Part):
    """The blocks that are kept (0-based) of `depth`."""

    kept: Annotated[list[Count], Field(min_length=1)]
    depth: Annotated[int, Field(ge=1)]
    strategy: str | None = None


class Named(Part):
    """A recipe."""

    name: str
    description: str | None = None


class MatrixRow(Part):
    """One replaced matrix: its spec and sizes; errors are relative, Frobenius, unitless."""

    name: str
    structure: str
    spec: dict[str, Any]
    label: str | None = None
    held_parameters: Count
    teacher_parameters: Count
    relative_error: float | None = None
    relative_error_plain: float | None = None
    predicted_loss: float | None = None
    why: str | None = None


class LossRecord(Part):
    """Losses (nats per token) after a number of training tokens."""

    tokens: Count
    loss: float | None = None
    kl: float | None = None
    ce: float | None = None


class Stage(Part):
    """One stage of a run. Perplexities per token; `tokens` and `seconds` are those of healing."""

    name: str
    rows: list[MatrixRow] = Field(default_factory=list)
    layers: Layers | None = None
    held_parameters: Count | None = None
    before_healing: float | None = None
    after_healing: float | None = None
    learning_rate: Positive | None = None
    tokens: Count | None = None
    seconds: Seconds | None = None
    decompose_seconds: Seconds | None = None
    losses: list[LossRecord] = Field(default_factory=list)


class Source(Part):
    """A text that was read: its file's name, what it held, the SHA-256 of its tokens."""

    source: str | None = None
    tokens: Count | None = None
    sha256: str | None = None


class Controlled(Part):
    """A model that a run compares with."""

    held_parameters: Count | None = None
    perplexity: float | None = None
    learning_rate: Positive | None = None
    tokens: Count | None = None
    losses: list[LossRecord] = Field(default_factory=list)


class PlainKronecker(Part):
    """The control without permutations: the recipe's stages once more."""

    stages: list[Stage] = Field(default_factory=list)


class RunControls(Part):
    dense_finetuned: Controlled | None = None
    compressed_unhealed: Controlled | None = None
    plain_kronecker: PlainKronecker | None = None


class Sample(Part):
    """What one model writes after `prompt`."""

    who: str
    prompt: str = ""
    text: str


class Beside(Part):
    """The second track of a run: another recipe at the same size, same tokens and seed. `stages` as in the run."""

    recipe: Named
    held_parameters: Count
    macs_per_token: Count | None = None
    bytes_fp16: Count | None = None
    stages: Annotated[list[Stage], Field(min_length=1)]
    checkpoint: str | None = None


class RunData(Part):
    heal: Source | None = None
    eval: Source | None = None


class Teacher(Part):
    """The model that everything is compared with."""

    held_parameters: Count | None = None
    macs_per_token: Count | None = None
    bytes_fp16: Count | None = None
    perplexity: float | None = None


class Document(Part):
    """The head of every document."""

    schema_: str = Field(alias="schema")
    schema_version: int
    created: str | None = None
    seed: int | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    machine: dict[str, Any] = Field(default_factory=dict)
    command: str | None = None


class HealStage(Stage):
    tokens: Count
    seconds: Seconds


class Measured(Part):
    """A perplexity per token, and what it was counted over; `nll` in nats."""

    perplexity: Positive
    protocol: dict[str, Any]
    tokens: Count
    words: Count
    bytes: Count
    nll: float
    perplexity_per_word: Positive
    perplexity_per_byte: Positive


class Lambada(Part):
    accuracy: Annotated[float, Field(ge=0, le=1)]
    perplexity: float
    passages: Count


class LambadaInFull(Lambada):
    accuracy_stderr: Annotated[float, Field(ge=0)]
    truncated: Count
    protocol: dict[str, Any]


class ComparedSize(Part):
    reached: bool
    note: str


class ComparedModel(Part):
    """A model of a comparison, measured on every text. Perplexities per token by name of the text."""

    held_parameters: Count
    macs_per_token: Count
    bytes_fp16: Count
    perplexities: dict[str, Positive]
    lambada: Lambada | None = None
    learning_rate: Positive | None = None
    heal_tokens: Count | None = None
    heal_seconds: Seconds | None = None


class ComparedRow(ComparedModel):
    recipe: str
    description: str = ""
    size: ComparedSize
    perplexity_before: Positive
    perplexity_after: Positive
    excess_perplexity: float
    decompose_seconds: Seconds
    heal_seconds: Seconds
    heal_tokens: Count
    tokens_per_second: Positive
    teacher_tokens_per_second: Positive


class CompareControls(Part):
    dense_finetuned: ComparedModel


class Target(Part):
    held_parameters: Count
    ratio: Positive


class CompareData(Part):
    heal: Source
    eval: dict[str, str]
    lambada: str | None = None


class PlannedRow(MatrixRow):
    stage: str | None = None


class PlanBudget(Part):
    """What a planned recipe was asked for, and what the planner says about its choice (nats per token)."""

    amount: float
    unit: str
    met_by: float
    floor: float
    predicted_loss: float
    optimality_gap: float
    left_dense: list[str] = Field(default_factory=list)


class Training(Part):
    """What healing takes: bytes per device by purpose, tokens and steps."""

    processes: Count
    precision: str
    memory: dict[str, Count]
    memory_per_device: Count
    tokens: Count
    steps: Count


class PlanTotals(Part):
    recipe: str
    held_parameters: Count
    macs_per_token: Count
    bytes_fp16: Count
    predicted_loss: float | None = None
    layers: Layers | None = None


class DiffRow(Part):
    name: str
    a_label: str
    b_label: str
    a_held_parameters: Count
    b_held_parameters: Count


class Counts(Part):
    documents: Count
    words: Count
    characters: Count | None = None


class Filter(Part):
    """What one filter of a cleaning let through."""

    filter: str
    documents_in: Count
    documents_out: Count
    words_in: Count
    words_out: Count
    lines_dropped: dict[str, Count] | None = None
    documents_changed: Count | None = None


class Rates(Part):
    device: str
    dtype: str
    threads: Count | None = None
    rates: dict[str, float]
    built_in: dict[str, float]


class SeedResult(Part):
    """One seed of a fine-tuning: scores on the dev set of its best epoch."""

    seed: int
    best_epoch: int
    best: dict[str, float | None]
    seconds: Seconds
