"""Documents from files, directories or the `datasets` library, one string each, and a record of what was read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfold.base.errors import DataError, suggest
from kronfold.data.bad_rows import BadRows, Reading
from kronfold.data.text_files import COMPRESSIONS, ENDINGS, Part, ending, read_file, source_files, text_of

EVALUATION = ("test", "validation")  # splits that a model is measured on, the first that is there
_COMMIT = re.compile(r"@([0-9a-f]{40})(?:/|$)")
_SAVED = ("dataset_dict.json", "state.json")  # a directory made by save_to_disk of the `datasets` library has one


def documents(
    source: str | Path,
    *,
    split: str | Sequence[str] = "train",
    text_column: str = "text",
    max_bad_rows: str | int | None = None,
) -> Texts:
    """The documents of `source`, in a fixed order, read as they are asked for.

    `source`: a .txt file (one document), a .jsonl or .parquet file (one document per row, from `text_column`), any of
    these as .gz or .zst (endings in any case), a directory of them (sorted by name, subdirectories too, nothing
    hidden), a directory made by `save_to_disk` of `datasets`, or, when no such path exists, a `datasets` id. The last
    two may name a split: `ID@SPLIT`, `ID:CONFIG@SPLIT` (or `ID:CONFIG:SPLIT`), `DIRECTORY@SPLIT`.
    `split`: what is read of them where none is named; of several, the first that is there. It does not touch files.
    `text_column`, `max_bad_rows`: see `Reading`. Lone surrogates become U+FFFD.

    Raises DataError when the source is missing, holds no text, is not UTF-8 (with the byte offset and a likely
    encoding), has no column `text_column` (with the columns it has), more rows without text than allowed, an unknown
    ending, or no such split (with the splits it has). The place is checked at the call; its content while reading.
    """
    reading = Reading(text_column, max_bad_rows)
    path = Path(source)
    named = None
    if not path.exists() and "@" in str(source):
        place, _, named = str(source).rpartition("@")
        if _is_saved(Path(place)):
            path = Path(place)
    if _is_saved(path):
        return _saved(path, named or split, reading)
    if path.exists():
        return _local(path, reading)
    if isinstance(source, Path) or _looks_local(source):
        raise DataError(f"{source} does not exist. Give a file, a directory, or a datasets id like 'id:config@split'.")
    return _hub(source, split, reading)


class Texts(Iterator[str]):
    """The documents of a source, to be read once. `record()` says what was read until now."""

    def __init__(self, about: dict[str, Any], bad: BadRows, read: Callable[[], Iterator[Part]], root: str = "") -> None:
        self.about, self.bad, self.root = about, bad, root
        self.count = self.bytes = self.surrogates = 0
        self.complete = False
        self._digest = hashlib.sha256()
        self._parts = self._counted(read)

    def parts(self) -> Iterator[Part]:
        """What is left of the documents, long ones of .txt files in parts, so that little is held at once."""
        return self._parts

    def __next__(self) -> str:
        held = []
        for part in self._parts:
            held.append(part.text)
            if part.ends:
                return "".join(held)
        raise StopIteration

    def record(self) -> dict[str, Any]:
        """What was read: source, split, revision or files, documents, UTF-8 bytes, sha256, rows left out.

        No path of this machine stands in it. `sha256`: of the UTF-8 text; between two documents a byte 0xFF, which no
        text holds. `complete`: false where reading stopped before the end. `replaced_surrogates`: lone surrogates
        that became U+FFFD.
        """
        return {
            **self.about,
            "documents": self.count,
            "bytes": self.bytes,
            "sha256": self._digest.hexdigest(),
            "complete": self.complete,
            **self.bad.record(self.root),
            "replaced_surrogates": self.surrogates,
        }

    def _counted(self, read: Callable[[], Iterator[Part]]) -> Iterator[Part]:
        begins, blank = True, True
        for part in read():
            text, content, replaced = encoded(part.text)
            if begins:
                self._digest.update(b"\xff" if self.count else b"")
                self.count += 1
            self._digest.update(content)
            self.bytes += len(content)
            self.surrogates += replaced
            begins, blank = part.ends, blank and not text.strip()
            yield part._replace(text=text) if replaced else part
        self.bad.finish()
        self.complete = True
        if blank:
            raise DataError(f"{self.bad.source} holds no text. Give a source with at least one non-empty document.")


def encoded(text: str) -> tuple[str, bytes, int]:
    """The text as it can be written, its UTF-8 bytes, and how many lone surrogates became U+FFFD.

    JSON may hold half of a pair of surrogates ("\\ud83d"); both halves side by side are the character they stand for.
    """
    try:
        return text, text.encode(), 0
    except UnicodeEncodeError:
        mended = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return mended, mended.encode(), mended.count("\ufffd") - text.count("\ufffd")


def parts_of(texts: Iterable[str]) -> Iterator[Part]:
    """Documents in parts, whether from a source or any other iterable; lone surrogates become U+FFFD."""
    if isinstance(texts, Texts):
        return texts.parts()
    return (Part(encoded(text)[0], True, None) for text in texts)


def record_of(texts: Iterable[str]) -> dict[str, Any] | None:
    """What was read of a source until now; None for texts that came from elsewhere."""
    return texts.record() if isinstance(texts, Texts) else None


def _looks_local(source: str) -> bool:
    place = source.rpartition("@")[0] or source
    return source.startswith((".", "/", "~")) or ending(place) in ENDINGS or place.lower().endswith(COMPRESSIONS)


def _is_saved(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in _SAVED)


def _local(path: Path, reading: Reading) -> Texts:
    files = source_files(path)
    root = path if path.is_dir() else path.parent
    names = [file.relative_to(root).as_posix() for file in files]
    about = {
        "source": path.resolve().name,
        "files": [{"name": name, "bytes": file.stat().st_size} for name, file in zip(names, files, strict=True)],
    }
    bad = BadRows(str(path), reading.max_bad_rows)

    def read() -> Iterator[Part]:
        for name, file in zip(names, files, strict=True):
            yield from read_file(file, name, reading.text_column, bad)

    return Texts(about, bad, read, root=f"{root}/")


def _saved(path: Path, split: str | Sequence[str], reading: Reading) -> Texts:
    """A directory that `save_to_disk` made: of a dataset, which is one split, or of several by name."""
    import datasets

    try:
        rows: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{path} holds a saved dataset that cannot be read: {_first_line(error)}") from error
    own = str(rows.split) if isinstance(rows, datasets.Dataset) and rows.split else None
    if not isinstance(rows, datasets.Dataset):
        own = _choose(split, list(rows), str(path))
        rows = rows[own]
    elif own:
        own = _choose(split, [own], str(path))
    about = {"source": path.resolve().name, "split": own, "fingerprint": rows._fingerprint}
    bad = BadRows(str(path), reading.max_bad_rows)
    return Texts(about, bad, lambda: _rows(rows, str(path), reading, bad), root=f"{path.parent}/")


@dataclass(frozen=True)
class _HubName:
    """A `datasets` id as it is written: ID, ID:CONFIG, ID@SPLIT, ID:CONFIG@SPLIT or ID:CONFIG:SPLIT."""

    id: str
    config: str | None
    split: str | None

    @classmethod
    def parse(cls, written: str) -> _HubName:
        name, at, after = written.partition("@")
        parts = name.split(":")
        split = after if at else parts[2] if len(parts) == 3 else None
        if len(parts) > 3 or (at and (len(parts) > 2 or not after)) or not parts[0] or "@" in after:
            raise DataError(f"{written} is no datasets id. Write ID, ID@SPLIT, ID:CONFIG or ID:CONFIG@SPLIT.")
        return cls(parts[0], (parts[1] if len(parts) > 1 else "") or None, split or None)


def _hub(source: str, split: str | Sequence[str], reading: Reading) -> Texts:
    import datasets

    name = _HubName.parse(source)
    chosen = name.split or split
    try:
        if not isinstance(chosen, str):
            found = list(datasets.get_dataset_split_names(name.id, name.config))
            chosen = _choose(chosen, found, source)
        rows = datasets.load_dataset(name.id, name.config, split=chosen, streaming=True)
    except DataError:
        raise
    except Exception as error:  # the library raises many kinds, from the network up
        if isinstance(chosen, str) and (found := _splits_of(name)) and chosen not in found:
            _choose(chosen, found, source)
        raise DataError(
            f"{source} is neither an existing path nor a datasets id that can be loaded: "
            f"{_first_line(error)} Check the spelling or the network, or give a local file."
        ) from error
    about = {"source": name.id, "config": name.config, "split": chosen, "revision": _revision(name)}
    bad = BadRows(source, reading.max_bad_rows)
    return Texts(about, bad, lambda: _rows(rows, source, reading, bad))


def _splits_of(name: _HubName) -> list[str]:
    import datasets

    try:
        return list(datasets.get_dataset_split_names(name.id, name.config))
    except Exception:  # then the first error says more
        return []


def _choose(wanted: str | Sequence[str], found: list[str], source: str) -> str:
    """The first of the wanted splits that there is. Raises DataError with those there are."""
    names = [wanted] if isinstance(wanted, str) else wanted
    for name in names:
        if name in found:
            return name
    if isinstance(wanted, str):
        said = f"{source} has no split {wanted!r}. {suggest(wanted, found)}"
    else:
        said = f"{source} has no split {' or '.join(names)} to measure on. It has: {', '.join(found) or 'none'}."
    bare = source.partition("@")[0]
    bare = bare if bare.count(":") < 2 else bare.rpartition(":")[0]
    raise DataError(f"{said} Name one: {bare}@{found[0] if found else 'SPLIT'}.")


def _revision(name: _HubName) -> str | None:
    """The commit of a dataset on the hub, None where `datasets` does not know it."""
    import datasets

    try:
        files = datasets.load_dataset_builder(name.id, name.config).config.data_files or {}
        found = (_COMMIT.search(str(place)) for places in files.values() for place in places)
        return next((match[1] for match in found if match), None)
    except Exception:  # a record may lack it; the text was found
        return None


def _rows(rows: Iterable[dict[str, Any]], source: str, reading: Reading, bad: BadRows) -> Iterator[Part]:
    columns = reading.text_column.split(",")
    entries = iter(rows)
    number = 0
    while True:
        number += 1
        try:
            row = next(entries, None)
        except Exception as error:  # the library raises many kinds, from the network up
            raise DataError(f"{source} cannot be read at row {number}: {_first_line(error)}") from error
        if row is None:
            return
        bad.rows += 1
        if (text := text_of(row, columns, f"{source}, row {number}", bad)) is not None:
            yield Part(text, True, source)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".") + "."
