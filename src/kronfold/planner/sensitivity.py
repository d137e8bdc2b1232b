"""For every site a curve: what it would hold as this or that structure, against how much the loss would rise.

The predicted rise is the second-order one, ½ tr(G D H Dᵀ) in nats per token with D = W − Ŵ, H the second moment of the
inputs and G that of the loss gradient at the outputs (see `structures.weighting`). It is exact in the limit of small
errors and adds up over sites as long as their errors do not interact; what it is good for is comparing sites.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError, InputError, RecipeError, suggest
from kronfold.base.files import atomic_file, explain_write_errors, write_json
from kronfold.models.calibrate import fingerprint
from kronfold.models.finite import check_finite
from kronfold.models.linear_view import LinearView, sites
from kronfold.models.statistics import Statistics
from kronfold.planner.allocate import Options
from kronfold.structures.registry import (
    FP16_BYTES,
    STRUCTURES,
    Kind,
    Structure,
    Unit,
    plannable,
    planned_for,
    structure_of,
)
from kronfold.structures.spec import Pair

FORMAT_VERSION = 2


@dataclass
class SiteCurve:
    """One site, or one token group of an embedding: what it may become and what that would cost.

    Attributes:
        site: its name. group: (first token place, number of tokens) for an embedding or a part of one, else None.
        shape: (out, in) of the site; of the group for a group. tied: an embedding whose head reads it.
        losses: by structure, the predicted loss increase, nats, of each of its `choices` for this shape.
    """

    site: str
    shape: Pair
    group: tuple[int, int] | None = None
    tied: bool = False
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.site if self.group is None else f"{self.site}[{self.group[0]}:{sum(self.group)}]"

    @property
    def kind(self) -> Kind:
        return "linear" if self.group is None else "embedding"

    def options(self, unit: Unit) -> tuple[Options, list[Any]]:
        """What the site may become: costs and losses, and beside them the specs (None: it stays dense)."""
        specs: list[Any] = [None]
        costs, losses = [self.dense_cost(unit)], [0.0]
        for name, curve in self.losses.items():
            structure = STRUCTURES.get(name)
            choices = structure.choices(self.shape, self.kind)
            specs += choices
            costs += [structure.cost(choice, unit, self.tied) for choice in choices]
            losses += curve.tolist()
        return Options(np.array(costs, dtype=np.float64), np.array(losses, dtype=np.float64)), specs

    def dense_cost(self, unit: Unit) -> float:
        """Cost of the site as it is. Looking a row up costs no multiplication; making a logit does."""
        numbers = float(self.shape[0] * self.shape[1])
        if unit == "bytes":
            return FP16_BYTES * numbers
        return numbers * self.tied if unit == "macs" and self.group else numbers

    def place_cost(self, unit: Unit) -> float:
        """What this slice adds to the cost of its site once that is structured, whatever is chosen for the slice."""
        return max((STRUCTURES.get(name).slice_cost(self.shape, unit) for name in self.losses), default=0.0)


def sensitivity(
    model: PreTrainedModel,
    statistics: Statistics,
    structures: Sequence[str] = ("low_rank",),
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[SiteCurve]:
    """Curves of all dense sites of `model`, in model order; an embedding gives one per group of tokens.

    Args:
        statistics: of this very model, with gradients.
        structures: what sites may become, of `plannable()`.

    Raises:
        RecipeError: an unknown structure, or statistics without gradients. DataError: statistics of another model.
    """
    allowed = plannable()
    unknown = [name for name in structures if name not in allowed]
    if unknown or not structures:
        raise RecipeError(
            f"The planner cannot choose {unknown or 'among no structures'}. "
            f"{suggest(str(unknown[0]) if unknown else '', allowed)}"
        )
    if not statistics.gradient_tokens:
        raise RecipeError(
            "These statistics hold no gradients, so errors of different sites cannot be compared. Calibrate with "
            "gradient_windows above 0."
        )
    statistics.check_model(fingerprint(model))
    views = [view for view in sites(model).values() if view.is_dense]
    curves: list[SiteCurve] = []
    for i, view in enumerate(views):
        if progress:
            progress(f"sensitivity {view.name}", i, len(views))
        curves += _curves(view, statistics, planned_for(view.kind, structures))
    if progress:
        progress("sensitivity", len(views), len(views))
    return curves


def _curves(view: LinearView, statistics: Statistics, structures: Sequence[Structure]) -> list[SiteCurve]:
    """One curve for each slice of a site. Raises RecipeError where structures would share its slices."""
    slices = {tuple(structure.slices(view.shape, view.kind)) for structure in structures}
    if len(slices) > 1 or (len(structures) > 1 and len(next(iter(slices))) > 1):
        raise RecipeError(
            f"{view.name} is chosen part by part, so the planner cannot choose between "
            f"{' and '.join(structure.name for structure in structures)} there; ask for one of them."
        )
    curves: list[SiteCurve] = []
    start = 0
    for shape in next(iter(slices), ()):
        group = (start, shape[0]) if view.kind == "embedding" else None
        curves.append(SiteCurve(view.name, shape, group, view.kind == "embedding" and statistics.tied))
        start += shape[0]
    for structure in structures:
        losses = structure.losses(view.weight(), statistics.weighting(view), view.kind)
        for curve, own in zip(curves, losses, strict=True):
            curve.losses[structure.name] = own
    return curves


def save_curves(curves: Sequence[SiteCurve], path: str | Path) -> None:
    """Write curves as `PATH.json` and `PATH.safetensors`. Raises OutputError, NotFiniteError."""
    tensors = {f"{i}/{name}": own.contiguous() for i, curve in enumerate(curves) for name, own in curve.losses.items()}
    check_finite(tensors.items(), what="The sensitivity curves")
    with explain_write_errors(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = save(tensors)
        with atomic_file(f"{path}.safetensors") as file:
            file.write(content)
    rows = [
        {"site": c.site, "shape": c.shape, "group": c.group, "tied": c.tied, "structures": list(c.losses)}
        for c in curves
    ]
    digests = [hashlib.sha256(part).hexdigest() for part in (content, json.dumps(rows).encode())]
    header = {"schema": "kronfold/curves", "format_version": FORMAT_VERSION, "sha256": digests}
    write_json(f"{path}.json", {**header, "curves": rows})


def load_curves(path: str | Path) -> list[SiteCurve]:
    """Curves that `save_curves` wrote. Raises CheckpointError when they cannot be read or are not what was written."""
    try:
        header = json.loads(Path(f"{path}.json").read_text(encoding="utf-8"))
        if header["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {header['format_version']}, this kronfold reads {FORMAT_VERSION}")
        rows, content = header["curves"], Path(f"{path}.safetensors").read_bytes()
        digests = [hashlib.sha256(part).hexdigest() for part in (content, json.dumps(rows).encode())]
        if header["sha256"] != digests:
            raise ValueError("their hashes do not match")
        tensors = load(content)
        curves = [
            SiteCurve(
                row["site"],
                tuple(row["shape"]),
                tuple(row["group"]) if row["group"] else None,
                row["tied"],
                {name: tensors[f"{i}/{name}"] for name in row["structures"]},
            )
            for i, row in enumerate(rows)
        ]
        for curve in curves:
            for name, own in curve.losses.items():
                if len(own) != len(STRUCTURES.get(name).choices(curve.shape, curve.kind)):
                    raise ValueError(f"{curve.key}: {name} has other choices now")
        return curves
    except (OSError, ValueError, KeyError, TypeError, InputError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no sensitivity curves ({error}). Delete it and plan again.") from error


def joined_spec(slices: Sequence[SiteCurve], chosen: Sequence[Any]) -> Any | None:
    """The spec of a site from the choices for its slices; None where all of them stay dense (None)."""
    spec = next((choice for choice in chosen if choice is not None), None)
    return None if spec is None else structure_of(spec).combined([own.shape for own in slices], chosen)
