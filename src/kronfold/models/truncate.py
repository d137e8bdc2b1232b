"""Keep some of a model's blocks and drop the others: the students of DistilGPT-2 and of "A Short Study on Compressing
Decoder-Based Language Models" (arXiv 2110.08460), whose five choices of 12 blocks are generalised to any depth here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from kronfold.base.errors import InputError, KronfoldError, suggest
from kronfold.models.families import Family, empty_model, family_of
from kronfold.models.place import build_skeleton, read_specs

# What blocks call their own place; a KV cache is looked up under it.
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number")


def _evenly(depth: int, count: int) -> list[int]:
    """From the first block in equal steps; 6 of 12: 0, 2, 4, 6, 8, 10."""
    return [i * depth // count for i in range(count)]


def _both_ends(depth: int, count: int) -> list[int]:
    """The lower half as `alt` has it, the upper half its mirror image; 6 of 12: 0, 2, 4 and 7, 9, 11."""
    steps = _evenly(depth, count)
    return [*steps[: (count + 1) // 2], *(depth - 1 - step for step in steps[: count // 2])]


def _first_to_last(depth: int, count: int) -> list[int]:
    """The first, the last, and blocks at equal distances between (halves round up); 3 of 12: 0, 6, 11."""
    gaps = max(1, count - 1)
    return [(2 * i * (depth - 1) + gaps) // (2 * gaps) for i in range(count)]


# name -> (the share of the blocks kept unless a count is given, which ones)
STRATEGIES: dict[str, tuple[float, Callable[[int, int], list[int]]]] = {
    "alt": (0.5, _evenly),
    "6b": (0.5, lambda depth, count: list(range(count))),
    "6t": (0.5, lambda depth, count: list(range(depth - count, depth))),
    "3b3t": (0.5, _both_ends),
    "3l": (0.25, _first_to_last),
}


def kept_layers(strategy: str | Sequence[int], depth: int, count: int | None = None) -> tuple[int, ...]:
    """Indices of the blocks that a strategy keeps of `depth`, ascending, 0-based.

    Args:
        strategy: alt (every other block), 6b (the bottom), 6t (the top), 3b3t (bottom and top, every other block of
            each; DistilGPT-2's choice), 3l (first, middle, last), or the indices themselves.
        count: how many blocks a named strategy keeps. None stands for half of them, for 3l a quarter, rounded down,
            at least one: on 12 blocks the published choices.

    Raises:
        InputError: an unknown name (near names), a count outside 1..depth or beside a list, no index, one twice, one
            that is not there.
    """
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise InputError(
                f"Unknown truncation strategy {strategy!r}. {suggest(strategy, STRATEGIES)} "
                f"Or give the blocks to keep, a list of indices from 0 to {depth - 1}."
            )
        share, choose = STRATEGIES[strategy]
        count = max(1, int(share * depth)) if count is None else count
        if not 1 <= count <= depth:
            raise InputError(f"Truncation cannot keep {count} of {depth} blocks; keep 1 to {depth}.")
        return tuple(sorted(choose(depth, count)))
    if count is not None:
        raise InputError("A list of blocks to keep says itself how many there are; leave the count out.")
    return _checked(strategy, depth)


def _checked(keep: Sequence[int], depth: int) -> tuple[int, ...]:
    keep = list(keep)
    if not keep:
        raise InputError(f"This truncation keeps no block; name at least one of 0 to {depth - 1}.")
    beyond = sorted({i for i in keep if not 0 <= i < depth})
    if beyond:
        raise InputError(f"Blocks {beyond} are not in this model; it has blocks 0 to {depth - 1}.")
    twice = sorted({i for i in keep if keep.count(i) > 1})
    if twice:
        raise InputError(f"Blocks {twice} are named twice; a block can be kept once.")
    return tuple(sorted(keep))


def depth_of(model: PreTrainedModel) -> int:
    """Number of transformer blocks. Raises InputError for a model of which nothing is recognised."""
    return len(list(model.get_submodule(family_of(model).blocks).children()))


def truncate(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A new model of the same class with the blocks `keep` (0-based) of `model`, which is unchanged.

    Embeddings, final norm and head are copied, tied as they were; nothing is shared with `model`. Block `keep[i]` is
    block i of the new model; its config has `kept_layers`. Structured layers are kept. Works on the meta device.

    Raises:
        InputError: indices as in `kept_layers`; a model whose config cannot describe what would be left.
    """
    family = family_of(model)
    blocks = model.get_submodule(family.blocks)
    keep = _checked(keep, len(list(blocks.children())))
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise InputError(
            "This model scales its attention by the place of each block (scale_attn_by_inverse_layer_idx), so a block "
            "that moves computes something else. It cannot be truncated."
        )
    made = dict(blocks.named_children())
    names = list(made)
    memo: dict[int, Any] = {}
    # deepcopy finds the list of blocks in its memo, so the blocks that are dropped are never copied
    kept = [copy.deepcopy(made[names[i]], memo) for i in keep]
    memo[id(blocks)] = type(blocks)(kept) if isinstance(blocks, nn.ModuleList) else nn.ModuleList(kept)
    student = copy.deepcopy(model, memo)
    for place, (old, block) in enumerate(zip(keep, kept, strict=True)):
        _renumber(block, old, place)
    _shorten(student.config, keep, len(names))
    _check_config(student, family)
    return student


def _renumber(block: nn.Module, old: int, new: int) -> None:
    for module in block.modules():
        for name in _INDEX_NAMES:
            if module.__dict__.get(name) == old:
                setattr(module, name, new)


def _shorten(config: PretrainedConfig, keep: Sequence[int], depth: int) -> None:
    """Let the config describe the kept blocks: their number, and every list that has one entry per block.

    `kept_layers` says which they were; distillation pairs them with those of the model they come from.
    """
    for name, value in list(vars(config).items()):
        if "layer" in name and name != "kept_layers" and isinstance(value, list | tuple) and len(value) == depth:
            setattr(config, name, type(value)(value[i] for i in keep))
    if hasattr(config, "attention_types") and hasattr(config, "attention_layers"):  # GPT-Neo expands one to the other
        config.attention_types = [[list(config.attention_layers), 1]]
    config.num_hidden_layers = len(keep)
    config.kept_layers = list(keep)


def _check_config(student: PreTrainedModel, family: Family) -> None:
    """Raise InputError unless the config, read from a file, would build the very model that is there."""
    try:
        rebuilt = empty_model(student.config)
        build_skeleton(rebuilt, read_specs(student))
        expected = {name: tuple(value.shape) for name, value in rebuilt.state_dict().items()}
    except (KronfoldError, ValueError, IndexError, KeyError) as error:
        raise _cannot(student, family, str(error).splitlines()[0]) from error
    actual = {name: tuple(value.shape) for name, value in student.state_dict().items()}
    differing = sorted(name for name in {*expected, *actual} if expected.get(name) != actual.get(name))
    if differing:
        raise _cannot(student, family, f"it would build {differing[0]} otherwise")


def _cannot(student: PreTrainedModel, family: Family, why: str) -> InputError:
    return InputError(
        f"The config of a model of type {student.config.model_type!r} cannot describe these blocks of {family.blocks} "
        f"({why}), so it cannot be truncated this way."
    )
