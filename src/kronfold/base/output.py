"""Where a result goes: what stands there, what of it may be replaced, and the one step that puts the new one there.

The rules. What stands at an output without kronfold having written it is never removed, and neither is what was not
there when the work began. A finished result has a name at every moment: its own, or one beside it that is told.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kronfold.base.errors import OutputError
from kronfold.base.files import UNFINISHED, explain_write_errors, sync
from kronfold.base.marker import is_empty, kind_of, seal, standing


class Output:
    """A directory or a file that a result will be, from the first check to the last rename.

    Attributes:
        path: as it was given. place: the same, or where it leads if it is a symbolic link.
        before: what stood there at first.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        overwrite: bool = False,
        inputs: Iterable[str | Path | None] = (),
        is_file: bool = False,
        continues: str | None = None,
        stays: bool = False,
    ) -> None:
        """Refuse early what could not be written or must not be replaced; nothing is changed.

        Args:
            overwrite: a result of kronfold's there may be replaced.
            inputs: what the job reads (names that are no paths are passed by); none of it may lie in the output.
            is_file: the result is one file, not a directory.
            continues: a finished result of this kind of job may stand there, to be added to.
            stays: what stands there is not to be replaced, only tidied up after.

        Raises OutputError.
        """
        self.path, self.is_file, self.overwrite = Path(path), is_file, overwrite
        try:
            self.place = followed(self.path)
            self._check_name()
            self.before = standing(self.place, closely=overwrite or continues is not None)
            self.continued = continues is not None and kind_of(self.place) == continues
            if not stays:
                self._check_standing()
                self._check_inputs(inputs)
                self._check_place()
        except (OSError, ValueError) as error:
            if isinstance(error, OutputError):
                raise
            raise OutputError(f"Cannot write to {path}: {getattr(error, 'strerror', None) or error}.") from error

    def _check_name(self) -> None:
        here = Path.cwd()
        place = Path(os.path.realpath(self.place))
        if place == here:
            raise OutputError(
                f"-o {self.path} is the current directory, which cannot be replaced. Name a new one inside it."
            )
        if place in here.parents:
            raise OutputError(f"-o {self.path} holds the current directory and cannot be replaced. Name another one.")
        if os.path.islink(self.place):
            raise OutputError(f"-o {self.path} is a symbolic link that leads round in a circle. Name another place.")
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(self.place.with_name(f".{self.place.name}.12345678{UNFINISHED}"))  # a name too long says so here

    def _check_standing(self) -> None:
        kind, foreign = self.before.kind, self.before.foreign
        if kind == "nothing":
            return
        if self.is_file and self.place.is_dir():
            raise OutputError(f"{self.path} is a directory, and the result is one file. Name a file, e.g. in it.")
        if kind == "empty" or (self.continued and not foreign):
            return
        if not self.overwrite and not self.continued:
            raise OutputError(
                f"{self.path} exists already. Choose another -o/--output, or pass --overwrite to replace it."
            )
        if kind == "other":
            raise OutputError(
                f"{self.path} exists already and is not a result of kronfold's, which alone --overwrite replaces. "
                "Choose another -o/--output, or remove it yourself."
            )
        if foreign:
            raise OutputError(
                f"{self.path} holds what kronfold did not write: {_named(foreign)}. Only what it wrote is replaced. "
                "Move these files away, or choose another -o/--output."
            )

    def _check_inputs(self, inputs: Iterable[str | Path | None]) -> None:
        if held := held_within(self.place, inputs):
            raise OutputError(
                f"{self.path} is or holds {held}, which this job reads, so it cannot be replaced. Choose another "
                "-o/--output."
            )

    def _check_place(self) -> None:
        parent = self.place.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(
                f"Cannot write to {self.path}: {parent} is a file, not a directory. Choose another -o/--output."
            )
        inside = f"Name a directory inside it: -o {self.path / 'result'}."
        if self.before.kind != "nothing" and not self.is_file and _is_mount(self.place):
            raise OutputError(
                f"{self.path} is a mount point, so a finished result cannot take its place in one step. {inside}"
            )
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            hint = f" {inside}" if self.before.kind == "empty" else ""
            raise OutputError(
                f"Cannot write to {self.path}: {error.strerror} in {parent}. Choose another -o/--output or fix the "
                f"permissions.{hint}"
            ) from error

    def may_replace(self) -> bool:
        """Whether what stands there now is what stood there at first, and may go."""
        now = standing(self.place, closely=self.before.kind == "own")
        if now.kind in ("nothing", "empty"):
            return True
        allowed = now.kind == "own" and (self.overwrite or self.continued)
        return allowed and not now.foreign and now.state == self.before.state

    def hand_over(self, made: Path) -> None:
        """Let `made` take the name of the output. What stood there, if anything, then stands at `made`.

        Raises OutputError, which says where the result is, when it cannot or must not: something else has come to
        stand there meanwhile.
        """
        if not self.may_replace():
            self._keep_beside(made)
        try:
            if not os.path.lexists(self.place) or is_empty(self.place):
                _move(made, self.place)
            elif exchange(made, self.place):
                if self.before.state and standing(made, closely=True).state != self.before.state:
                    exchange(made, self.place)  # it changed in the last moment
                    self._keep_beside(made)
            elif self.is_file:
                os.replace(made, self.place)
            else:
                old = self.place.with_name(f".{self.place.name}.old-{os.getpid()}")
                self.place.rename(old)
                try:
                    made.rename(self.place)
                except OSError:
                    old.rename(self.place)
                    raise
                old.rename(made)
            sync(self.place.parent)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                self._keep_beside(made)
            raise OutputError(
                f"The result is finished and lies in {made}; it could not be renamed to {self.path}: "
                f"{error.strerror}. Move it where you want it."
            ) from error

    def _keep_beside(self, made: Path) -> None:
        for number in range(1, 1000):
            beside = self.place.with_name(f"{self.place.name}.new{number if number > 1 else ''}")
            if os.path.lexists(beside):
                continue
            try:
                _move(made, beside)
            except OSError:
                beside = made
            raise OutputError(
                f"{self.path} came to be or was changed while this job ran, so it was left alone. The finished result "
                f"is in {beside}."
            )

    def recover(self) -> None:
        """Clear up after killed jobs: an old result between two renames gets its name back, leftovers go.

        0.3 and file systems without an exchange of names move the old result aside for a moment. Raises OSError.
        """
        if not self.place.parent.is_dir():
            return
        name = re.escape(self.place.name)
        for aside in sorted(self.place.parent.iterdir()):
            if re.fullmatch(rf"\.{name}\.old-\d+", aside.name):
                if not os.path.lexists(self.place):
                    aside.rename(self.place)
                elif (found := standing(aside, closely=True)).kind == "empty" or (
                    found.kind == "own" and not found.foreign
                ):
                    remove(aside)
            elif re.fullmatch(rf"\.{name}\.\w+{re.escape(UNFINISHED)}", aside.name):
                with contextlib.suppress(OSError, OutputError), Lock(aside / "lock" if aside.is_dir() else aside):
                    remove(aside)  # nobody holds it, so its writer is gone

    def write(self, text: str) -> None:
        """Write the one file that the result is. Raises OutputError; what stood there before is then unchanged."""
        with explain_write_errors(self.path):
            self.place.parent.mkdir(parents=True, exist_ok=True)
            self.recover()
            handle, name = tempfile.mkstemp(prefix=f".{self.place.name}.", suffix=UNFINISHED, dir=self.place.parent)
            os.close(handle)
            with Lock(Path(name)):
                try:
                    Path(name).write_text(text, encoding="utf-8")
                    os.chmod(name, 0o644)
                    sync(name)
                    self.hand_over(Path(name))
                finally:
                    Path(name).unlink(missing_ok=True)

    def write_json(self, document: Mapping[str, Any]) -> None:
        """`write` of a JSON document, indented, keys in the order given."""
        self.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def check_output(path: str | Path, overwrite: bool = False, allow_existing: bool = False) -> Path:
    """`Output` for the checks alone; an empty directory is as good as nothing. Returns the path. Raises OutputError."""
    if not (allow_existing and os.path.lexists(path)):
        Output(path, overwrite=overwrite)
    return Path(path)


