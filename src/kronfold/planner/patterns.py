"""Which sites a recipe entry means."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence

from kronfold.base.errors import RecipeError, suggest
from kronfold.models.families import ROLES
from kronfold.models.linear_view import LinearView


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
