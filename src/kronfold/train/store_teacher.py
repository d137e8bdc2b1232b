"""Run a teacher once over the training text and store what it says, for healings without it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from kronfold.base.errors import InputError, NotFiniteError
from kronfold.base.files import (
    atomic_file,
    explain_write_errors,
)
from kronfold.base.job import Job
from kronfold.distill.losses import top_k as likeliest
from kronfold.distill.pairs import check_head, is_classifier, position_faults, vocabulary
from kronfold.distill.stored import MANIFEST, Manifest, StoredTeacher, text_sha256
from kronfold.models.calibrate import fingerprint
from kronfold.train.heal import fused_gelu, inspect_blocks, left_as_found
from kronfold.train.watch import check_teacher_outputs

_SHARD_BYTES = 1 << 26  # what a killed job has to do again, and what is held in memory: 254 blocks of 1024 at k = 64
_CHUNK_TOKENS = 1024  # logits alive at a time


def store_teacher(
    teacher: PreTrainedModel,
    data: Dataset,
    place: str | Path,
    *,
    top_k: int = 64,
    temperature: float = 1.0,
    batch_size: int = 8,
    bf16: bool = False,
    about: Mapping[str, Any] | None = None,
    inputs: Sequence[str | Path] = (),
    shard_bytes: int = _SHARD_BYTES,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> StoredTeacher:
    """Store the `top_k` likeliest tokens of `teacher` at every position of `data` in the directory `place`.

    Finished shards lie in `<place>.partial` until all are there. `resume` goes on after them; on the same machine the
    result is, byte for byte but for its marker, that of a job that was never stopped.

    Args:
        teacher: run where it is, and left as it was.
        data: map-style dataset of blocks, as for `heal`.
        temperature: of the objective that will learn from it.
        batch_size: blocks that go through the teacher at once. bf16: matrix products in bfloat16, by autocast.
        about: names and versions for the manifest. inputs: files that teacher and data were read from, for `Job.open`.
        progress: called with (blocks done, blocks in all).

    Raises:
        InputError: top_k, temperature or batch_size that cannot be used, a model that is no language model.
        NotFiniteError: outputs of the teacher that are NaN or infinite; on the first block, before anything is written.
        DataError: no blocks, or blocks that are not integers of one length.
        OutputError: `place` is taken or cannot be written. CheckpointError: another job lies in `<place>.partial`.
    """
    with Job.open(place, "teach", inputs=inputs, resume=resume, overwrite=overwrite) as job:
        manifest = _planned(teacher, data, top_k, temperature, batch_size, bf16, about or {}, shard_bytes)
        check_teacher_outputs(teacher, data[0]["input_ids"])
        facts = {name: value for name, value in manifest.to_dict().items() if name != "about"}
        if job.begin(facts):
            return StoredTeacher(place)
        with contextlib.ExitStack() as stack:
            stack.enter_context(explain_write_errors(place))
            stack.enter_context(left_as_found(teacher))
            stack.enter_context(fused_gelu(teacher))
            teacher.eval()
            for shard, blocks in enumerate(manifest.shards):
                files = {job.result / name: kind for name, (kind, _) in manifest.files(shard).items()}

                def store(blocks: range = blocks, files: Mapping[Path, np.dtype] = files) -> None:
                    arrays = _shard(teacher, data, blocks, manifest, progress)
                    for (path, kind), array in zip(files.items(), arrays, strict=True):
                        with atomic_file(path) as file:
                            np.save(file, array.astype(kind), allow_pickle=False)

                job.step(f"shard {shard}", store, files)
                progress(blocks.stop, manifest.blocks)
        job.finish(manifest.to_dict(), MANIFEST)
    return StoredTeacher(place)


def _planned(
    teacher: PreTrainedModel,
    data: Dataset,
    top_k: int,
    temperature: float,
    batch_size: int,
    bf16: bool,
    about: Mapping[str, Any],
    shard_bytes: int,
) -> Manifest:
    """The manifest of the job, once everything is checked."""
    if is_classifier(teacher):
        raise InputError(f"{type(teacher).__name__} is no language model; an offline teacher is one.")
    width = vocabulary(teacher)
    faults = []
    if not 1 <= top_k <= width:
        faults.append(f"top_k={top_k} must lie from 1 to the {width:,} tokens of the vocabulary; 64 is usual")
    if not 0 < temperature < float("inf"):
        faults.append(f"temperature={temperature} must be above 0; 1 to 4 is usual")
    if batch_size < 1:
        faults.append(f"batch_size={batch_size} must be at least 1")
    block, facts = inspect_blocks(data)
    faults += position_faults("teacher", teacher, block)
    if faults:
        raise InputError(f"The teacher cannot be stored: {'; '.join(faults)}.")
    check_head(teacher)
    made = Manifest(
        fingerprint(teacher), text_sha256(data), facts["blocks"], block, width, top_k, float(temperature),
        1, batch_size, bf16, dict(about),
    )  # fmt: skip
    # Whole batches, so that a block always goes through the teacher with the same others.
    batches = max(1, shard_bytes // (made.bytes_per_token * block * batch_size))
    return Manifest(**{**made.to_dict(), "blocks_per_shard": batches * batch_size})


@torch.no_grad()
def _shard(
    teacher: PreTrainedModel, data: Dataset, blocks: range, manifest: Manifest, progress: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """ids (blocks, block size, k) and log-probabilities (blocks, block size, k + 1)."""
    ids, log_probs = [], []
    head = teacher.get_output_embeddings()
    for start in range(blocks.start, blocks.stop, manifest.batch_size):
        batch = range(start, min(start + manifest.batch_size, blocks.stop))
        tokens = torch.stack([torch.as_tensor(data[index]["input_ids"]) for index in batch]).to(teacher.device)
        with torch.autocast(teacher.device.type, torch.bfloat16, enabled=manifest.bf16):
            hidden = teacher.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
            for chunk in hidden.split(_CHUNK_TOKENS):
                kept = likeliest(head(chunk), manifest.top_k, manifest.temperature)
                if kept.log_probs.isnan().any():  # of -inf there may be some: a bucket that is empty
                    raise NotFiniteError(
                        f"The teacher's outputs are not finite in blocks {batch.start} to {batch.stop - 1} of the "
                        "text. Run it in float32, or leave that text out."
                    )
                ids.append(kept.ids.int().cpu())
                log_probs.append(kept.log_probs.half().cpu())
        progress(batch.stop, manifest.blocks)
    shape = len(blocks), manifest.block_size, -1
    return torch.cat(ids).view(shape).numpy(), torch.cat(log_probs).view(shape).numpy()
