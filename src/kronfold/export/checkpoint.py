"""Write a model directory, and check one against a model before a single weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError
from kronfold.base.files import explain_write_errors
from kronfold.models.finite import check_finite
from kronfold.models.safetensors_header import read_headers


def check_tensors(model: PreTrainedModel, specs: Mapping[str, Any], files: Iterable[str | Path]) -> None:
    """Raise CheckpointError unless the files hold every tensor of the structured modules, in the right shape.

    transformers fills missing weights with random numbers and a warning; for factors that would be a silent ruin.
    """
    found = read_headers(files)
    prefix = type(model).base_model_prefix + "."
    faults = []
    for name in specs:
        module = model.get_submodule(name)
        expected = {f"{name}.{key}": tuple(value.shape) for key, value in module.state_dict().items()}
        given = {key for key in found if key.startswith((name + ".", prefix + name + "."))}
        for key, shape in expected.items():
            actual = found.get(key, found.get(prefix + key))
            if actual is None:
                faults.append(f"{key}: missing, expected shape {shape}")
            elif actual != shape:
                faults.append(f"{key}: shape {actual}, expected {shape}")
        known = {key.removeprefix(prefix) for key in expected}
        faults += [
            f"{key}: not part of this structure" for key in sorted(given) if key.removeprefix(prefix) not in known
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


def write_model(model: PreTrainedModel, tokenizer: Any, place: str | Path, dtype: torch.dtype | None = None) -> None:
    """Model and tokenizer (None for none) into the directory `place`, readable like any other file.

    The model is brought to `dtype` first, if one is given. Raises OutputError; NotFiniteError, with the model as it
    was, for weights that are not finite or would not be in that dtype.
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
