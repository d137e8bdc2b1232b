"""Read the headers of safetensors files, and notice damage, without reading a weight."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from kronfold.base.errors import CheckpointError
from kronfold.models.place import read_specs
from kronfold.models.stored_names import Converted, is_guard, is_old_buffer, names_in_model, report_faults


def read_header(path: str | Path) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a safetensors file. Raises CheckpointError when it is cut short or damaged."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= size - 8:
            raise CheckpointError(
                f"{path} is no complete safetensors file ({size:,} bytes). Copy or download it again."
            )
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise CheckpointError(f"{path}: the header is damaged. Copy or download the file again.") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(
            f"{path} is cut short or damaged: its header promises {8 + length + end:,} bytes, the file has {size:,}. "
            "Copy or download it again."
        )
    return {name: tuple(entry["shape"]) for name, entry in header.items()}


def read_headers(files: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes over all shards."""
    found: dict[str, tuple[int, ...]] = {}
    for file in files:
        found.update(read_header(file))
    return found


# Read single tensors of a checkpoint from its safetensors files, by the names the model has for them.


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
        self._model = model
        self._stored = self._match(place, shapes)

    def _match(self, place: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str | Converted]:
        """Name of a tensor in the model -> its name in the files, or what it is made of."""
        model, specs = self._model, read_specs(self._model)
        state = model.state_dict(keep_vars=True)
        names, converted = names_in_model(model, shapes)
        stored: dict[str, str | Converted] = {}
        given: dict[str, tuple[int, ...]] = {}
        faults, spare, old = [], [], []
        ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
        # Where a tensor is there with and without the prefix of the body, the full name, which comes last, counts.
        for key, name in sorted(names.items(), key=lambda item: item[0] == item[1]):
            if name in state:
                stored[name], given[name] = key, shapes[key]
            elif is_guard(model, name, shapes[key], specs) or any(pattern.search(name) for pattern in ignored):
                continue
            elif is_old_buffer(model, name):
                old.append(name)
            else:
                spare.append(name)
        for made in converted:
            try:
                pieces = {key: torch.empty(shapes[key], device="meta") for key, _ in made.sources}
                found = {name: tuple(tensor.shape) for name, tensor in made.convert(model, pieces).items()}
            except Exception as error:  # tensors that do not go together, each kind with its own error
                faults.append(f"cannot be put together: {made.first} from {len(made.sources)} tensors ({error})")
                found = dict.fromkeys((made.first,), tuple(state[made.first].shape))
            stored |= dict.fromkeys(found, made)
            given |= found
        by_tensor = {id(tensor): stored[name] for name, tensor in state.items() if name in stored}
        for name, tensor in state.items():
            if name not in stored and id(tensor) not in by_tensor:
                faults.append(f"missing: {name}")
            elif name not in stored:
                stored[name] = by_tensor[id(tensor)]  # tied: the files hold it once
            elif given[name] != tuple(tensor.shape):
                faults.append(f"wrong shape: {name} {given[name]}, expected {tuple(tensor.shape)}")
        report_faults(place, faults + [f"not in the config: {key}" for key in sorted(spare)], old)
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
        return (
            len({id(source) if isinstance(source := self._stored[name], Converted) else source for name in names}) > 1
        )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by the model's names, copied into memory: floating-point ones as float32, others as stored."""
        sources = {name: self._stored[name] for name in names}
        plain = {name: source for name, source in sources.items() if isinstance(source, str)}
        read = self._read(plain.values())
        found = {name: read[source] for name, source in plain.items()}
        for made in {id(source): source for source in sources.values() if isinstance(source, Converted)}.values():
            pieces = self._read(key for key, _ in made.sources)
            whole = made.convert(self._model, pieces)
            found |= {name: whole[name] for name in sources.keys() & whole.keys()}
        return found

    def _read(self, stored: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names in the files."""
        wanted: dict[Path, list[str]] = {}
        for name in stored:
            wanted.setdefault(self._where[name], []).append(name)
        found = {}
        for path, here in wanted.items():
            with safe_open(path, framework="pt") as file:
                for name in here:
                    tensor = file.get_tensor(name)
                    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    found[name] = tensor.to(dtype, copy=True)  # the original is a view of the mapped file
        return found
