"""Which checkpoint may a run continue from? Only a whole one, and only of the same run."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kronfold.base import processes
from kronfold.base.errors import CheckpointError, OutputError
from kronfold.base.files import explain_write_errors, files_below, sha256_of, sync, write_json
from kronfold.base.marker import SEAL, faults_in, is_sealed, sealed

logger = logging.getLogger(__name__)

SETTINGS = "heal.json"  # beside the checkpoints; what must be the same for a resumed run to be the same run


class Seal(TrainerCallback):
    """Notes every file of a checkpoint with its hash as soon as all processes have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        processes.barrier()
        processes.on_main(lambda: seal(Path(args.output_dir) / f"checkpoint-{state.global_step}"))


def seal(checkpoint: Path) -> None:
    """Write the hashes of all files of a checkpoint, which makes it whole. Raises OutputError."""
    with explain_write_errors(checkpoint):
        names = [name for name in files_below(checkpoint) if name != SEAL]
        for name in names:
            sync(checkpoint / name)
        sizes = {name: (checkpoint / name).stat().st_size for name in names}
        files = {name: {"bytes": sizes[name], "sha256": sha256_of(checkpoint / name)} for name in names}
        write_json(checkpoint / SEAL, sealed({"step": step_of(checkpoint), "files": files}))


def damage(checkpoint: Path) -> str | None:
    """Why `checkpoint` cannot be resumed from, or None when it is whole: every file has the hash it was written with.

    A killed run leaves a directory without the hashes, which are written last.
    """
    try:
        content = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        step, files = content["step"], content["files"]
        if not is_sealed(content):
            raise ValueError("it is not what was written")
        faults = faults_in(checkpoint, files)
    except FileNotFoundError:
        return f"{SEAL}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{SEAL} cannot be read ({error})"
    if step != step_of(checkpoint):
        return f"{SEAL} is of step {step}"
    return "; ".join(faults) or None


def newest_whole(directory: Path) -> Path | None:
    """The whole checkpoint with the highest step; damaged ones are named in a warning and passed by."""
    for checkpoint in sorted(_checkpoints(directory), key=step_of, reverse=True):
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("Checkpoint %s is not whole (%s); trying an earlier one.", checkpoint, fault)
    return None


def prepare(directory: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """Check `directory` against `settings` and note them there; returns the checkpoint to continue from.

    Raises:
        OutputError: checkpoints of an earlier run are there and `resume` is False.
        CheckpointError: `resume` is True and the earlier run had other settings, or its settings cannot be
            read.
    """
    path = directory / SETTINGS
    if not resume and (path.exists() or _checkpoints(directory)):
        raise OutputError(
            f"{directory} holds checkpoints of an earlier healing. Pass resume to continue it, or choose "
            "another directory, or delete this one."
        )
    if resume and path.exists():
        _check_same(path, settings)
    elif resume and _checkpoints(directory):
        raise CheckpointError(
            f"{directory} holds checkpoints but no {SETTINGS}, so they are not of a healing that can be "
            "resumed. Choose another directory."
        )
    write_json(path, settings)
    return newest_whole(directory) if resume else None


def _check_same(path: Path, settings: dict[str, Any]) -> None:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete {path.parent} and start again.") from error
    wanted = json.loads(json.dumps(settings))  # as it reads back: tuples become lists
    differing = [
        f"{key} was {earlier.get(key)!r} and is now {wanted.get(key)!r}"
        for key in sorted({*earlier, *wanted})
        if earlier.get(key) != wanted.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"The healing in {path.parent} cannot be continued with other settings: {'; '.join(differing)}. "
            "Use the earlier settings, or start again in another directory."
        )


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return [p for p in directory.iterdir() if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]


def step_of(checkpoint: Path) -> int:
    """The optimiser step at which `checkpoint` was written, from its name."""
    return int(checkpoint.name.rpartition("-")[2])
