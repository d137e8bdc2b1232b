"""Errors that say what was given, what is allowed, and the next step."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KronfoldError(Exception):
    """Base of every error raised on purpose. The command line prints its text and exits with `exit_code`."""

    exit_code = 1


class InputError(KronfoldError, ValueError):
    """Something the caller gave cannot be used: a shape, a file, a name, an option. Exit code 2."""

    exit_code = 2


class ShapeError(InputError):
    """A factor shape does not fit a matrix."""


class RecipeError(InputError):
    """A recipe or plan is malformed or does not fit the model."""


class DataError(InputError):
    """A text source is missing, empty, too short or not readable as text."""


class CheckpointError(InputError):
    """A checkpoint is incomplete, damaged, or does not match its config."""


class OutputError(InputError):
    """The output place exists already or cannot be written."""


class NotFiniteError(InputError):
    """A number that must be finite is NaN or infinite: a weight about to be saved, a teacher's output, a result."""


class DivergedError(NotFiniteError):
    """A training stopped because its loss, its gradients or its weights were no longer finite.

    Attributes:
        since: the first step (from 1) whose loss was no longer sound.
        finding: the message without what is said of checkpoints and resuming.
    """

    def __init__(self, message: str, since: int = 1, finding: str | None = None) -> None:
        super().__init__(message)
        self.since = since
        self.finding = finding or message


def suggest(name: str, allowed: Iterable[str], limit: int = 12) -> str:
    """One sentence: the names nearest to `name`, then all that are allowed (cut after `limit`).

    >>> suggest("kroneker", ["kronecker", "low_rank"])
    "Did you mean 'kronecker'? Allowed: kronecker, low_rank."
    """
    names = sorted(set(allowed))
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    start = f"Did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    shown = ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
    return f"{start}Allowed: {shown}."
