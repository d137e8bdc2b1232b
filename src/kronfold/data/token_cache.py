"""Token ids kept on disk by content: the same text under the same tokenizer is tokenised once per machine.

An entry is a .npy file (1-D, uint16 or uint32) with the SHA-256 of its numbers behind them, named by the hash of what
it was made from, in `$KRONFOLD_CACHE/tokens` (`~/.cache/kronfold/tokens`). It is written under another name first, so
several processes may share the place, and what does not match its own hash is made anew. Deleting the directory is
always safe. `$KRONFOLD_TOKEN_CACHE_GB` bounds it (8 by default; the entries unused for longest go first); 0 switches
it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import numpy as np

from kronfold.base.cache import cache_directory
from kronfold.base.errors import InputError
from kronfold.base.files import UNFINISHED, atomic_file

LIMIT = "KRONFOLD_TOKEN_CACHE_GB"
_USUAL_GB = 8.0
_BETWEEN_TRIMS = 1 << 28  # bytes written before the whole is measured again
_ABANDONED = 86_400.0  # seconds after which an unfinished file has no writer any more
_DIGEST = hashlib.sha256().digest_size


def token_cache() -> TokenCache | None:
    """The cache of this machine, None where it is switched off. Raises InputError for a limit that is no number."""
    text = os.environ.get(LIMIT) or str(_USUAL_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        raise InputError(f"${LIMIT} is {text!r}; give a number of gigabytes, 0 for no cache.") from None
    return TokenCache(cache_directory() / "tokens", int(gigabytes * 1e9)) if gigabytes > 0 else None


class TokenCache:
    """Arrays of token ids by key, at most about `limit` bytes. A place that cannot be written keeps nothing."""

    def __init__(self, place: Path, limit: int) -> None:
        self.place = place
        self.limit = limit
        self._written = _BETWEEN_TRIMS  # the first entry of a process looks at the whole

    def get(self, key: str, dtype: np.dtype) -> np.ndarray | None:
        """The entry, mapped into memory; None when there is none, or a damaged one."""
        path = self._path(key)
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            with path.open("rb") as file:
                file.seek(-_DIGEST, os.SEEK_END)
                digest = file.read()
            if ids.ndim != 1 or ids.dtype != dtype or hashlib.sha256(ids.data).digest() != digest:
                return None
            os.utime(path)  # used now; the oldest go first
        except (OSError, ValueError, EOFError):
            return None
        return ids

    def put(self, key: str, ids: np.ndarray) -> None:
        """Keep `ids` (1-D). Nothing happens when it cannot be written: the caller has them anyway."""
        try:
            with atomic_file(self._path(key)) as file:
                np.save(file, ids, allow_pickle=False)
                file.write(hashlib.sha256(ids.data).digest())
        except OSError:
            return
        self._written += ids.nbytes
        if self._written >= _BETWEEN_TRIMS:
            self._written = 0
            self.trim()

    def trim(self) -> None:
        """Delete the entries unused for longest until the rest fits the limit, and what killed writers left."""
        now, found = time.time(), []
        for path in self.place.glob("*"):
            with contextlib.suppress(OSError):  # another process may delete it meanwhile
                stat = path.stat()
                if path.suffix == ".npy":
                    found.append((stat.st_mtime, stat.st_size, path))
                elif path.suffix == UNFINISHED and now - stat.st_mtime > _ABANDONED:
                    path.unlink()
        excess = sum(size for _, size, _ in found) - self.limit
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= size

    def _path(self, key: str) -> Path:
        return self.place / f"{key}.npy"
