"""Calibration with a memory: statistics and sensitivity curves are kept by the content they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError
from kronfold.models.calibrate import calibrate, fingerprint, tokens_fingerprint
from kronfold.models.statistics import FORMAT_VERSION, Statistics
from kronfold.planner.sensitivity import SiteCurve, load_curves, save_curves, sensitivity

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibration:
    """Text and statistics that data-aware fitting works with.

    Attributes:
        windows: (n, window) token ids. statistics: of the dense model on them (or on the first of them).
        place: directory of the cache entry, None without a cache. read: what was read of each text, see
            `kronfold.data.sources.Texts.record`; empty where the windows were given.
    """

    windows: Tensor
    statistics: Statistics
    place: Path | None = None
    read: tuple[dict[str, Any], ...] = ()

    def curves(
        self, model: PreTrainedModel, structures: Sequence[str], progress: Progress | None = None
    ) -> list[SiteCurve]:
        """Sensitivity curves of `model`, from the cache where they stand there."""
        if self.place is None:
            return sensitivity(model, self.statistics, structures, progress=progress)
        path = self.place / f"curves-{'-'.join(sorted(structures))}"
        if path.with_name(path.name + ".json").is_file():
            return load_curves(path)
        curves = sensitivity(model, self.statistics, structures, progress=progress)
        save_curves(curves, path)
        return curves

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "windows": len(self.windows),
            "tokens": self.windows.numel(),
            "statistics_tokens": self.statistics.tokens,
            "gradient_tokens": self.statistics.gradient_tokens,
            **self.statistics.about,
            "read": list(self.read),
        }


def calibrated(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    gradient_windows: int = 16,
    all_windows: bool = False,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Statistics of `model` on `windows`, taken anew or found in `cache` under model, text, counts and seed.

    Args:
        gradient_windows: so many windows, from the first, are run forwards and backwards.
        all_windows: run the others forwards too; sequential fitting does not need that, it measures inputs itself.
        cache: directory of the cache; None keeps nothing.

    Raises as `calibrate`; OutputError when the cache cannot be written.
    """
    used = windows if all_windows else windows[:gradient_windows]
    facts = {
        "model": fingerprint(model),
        "text": tokens_fingerprint(used),
        "gradient_windows": min(gradient_windows, len(used)),
        "seed": seed,
        "format": FORMAT_VERSION,
    }
    place = None
    if cache is not None:
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]
        place = Path(cache) / "calibration" / key
        try:
            if place.is_dir():
                return Calibration(windows, Statistics.load(place), place)
        except CheckpointError:  # a damaged entry is made anew
            pass
    statistics = calibrate(model, used, gradient_windows=gradient_windows, seed=seed, progress=progress)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(place, overwrite=True)
    return Calibration(windows, statistics, place)
