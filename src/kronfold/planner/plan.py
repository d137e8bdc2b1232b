"""The plan: a printable, saved, editable object that says what will happen before anything does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kronfold.base.errors import KronfoldError, RecipeError, suggest
from kronfold.base.files import write_json
from kronfold.base.results import SCHEMA_VERSION, document
from kronfold.models.cost import Cost
from kronfold.options import read
from kronfold.options.healing import HealConfig
from kronfold.structures.registry import as_dict, read_spec, structure_of

STORAGES = ("model",)


@dataclass
class PlanRow:
    """What becomes of one weight.

    Attributes:
        spec: typed; it knows its structure, its exact number of held parameters and its label.
        teacher_parameters: of the dense weight. Biases are counted neither here nor there.
        head: for embeddings: whether the LM head goes on reading it (tied) or keeps a dense copy (untied).
        init: what the solver starts from, None for its own way.
        storage: how the numbers are kept; `model`: in the dtype of the model.
        relative_error: with permutations, when the spec asks for them; `relative_error_plain` without. Both are filled
            once the weights have been fitted.
        predicted_loss: nats per token, and `why`; from the planner.
    """

    name: str
    spec: Any
    teacher_parameters: int
    head: Literal["tied", "untied"] | None = None
    init: str | None = None
    storage: str = "model"
    relative_error: float | None = None
    relative_error_plain: float | None = None
    predicted_loss: float | None = None
    why: str | None = None

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise RecipeError(
                f"{self.name}: storage {self.storage!r} is not known; numbers are kept as the rest of the model "
                f"({', '.join(STORAGES)}). Leave storage out."
            )
        if self.head not in ("tied", "untied", None):
            raise RecipeError(f"{self.name}: head {self.head!r} is not known; give tied or untied.")
        structure = structure_of(self.spec)
        if self.init is not None and self.init not in structure.inits:
            raise RecipeError(f"{self.name}: init {self.init!r} is not known. {suggest(self.init, structure.inits)}")

    @property
    def structure(self) -> str:
        return str(self.spec.structure)

    @property
    def label(self) -> str:
        """Short text for tables."""
        return str(self.spec.label())

    @property
    def held_parameters(self) -> int:
        return int(self.spec.held_parameters)

    def to_dict(self) -> dict[str, Any]:
        spec = {**as_dict(self.spec), "init": self.init, "head": self.head}
        row = {
            "name": self.name,
            "structure": self.structure,
            "spec": {key: value for key, value in spec.items() if value is not None},
            "label": self.label,
            "held_parameters": self.held_parameters,
            "teacher_parameters": self.teacher_parameters,
            "storage": self.storage,
        }
        optional = ("relative_error", "relative_error_plain", "predicted_loss", "why")
        return {**row, **{key: getattr(self, key) for key in optional if getattr(self, key) is not None}}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> PlanRow:
        """A row of a plan document (perhaps edited), of this version or an older one; what a spec implies is worked out
        anew. Raises RecipeError, with the row's name, for a spec that describes nothing."""
        beside = ("head", "init", "storage")
        given = {key: row["spec"].get(key, row.get(key)) for key in beside}
        optional = ("relative_error", "relative_error_plain", "predicted_loss", "why")
        known = {*beside, *optional, "stage", "name", "structure", "spec", "label", "held_parameters"}
        if strange := sorted({*row} - {*known, "teacher_parameters"}):
            raise RecipeError(f"{row['name']}: unknown key. {suggest(strange[0], known)}")
        try:
            spec = read_spec({key: value for key, value in row["spec"].items() if key not in beside})
        except (KronfoldError, TypeError, KeyError) as error:
            raise RecipeError(f"{row['name']}: {error}") from error
        return cls(
            name=row["name"],
            spec=spec,
            teacher_parameters=row["teacher_parameters"],
            **{key: value for key, value in given.items() if value is not None},
            **{key: row[key] for key in optional if key in row},
        )


@dataclass(frozen=True)
class KeptLayers:
    """The blocks that are kept (0-based, ascending) of a model of `depth` blocks, and the strategy that chose them."""

    kept: tuple[int, ...]
    depth: int
    strategy: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"kept": list(self.kept), "depth": self.depth, "strategy": self.strategy}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> KeptLayers:
        return cls(tuple(content["kept"]), content["depth"], content.get("strategy"))


@dataclass
class PlanStage:
    """The rows of one stage and how it heals.

    `layers`: the blocks that the first stage keeps, None for all. Names of rows count blocks in what is left.
    `reach`: of a recipe that plans in several stages: this one is planned on its turn, so far on the way to the budget.
    The rows of the last are then what a plan in one step would be. Not kept in files.
    """

    name: str
    rows: list[PlanRow]
    heal: HealConfig | None = None
    layers: KeptLayers | None = None
    reach: float | None = None


