"""The plan: a printable, saved, editable object that says what will happen before anything does."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfold.base.errors import RecipeError
from kronfold.base.files import write_json
from kronfold.base.results import SCHEMA_VERSION, document
from kronfold.models.cost import Cost
from kronfold.options import read
from kronfold.options.healing import HealConfig


@dataclass
class PlanRow:
    """One weight: `spec` (as in checkpoints), exact numbers held before and after, biases not counted.

    `relative_error` (with permutations, when the spec asks for them) and `relative_error_plain` are filled once the
    weights have been fitted. `predicted_loss` (nats per token) and `why` come from the planner.
    """

    name: str
    spec: dict[str, Any]
    label: str
    held_parameters: int
    teacher_parameters: int
    relative_error: float | None = None
    relative_error_plain: float | None = None
    predicted_loss: float | None = None
    why: str | None = None

    def to_dict(self) -> dict[str, Any]:
        row = {
            "name": self.name,
            "structure": self.spec["structure"],
            "spec": self.spec,
            "label": self.label,
            "held_parameters": self.held_parameters,
            "teacher_parameters": self.teacher_parameters,
        }
        optional = ("relative_error", "relative_error_plain", "predicted_loss", "why")
        return {**row, **{key: getattr(self, key) for key in optional if getattr(self, key) is not None}}


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
            rows = [
                PlanRow(**{key: value for key, value in row.items() if key not in ("stage", "structure")})
                for row in content["rows"]
                if row["stage"] == name
            ]
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
