"""Which sites a recipe entry means."""

from __future__ import annotations

import fnmatch
import importlib.resources
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from kronfold.base.errors import RecipeError, suggest
from kronfold.models.families import ROLES
from kronfold.models.linear_view import LinearView
from kronfold.options import Options, read
from kronfold.options.healing import HealConfig


def match(
    views: Iterable[LinearView], patterns: Sequence[str], blocks: str | Sequence[int] = "all"
) -> list[LinearView]:
    """The sites whose name or role matches any pattern and whose block is wanted, in model order.

    Patterns: shell wildcards on the name (`*.mlp.c_fc`), `re:` and a regular expression on the name, or `role:` and
    one of `families.ROLES` (`role:mlp_in`), which means the same in every model family.

    Raises RecipeError when nothing matches (a recipe that does nothing is never run silently), when a regular
    expression is malformed, when a role is unknown, or when a block index is not there.
    """
    views = list(views)
    _check_blocks(views, blocks)
    named = [view for view in views if any(_matches(pattern, view) for pattern in patterns)]
    found = [view for view in named if _wanted(view.block, blocks)]
    if not found:
        why = f" in blocks {blocks!r}" if named else ""
        names = sorted({re.sub(r"\.\d+\.", ".*.", view.name) for view in views})
        roles = sorted({f"role:{view.role}" for view in views if view.role})
        raise RecipeError(
            f"modules {list(patterns)} match nothing{why} in this model. "
            + (suggest(patterns[0], roles) if patterns[0].startswith("role:") else suggest(patterns[0], names))
        )
    return found


def _matches(pattern: str, view: LinearView) -> bool:
    name = view.name
    if pattern.startswith("role:"):
        if pattern[5:] not in ROLES:
            raise RecipeError(f"modules pattern {pattern!r}: unknown role. {suggest(pattern[5:], ROLES)}")
        return view.role == pattern[5:]
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise RecipeError(f"modules pattern {pattern!r} is no regular expression: {error}.") from error


def _wanted(block: int | None, blocks: str | Sequence[int]) -> bool:
    if blocks == "all":
        return True
    if block is None:
        return False
    if isinstance(blocks, str):
        return block % 2 == (blocks == "odd")
    return block in blocks


def _check_blocks(views: list[LinearView], blocks: str | Sequence[int]) -> None:
    if isinstance(blocks, str):
        return
    depth = 1 + max((view.block for view in views if view.block is not None), default=-1)
    beyond = [block for block in blocks if not 0 <= block < depth]
    if beyond:
        raise RecipeError(f"blocks {beyond} are not in this model; it has blocks 0 to {depth - 1}.")


# Recipes: YAML files with a list of stages, each compress + heal. Unknown keys are refused, all faults at once.


class _Part(Options):
    error = RecipeError


class TermRecipe(_Part):
    """One term of a sum; what it says means the same as in an entry of its own."""

    structure: str
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    rank: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, le=1)
    permute: Literal["both", "in", "out", "none"] = "both"


