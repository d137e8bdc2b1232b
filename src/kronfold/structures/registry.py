"""The structures there are, and all that the rest of the project asks of one.

A structure is one file (or folder) with its spec, tensor functions, solver, layer and a `Structure` that answers for
them, and one line at the end of this file. From outside the package `register_structure` takes the place of the line.
No other room tests which structure it has before it: what differs between them is a method here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kronfold.base.errors import CheckpointError, InputError, RecipeError, suggest
from kronfold.base.registry import Registry
from kronfold.structures.spec import Pair
from kronfold.structures.weighting import Weighting

Kind = Literal["linear", "embedding"]
Unit = Literal["params", "macs", "bytes"]
FP16_BYTES, INDEX_BYTES = 2, 4
_ARTICLES = {"linear": "a linear layer", "embedding": "an embedding"}


@dataclass(frozen=True)
class Where:
    """The place that a layer is made for: plain facts, no model.

    Attributes:
        kind: what stands there now. shape: of its weight, (out, in) or (vocabulary, stored width).
        bias: whether it has one. device, dtype: of its numbers.
        present: the module itself.
        parts: names of the parts of a fused layer, in the order of their outputs; empty for any other.
        embedding: the structured embedding that an LM head here would read; None where this is no head, or none is.
    """

    kind: Kind
    shape: Pair
    bias: bool
    device: torch.device
    dtype: torch.dtype
    present: nn.Module
    parts: tuple[str, ...] = ()
    embedding: nn.Module | None = None

    @property
    def factory(self) -> dict[str, Any]:
        """Device and dtype as constructors take them."""
        return {"device": self.device, "dtype": self.dtype}


class Structure:
    """One structure. A subclass sets the attributes and overrides what differs.

    Attributes:
        name: in recipes, plans and checkpoints. spec: class of its typed spec (`spec.Spec`); None for a container,
            which a checkpoint may name and no recipe can ask for.
        layer: class of its module, a `StructuredLinear` or `StructuredEmbedding`.
        replaces: the kinds of modules it can take the place of.
        takes: the keys of a recipe entry that mean something to it, of `block`, `rank`, `ratio`, `permute`, `init`,
            `cores` and `terms`.
        inits: what an entry may name as `init`, the default first.
        may_be_term: one of its layers may be a term of a sum.
        goes_inside: at an embedding that is held in levels it becomes one more of them; others replace the whole.
        planned: the kinds of sites for which the planner may choose it (`choices`).
    """

    name: ClassVar[str]
    spec: ClassVar[Any] = None
    layer: ClassVar[Any] = None
    replaces: ClassVar[tuple[Kind, ...]] = ("linear",)
    takes: ClassVar[tuple[str, ...]] = ()
    inits: ClassVar[tuple[str, ...]] = ("van_loan",)
    may_be_term: ClassVar[bool] = True
    goes_inside: ClassVar[bool] = False
    planned: ClassVar[tuple[Kind, ...]] = ()

    # --- what a recipe entry says ------------------------------------------------------------------------------------

    def at(self, kind: Kind) -> str | None:
        """Name of the structure that an entry of this name asks for at a site of this kind; None: it cannot be."""
        return self.name if kind in self.replaces else None

    def check_entry(self, entry: Mapping[str, Any]) -> None:
        """Raises RecipeError for keys that were given in a recipe entry and belong to other structures alone."""
        for key in ("terms", "cores", "init"):
            if key in entry and entry[key] is not None and key not in self.takes:
                owners = [name for name in STRUCTURES if key in STRUCTURES.get(name).takes]
                verb = "belong" if key.endswith("s") else "belongs"
                raise RecipeError(f"{key} {verb} to structure {' or '.join(owners)}, not to {self.name}")

    def ask(self, shape: Pair, entry: Mapping[str, Any], kind: Kind) -> Any:
        """The spec that a recipe entry means for a weight of `shape` at a site of `kind`.

        Raises RecipeError or ShapeError: keys missing, not meant for this structure, or that do not fit the shape.
        """
        raise RecipeError(f"structure {self.name!r} cannot be asked for. {suggest(self.name, askable())}")

    # --- specs -------------------------------------------------------------------------------------------------------

    def read_spec(self, content: Mapping[str, Any]) -> Any:
        """The typed spec from its dict form, `structure` or not. Raises ShapeError, TypeError, KeyError."""
        if self.spec is None:
            raise RecipeError(f"structure {self.name!r} describes no single weight. {suggest(self.name, askable())}")
        return self.spec(**{key: value for key, value in content.items() if key != "structure"})

    def check_site(self, spec: Any, kind: Kind, shape: Pair, inside: bool = False) -> None:
        """Raises RecipeError or ShapeError unless `spec` can stand at a site of this kind and shape.

        inside: the site is the stored matrix of an embedding that is held in levels.
        """
        if kind not in self.replaces:
            raise RecipeError(cannot_replace(self.name, kind))
        if inside and not self.goes_inside:
            able = [name for name in askable() if STRUCTURES.get(name).goes_inside]
            raise RecipeError(
                f"this embedding is held in levels, and {self.name} cannot go inside one; use {' or '.join(able)}, or "
                "fold the model first (kronfold.to_dense)"
            )
        spec.check_weight(shape)

    def held(self, spec: Any) -> Any:
        """The spec of the layer that a fit of `spec` gives, as far as it is known before fitting."""
        return spec

    def plain(self, spec: Any) -> Any | None:
        """`spec` without its permutations, for the control; None for a structure that has none to leave out."""
        return None

    def sizes(self, spec: Any) -> list[Any]:
        """The same structure and shape at every size it comes in, ascending by numbers held, below dense; empty for
        one that comes in one size only."""
        return []

    def macs(self, spec: Any) -> float:
        """Multiply-accumulates per token when many tokens share the call; of an embedding for a row looked up."""
        return float(spec.macs_per_token)

    # --- fitting -----------------------------------------------------------------------------------------------------

    def fit(
        self, weight: Tensor, spec: Any, seed: int = 0, weighting: Weighting | None = None, init: str | None = None
    ) -> Any:
        """What the solver finds for a weight (out, in): an object with `relative_error` and `to_dense()` (float64).

        Raises ShapeError or InputError when weight or statistics do not fit the spec, or are not finite.
        """
        raise RecipeError(f"structure {self.name!r} cannot be fitted to a weight. {suggest(self.name, askable())}")

    def weighting(self, spec: Any, weighting: Weighting) -> Weighting:
        """The part of a site's weighting that this structure is fitted under."""
        return weighting

    # --- layers ------------------------------------------------------------------------------------------------------

    def build(self, content: Mapping[str, Any], where: Where) -> nn.Module:
        """The module that a checkpoint's spec (`to_spec` of the module) describes, its numbers still to be read.

        Raises CheckpointError, ShapeError, KeyError or TypeError when it does not fit the place.
        """
        self.check_place(where)
        spec = self.read_spec(content)
        spec.check_weight(where.shape)
        return self.empty(spec, where)

    def check_place(self, where: Where) -> None:
        """Raises CheckpointError where what stands there is not of a kind that this structure can replace."""
        if where.kind not in self.replaces:
            needed = " or ".join(_ARTICLES[kind] for kind in self.replaces)
            raise CheckpointError(f"{self.name} needs {needed}, found {type(where.present).__name__}")

    def empty(self, spec: Any, where: Where) -> nn.Module:
        """A layer of the right shapes for `spec`; also on the meta device."""
        if where.kind == "embedding":
            return self.layer.from_spec(spec.to_dict(), **where.factory)
        return self.layer.from_spec(spec.to_dict(), where.bias, **where.factory)

    def from_fit(self, fit: Any, where: Where, bias: Tensor | None) -> nn.Module:
        """The layer that holds what `fit` returned. bias: (out,) or None."""
        if where.kind == "embedding":
            return self.layer.from_fit(fit, **where.factory)
        return self.layer.from_fit(fit, bias, **where.factory)

    # --- the planner -------------------------------------------------------------------------------------------------

    def slices(self, shape: Pair, kind: Kind) -> list[Pair]:
        """Shapes of the parts of a site that are chosen one by one, such as the token groups of an embedding."""
        return [shape]

    def choices(self, shape: Pair, kind: Kind) -> list[Any]:
        """Specs the planner may choose among for one slice of this shape; the same list for the same shape, always."""
        return []

    def losses(self, weight: Tensor, weighting: Weighting, kind: Kind) -> list[Tensor]:
        """For each slice the predicted rise of the loss, nats, of each of its `choices`: ½ tr(G D H Dᵀ), float64.

        By fitting every choice, which serves a structure that comes in few sizes; others override it.
        """
        (shape,) = self.slices((weight.shape[0], weight.shape[1]), kind)
        metric, weight = weighting.checked(shape), weight.detach().double().cpu()
        residuals = (weight - self.fit(weight, spec, 0, weighting).to_dense() for spec in self.choices(shape, kind))
        return [torch.tensor([0.5 * metric.squared_error(left) for left in residuals], dtype=torch.float64)]

    def cost(self, choice: Any, unit: Unit, tied: bool) -> float:
        """What a choice costs in the unit of the budget. tied: it is a slice of an embedding that the LM head reads."""
        if unit == "macs":
            return self.macs(choice)
        if unit == "bytes":
            return float(FP16_BYTES * choice.held_parameters + INDEX_BYTES * choice.index_count)
        return float(choice.held_parameters)

    def slice_cost(self, shape: Pair, unit: Unit) -> float:
        """What a slice costs besides as soon as the site is held in this structure, whatever is chosen for it."""
        return 0.0

    def combined(self, slices: Sequence[Pair], chosen: Sequence[Any]) -> Any:
        """The spec of the whole site from the choices for its slices, of which some may be None (dense), not all."""
        (spec,) = chosen
        return spec


