"""One registry for every kind of named thing: structures, losses, families, schedules."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Generic, TypeVar

from kronfold.base.errors import InputError, suggest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to objects. An entry may be lazy, given as `"module:attribute"`, so that listing imports nothing.

    Raises:
        InputError: on `get` of an unknown name (with the nearest names) or a second entry under one name.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T | str] = {}

    def register(self, name: str, entry: T | str) -> None:
        """Add `entry` (an object, or a lazy `"module:attribute"` string) under `name`."""
        if name in self._entries:
            raise InputError(f"{self.kind} {name!r} is registered already; choose another name.")
        self._entries[name] = entry

    def unregister(self, name: str) -> None:
        """Take the entry called `name` out again."""
        self._entries.pop(name, None)

    def get(self, name: str) -> T:
        """The entry called `name`, imported now if it was lazy."""
        if name not in self._entries:
            raise InputError(f"Unknown {self.kind} {name!r}. {suggest(name, self._entries)}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, attribute = entry.split(":")
            entry = getattr(importlib.import_module(module), attribute)
            self._entries[name] = entry
        return entry

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())
