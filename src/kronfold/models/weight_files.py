"""Read single tensors of a checkpoint from its safetensors files, by the names the model has for them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError
from kronfold.models.safetensors_header import read_header

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class WeightFiles:
    """The weights of a local model directory, in one file or in shards; nothing is read until asked for.

    Args:
        place: a directory as `local_checkpoint` gives it. model: the (empty) model whose names count.

    Attributes:
        files: the safetensors files that hold the model.

    Raises CheckpointError unless the files hold every tensor of the model in its shape, and nothing else.
    """

    def __init__(self, place: Path, model: PreTrainedModel) -> None:
        single, index = place / _SINGLE, place / _INDEX
        if single.is_file():  # as transformers does: one whole file counts before an index
            self.files = [single]
        elif index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            self.files = [place / name for name in sorted(set(names))]
        else:
            raise CheckpointError(
                f"{place} holds neither {_SINGLE} nor {_INDEX}; transformers would not read it either. Save the model "
                "again with model.save_pretrained(...)."
            )
        self._where: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            for name, shape in read_header(file).items():
                self._where[name], shapes[name] = file, shape
        self._stored = self._match(place, model, shapes)

    def _match(self, place: Path, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Name of a tensor in the model -> its name in the files, which may lack the prefix of the bare body."""
        prefix = model.base_model_prefix + "."
        state = model.state_dict(keep_vars=True)
        # Where both names are there the full one, which comes last, counts.
        stored = {name: found for name in state for found in (name.removeprefix(prefix), name) if found in shapes}
        by_tensor = {id(tensor): stored[name] for name, tensor in state.items() if name in stored}
        faults = []
        for name, tensor in state.items():
            found = stored.get(name)
            if found is None and id(tensor) not in by_tensor:
                faults.append(f"missing: {name}")
            elif found is None:
                stored[name] = by_tensor[id(tensor)]  # tied: the files hold it once
            elif shapes[found] != tuple(tensor.shape):
                faults.append(f"wrong shape: {name} {shapes[found]}, expected {tuple(tensor.shape)}")
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        spare = set(shapes) - set(stored.values())
        faults += [f"not in the config: {key}" for key in sorted(spare) if not any(i.search(key) for i in ignored)]
        if faults:
            shown = "\n  ".join(faults[:8]) + (f"\n  … and {len(faults) - 8} more" if len(faults) > 8 else "")
            raise CheckpointError(
                f"The weights in {place} do not match its config.json:\n  {shown}\n"
                "Take both files from the same checkpoint."
            )
        return stored

    def dtype(self) -> torch.dtype:
        """That of the first floating-point tensor of the files."""
        with safe_open(self.files[0], framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                # An empty slice has the dtype and reads nothing.
                found = file.get_slice(name)
                dtype: torch.dtype = (found[:0] if found.get_shape() else file.get_tensor(name)).dtype
                if dtype.is_floating_point:
                    return dtype
        return torch.float32

    def stored_twice(self, names: Iterable[str]) -> bool:
        """Whether the files hold tensors of these names (of one tied tensor) more than once."""
        return len({self._stored[name] for name in names}) > 1

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the model's names, copied into memory: floating-point ones as float32, others as stored."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self._where[self._stored[name]], []).append(name)
        found = {}
        for path, here in wanted.items():
            with safe_open(path, framework="pt") as file:
                for name in here:
                    tensor = file.get_tensor(self._stored[name])
                    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    found[name] = tensor.to(dtype, copy=True)  # the original is a view of the mapped file
        return found