STRUCTURES: Registry[Structure] = Registry("structure")


def register_structure(structure: Structure) -> None:
    """Add a structure from outside the package; recipes, plans and checkpoints may then name it.

    A checkpoint that names it loads in a process that has registered it. Raises InputError: the name is taken, or the
    structure says too little of itself.
    """
    lacking = [key for key in ("name", "spec", "layer") if getattr(structure, key, None) is None]
    if lacking or not structure.replaces:
        raise InputError(
            f"{type(structure).__name__} does not say its {', '.join(lacking) or 'replaces'}; see "
            "kronfold.structures.registry.Structure for what a structure answers."
        )
    STRUCTURES.register(structure.name, structure)


def structure_of(spec: Any) -> Structure:
    """The structure that a typed spec is of."""
    return STRUCTURES.get(spec.structure)


def read_spec(content: Mapping[str, Any]) -> Any:
    """The typed spec from its dict form. Raises InputError for an unknown structure; as `Structure.read_spec`."""
    return STRUCTURES.get(content["structure"]).read_spec(content)


def as_dict(spec: Any) -> dict[str, Any]:
    """The dict form of a typed spec, as in plans and checkpoints."""
    return {"structure": spec.structure, **spec.to_dict()}


def askable() -> list[str]:
    """Names that a recipe entry may give as `structure`."""
    return [name for name in STRUCTURES if STRUCTURES.get(name).spec is not None]


