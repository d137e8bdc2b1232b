"""What calibration found out about a model on a text: second moments per site, in memory or in files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kronfold.base.errors import CheckpointError, DataError
from kronfold.base.files import write_json
from kronfold.base.marker import MARKER, faults_in
from kronfold.base.output import atomic_directory
from kronfold.models.linear_view import LinearView
from kronfold.structures.layer import StructuredEmbedding
from kronfold.structures.weighting import DAMPING, Weighting, covariance

FORMAT_VERSION = 1
TOKEN_PRIOR = 0.3  # share of the general-use prior in the token frequencies
ZIPF_OFFSET = 100  # byte-level alphabets and special tokens stand first in a vocabulary


@dataclass(frozen=True)
class Statistics:
    """Sums over the calibration tokens; the methods return means, ready for the solvers.

    Attributes:
        tensors: name -> float32 tensor. `input/KEY/second` (in, in) and `input/KEY/first` (in,) sums of x xᵀ and of x;
            `output/SITE` (out, out) sum of g gᵀ; `predicted` (V,) sum of the model's next-token probabilities;
            `head` (width, width) sum of h hᵀ of the last hidden state; `embedding` (width, width) sum of the squared
            gradient at the embedding's output.
        reads: module name -> KEY; layers that read the same input share one.
        tokens: tokens behind the input sums. gradient_tokens: tokens behind the gradient sums, 0 without.
        tied: whether the head reads the embedding.
        about: what was measured (fingerprints of model and text, window, seed), for the record and the cache.
    """

    tensors: Mapping[str, Tensor]
    reads: dict[str, str]
    tokens: int
    gradient_tokens: int
    tied: bool
    about: dict[str, Any]

    def input_moments(self, module_name: str) -> tuple[Tensor, Tensor]:
        """E[x xᵀ] (in, in) and E[x] (in,) of a layer's input. Raises DataError for a layer that was not measured."""
        if module_name not in self.reads:
            raise DataError(
                f"The statistics hold nothing about {module_name!r}: they were taken on another model, or the site was "
                f"left out. Calibrate this model anew. Measured layers: {len(self.reads)}, e.g. "
                f"{', '.join(list(self.reads)[:3])}."
            )
        key = self.reads[module_name]
        return self.tensors[f"input/{key}/second"] / self.tokens, self.tensors[f"input/{key}/first"] / self.tokens

    def weighting(self, view: LinearView, *, damping: float = DAMPING) -> Weighting:
        """H and G of a site. With a bias to refit H is the covariance of the input, else its second moment.

        For an embedding: token frequencies as `outputs` (V,), and the metric of its columns as `inputs`. Of one that
        is factorised already, the stored columns are weighted: an error D there is D G behind the expansion.
        """
        if view.kind == "embedding":
            metric = self.column_metric()
            if isinstance(view.module, StructuredEmbedding):
                metric = view.module.site_metric(metric)
            return Weighting(metric, self.token_frequencies(), damping)
        second, first = self.input_moments(view.module_name)
        if view.bias() is not None:
            second = covariance(second, first, first)
        if view.role == "head":
            return Weighting(second, self.token_frequencies(), damping)
        gradient = self.tensors[f"output/{view.name}"] / self.gradient_tokens if self.gradient_tokens else None
        return Weighting(second, gradient, damping)

    def token_frequencies(self, prior: float = TOKEN_PRIOR) -> Tensor:
        """(V,) float64, summing to 1: what the model expects on the text, mixed with a prior for other text.

        Byte-pair vocabularies list tokens in the order they were merged, so by falling frequency in the text the
        tokenizer was made from; the prior is Zipf's law over that order.
        """
        predicted = self.tensors["predicted"].double()
        ranks = torch.arange(predicted.numel(), dtype=torch.float64)
        zipf = 1 / (ranks + ZIPF_OFFSET)
        return (1 - prior) * predicted / predicted.sum() + prior * zipf / zipf.sum()

    def column_metric(self) -> Tensor:
        """(width, width): cost of an embedding error per use: looked up (gradient) and, if tied, as a logit."""
        parts = []
        if self.tied:
            parts.append(self.tensors["head"] / self.tokens)
        if self.gradient_tokens:
            parts.append(self.tensors["embedding"] / self.gradient_tokens)
        return torch.stack(parts).sum(0) if parts else torch.eye(self.tensors["head"].shape[0])

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the statistics as a directory, atomically, with the hashes of its files. Raises OutputError."""
        self._write(atomic_directory(path, overwrite, "statistics"))

    def keep(self, path: str | Path) -> None:
        """`save` as an entry of a cache: one that stands there already is as good. Raises OutputError."""
        if not (Path(path) / MARKER).exists():
            self._write(atomic_directory(path, True, "statistics", first=True))

    def _write(self, directory: AbstractContextManager[Path]) -> None:
        with directory as place:
            save_file(
                {name: tensor.contiguous() for name, tensor in self.tensors.items()}, place / "moments.safetensors"
            )
            write_json(place / "statistics.json", self.header())

    def header(self) -> dict[str, Any]:
        """Everything but the tensors, as it is saved."""
        return {
            "schema": "kronfold/statistics",
            "format_version": FORMAT_VERSION,
            "reads": self.reads,
            "tokens": self.tokens,
            "gradient_tokens": self.gradient_tokens,
            "tied": self.tied,
            "about": self.about,
        }

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Statistics from a directory; tensors are read when they are asked for, one at a time.

        Raises CheckpointError: no statistics there, a newer format, or a damaged file (those of 0.3 have no hashes to
        tell by).
        """
        place = Path(path)
        try:
            if (place / MARKER).exists() and (faults := faults_in(place)):
                raise ValueError("; ".join(faults))
            header = json.loads((place / "statistics.json").read_text(encoding="utf-8"))
            if header["schema"] != "kronfold/statistics" or header["format_version"] > FORMAT_VERSION:
                raise ValueError(f"format {header['schema']} {header['format_version']}")
            tensors = MomentFiles(sorted(place.glob("moments*.safetensors")))
            lost = {f"input/{key}/second" for key in header["reads"].values()} | {"head", "predicted"}
            if lost := lost - set(tensors):
                raise ValueError(f"{len(lost)} tensors are missing, e.g. {min(lost)}")
            counts = (header["tokens"], header["gradient_tokens"], header["tied"])
            return cls(tensors, header["reads"], *counts, header["about"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{place} holds no calibration statistics this version can read ({error}). Calibrate again."
            ) from error

    def check_model(self, fingerprint: str) -> None:
        """Raises DataError when the statistics were taken on another model."""
        if self.about.get("model") != fingerprint:
            raise DataError(
                f"These statistics were taken on another model (fingerprint {self.about.get('model')}, this one has "
                f"{fingerprint}). Calibrate this model: pass the text instead of the statistics."
            )

    def with_about(self, **more: Any) -> Statistics:
        """The same with more facts for the record."""
        return replace(self, about={**self.about, **more})


class MomentFiles(Mapping[str, Tensor]):
    """Tensors of several safetensors files by name, read one at a time."""

    def __init__(self, files: list[Path]) -> None:
        self._place: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self._place |= dict.fromkeys(opened.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._place[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)