@contextlib.contextmanager
def atomic_directory(
    path: str | Path, overwrite: bool = False, kind: str = "files", first: bool = False
) -> Iterator[Path]:
    """Yield a temporary directory beside `path`; on success it is sealed and takes that name, on failure it vanishes.

    For what several processes may make at once, such as an entry of a cache: with `first` the one that is done first
    counts, and the others' are dropped. Raises OutputError.
    """
    output = Output(path, overwrite=overwrite)
    place = output.place
    with explain_write_errors(path):
        place.parent.mkdir(parents=True, exist_ok=True)
        output.recover()
        scratch = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=UNFINISHED, dir=place.parent))
        lock = Lock(scratch / "lock")
        try:
            made = scratch / "made"
            made.mkdir()
            yield made
            seal(made, kind)
            if not (first and not output.may_replace()):
                output.hand_over(made)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            lock.release()


def followed(path: str | Path) -> Path:
    """The path, or where it leads if it is a symbolic link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)


def held_within(place: Path, inputs: Iterable[str | Path | None]) -> str | None:
    """The first of `inputs` that is `place` or lies in it."""
    whole = Path(os.path.realpath(place))
    for source in inputs:
        if isinstance(source, (str, os.PathLike)) and source and os.path.lexists(source):
            path = Path(os.path.realpath(source))
            if path == whole or whole in path.parents:
                return str(source)
    return None


def _named(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _is_mount(place: Path) -> bool:
    """Whether a file system begins at `place`; a directory bound there from the same one shows in /proc only."""
    if os.path.ismount(place):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    points = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), line.split(" ")[4]) for line in lines)
    return os.path.realpath(place) in points


def _move(source: Path, target: Path) -> None:
    """Rename; a file never replaces one (a directory replaces at most an empty one). Raises OSError."""
    if not source.is_dir():
        try:
            os.link(source, target)
            source.unlink()
            return
        except OSError as error:
            if error.errno == errno.EEXIST or os.path.lexists(target):
                raise
    source.rename(target)


_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE, AT_FDCWD


@cache
def _renameat2() -> Any:
    """The system call by which two names change places, None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step. False where the system or the file system cannot. Raises OSError."""
    call = _renameat2()
    if call is None:
        return False
    sys.audit("kronfold.exchange", str(one), str(other))
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        sys.audit("kronfold.exchanged", str(one), str(other))
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one))


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _forget_locks() -> None:
    """In a child: a helper process that outlives a killed job must not hold its lock."""
    for lock in _held:
        lock.release()


os.register_at_fork(after_in_child=_forget_locks)


class Lock:
    """A file that one process holds at a time; the system lets go of it when that process ends, however it ends.

    Raises OutputError, with the number of the process, when another one holds it; or, with `wait`, comes after it.
    """

    def __init__(self, path: Path, wait: bool = False) -> None:
        import fcntl

        self.path, self._handle = path, -1
        while True:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except OSError as error:
                holder = os.pread(self._handle, 32, 0).decode(errors="replace").strip() or "another one"
                os.close(self._handle)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                raise OutputError(
                    f"Process {holder} is at work in {path.parent}. Wait for it, end it, or choose another -o/--output."
                ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(self._handle)):
                    _held.add(self)
                    return
            os.close(self._handle)  # it was removed by the one that held it before: take the new one

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def note_holder(self) -> None:
        """Write this process's number into the file."""
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1
