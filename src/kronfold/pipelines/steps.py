"""The book of finished steps of a long run, so that an interrupted one can go on where it stopped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kronfold.base import processes
from kronfold.base.errors import InputError
from kronfold.base.files import write_json


class StepBook:
    """Results of finished steps by name, in `<work>/steps.json`, written after each step.

    Several processes do each step together; the main one reads and writes the book, and what it found is what counts.

    Attributes:
        resumed: the book was opened to continue an earlier run.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any], steps: dict[str, Any], seconds: float) -> None:
        self.path, self.fingerprint, self.steps = path, fingerprint, steps
        self.resumed = bool(steps) or path.exists()
        self._seconds, self._started = seconds, time.monotonic()

    @classmethod
    def open(cls, work: Path, fingerprint: dict[str, Any], resume: bool, discard: bool = False) -> StepBook:
        """Start a new book in `work` (deleting an unfinished run there if `discard`), or go on with the one there.

        Raises InputError: an unfinished run lies there and `resume` was not asked for; nothing lies there and it was;
        or the one there was started with other options (which are named).
        """
        return processes.on_main(lambda: cls._open(work, fingerprint, resume, discard))

    @classmethod
    def _open(cls, work: Path, fingerprint: dict[str, Any], resume: bool, discard: bool) -> StepBook:
        path = work / "steps.json"
        fingerprint = json.loads(json.dumps(fingerprint))
        if resume:
            if not path.is_file():
                raise InputError(f"There is nothing to resume: {path} does not exist. Run without --resume.")
            old = json.loads(path.read_text(encoding="utf-8"))
            differing = sorted(key for key in fingerprint if fingerprint[key] != old["fingerprint"].get(key))
            if differing:
                raise InputError(
                    f"The unfinished run in {work} was started with other options ({', '.join(differing)}). "
                    "Resume with the same ones, or delete that directory and start anew."
                )
            return cls(path, fingerprint, old["steps"], old["seconds"])
        if work.is_dir() and any(work.iterdir()) and not discard:
            raise InputError(
                f"An unfinished run lies in {work}. Continue it with --resume, or pass --overwrite to start anew."
            )
        shutil.rmtree(work, ignore_errors=True)
        book = cls(path, fingerprint, {}, 0.0)
        book._write()
        return book

    def step(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of step `name`: read from the book, or worked out now and written down."""
        if name not in self.steps:
            found = processes.from_main(work())
            self.steps[name] = json.loads(json.dumps(found))
            if processes.is_main():
                self._write()
        return self.steps[name]

    def add_seconds_from(self, started: float) -> None:
        """Count the time since `started` (a `time.monotonic` value) as part of the run."""
        self._started = started

    def seconds(self) -> float:
        """Wall time of all sessions of this run."""
        return self._seconds + time.monotonic() - self._started

    def _write(self) -> None:
        document = {"fingerprint": self.fingerprint, "steps": self.steps, "seconds": self.seconds()}
        write_json(self.path, document)
