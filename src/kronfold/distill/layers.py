"""Which teacher layer does each student layer follow? Blocks are counted from 0, as in the names of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from kronfold.base.errors import InputError, suggest

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