class CompressRecipe(_Part):
    """What becomes of the sites whose names match.

    Attributes:
        modules: name patterns (shell wildcards as in `*.mlp.c_fc`, or `re:` and a regular expression), or `role:` and
            embedding, attention_in, attention_out, mlp_in, mlp_out or head, in any model family.
        blocks: all, odd, even (0-based index), or a list of indices. Only sites inside blocks are concerned.
        structure: name of a structure; the next four are for those that use them.
        block: Kronecker: (out_b, in_b), canonical orientation; the A factor follows from the weight's shape.
        rank: Kronecker: number of terms (default 1); low rank: the rank. ratio: low rank: share of numbers kept.
        permute: Kronecker: which sides the permutation search may reorder.
        init: Kronecker: what the factors start from: van_loan (the nearest sum), modified_van_loan (the same, scaled
            for training), or pruning (some of the weight's own entries; without permutations).
        cores: tensor_train: how many dimensions each row is split into (default 2); it takes a ratio too.
        terms: sum: the structures to add up, each with its own block, rank, ratio, permute.
        head: embeddings only: tied (the LM head reads the factors) or untied (it keeps a dense copy, as published).
    """

    modules: Annotated[list[str], Field(min_length=1)]
    blocks: Literal["all", "odd", "even"] | list[int] = "all"
    structure: str = "kronecker"
    block: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None
    rank: int | None = Field(None, ge=1)
    ratio: float | None = Field(None, gt=0, le=1)
    permute: Literal["both", "in", "out", "none"] = "both"
    init: Literal["van_loan", "modified_van_loan", "pruning"] = "van_loan"
    cores: int | None = Field(None, ge=2)
    terms: list[TermRecipe] | None = None
    head: Literal["tied", "untied"] = "tied"

    @field_validator("modules", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _keys_of_the_structure(self) -> CompressRecipe:
        special = {"terms": self.terms, "cores": self.cores, "init": None if self.init == "van_loan" else self.init}
        if any(value is not None for value in special.values()):
            from kronfold.structures.registry import STRUCTURES  # only where needed: it imports torch

            if self.structure in STRUCTURES:  # an unknown one is named where the recipe meets a model
                STRUCTURES.get(self.structure).check_entry({**special, "permute": self.permute})
        return self

    def without_permutations(self) -> CompressRecipe:
        """The same entry with no permutation search, in its terms neither."""
        terms = self.terms and [term.model_copy(update={"permute": "none"}) for term in self.terms]
        return self.model_copy(update={"permute": "none", "terms": terms})


class AutoRecipe(_Part):
    """How the planner calibrates and chooses; its plan takes the place of `compress` entries.

    Attributes:
        target_ratio: held parameters as a share of the dense model's, unless the command names a budget.
        structures: what sites may become: names of structures that the planner can choose (low_rank, kronecker).
        windows: calibration windows the layers are fitted on. window: their length in tokens (at most the context).
        gradient_windows: how many of them are also run backwards, for the sensitivities.
        sequential: fit each layer to the inputs that the compressed layers before it produce.
        adapt: with sequential, also refit the layers of the blocks that stay dense to the inputs they now see.
    """

    target_ratio: float = Field(0.65, gt=0, lt=1)
    structures: list[str] = Field(["low_rank"], min_length=1)
    windows: int = Field(128, gt=0)
    window: int = Field(1024, gt=1)
    gradient_windows: int = Field(16, gt=0)
    sequential: bool = False
    adapt: bool = False

    @model_validator(mode="after")
    def _adapts_in_sequence(self) -> AutoRecipe:
        if self.adapt and not self.sequential:
            raise ValueError("adapt refits layers to what the compressed ones before them give: set sequential too")
        return self


class StageRecipe(_Part):
    """One step of the progressive pipeline. `compress` stays empty in a recipe that the planner fills in.

    Attributes:
        layers: the blocks to keep, before anything is compressed: a strategy (`models.truncate.STRATEGIES`) or a list
            of 0-based indices; the first stage only. From there on, blocks are counted in the truncated model.
        layer_count: how many blocks a named strategy keeps; None: half of them, of 3l a quarter.
        reach: with auto in several stages: how far this one goes on the way from the dense model (0) to the budget (1).
            Each folds what the one before it healed into plain weights and plans anew; the last goes all the way.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    layers: str | list[int] | None = None
    layer_count: int | None = Field(None, ge=1)
    compress: list[CompressRecipe] = Field(default_factory=list)
    heal: HealConfig | None = None
    reach: float | None = Field(None, gt=0, le=1)

    @model_validator(mode="after")
    def _fits_together(self) -> StageRecipe:
        if self.layer_count is not None and not isinstance(self.layers, str):
            raise ValueError("layer_count says how many blocks a strategy keeps; give `layers: alt` (or another) too")
        if self.heal is not None and self.heal.tokens is None:
            raise ValueError("heal.tokens: the stages of a recipe heal by tokens, not by steps")
        return self


class Recipe(_Part):
    """A named list of stages. With `auto` the planner says what is compressed in them."""

    name: str
    description: str = ""
    auto: AutoRecipe | None = None
    stages: Annotated[list[StageRecipe], Field(min_length=1)]

    @model_validator(mode="after")
    def _distinct(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, found {names}")
        later = self.stages[1:]
        if self.auto and any(stage.compress or stage.layers is not None for stage in self.stages):
            raise ValueError("with auto the planner says what becomes of the matrices: no compress entries, no layers")
        self._check_reach()
        if any(stage.layers is not None for stage in later):
            raise ValueError("layers belong to the first stage; a later one works on the blocks that are left")
        if not self.auto and not all(stage.compress or stage.layers is not None for stage in self.stages):
            raise ValueError("every stage needs compress entries (the first: or layers), or the recipe an auto entry")
        return self

    def _check_reach(self) -> None:
        *earlier, last = [stage.reach for stage in self.stages]
        if not self.auto:
            if any(reach is not None for reach in (*earlier, last)):
                raise ValueError("reach belongs to recipes with auto; other stages say what they compress")
            return
        steps = [*earlier, 1.0 if last is None else last]
        rising = all(a is not None and b is not None and a < b for a, b in itertools.pairwise(steps))
        if not rising or steps[-1] != 1:
            raise ValueError(
                f"with auto in several stages each must reach further than the one before, the last 1; found {steps}"
            )

    def with_heal_tokens(self, total: int | None) -> Recipe:
        """The same recipe with the healing budgets of its stages rescaled to `total` tokens in all."""
        budgets = [stage.heal.tokens or 0 for stage in self.stages if stage.heal]
        if total is None or not budgets:
            return self
        scale = total / sum(budgets)

        def scaled(stage: StageRecipe) -> StageRecipe:
            if stage.heal is None:
                return stage
            tokens = max(1, round((stage.heal.tokens or 0) * scale))
            return stage.model_copy(update={"heal": stage.heal.model_copy(update={"tokens": tokens})})

        stages = [scaled(stage) for stage in self.stages]
        return self.model_copy(update={"stages": stages})

    def without_permutations(self) -> Recipe:
        """The control: the same shapes and budgets, plain Kronecker products."""
        stages = [
            stage.model_copy(update={"compress": [e.without_permutations() for e in stage.compress]})
            for stage in self.stages
        ]
        return self.model_copy(update={"name": f"{self.name} without permutations", "stages": stages})


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = importlib.resources.files("kronfold") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path | Recipe) -> Recipe:
    """A recipe by shipped name, by path of a YAML file, or as it is.

    Raises RecipeError: unknown name (nearest names), unreadable YAML, or all schema faults at once.
    """
    if isinstance(source, Recipe):
        return source
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"There is no recipe file {path}. Shipped recipes: {', '.join(shipped_recipes())}.")
        text, label = path.read_text(encoding="utf-8"), str(path)
    else:
        if str(source) not in shipped_recipes():
            raise RecipeError(
                f"Unknown recipe {str(source)!r}. {suggest(str(source), shipped_recipes())} "
                "Or give the path of a .yaml file."
            )
        label = str(source)
        text = (importlib.resources.files("kronfold") / "recipes" / f"{label}.yaml").read_text(encoding="utf-8")
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"Recipe {label} is not valid YAML: {error}") from error
    return read(Recipe, document, f"Recipe {label}")