@dataclass
class Plan:
    """Attributes:
    teacher, cost: costs of the model before and after all stages.
    rows: all rows of all stages, in order.
    budget: what a planned recipe was asked for and what the planner says about its choice (see `planner.budget`).
    gathers: how many gathers will be absorbed by neighbouring layers, the names of those that remain, their bytes
        (`models.absorb.AbsorbReport.to_dict`); None in files of older versions. `cost` counts those that remain.
    """

    recipe: str
    description: str
    stages: list[PlanStage]
    teacher: Cost
    cost: Cost
    budget: dict[str, Any] | None = None
    gathers: dict[str, Any] | None = None

    @property
    def rows(self) -> list[PlanRow]:
        return [row for stage in self.stages for row in stage.rows]

    @property
    def layers(self) -> KeptLayers | None:
        """The blocks that are kept, None for all; only a first stage drops any."""
        return self.stages[0].layers if self.stages else None

    @property
    def held_parameters(self) -> int:
        return self.cost.held_parameters

    def to_dict(self) -> dict[str, Any]:
        """The JSON document that `kronfold plan --json` prints."""
        return document(
            "plan",
            None,
            recipe={"name": self.recipe, "description": self.description},
            **self.cost.to_dict(),
            **{f"teacher_{key.removeprefix('held_')}": value for key, value in self.teacher.to_dict().items()},
            rows=[{"stage": stage.name, **row.to_dict()} for stage in self.stages for row in stage.rows],
            heal={stage.name: stage.heal.model_dump() if stage.heal else None for stage in self.stages},
            **({"layers": self.layers.to_dict()} if self.layers else {}),
            **({"budget": self.budget} if self.budget else {}),
            **({"gathers": self.gathers} if self.gathers else {}),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, atomically. Raises OutputError."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a saved plan (perhaps edited). Raises RecipeError when it is none, or of a newer format."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != "kronfold/plan" or content["schema_version"] > SCHEMA_VERSION:
                raise RecipeError(
                    f"{path} is {content['schema']} version {content['schema_version']}; this version reads "
                    f"kronfold/plan up to {SCHEMA_VERSION}. Make a new one: kronfold plan MODEL --recipe NAME -o {path}"
                )
            return cls._from_dict(content)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, RecipeError):
                raise
            raise RecipeError(
                f"{path} is no kronfold plan ({type(error).__name__}: {error}). "
                f"Make one: kronfold plan MODEL --recipe NAME -o {path}"
            ) from error

    @classmethod
    def _from_dict(cls, content: dict[str, Any]) -> Plan:
        stages = []
        lost = sorted({row["stage"] for row in content["rows"]} - set(content["heal"]))
        if lost:
            raise RecipeError(f"Rows of the plan name stages {lost}, which its 'heal' entry does not list.")
        for name, heal in content["heal"].items():
            rows = [PlanRow.from_dict(row) for row in content["rows"] if row["stage"] == name]
            stages.append(PlanStage(name, rows, read(HealConfig, heal, f"heal of stage {name}") if heal else None))
        if content.get("layers"):
            stages[0].layers = KeptLayers.from_dict(content["layers"])
        keys = list(Cost.__dataclass_fields__)
        return cls(
            recipe=content["recipe"]["name"],
            description=content["recipe"]["description"],
            stages=stages,
            teacher=Cost(**{key: content[f"teacher_{key.removeprefix('held_')}"] for key in keys}),
            cost=Cost(**{key: content[key] for key in keys}),
            budget=content.get("budget"),
            gathers=content.get("gathers"),
        )


# What two plans do differently.


def diff(a: Plan, b: Plan) -> dict[str, Any]:
    """The JSON document of `kronfold plan --diff A B`: totals of both, and every weight whose spec is not the same.

    A weight that only one plan touches is `dense` in the other. Weights are told apart by stage and name; where a plan
    drops blocks (`layers` of its totals), names count the blocks it keeps.
    """
    rows_a, rows_b = _by_place(a), _by_place(b)
    rows = []
    for place in [*rows_a, *(place for place in rows_b if place not in rows_a)]:
        one, other = rows_a.get(place), rows_b.get(place)
        if one and other and _choice(one) == _choice(other):
            continue
        known = one or other
        assert known is not None
        rows.append(
            {
                "name": known.name,
                **_side("a", one, known.teacher_parameters),
                **_side("b", other, known.teacher_parameters),
            }
        )
    return document(
        "plan-diff",
        None,
        a=_totals(a),
        b=_totals(b),
        rows=rows,
        equal_rows=len({*rows_a} | {*rows_b}) - len(rows),
    )


def _by_place(plan: Plan) -> dict[tuple[int, str], PlanRow]:
    return {(i, row.name): row for i, stage in enumerate(plan.stages) for row in stage.rows}


def _choice(row: PlanRow) -> tuple[Any, ...]:
    """All that the plan says becomes of the weight."""
    return row.spec, row.head, row.init, row.storage


def _side(which: str, row: PlanRow | None, dense: int) -> dict[str, Any]:
    if row is None:
        return {f"{which}_label": "dense", f"{which}_held_parameters": dense, f"{which}_predicted_loss": 0.0}
    return {
        f"{which}_label": f"{row.structure} {row.label}",
        f"{which}_held_parameters": row.held_parameters,
        f"{which}_predicted_loss": row.predicted_loss,
    }


def _totals(plan: Plan) -> dict[str, Any]:
    predicted = [row.predicted_loss for row in plan.rows]
    return {
        "recipe": plan.recipe,
        **plan.cost.to_dict(),
        **({"layers": plan.layers.to_dict()} if plan.layers else {}),
        "predicted_loss": None if None in predicted or not predicted else sum(predicted),
    }