def askable_at(kind: Kind) -> list[str]:
    """Names that an entry may give for sites of a kind, without those that another name stands for."""
    stood_for = {STRUCTURES.get(name).at(kind) for name in askable() if STRUCTURES.get(name).at(kind) != name}
    return [name for name in askable() if STRUCTURES.get(name).at(kind) is not None and name not in stood_for]


def plannable() -> list[str]:
    """Names among which the planner may choose."""
    return [name for name in STRUCTURES if STRUCTURES.get(name).planned]


def planned_for(kind: Kind, structures: Iterable[str]) -> list[Structure]:
    """What the planner chooses among at sites of a kind, when asked for `structures`.

    An embedding that none of them can hold is offered what there is for embeddings: it is often half of the model.
    """
    names = dict.fromkeys(STRUCTURES.get(name).at(kind) for name in structures)
    able = [STRUCTURES.get(name) for name in names if name is not None]
    able = [structure for structure in able if kind in structure.planned]
    if kind == "embedding" and not able:
        able = [STRUCTURES.get(name) for name in plannable() if kind in STRUCTURES.get(name).planned][:1]
    return able


def cannot_replace(name: str, kind: Kind) -> str:
    """The sentence for a structure that is asked for where it cannot stand."""
    *others, last = askable_at(kind)
    allowed = f"{', '.join(others)} or {last}" if others else last
    return f"structure {name!r} cannot replace {_ARTICLES[kind]}; use {allowed}"


for _name, _place in {
    "kronecker": "kronecker.layer",
    "low_rank": "low_rank",
    "grouped_embedding": "grouped_embedding",
    "tensor_train": "tensor_train",
    "sum": "sums",
    "factorized_embedding": "levels",
    "tied_head": "levels:TIED_HEAD",
    "fused": "layer:FUSED",
    "dense": "layer:DENSE",
}.items():
    STRUCTURES.register(_name, "kronfold.structures." + (_place if ":" in _place else f"{_place}:STRUCTURE"))
