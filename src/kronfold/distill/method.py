"""Which teacher layer does each student layer follow? Blocks are counted from 0, as in the names of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError, suggest
from kronfold.distill.losses import LOSSES
from kronfold.distill.signals import Batch, Moment, Signals
from kronfold.options.healing import ObjectiveConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kronfold.distill.pairs import Pair


MAPS = ("auto", "kept", "uniform")


@dataclass(frozen=True)
class Shape:
    """What a method must know of a model before it sees it run.

    Attributes:
        layers: transformer blocks. width: of the hidden states. heads: of queries, per block.
        kept: the blocks of the original model that a truncated one kept, None where its config does not say.
    """

    layers: int
    width: int
    heads: int
    kept: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> Shape:
        config = model.config
        kept = getattr(config, "kept_layers", None)
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=config.num_attention_heads,
            kept=None if kept is None else tuple(kept),
        )


def layer_map(wanted: str | Sequence[int], student: Shape, teacher: Shape) -> tuple[int, ...]:
    """The teacher block of each student block.

    Args:
        wanted: "kept": the blocks a truncated student kept (`kept_layers` in its config); "uniform": evenly spaced, the
            last on the last (block m on ceil(L_teacher (m+1) / L_student) - 1, the identity for equal depths); "auto":
            kept where the config says so and this teacher has these blocks and more, else uniform; or the list itself.

    Raises:
        InputError: an unknown word, a list of another length than the student's depth, an index outside the teacher,
            "kept" for a student whose config says nothing.
    """
    if wanted == "auto":
        kept = student.kept or ()
        # equal depths: the teacher is truncated itself, or the student is not
        fits = len(kept) == student.layers < teacher.layers and max(kept) < teacher.layers
        wanted = kept if fits else "uniform"
    if wanted == "uniform":
        chosen = tuple(-(-teacher.layers * (m + 1) // student.layers) - 1 for m in range(student.layers))
    elif wanted == "kept":
        if student.kept is None:
            raise InputError(
                "teacher_layers=kept follows the `kept_layers` of a truncated student, and the config of this student "
                f"has none. Give the list of its {student.layers} teacher blocks, or uniform."
            )
        chosen = student.kept
    elif isinstance(wanted, str):
        raise InputError(f"Unknown layer map {wanted!r}. {suggest(wanted, MAPS)} Or a list of teacher blocks.")
    else:
        chosen = tuple(wanted)
    if len(chosen) != student.layers:
        raise InputError(
            f"teacher_layers names {len(chosen)} teacher blocks {list(chosen)}, one is needed for each of the "
            f"{student.layers} blocks of the student."
        )
    check_layers(chosen, teacher.layers, "teacher")
    return chosen


def check_layers(chosen: Sequence[int], layers: int, role: str) -> None:
    """Raises InputError when a block index lies outside a model of `layers` blocks."""
    outside = [index for index in chosen if not 0 <= index < layers]
    if outside:
        raise InputError(f"Block {outside[0]} is out of range: the {role} has the blocks 0 to {layers - 1}.")


def hidden_pairs(chosen: Sequence[int], teacher_layers: int) -> list[tuple[int, int]]:
    """(student, teacher) indices into the tuples of hidden states, where 0 is the embedding output.

    The last hidden states are taken after the final norm, all others before any, so the last of the student is always
    compared with the last of the teacher, whatever block the map says.
    """
    pairs = [(student + 1, teacher + 1) for student, teacher in enumerate(chosen)]
    pairs[-1] = (len(chosen), teacher_layers)
    # a teacher block that is last is normed too, and no other student state is
    return [pair for pair in pairs[:-1] if pair[1] != teacher_layers] + pairs[-1:]


# The base of all distillation methods. A method is one file in `methods/` and one line in its registry.


@dataclass(frozen=True)
class MethodOptions:
    """Options of a method; each method has its own subclass, every field with a default.

    Values are numbers, words or lists of block indices. `faults` gives all that cannot be used, as sentences without a
    full stop.
    """

    def faults(self) -> list[str]:
        return []


@dataclass(frozen=True)
class AttentionLayers:
    """Blocks whose attention is wanted, in the student and in the teacher; `values`: their value vectors too."""

    student: tuple[int, ...] = ()
    teacher: tuple[int, ...] = ()
    values: bool = False


class Method(nn.Module):
    """What is compared between student and teacher, with which weights, at which moment.

    A method is built from an `ObjectiveConfig` and then bound to a pair of models. Its own parameters (projections)
    are trained with the student, saved beside the checkpoints of the run, and never in the student.

    To override: `options_type`; `bind` for checks and projections; `weights` and `temperature` for schedules;
    `term_weights` and `terms` for what is compared beyond the logits.

    Attributes:
        hidden: set by `bind`: hidden states are wanted.
        seed: of the run, set before `bind`; what is drawn at a step shall depend on the seed and the step alone, so
            that a resumed run draws the same.
        attention: set by `bind`: blocks whose attention is wanted.
    """

    options_type: ClassVar[type[MethodOptions]] = MethodOptions
    needs_teacher_always: ClassVar[bool] = False
    trains_teacher: ClassVar[bool] = False
    makes_inputs: ClassVar[bool] = False
    # Nothing of the teacher but its likeliest tokens is needed, at one temperature throughout: it may lie on disk.
    learns_from_top_k: ClassVar[bool] = False

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.config = config
        self.options: Any = read_options(type(self), config.method, config.options)
        self.hidden = False
        self.seed = 0
        self.attention = AttentionLayers()
        self.projections = nn.ModuleDict()

    @property
    def needs_teacher(self) -> bool:
        """Whether anything at all is compared with a teacher."""
        named = self.config.weights
        return self.needs_teacher_always or any(LOSSES.get(name).needs_teacher for name in named)

    @property
    def term_weights(self) -> dict[str, float]:
        """Names and weights, above 0, of what `terms` gives."""
        return {}

    def bind(self, student: Shape, teacher: Shape | None) -> None:
        """Check the options against the pair, and build what depends on its shapes. Raises InputError."""

    def weights(self, moment: Moment) -> dict[str, float]:
        """Weights above 0 of the losses of the logits (names of LOSSES) and of the terms, in the order of the logs."""
        return self.config.weights | self.term_weights

    def temperature(self, moment: Moment) -> float:
        return self.config.temperature

    def terms(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        """Named scalars beyond the losses of the logits, unweighted, each Σ of `batch.weights` · value per position."""
        return {}

    # The rest is for methods that train more than the student.

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        """Called after `bind`, with the models themselves; what is kept of them must be a copy. Raises InputError."""

    def acting_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        """The model to learn from. With `trains_teacher`, a copy that is a submodule of the method."""
        return teacher

    def partner_weights(self, moment: Moment) -> dict[str, float]:
        """With `trains_teacher`: weights of the losses of the acting teacher, which learns from the student."""
        return {}

    def extra_terms(
        self, pair: Pair, features: Mapping[str, Any], batch: Batch, learning: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Terms on inputs of the method's own making, and a number to add to the loss as it is (None for nothing).

        Args:
            pair: student and teacher to run. features: of the micro-batch. learning: False while evaluating.
        """
        return {}, None

    @property
    def companions(self) -> list[nn.Parameter]:
        """The method's parameters that are trained with the student."""
        return [p for p in self.parameters() if p.requires_grad]

    def project(self, name: str, student: int, teacher: int) -> None:
        """Make a learned map called `name` from `student` to `teacher` channels, where these differ."""
        if student != teacher:
            self.projections[name] = nn.Linear(student, teacher, bias=False)

    def projected(self, name: str, states: Tensor) -> Tensor:
        """`states` through the projection of that name, or as they are."""
        return self.projections[name](states) if name in self.projections else states


