"""Rows of a text source that hold no text: skipped and counted, up to a limit."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kronfold.base.errors import DataError, InputError
from kronfold.options.shared import ReadsText

_ROWS = 100
_SHARE = 0.01


@dataclass(frozen=True)
class Reading:
    """How text sources are read.

    Attributes:
        text_column: column of .jsonl, .parquet and `datasets` rows; several, separated by commas: the first that is
            there.
        max_bad_rows: the most rows without text (not JSON, null, no such column, not UTF-8) that are skipped, as a
            number ("20") or a share of the rows ("1%"). None: 100 rows or 1 % of the rows, whichever is more, and
            always fewer than half.

    Raises InputError for a limit that is neither, or a column without a name.
    """

    text_column: str = "text"
    max_bad_rows: str | int | None = None

    @classmethod
    def of(cls, options: ReadsText) -> Reading:
        """As the options of a job say. Raises InputError."""
        return cls(options.text_column, options.max_bad_rows)

    def __post_init__(self) -> None:
        if not all(name.strip() for name in self.text_column.split(",")):
            raise InputError(f"--text-column {self.text_column!r} names no column. Give its name, such as content.")
        if self.max_bad_rows is None:
            return
        written = str(self.max_bad_rows).strip()
        if not re.fullmatch(r"\d{1,18}|\d{1,3}(\.\d{1,6})?\s*%", written) or (
            written.endswith("%") and float(written[:-1]) > 100
        ):
            raise InputError(
                f"--max-bad-rows {written!r} is neither a number of rows such as 20 nor a share such as 1%."
            )


class BadRows:
    """Counts the rows of a source and those without text. Raises DataError, with the first of them, past the limit."""

    def __init__(self, source: str, limit: str | int | None = None) -> None:
        self.source = source
        self.rows = 0
        self.skipped: Counter[str] = Counter()
        self.first = ""
        written = "" if limit is None else str(limit).strip()
        self.share = float(written[:-1]) / 100 if written.endswith("%") else None
        self.most = int(written) if written and self.share is None else None

    def skip(self, why: str, message: str) -> None:
        """Count a row that is left out because it is `why`; `message` names file and row."""
        self.first = self.first or message
        self.skipped[why] += 1
        # A share is known at the end only; on the way it counts from where it is more than a few rows.
        share = _SHARE if self.share is None else self.share
        if self.skipped.total() > (max(_ROWS, share * self.rows) if self.most is None else self.most):
            self._refuse()

    def finish(self) -> None:
        """Check what can be told only when all was read."""
        count = self.skipped.total()
        if self.most is not None or not count:
            return
        if 2 * count >= self.rows if self.share is None else count > self.share * self.rows:
            self._refuse()

    def _refuse(self) -> None:
        allowed = f"{self.most:,}" if self.most is not None else f"{self.share:.4%}" if self.share is not None else ""
        allowed = allowed or f"{_ROWS} or {_SHARE:.0%} of them, and fewer than half"
        raise DataError(
            f"{self.first} {self.skipped.total():,} of {self.rows:,} rows read from {self.source} hold no text "
            f"({self.why()}); allowed are {allowed}. Mend the file, or allow more with --max-bad-rows."
        )

    def why(self) -> str:
        return ", ".join(f"{why} {count:,}" for why, count in self.skipped.most_common())

    def record(self, root: str = "") -> dict[str, Any]:
        """For result documents; `root` is taken out of the message, so that no path of a machine is published."""
        if not self.skipped:
            return {"skipped_rows": 0}
        first = self.first.replace(root, "") if root else self.first
        return {"skipped_rows": self.skipped.total(), "skipped_for": dict(self.skipped), "first_skipped": first}
