"""Which checkpoint may a run continue from? Only a whole one, and only of the same run."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from kronfold.base import processes
from kronfold.base.errors import CheckpointError, DivergedError, OutputError
from kronfold.base.files import explain_write_errors, files_below, sha256_of, sync, write_json
from kronfold.base.marker import SEAL, faults_in, is_sealed, sealed
from kronfold.distill import Method

logger = logging.getLogger(__name__)

SETTINGS = "heal.json"  # beside the checkpoints; what must be the same for a resumed run to be the same run
DIVERGED = "diverged.json"  # beside them, of a run that diverged: where, and with which of the settings below
CALMING = ("learning_rate", "warmup", "max_grad_norm")  # what may change then, wherever in the settings it stands


class Seal(TrainerCallback):
    """Notes every file of a checkpoint with its hash as soon as all processes have written theirs."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        processes.barrier()
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if checkpoint.is_dir():  # the watch may have kept a ruined one from being written
            processes.on_main(lambda: seal(checkpoint))


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


def newest_whole(directory: Path, up_to: int | None = None) -> Path | None:
    """The whole checkpoint of the highest step, at most `up_to`; damaged ones are named in a warning and passed by."""
    for checkpoint in sorted(_checkpoints(directory), key=step_of, reverse=True):
        if up_to is not None and step_of(checkpoint) > up_to:
            continue
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("Checkpoint %s is not whole (%s); trying an earlier one.", checkpoint, fault)
    return None


def prepare(directory: Path, settings: dict[str, Any], resume: bool) -> Path | None:
    """Check `directory` against `settings` and note them there; returns the checkpoint to continue from.

    After a divergence (`mark_diverged`) one of CALMING must differ, and checkpoints from when it went wrong are
    deleted: they would count as the newest.

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
    diverged = _read(directory / DIVERGED) if resume and (directory / DIVERGED).exists() else None
    if resume and path.exists():
        _check_same(path, settings, diverged)
    elif resume and _checkpoints(directory):
        raise CheckpointError(
            f"{directory} holds checkpoints but no {SETTINGS}, so they are not of a healing that can be "
            "resumed. Choose another directory."
        )
    if diverged is not None:
        for checkpoint in _checkpoints(directory):
            if step_of(checkpoint) > diverged["good_up_to"]:
                shutil.rmtree(checkpoint)
    write_json(path, settings)
    (directory / DIVERGED).unlink(missing_ok=True)  # last: a kill before this line repeats all of it
    return newest_whole(directory) if resume else None


def mark_diverged(directory: Path, settings: dict[str, Any], error: DivergedError) -> DivergedError:
    """Note in `directory` that the run of these settings has diverged; returns the error with what is kept there."""
    good_up_to = max(0, error.since - 2)
    calming = {key: value for key, value in _leaves(settings).items() if key.rpartition(".")[2] in CALMING}
    write_json(directory / DIVERGED, {"since_step": error.since, "good_up_to": good_up_to, "settings": calming})
    kept = newest_whole(directory, good_up_to)
    found = f"{kept} is kept, from before it went wrong" if kept else "There is no checkpoint from before it went wrong"
    way = "goes on from there" if kept else "begins anew"
    return DivergedError(
        f"{error} {found}; a resumed run (--resume) with a lower learning rate {way}.",
        since=error.since,
        finding=str(error),
    )


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings with those of a group named `group.name`."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete {path.parent} and start again.") from error


def _check_same(path: Path, settings: dict[str, Any], diverged: dict[str, Any] | None) -> None:
    earlier = _read(path)
    wanted = json.loads(json.dumps(settings))  # as it reads back: tuples become lists
    keys = {key for key in {*earlier, *wanted} if earlier.get(key) != wanted.get(key)}
    if diverged is not None:
        now = _leaves(wanted)
        if all(now.get(key) == value for key, value in diverged["settings"].items()):
            rates = [value for key, value in diverged["settings"].items() if key.endswith("learning_rate")]
            raise CheckpointError(
                f"The training in {path.parent} diverged at step {diverged['since_step']} with learning rate "
                f"{', '.join(f'{rate:g}' for rate in rates)}, and would do so again. Resume it with a lower one "
                "(--learning-rate), or start again in another directory."
            )
        before = _leaves(earlier)
        keys = {key for key in {*before, *now} if before.get(key) != now.get(key)}
        keys = {key for key in keys if key.rpartition(".")[2] not in CALMING}
        earlier, wanted = before, now
    differing = [f"{key} was {earlier.get(key)!r} and is now {wanted.get(key)!r}" for key in sorted(keys)]
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


# Parameters of the distillation method (projections, ...): trained and saved beside the student, never inside it.


FILE = "method.pt"  # in a Trainer checkpoint, beside optimizer.pt


class MethodGradients(TrainerCallback):
    """What the Trainer does for the gradients of the student only: average over processes, clip, clear."""

    def __init__(self, method: Method, accelerator: Any) -> None:
        self.method = method
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._average()
        parameters = [p for p in self.method.companions if p.grad is not None]
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def _average(self) -> None:
        """The mean over processes; one without a gradient counts as zero, unless none has one."""
        if self.accelerator.num_processes == 1:
            return
        own = self.method.companions
        had = torch.tensor([float(p.grad is not None) for p in own], device=self.accelerator.device)
        for parameter, somewhere in zip(own, self.accelerator.reduce(had, "sum").tolist(), strict=True):
            if somewhere:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.method.zero_grad()


def save_method(method: nn.Module, directory: str) -> None:
    """Write the state of `method` into a checkpoint, if it has any."""
    if method.state_dict():
        torch.save(method.state_dict(), Path(directory) / FILE)


def load_method(method: nn.Module, directory: str) -> None:
    """Read it back. Raises CheckpointError when it is missing or of another shape."""
    if not method.state_dict():
        return
    try:
        method.load_state_dict(torch.load(Path(directory) / FILE, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory} does not hold the parameters of this run's method in {FILE} ({error}). Resume from another "
            "checkpoint, or start again in another directory."
        ) from error
