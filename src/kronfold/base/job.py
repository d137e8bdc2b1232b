"""One job that writes an output: checked before, done in steps beside it, resumed after a kill, handed over at the end.

    with Job.open(output, "heal", inputs=[student, teacher], resume=resume, overwrite=overwrite) as job:
        ...                                     # load and check; nothing is written yet
        if job.begin({"seed": seed}, student=student, teacher=teacher):
            return job.document()               # all was done, only the tidying was left
        before = job.step("before", measure)    # once, however often the job is killed
        model.save_pretrained(job.result)
        job.finish(document)

Everything happens in `<output>.partial`. Its `job.json` is the book: what the job is of, and which steps are done with
the hashes of the files they left. `result` in it takes the output's name at the end. The book is the only mark of work
done, and it is struck out, by another name, before anything that it speaks of is removed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kronfold.base import processes, results
from kronfold.base.errors import CheckpointError, InputError, Interrupted, OutputError
from kronfold.base.files import explain_write_errors, files_below, sha256_of, sha256_of_content, write_json
from kronfold.base.marker import BOOK, MARKER, faults_in, is_sealed, read_marker, seal, sealed
from kronfold.base.output import Lock, Output, followed, held_within, remove

logger = logging.getLogger(__name__)

T = TypeVar("T")

STRUCK, LOCK, RESULT = "job.removed", "lock", "result"
_SCHEMA = "kronfold/job"
_OF_03 = ("steps.json", "heal.json", "settings.json", "manifest.json")  # its books, one for each kind of job


class Job:
    """One job in progress. Several processes may do it together: all call the methods alike, and the main one writes.

    Attributes:
        kind: the command. output: where the result goes. work: the directory beside it. result: in it, what becomes
            the output.
        steps: results of the finished steps by name. damaged: names of those that are done again, because files they
            left are not what they were. resumed: this continues an earlier session.
        checks: called with `result` once it is written; one that raises keeps it from being handed over.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        inputs: Iterable[str | Path | None],
        resume: bool,
        overwrite: bool,
        resumable: bool,
        grows: bool,
        apart: Iterable[str | Path],
        checks: Iterable[Callable[[Path], object]],
        together: bool,
    ) -> None:
        self.kind, self.resume, self.overwrite, self.resumable, self.grows = kind, resume, overwrite, resumable, grows
        self.inputs = [str(source) for source in inputs if isinstance(source, (str, os.PathLike))]
        self.checks, self.together = list(checks), together
        self.steps: dict[str, Any] = {}
        self.damaged: list[str] = []
        self.resumed = self.begun = self.finished = self._anew = False
        self._book: dict[str, Any] = {}
        self._lock: Lock | None = None
        self._started = time.monotonic()
        place = followed(path)
        self.work = place.with_name(place.name + ".partial") if place.name else place
        self.result = self.work / RESULT
        for source in apart:
            parent = next(parent for parent in place.absolute().parents if parent.exists())
            if Path(source).is_dir() and held_within(Path(source), [parent]):
                raise OutputError(f"-o {path} lies in {source}, which is read as a whole. Choose a place outside it.")
        book = self._read_book()
        left = book is not None and _marked(place) == book["id"]  # killed after the result got its name
        if resume and left and not grows:
            self.output = Output(path, stays=True)
        else:
            self.output = Output(path, overwrite=overwrite, inputs=inputs, continues=kind if grows and resume else None)
        if (self.work / LOCK).exists():
            Lock(self.work / LOCK).release()  # raises when another process holds it
        self._check_work(book, left)

    @classmethod
    def open(
        cls,
        output: str | Path,
        kind: str,
        *,
        inputs: Iterable[str | Path | None] = (),
        resume: bool = False,
        overwrite: bool = False,
        resumable: bool = True,
        grows: bool = False,
        apart: Iterable[str | Path] = (),
        checks: Iterable[Callable[[Path], object]] = (),
        together: bool = False,
    ) -> Job:
        """Check everything that can be checked before any work; nothing is changed.

        Args:
            inputs: paths that the job reads; none of them may lie where something is replaced.
            resumable: False for a job that is done in one go: what a killed one left is then cleared away unasked.
            grows: `resume` may add to a result that is finished.
            apart: directories that are read as a whole, so that the output must not lie in them.
            together: all processes under a launcher do this job as one.

        Raises OutputError: the output is taken, cannot be written, or an unfinished job lies beside it. InputError:
        there is nothing to resume. CheckpointError: what lies there cannot be resumed.
        """
        given, places = list(inputs), list(apart)

        def make() -> Job:
            return cls(output, kind, given, resume, overwrite, resumable, grows, places, checks, together)

        return processes.on_main(make) if together else make()

    def _on_main(self, work: Callable[[], T]) -> T:
        return processes.on_main(work) if self.together else work()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "checks": []}

    # --- before the work --------------------------------------------------------------------------------------------

    def _check_work(self, book: dict[str, Any] | None, left: bool) -> None:
        """Whether what lies in the work directory can be resumed or may go. Raises OutputError, InputError."""
        work = self.work
        if held := held_within(work, self.inputs):
            raise OutputError(
                f"This job works in {work} and empties it, and it reads {held}. Choose another -o/--output."
            )
        if held_within(work, [Path.cwd()]):
            raise OutputError(f"This job would work in {work}, which holds the current directory. Go elsewhere first.")
        names = _names(work)
        if book is None and names and STRUCK not in names:
            older = any(name in (BOOK, *_OF_03) or name.startswith("checkpoint-") for name in names)
            if not older:
                raise OutputError(
                    f"This job works in {work}, and what lies there is not kronfold's: {', '.join(names[:5])}. Move it "
                    "away, or choose another -o/--output."
                )
            if self.resume:
                raise CheckpointError(
                    f"The unfinished run in {work} is not one that this version can resume (it has no {BOOK} that can "
                    "be read; 0.3 wrote none). Start anew with --overwrite."
                )
        open_job = bool(names) and STRUCK not in names and not left and (book is None or book["resumable"])
        if self.resume:
            growing = self.grows and self.output.continued
            if not (open_job or left or growing):
                raise InputError(f"There is nothing to resume: {work} does not exist. Run without --resume.")
            if open_job and book is not None and book["kind"] != self.kind:
                raise CheckpointError(
                    f"The unfinished run in {work} is of `kronfold {book['kind']}`. Resume it with that command, or "
                    "start anew with --overwrite."
                )
        elif open_job and not self.overwrite:
            raise OutputError(
                f"An unfinished run lies in {work}. Continue it with --resume, or pass --overwrite to start anew."
            )

    def _is_left(self, book: dict[str, Any] | None) -> bool:
        """Whether the job of `book` is done: what stands at the output is its result."""
        return book is not None and _marked(self.output.place) == book["id"]

    def _read_book(self) -> dict[str, Any] | None:
        for name in (STRUCK, BOOK):
            try:
                book = json.loads((self.work / name).read_text(encoding="utf-8"))
                whole = {"kind", "id", "resumable", "fingerprint", "steps", "seconds", "hashed"} <= set(book)
                return book if book["schema"] == _SCHEMA and whole and is_sealed(book) else None
            except (OSError, ValueError, TypeError, KeyError):
                continue
        return None

    def begin(self, facts: Mapping[str, Any] | None = None, **read: str | Path | None) -> bool:
        """Everything is checked: take the work directory, and go on with what lies there or start anew.

        Args:
            facts: what must be equal when the job is resumed, JSON at heart.
            read: files and directories by name whose whole content must be; what is no path here is passed by.

        Returns True when the job turns out to be done already: a killed session got as far as the last rename.

        Raises OutputError: another process is at work there, or the place cannot be written. CheckpointError: what lies
        there is of other facts, which are named.
        """
        state = self._on_main(lambda: self._begin(facts or {}, read))
        self.steps, self.resumed, self.finished = state
        self.begun = True
        return self.finished

    def _begin(self, facts: Mapping[str, Any], read: Mapping[str, Any]) -> tuple[dict[str, Any], bool, bool]:
        with explain_write_errors(self.work):
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.work / LOCK)
            try:
                self._lock.note_holder()
                return self._begin_locked(facts, read)
            except BaseException:
                with contextlib.suppress(OSError):
                    if self._anew:
                        self._clear()
                self._let_go()
                raise

    def _begin_locked(self, facts: Mapping[str, Any], read: Mapping[str, Any]) -> tuple[dict[str, Any], bool, bool]:
        book = self._read_book()
        left = self._is_left(book)
        self._check_work(book, left)  # another process may have been here since
        hashed: dict[str, Any] = dict(book["hashed"]) if book else {}
        fingerprint = {"kronfold": results.versions().get("kronfold"), **facts}
        if self.resumable:
            own = (self.output.place, self.work)
            fingerprint |= {name: sha256_of_content(source, hashed, own) for name, source in read.items()}
        fingerprint = json.loads(json.dumps(fingerprint))
        left = left and not self.grows  # one that grows goes on from the result itself
        going_on = self.resume and book is not None and not (self.work / STRUCK).exists() and not self._is_left(book)
        if book is not None and self.resume and (going_on or left):
            self._check_same(book["fingerprint"], fingerprint, self.work)
        self.output.recover()
        if left and self.resume:
            return {}, True, True
        if going_on:
            assert book is not None
            self._book = {**book, "hashed": hashed}
            if self.output.continued and not self.result.exists():
                self._grow(fingerprint)  # killed while it linked
            self._take_stock()
            return {name: step["value"] for name, step in self._book["steps"].items()}, True, False
        self._anew = True
        self._clear()
        self._book = {
            "schema": _SCHEMA, "kind": self.kind, "id": uuid.uuid4().hex, "resumable": self.resumable,
            "fingerprint": fingerprint, "steps": {}, "seconds": 0.0, "hashed": hashed,
        }  # fmt: skip
        self._write()
        if self.resume and self.output.continued:
            self._grow(fingerprint)
            self._write()
        self.result.mkdir(exist_ok=True)
        return {name: step["value"] for name, step in self._book["steps"].items()}, bool(self._book["steps"]), False

    def _check_same(self, before: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
        differing = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if not differing:
            return
        told = []
        for key in differing:
            was, is_now = repr(before.get(key)), repr(now.get(key))
            if max(len(was), len(is_now)) <= 40:
                told.append(f"{key} was {was} and is now {is_now}")
        raise CheckpointError(
            f"The unfinished run in {place} was started with other options ({', '.join(differing)})"
            f"{': ' if told else ''}{'; '.join(told)}. Resume with the same ones, or start anew with --overwrite."
        )

    def _take_stock(self) -> None:
        """Forget the steps whose files are not what they left, and remove what a killed writer was at."""
        for name, step in list(self._book["steps"].items()):
            if faults := faults_in(self.work, step["files"]):
                logger.warning("Step %r of the unfinished run is done again: %s.", name, "; ".join(faults[:3]))
                del self._book["steps"][name]
                self.damaged.append(name)
        for name in files_below(self.work):
            last = name.rpartition("/")[2]
            if last.startswith(".") and name.startswith((f"{RESULT}/", ".")):
                (self.work / name).unlink()
        self.result.mkdir(exist_ok=True)
        self._write()

    def _grow(self, fingerprint: Mapping[str, Any]) -> None:
        """Go on with a finished result: its files are linked, not copied, and never written in place."""
        place = self.output.place
        before = read_marker(place)
        self._check_same(before["fingerprint"], fingerprint, place)
        if faults := faults_in(place):
            raise CheckpointError(f"{place} cannot be added to, it is damaged: {'; '.join(faults[:3])}.")
        linked = self.work / "linked"
        if linked.exists():
            remove(linked)
        shutil.copytree(place, linked, copy_function=_link)
        (linked / MARKER).unlink()
        linked.rename(self.result)
        self._book["steps"], self._book["seconds"] = before["steps"], before["seconds"]

    # --- during the work --------------------------------------------------------------------------------------------

    def step(self, name: str, do: Callable[[], Any], keeps: Iterable[Path] = ()) -> Any:
        """The result of step `name`, as JSON gives it back: from the book, or worked out now and written down.

        Several processes do each step together; what the main one found is what counts.

        Args:
            keeps: files and directories in `work` that the step leaves; should one be damaged, the step is done again.
        """
        if name not in self.steps:
            found = processes.from_main(do()) if self.together else do()
            self.steps[name] = json.loads(json.dumps(found))
            if not self.together or processes.is_main():
                self._book["steps"][name] = {"value": self.steps[name], "files": self._listed(keeps)}
                self._write()
        return self.steps[name]

    def unlisted(self) -> Iterator[Path]:
        """The files in the work directory that no step has left so far; looked for when they are asked for."""
        listed = {BOOK, LOCK, *(file for step in self._book["steps"].values() for file in step["files"])}
        yield from (self.work / name for name in files_below(self.work) if name not in listed)

    def release(self, name: str, *paths: Path) -> None:
        """Remove files or directories that step `name` left and nobody needs any more."""

        def work() -> None:
            files = self._book["steps"][name]["files"]
            kept = {f: facts for f, facts in files.items() if not {self.work / f, *(self.work / f).parents} & {*paths}}
            if kept != files:
                self._book["steps"][name]["files"] = kept
                self._write()
            for path in paths:
                if path.exists():
                    remove(path)

        self._on_main(work)

    def seconds(self) -> float:
        """Wall time of all sessions of this job."""
        return self._book.get("seconds", 0.0) + time.monotonic() - self._started

    def _listed(self, keeps: Iterable[Path]) -> dict[str, Any]:
        files = {}
        for path in keeps:
            for name in files_below(path) if path.is_dir() else [""]:
                file = path / name if name else path
                facts = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
                files[str(file.relative_to(self.work))] = facts
        return files

    def _write(self) -> None:
        book = {key: value for key, value in self._book.items() if key != "seal"}
        write_json(self.work / BOOK, sealed({**book, "seconds": round(self.seconds(), 3)}))

    # --- after the work ---------------------------------------------------------------------------------------------

    def finish(self, document: Mapping[str, Any] | None = None, name: str = "results.json") -> None:
        """Write the document into the result, check and seal it, give it the output's name, and tidy up.

        Raises OutputError, which says where the result is if it could not be handed over; whatever a check raises.
        """
        self._on_main(lambda: self._finish(document, name))
        self.finished = True

    def _finish(self, document: Mapping[str, Any] | None, name: str) -> None:
        if document is not None:
            write_json(self.result / name, document)
        for check in self.checks:
            check(self.result)
        kept = {key: self._book[key] for key in ("fingerprint", "steps")} | {"seconds": self.seconds()}
        with explain_write_errors(self.output.path):
            seal(self.result, self.kind, id=self._book["id"], document=name, **(kept if self.grows else {}))
            try:
                self.output.hand_over(self.result)
            except OutputError:
                self.finished = not self.result.exists()  # it has another name now
                if not self.finished:
                    self.resumable = self._book["resumable"] = True  # it is all there is: no later job clears it away
                    self._write()
                raise

    def document(self) -> dict[str, Any]:
        """The document of the result that stands at the output."""
        path = self.output.place / read_marker(self.output.place)["document"]
        return json.loads(path.read_text(encoding="utf-8"))

    def discard(self) -> None:
        """The job came to nothing: whatever it did is removed when it is left."""
        self.resumable = False

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._lock is not None:
            worth = self.resumable and (self.steps or set(files_below(self.work)) - {BOOK, LOCK})  # to go on from
            try:
                if self.finished or (error is not None and not worth):
                    with contextlib.suppress(OSError, OutputError):  # what stays is cleared away by the next job here
                        self._clear()
            finally:
                self._let_go()
        if isinstance(error, Interrupted) and self.begun and self.work.exists():
            error.kept = self.work

    def _clear(self) -> None:
        """Empty the work directory. The book is struck out first and goes last; neither takes room on a full disk."""
        if not _names(self.work):
            return
        with contextlib.suppress(FileNotFoundError):
            (self.work / BOOK).replace(self.work / STRUCK)
        (self.work / STRUCK).touch()
        for path in self.work.iterdir():
            if path.name not in (STRUCK, LOCK):
                remove(path)
        (self.work / STRUCK).unlink()

    def _let_go(self) -> None:
        """Give up the lock, and the work directory if nothing is in it."""
        if self._lock is None:
            return
        with contextlib.suppress(OSError):
            if not _names(self.work):
                for path in self.work.iterdir():  # the lock, and what a killed writer of the book left
                    path.unlink()
                self.work.rmdir()
        self._lock.release()
        self._lock = None


def _names(work: Path) -> list[str]:
    """What lies in a work directory, but for the lock and what a killed writer of the book left."""
    if not work.is_dir():
        return []
    return sorted(path.name for path in work.iterdir() if path.name != LOCK and not path.name.startswith(f".{BOOK}."))


def _marked(place: Path) -> str | None:
    """The job that wrote what stands at `place`."""
    try:
        return read_marker(place).get("id")
    except CheckpointError:
        return None


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
