"""GLUE's own metrics, by scikit-learn and SciPy, and a classifier's answers to padded batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from kronfold.base.errors import CheckpointError, InputError, suggest
from kronfold.data.glue import Task

_BATCH = 64


def _matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(true, predicted))


def _accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float((predicted == true).mean())


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(true, predicted, zero_division=0.0))  # of label 1, as GLUE has it


def _correlation(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    def measured(predicted: np.ndarray, true: np.ndarray) -> float:
        from scipy import stats

        if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
            return 0.0  # one value throughout orders nothing; SciPy would say NaN
        return float(getattr(stats, name)(predicted, true).statistic)

    return measured


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "matthews_correlation": _matthews,
    "accuracy": _accuracy,
    "f1": _f1,
    "pearson": _correlation("pearsonr"),
    "spearman": _correlation("spearmanr"),
}


def score(names: Sequence[str], predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    """Each named metric, in [-1, 1]. Raises InputError: unknown name, nothing to score, unequal lengths."""
    for name in names:
        if name not in METRICS:
            raise InputError(f"Unknown metric {name!r}. {suggest(name, METRICS)}")
    if len(predicted) != len(true) or not len(true):
        raise InputError(f"{len(predicted)} predictions for {len(true)} labels; there must be one each, and some.")
    return {name: METRICS[name](np.asarray(predicted), np.asarray(true)) for name in names}


@torch.no_grad()
def predict(model: Any, rows: Sequence[Mapping[str, Any]], collate: Callable[[Sequence[Any]], Any]) -> torch.Tensor:
    """Logits (examples, outputs), float32 on the CPU, in the order of `rows`; the model keeps its mode.

    `rows` hold "input_ids" lists; `collate` makes padded batches of them. Raises CheckpointError: not finite.
    """
    order = sorted(range(len(rows)), key=lambda index: -len(rows[index]["input_ids"]))
    training = model.training
    model.eval()
    found: dict[int, torch.Tensor] = {}
    try:
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            batch = {key: value.to(model.device) for key, value in collate([rows[i] for i in chosen]).items()}
            batch.pop("labels", None)
            found |= zip(chosen, model(**batch, use_cache=False).logits.float().cpu(), strict=True)
    finally:
        model.train(training)
    logits = torch.stack([found[index] for index in range(len(rows))])
    if not logits.isfinite().all():
        raise CheckpointError("The classifier's logits are not finite: its weights hold NaN or inf. Train it again.")
    return logits


def answers(logits: torch.Tensor, task: Task) -> list[float]:
    """What logits (examples, outputs) say: the likeliest label, or the number itself."""
    return (logits.argmax(-1) if task.labels else logits[:, 0]).tolist()


def spread(values: Sequence[float]) -> dict[str, float | int | None]:
    """Mean and standard deviation (n - 1 in the denominator; None for a single value) over seeds."""
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "seeds": len(values)}