def read_options(method: type[Method], name: str, given: Mapping[str, Any]) -> MethodOptions:
    """The options of a method from a mapping. Raises InputError for unknown names (near ones) and useless values."""
    allowed = {f.name: f.default for f in fields(method.options_type)}
    unknown = [key for key in given if key not in allowed]
    if unknown:
        known = suggest(unknown[0], {*allowed, *ObjectiveConfig.model_fields} - {"options"}, limit=24)
        raise InputError(f"Unknown option {unknown[0]!r} of method {name!r}. {known}")
    options = method.options_type(**{key: _plain(value) for key, value in given.items()})
    faults = options.faults()
    if faults:
        raise InputError(f"Method {name} cannot be used: {'; '.join(faults)}.")
    return options


def weight_faults(**weights: Any) -> list[str]:
    """Sentences about values that are no weights: finite numbers from 0 up."""
    return [
        f"{name}={value!r} must be a finite number, 0 or above"
        for name, value in weights.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf
    ]


def whole_faults(least: int, **numbers: Any) -> list[str]:
    """Sentences about values that are no whole numbers from `least` up."""
    return [
        f"{name}={value!r} must be a whole number, {least} or above"
        for name, value in numbers.items()
        if isinstance(value, bool) or not isinstance(value, int) or value < least
    ]


def layers_faults(**maps: Any) -> list[str]:
    """Sentences about layer maps that are neither a word nor a list of integers; `layer_map` checks the rest."""
    return [
        f"{name}={value!r} must be auto, kept, uniform or a list of block indices"
        for name, value in maps.items()
        if not isinstance(value, str) and not _integers(value)
    ]


def _integers(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def bind(method: Method, student: Shape, teacher: Shape | None, seed: int = 0) -> None:
    """`method.bind`, with projections that depend on `seed` alone and no trace in torch's own random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        method.seed = seed
        method.bind(student, teacher)
