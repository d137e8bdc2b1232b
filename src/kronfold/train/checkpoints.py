"""Which checkpoint may a run continue from? Only a whole one, and only of the same run."""

from __future__ import annotations

import json
import logging
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kronfold.base.errors import CheckpointError, DivergedError, OutputError
from kronfold.base.files import write_json

logger = logging.getLogger(__name__)

DEEPSPEED = "latest"  # names the directory of its state
SETTINGS = "heal.json"  # beside the checkpoints; what must be the same for a resumed run to be the same run
DIVERGED = "diverged.json"  # beside them, of a run that diverged: where, and with which of the settings below
CALMING = ("learning_rate", "warmup", "max_grad_norm")  # what may change then, wherever in the settings it stands


def damage(checkpoint: Path) -> str | None:
    """Why `checkpoint` cannot be resumed from, or None when it is whole.

    The Trainer writes weights, optimiser, schedule, random states, and last `trainer_state.json`; a killed
    run leaves a directory without it. Torn files are found by their own ends: JSON that does not parse, a zip
    archive without its directory, a safetensors file shorter than its header says.
    """
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except OSError:
        return "trainer_state.json, which is written last, is missing"
    except ValueError:
        return "trainer_state.json is cut off"
    if state.get("global_step") != step_of(checkpoint):
        return f"trainer_state.json is of step {state.get('global_step')}"
    split = checkpoint / DEEPSPEED  # of a healing under DeepSpeed, in place of optimizer.pt
    for name in ("scheduler.pt",) if split.exists() else ("optimizer.pt", "scheduler.pt"):
        if not zipfile.is_zipfile(checkpoint / name):
            return f"{name} is missing or cut off"
    if split.exists():
        parts = list((checkpoint / split.read_text(encoding="utf-8").strip()).glob("*.pt"))
        if not parts or not all(zipfile.is_zipfile(part) for part in parts):
            return "DeepSpeed's state is missing or cut off"
    method = checkpoint / "method.pt"  # only of methods with parameters of their own
    if method.exists() and not zipfile.is_zipfile(method):
        return "method.pt is cut off"
    random_states = list(checkpoint.glob("rng_state*.pth"))
    if not random_states or not all(zipfile.is_zipfile(path) for path in random_states):
        return "the random states are missing or cut off"
    return _damaged_weights(checkpoint)


def _damaged_weights(checkpoint: Path) -> str | None:
    try:
        index = checkpoint / "model.safetensors.index.json"
        names = {"model.safetensors"}
        if index.exists():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            with safe_open(checkpoint / name, framework="pt") as file:
                file.keys()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return f"the weights cannot be read ({error})"
    return None


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
