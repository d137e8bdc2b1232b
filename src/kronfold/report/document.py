"""Reading a result document: the schema is checked here once; tables and page ask it the same questions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kronfold.base.errors import InputError
from kronfold.base.results import SCHEMA_VERSION
from kronfold.report.numbers import known

Document = Mapping[str, Any]

_REQUIRED = {
    "run": ("model", "recipe", "protocol", "teacher", "held_parameters", "stages"),
    "plan": ("held_parameters", "teacher_parameters", "rows"),
    "plan-diff": ("a", "b", "rows"),
    "compare": ("model", "teacher", "controls", "rows", "protocol", "data"),
}
_WRITTEN_BY = {
    "run": "the results.json that `kronfold run` or `kronfold demo` wrote",
    "plan": "the document that `kronfold plan --json` prints",
    "plan-diff": "the document that `kronfold plan --diff A B --json` prints",
    "compare": "the results.json that `kronfold compare` wrote",
}


def check_document(document: Any, kind: str) -> None:
    """Make sure `document` is a result of this `kind` ("run" or "plan") in a version this kronfold reads.

    Raises:
        InputError: another schema, another version, or keys missing; says what was found and what is read.
    """
    reads = f"this version of kronfold reads 'kronfold/{kind}', schema_version {SCHEMA_VERSION}"
    if not isinstance(document, Mapping):
        raise InputError(f"A result document must be a JSON object, but this is a {type(document).__name__}; {reads}.")
    schema, version = document.get("schema"), document.get("schema_version")
    if schema != f"kronfold/{kind}":
        raise InputError(f"The result document has schema {schema!r}; {reads}. Give {_WRITTEN_BY[kind]}.")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        step = "Upgrade kronfold to read it." if newer else f"Give {_WRITTEN_BY[kind]}."
        raise InputError(f"The result document has schema_version {version!r}; {reads}. {step}")
    missing = [key for key in _REQUIRED[kind] if key not in document]
    if missing:
        raise InputError(
            f"The result document lacks {', '.join(missing)}; {reads}, which always has "
            f"{', '.join(_REQUIRED[kind])}. Give {_WRITTEN_BY[kind]}."
        )


def read_document(path: str | Path) -> Document:
    """A result file. Raises InputError when it is missing or no JSON object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a result file: {error}. Give the results.json of a run.") from error
    if not isinstance(found, Mapping):
        raise InputError(f"{path} holds no JSON object. Give the results.json of a run or a comparison.")
    return found


@dataclass(frozen=True)
class Measured:
    """One row of the perplexity table: a model, its size, the tokens it was trained on, its perplexity."""

    who: str
    held_parameters: int | None
    tokens: int | None
    perplexity: float | None
    excess: float | None
    ours: bool = False


def plain_stages(results: Document) -> Sequence[Document]:
    """Stages of the plain Kronecker control (no permutations), empty when it was not run."""
    return results.get("controls", {}).get("plain_kronecker", {}).get("stages", [])


def measured(results: Document) -> list[Measured]:
    """The teacher, every control that was run, and the compressed model before and after healing."""
    controls = results.get("controls", {})
    teacher, dense, unhealed = results["teacher"], controls.get("dense_finetuned"), controls.get("compressed_unhealed")
    rows = [_row(results, "Dense teacher", teacher.get("held_parameters"), None, teacher.get("perplexity"))]
    if dense:
        who = "Dense, fine-tuned on the same data"
        rows.append(_row(results, who, dense.get("held_parameters"), dense.get("tokens"), dense.get("perplexity")))
    stages = results["stages"]
    if unhealed:  # all stages at once, nothing trained
        who = "Compressed, never healed"
        rows.append(_row(results, who, unhealed.get("held_parameters"), None, unhealed.get("perplexity"), ours=True))
    else:
        rows += _staged(results, "Compressed, before healing", stages, "before_healing", ours=True)
    rows += _staged(results, "Compressed and healed", stages, "after_healing", ours=True)
    return rows + _staged(results, "Plain Kronecker, healed", plain_stages(results), "after_healing", ours=False)


def excess_perplexity(results: Document, value: Any) -> float | None:
    """`value / teacher - 1` (unitless), None where one of the two is not known."""
    base = results["teacher"].get("perplexity")
    return value / base - 1 if known(value) and known(base) and base > 0 else None


def _row(results: Document, who: str, held: Any, tokens: Any, value: Any, ours: bool = False) -> Measured:
    return Measured(who, held, tokens, value, excess_perplexity(results, value), ours)


def _staged(results: Document, who: str, stages: Sequence[Document], key: str, ours: bool) -> list[Measured]:
    """One row for the last stage where `key` was measured, none where no stage got that far."""
    index = last_index(stages, key)
    if index is None:
        return []
    healed = key == "after_healing"
    tokens = sum(stage.get("tokens") or 0 for stage in stages[: index + healed])
    # With several stages "before healing" holds the healing of the earlier ones: the label must say so.
    if len(stages) > 1 and not (healed and results.get("complete", True)):
        who += f" (stage {index + 1})"
    return [_row(results, who, stages[index].get("held_parameters"), tokens, stages[index][key], ours)]


def last_index(stages: Sequence[Document], key: str) -> int | None:
    """Index of the last stage where `key` was measured."""
    return next((i for i in reversed(range(len(stages))) if stages[i].get(key) is not None), None)


@dataclass(frozen=True)
class Matrix:
    """One replaced matrix of one stage. `label` is short and unique on the page."""

    label: str
    stage: str
    row: Document


def matrices(results: Document) -> list[Matrix]:
    """All replaced matrices in order; one that several stages replace carries its stage in the label."""
    stages = results["stages"]
    found = [(i, stage["name"], row) for i, stage in enumerate(stages, 1) for row in stage.get("rows", [])]
    short = short_names(row["name"] for _, _, row in found)
    times = Counter(row["name"] for _, _, row in found)
    return [
        Matrix(short[row["name"]] + (f" (stage {i})" if times[row["name"]] > 1 else ""), name, row)
        for i, name, row in found
    ]


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Dotted names without the leading parts that all share: `transformer.h.1.mlp` becomes `h.1.mlp`.

    A block keeps its number and the word before it, whatever is shared.
    """
    split = {name: name.split(".") for name in names}
    shared = 0
    if len(split) > 1:
        first = min(split.values(), key=len)
        while (
            shared < len(first) - 1
            and not first[shared + 1].isdigit()
            and len({parts[shared] for parts in split.values()}) == 1
        ):
            shared += 1
    return {name: ".".join(parts[shared:]) for name, parts in split.items()}
