"""The offline teacher: its likeliest tokens at every position of a training text, on disk, read as often as wanted.

A directory of `manifest.json` and, shard by shard, two arrays that are mapped into memory and never read as a whole:
`ids-00000.npy` (blocks, block size, k) and `log_probs-00000.npy` (blocks, block size, k + 1) in float16, the last being
the bucket of all other tokens. As logarithms float16 keeps every probability down to 1e-7 to 0.4 % or better, small and
large ones alike, and the bucket too, which as one minus the others would be lost where it is small.

They are softened by one temperature. Those of another cannot be had from them: the mass of the bucket depends on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError, InputError
from kronfold.distill.losses import IDS, LOG_PROBS
from kronfold.distill.methods import METHODS
from kronfold.distill.objective import Objective
from kronfold.distill.pairs import is_classifier, vocabulary
from kronfold.models.calibrate import fingerprint
from kronfold.options.healing import ObjectiveConfig

MANIFEST = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What the arrays of an offline teacher are of.

    Attributes:
        teacher: fingerprint of the model. text: SHA-256 of its training blocks (`TokenBlocks.sha256`).
        blocks, block_size: how many there are, of how many tokens. vocabulary: width of the teacher's logits.
        top_k: tokens kept of each position. temperature: by which its logits were divided.
        blocks_per_shard: of all shards but the last. batch_size: blocks that went through the teacher together.
        bf16: whether its matrix products ran in bfloat16.
        about: names and versions, for people.
    """

    teacher: str
    text: str
    blocks: int
    block_size: int
    vocabulary: int
    top_k: int
    temperature: float
    blocks_per_shard: int
    batch_size: int
    bf16: bool
    about: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def tokens(self) -> int:
        return self.blocks * self.block_size

    @property
    def id_type(self) -> np.dtype:
        return np.dtype("<u2" if self.vocabulary <= 1 << 16 else "<u4")

    @property
    def bytes_per_token(self) -> int:
        return self.top_k * self.id_type.itemsize + (self.top_k + 1) * 2

    @property
    def shards(self) -> list[range]:
        """The blocks of each shard."""
        starts = range(0, self.blocks, self.blocks_per_shard)
        return [range(start, min(start + self.blocks_per_shard, self.blocks)) for start in starts]

    def files(self, shard: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """File name -> type and shape of the two arrays of a shard."""
        shape = len(self.shards[shard]), self.block_size
        return {
            f"ids-{shard:05d}.npy": (self.id_type, (*shape, self.top_k)),
            f"log_probs-{shard:05d}.npy": (np.dtype("<f2"), (*shape, self.top_k + 1)),
        }

    @classmethod
    def read(cls, place: Path) -> Manifest:
        """Raises CheckpointError: none there, not readable, or of a later version."""
        try:
            found = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
            manifest = cls(**{one.name: found[one.name] for one in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{place} holds no offline teacher: {MANIFEST} is missing or cannot be read ({error}). Give a "
                "directory that `kronfold teach` has made."
            ) from error
        if manifest.format_version != FORMAT_VERSION:
            raise CheckpointError(
                f"The offline teacher in {place} has format {manifest.format_version}, and this version of kronfold "
                f"reads {FORMAT_VERSION}; make it anew with `kronfold teach`."
            )
        return manifest

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, wanted: Manifest) -> list[str]:
        """What differs from `wanted` and would give other numbers, as sentences."""
        mine, other = self.to_dict(), wanted.to_dict()
        names = [name for name in mine if name != "about" and mine[name] != other[name]]
        return [f"{name} was {mine[name]!r} and is now {other[name]!r}" for name in names]


def text_sha256(data: Dataset) -> str:
    """`TokenBlocks.sha256`, of any dataset of blocks."""
    known = getattr(data, "sha256", None)
    if known is not None:
        return known
    digest = hashlib.sha256()
    for index in range(len(data)):  # type: ignore[arg-type]
        digest.update(np.asarray(data[index]["input_ids"]).astype("<u4").tobytes())
    return digest.hexdigest()


class StoredTeacher:
    """An offline teacher, opened for reading; takes the place of a teacher in `heal` and `DistillationTrainer`.

    Raises CheckpointError for a directory that is none, or is not whole.
    """

    def __init__(self, place: str | Path) -> None:
        self.place = Path(place)
        self.manifest = Manifest.read(self.place)
        self._shards = [self._open(shard) for shard in range(len(self.manifest.shards))]

    def _open(self, shard: int) -> tuple[np.ndarray, ...]:
        arrays = []
        for name, (kind, shape) in self.manifest.files(shard).items():
            fault = damage(self.place / name, kind, shape)
            if fault:
                raise CheckpointError(
                    f"The offline teacher in {self.place} is not whole: {name} {fault}. Finish it with `kronfold teach "
                    "--resume`, or make it anew."
                )
            arrays.append(np.load(self.place / name, mmap_mode="r"))
        return tuple(arrays)

    def rows(self, block: int) -> dict[str, Tensor]:
        """Of one block of the text: ids (block size, k) int32 and log-probabilities (block size, k + 1) float16."""
        shard, index = divmod(block, self.manifest.blocks_per_shard)
        ids, log_probs = (np.array(array[index]) for array in self._shards[shard])
        return {IDS: torch.from_numpy(ids.astype(np.int32)), LOG_PROBS: torch.from_numpy(log_probs)}

    def beside(self, data: Dataset) -> Dataset:
        """`data` with the rows of this teacher in every item. Raises InputError unless it is the teacher's text."""
        found, stored = text_sha256(data), self.manifest
        if found != stored.text:
            size = len(data[0]["input_ids"]) if len(data) else 0  # type: ignore[arg-type]
            raise InputError(
                f"The offline teacher in {self.place} is of another text: of {stored.blocks:,} blocks of "
                f"{stored.block_size} tokens (sha256 {stored.text[:16]}), and the training text gives "
                f"{len(data):,} of {size} (sha256 {found[:16]}). "  # type: ignore[arg-type]
                "Give the text and the tokenizer it was made with, or make one for this text with `kronfold teach`."
            )
        return _TaughtBlocks(data, self)

    def check_teacher(self, teacher: PreTrainedModel) -> None:
        """Raises InputError unless `teacher` is the model that was stored."""
        found = fingerprint(teacher)
        if found != self.manifest.teacher:
            raise InputError(
                f"The offline teacher in {self.place} is of another model: of {self.manifest.about.get('model', '?')} "
                f"(fingerprint {self.manifest.teacher}), and the teacher given has {found}. Give that model, or store "
                "this one with `kronfold teach`."
            )

    def check_objective(self, config: ObjectiveConfig) -> None:
        """Raises InputError with every reason why this objective cannot be learnt from what is stored."""
        method = Objective(config).method
        faults = []
        if not method.learns_from_top_k:
            able = ", ".join(sorted(name for name in METHODS if METHODS.get(name).learns_from_top_k))
            faults.append(
                f"method {config.method} needs the teacher itself, and only its {self.manifest.top_k} likeliest tokens "
                f"are stored; choose method {able}, or give no offline teacher"
            )
        elif not method.needs_teacher:
            faults.append("nothing is compared with a teacher (kl is 0); raise kl, or give no offline teacher")
        elif config.temperature != self.manifest.temperature:
            stored = self.manifest.temperature
            faults.append(
                f"the temperature is {config.temperature:g} and the stored one {stored:g}; the mass of the bucket "
                f"depends on it, so take temperature {stored:g} or store another teacher with `kronfold teach "
                "--temperature`"
            )
        self._raise(faults)

    def check_student(self, student: PreTrainedModel) -> None:
        """Raises InputError unless `student` is a language model over the same tokens."""
        stored, width = self.manifest.vocabulary, vocabulary(student)
        if is_classifier(student):
            self._raise(["it is for language models, and the student classifies"])
        elif width != stored:
            self._raise([f"the student predicts {width:,} tokens and the stored teacher {stored:,}"])

    def _raise(self, faults: list[str]) -> None:
        if faults:
            raise InputError(f"The offline teacher in {self.place} cannot be used: {'; '.join(faults)}.")


def damage(path: Path, kind: np.dtype, shape: tuple[int, ...]) -> str | None:
    """Why the array in `path` is not whole and of this type and shape; None when it is."""
    if not path.is_file():
        return "is missing"
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        return f"cannot be read ({error})"
    if (found.dtype, found.shape) != (kind, shape):
        return f"is {found.dtype} {found.shape} and should be {kind} {shape}"
    return None


class _TaughtBlocks(Dataset):
    """Blocks with the rows of an offline teacher, found by the number of the block, in whatever order they are read."""

    def __init__(self, data: Dataset, teacher: StoredTeacher) -> None:
        self.data, self.teacher = data, teacher

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {**self.data[index], **self.teacher.rows(index)}
