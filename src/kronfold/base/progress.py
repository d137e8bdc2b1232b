"""How far long work has come, as named steps with facts; terminals and logs show it as they like. No torch."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class State:
    """Where a step stands.

    Attributes:
        step: what is being done, the same words from its first update to its last, such as "heal ffn".
        done, total: in the step's own units (windows, optimiser steps, matrices).
        facts: what else is known, such as `loss`, `tokens` (trained in this step so far) or `item` (at work on now).
        first: nothing was said of this step before.
        seconds: since the step began. left: seconds until it ends at its pace so far, None before that can be known.
        tokens_per_second: None where `tokens` is not told.
    """

    step: str
    done: int
    total: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    first: bool = False
    seconds: float = 0.0
    left: float | None = None
    tokens_per_second: float | None = None


Show = Callable[[State], object]
Report = Callable[[str, int, int], None]  # (what is being done, done, total); every Progress is one
_WITH_ITEMS = ("decompose", "sensitivity", "fit")  # steps whose words end with what they are at


class Progress:
    """Tells a listener about every step: `progress.step("heal ffn")`, then `progress.update(3, 40, loss=4.1)`.

    It can also be called as `progress(what, done, total)`, which names the step anew each time. Pace is reckoned from
    the first update of a step, so that a step resumed in its middle is not taken for a fast one.

    Args:
        show: called with a `State` after each update. clock: seconds, only ever rising.
    """

    def __init__(self, show: Show = lambda state: None, clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._step, self._began = "", clock()
        self._last = 0
        self._anchor: tuple[float, int, int | None] | None = None  # time, done, tokens of the first update

    @classmethod
    def of(cls, report: Report | None) -> Progress:
        """`report` if it is one; else one that calls `report(what, done, total)`, the loss in brackets in the words.
        None tells nobody."""
        if isinstance(report, Progress):
            return report
        if report is None:
            return cls()

        def show(state: State) -> None:
            told = f" (loss {state.facts['loss']:.3f})" if "loss" in state.facts else ""
            report(f"{state.step} {state.facts.get('item', '')}".strip() + told, state.done, state.total)

        return cls(show)

    def step(self, name: str) -> Progress:
        """Begin a step; `update` then speaks of it. Returns itself."""
        self._step, self._began, self._anchor = name, self._clock(), None
        return self

    def update(self, done: int, total: int, **facts: Any) -> None:
        """The step has come to `done` of `total`; a fact that is None is left out."""
        now, first = self._clock(), self._anchor is None
        known = {name: value for name, value in facts.items() if value is not None}
        if self._anchor is None or done < self._last:  # a step that counts from its start again is reckoned anew
            self._anchor = now, done, known.get("tokens")
        self._last = done
        since, begun, read = now - self._anchor[0], done - self._anchor[1], self._anchor[2]
        pace = (known["tokens"] - read) / since if since > 0 and read is not None and "tokens" in known else None
        left = since / begun * (total - done) if begun > 0 else None
        self._show(State(self._step, done, total, known, first, now - self._began, left, pace or None))

    def __call__(self, what: str, done: int, total: int) -> None:
        """The form without named steps: the step is read off the words, as is a loss in brackets behind them."""
        words, _, told = what.partition(" (loss ")
        name, item = next(
            ((kind, words[len(kind) :].strip()) for kind in _WITH_ITEMS if words.startswith(kind)),
            (re.sub(r" \(.*$", "", words), None),
        )
        if name != self._step or self._anchor is None:
            self.step(name)
        loss = float(told.rstrip(")")) if re.fullmatch(r"-?\d+(\.\d+)?\)", told) else None
        self.update(done, total, item=item or None, loss=loss)
