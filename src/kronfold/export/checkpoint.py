"""Write a model directory, and check one against a model before a single weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError, InputError
from kronfold.base.files import explain_write_errors
from kronfold.models.finite import check_finite
from kronfold.models.load import faults_of
from kronfold.models.place import read_specs
from kronfold.models.stored_names import EarlierNames, guards, is_guard, names_in_model
from kronfold.models.weight_files import read_headers
from kronfold.structures.layer import structured_modules
from kronfold.structures.permutations import is_permutation

_WOULD_NOT_LOAD = (
    "The checkpoint that was written to {} would not load, so it does not become the result; what was there before is "
    "unchanged. This is a fault of kronfold with this kind of model, or of the disk; please report it with these lines:"
)


def check_tensors(model: PreTrainedModel, specs: Mapping[str, Any], files: Iterable[str | Path]) -> None:
    """Raise CheckpointError unless the files hold every tensor of the structured modules, in the right shape.

    transformers fills missing weights with random numbers and a warning; for factors that would be a silent ruin.
    """
    shapes = read_headers(files)
    names, converted = names_in_model(model, shapes)
    prefix = type(model).base_model_prefix + "."
    found = {name.removeprefix(prefix): (key, shapes[key]) for key, name in names.items()}
    for made in converted:
        if isinstance(made.converter, EarlierNames):  # no other belongs to a structure
            (stored, _), *_ = made.sources
            pieces = {key: torch.empty(shapes[key], device="meta") for key, _ in made.sources}
            shape = tuple(made.convert(model, pieces)[made.first].shape)
            found[made.first.removeprefix(prefix)] = (stored, shape)
    guarded = [key for key, name in names.items() if is_guard(model, name, shapes[key], specs)]
    faults = []
    for name in specs:
        module, own = model.get_submodule(name), name.removeprefix(prefix)
        expected = {f"{own}.{key}": tuple(value.shape) for key, value in module.state_dict().items()}
        full = name[: len(name) - len(own)]
        for key, shape in expected.items():
            if key not in found:
                faults.append(f"{full}{key}: missing, expected shape {shape}")
            elif found[key][1] != shape:
                faults.append(f"{full}{key}: shape {found[key][1]}, expected {shape}")
        faults += [
            f"{stored}: not part of this structure"
            for key, (stored, _) in sorted(found.items())
            if key.startswith(own + ".") and key not in expected and stored not in guarded
        ]
    if faults:
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(
            "The weights do not match the structures that config.json describes:\n  "
            + "\n  ".join(faults[:8])
            + more
            + "\nconfig.json and the safetensors files belong to different checkpoints, or a file is incomplete; "
            "restore both from one source."
        )


def check_gathers(model: PreTrainedModel) -> None:
    """Raise CheckpointError unless every gather of a structured layer takes each index once.

    An index beyond the end would stop the model when it runs; one that is named twice would only make it worse.
    """
    for name, layer in structured_modules(model):
        for own, held in layer.named_buffers():
            if held.dtype == torch.int32 and not held.is_meta and not is_permutation(held):
                raise CheckpointError(
                    f"{name}.{own} of the checkpoint is no permutation of 0 to {held.numel() - 1}, so the file is "
                    "damaged. Restore it from a copy (kronfold inspect DIR --verify names the files), or make it anew."
                )


def verify_written(place: str | Path) -> None:
    """Run the loading route over a model directory that was just written, without reading a weight (meta device).

    Called while the directory still has its temporary name, so that nothing that loads is replaced by what does not.

    Raises:
        CheckpointError: tensors missing, of another shape or unknown, a compressed weight without its guard, or a
            file that is incomplete; the names of the tensors are told.
    """
    place = Path(place)
    try:
        model, faults = faults_of(place)
        files = place.glob("*.safetensors")
        unguarded = set(guards(model, read_specs(model))) - set(names_in_model(model, read_headers(files))[0].values())
        faults += [f"no guard: {name}" for name in sorted(unguarded)]
    except InputError as error:
        raise CheckpointError(f"{_WOULD_NOT_LOAD.format(place)} {error}") from error
    if faults:
        more = f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else ""
        raise CheckpointError(f"{_WOULD_NOT_LOAD.format(place)}\n  " + "\n  ".join(faults[:8]) + more)


def write_model(model: PreTrainedModel, tokenizer: Any, place: str | Path, dtype: torch.dtype | None = None) -> None:
    """Model and tokenizer (None for none) into the directory `place`, readable like any other file, then tried on the
    loading route.

    The model is brought to `dtype` first, if one is given. Raises OutputError; NotFiniteError, with the model as it
    was, for weights that are not finite or would not be in that dtype; CheckpointError as `verify_written`.
    """
    check_finite(model, dtype)
    if dtype is not None:
        model.to(dtype)
    with explain_write_errors(place):
        model.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        for file in Path(place).glob("*.safetensors"):
            file.chmod(0o644)  # safetensors creates them for the owner alone
    verify_written(place)
