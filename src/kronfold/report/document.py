"""The questions that tables and page ask of a run document, which `base.results.check` has looked at before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kronfold.report.numbers import known

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One row of the perplexity table: a model, its size, what it was trained on and how fast, its perplexity."""

    who: str
    held_parameters: int | None
    tokens: int | None
    perplexity: float | None
    excess: float | None
    learning_rate: float | None = None
    ours: bool = False


def plain_stages(results: Document) -> Sequence[Document]:
    """Stages of the plain Kronecker control (no permutations), empty when it was not run."""
    return control(results, "plain_kronecker").get("stages", [])


def control(results: Document, name: str) -> Document:
    """A control of the run, empty when it was not run."""
    return (results.get("controls") or {}).get(name) or {}


def own_name(results: Document) -> str | None:
    """The recipe's name where another track stands beside it: then "compressed" alone would not say which."""
    return results["recipe"]["name"] if results.get("beside") else None


def measured(results: Document) -> list[Measured]:
    """The teacher, every control that was run, the compressed model before and after healing, the track beside it."""

    def row(who: str, model: Document, value: Any, tokens: Any = None, rate: Any = None, ours: bool = False) -> Any:
        return Measured(
            who, model.get("held_parameters"), tokens, value, excess_perplexity(results, value),
            rate if tokens else None, ours,
        )  # fmt: skip

    def staged(who: str, stages: Sequence[Document], key: str, ours: bool) -> list[Measured]:
        """One row for the last stage where `key` was measured, none where no stage got that far."""
        index = last_index(stages, key)
        if index is None:
            return []
        healed = key == "after_healing"
        tokens = sum(stage.get("tokens") or 0 for stage in stages[: index + healed])
        # With several stages "before healing" holds the healing of the earlier ones: the label must say so.
        if len(stages) > 1 and not (healed and results.get("complete", True)):
            who += f" (stage {index + 1})"
        stage = stages[index]
        return [row(who, stage, stage[key], tokens, stage.get("learning_rate"), ours)]

    teacher, stages, name = results["teacher"], results["stages"], own_name(results)
    dense, unhealed = control(results, "dense_finetuned"), control(results, "compressed_unhealed")
    rows = [row("Dense teacher", teacher, teacher.get("perplexity"))]
    if dense:
        tokens, rate = dense.get("tokens"), dense.get("learning_rate")
        rows.append(row("Dense, fine-tuned on the same data", dense, dense.get("perplexity"), tokens, rate))
    if unhealed:  # all stages at once, nothing trained
        who = f"{name}, never healed" if name else "Compressed, never healed"
        rows.append(row(who, unhealed, unhealed.get("perplexity"), ours=True))
    else:
        rows += staged(f"{name or 'Compressed'}, before healing", stages, "before_healing", ours=True)
    rows += staged(f"{name}, healed" if name else "Compressed and healed", stages, "after_healing", ours=True)
    plain = f"{name} without permutations, healed" if name else "Plain Kronecker, healed"
    rows += staged(plain, plain_stages(results), "after_healing", ours=False)
    if beside := results.get("beside"):
        other = beside["recipe"]["name"]
        rows += staged(f"{other}, never healed", beside["stages"], "before_healing", ours=True)
        rows += staged(f"{other}, healed", beside["stages"], "after_healing", ours=True)
    return rows


def excess_perplexity(results: Document, value: Any) -> float | None:
    """`value / teacher - 1` (unitless), None where one of the two is not known."""
    base = results["teacher"].get("perplexity")
    return value / base - 1 if known(value) and known(base) and base > 0 else None


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
