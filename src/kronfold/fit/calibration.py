"""Calibration with a memory: statistics and sensitivity curves are kept by the content they were made from."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError, OutputError
from kronfold.base.marker import read_marker
from kronfold.base.progress import Report
from kronfold.models.calibrate import calibrate, fingerprint, tokens_fingerprint
from kronfold.models.statistics import FORMAT_VERSION, Statistics
from kronfold.planner.sensitivity import FORMAT_VERSION as CURVES_FORMAT
from kronfold.planner.sensitivity import SiteCurve, load_curves, save_curves, sensitivity

logger = logging.getLogger(__name__)


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
        self, model: PreTrainedModel, structures: Sequence[str], progress: Report | None = None
    ) -> list[SiteCurve]:
        """Sensitivity curves of `model`, from the cache where they stand there."""
        if self.place is None:
            return sensitivity(model, self.statistics, structures, progress=progress)
        path = self.place / f"curves-{CURVES_FORMAT}-{'-'.join(sorted(structures))}"
        try:
            return load_curves(path)
        except CheckpointError:  # none there, or a damaged entry, which is made anew
            curves = sensitivity(model, self.statistics, structures, progress=progress)
        try:
            save_curves(curves, path)
        except OutputError as error:
            logger.warning("The sensitivity curves are not kept for the next time: %s", error)
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
    progress: Report | None = None,
) -> Calibration:
    """Statistics of `model` on `windows`, taken anew or found in `cache` under model, text, counts and seed.

    Args:
        gradient_windows: so many windows, from the first, are run forwards and backwards.
        all_windows: run the others forwards too; sequential fitting does not need that, it measures inputs itself.
        cache: directory of the cache; None keeps nothing.

    A cache that cannot be written costs a warning. Raises as `calibrate`.
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
                read_marker(place)  # 0.3 wrote none, and without hashes nothing can be told of an entry
                return Calibration(windows, Statistics.load(place), place)
        except CheckpointError:  # a damaged entry is made anew
            shutil.rmtree(place, ignore_errors=True)
    statistics = calibrate(model, used, gradient_windows=gradient_windows, seed=seed, progress=progress)
    if place is not None:
        try:
            statistics.keep(place)
        except OutputError as error:
            logger.warning("The calibration is not kept for the next time: %s", error)
            place = None
    return Calibration(windows, statistics, place)
