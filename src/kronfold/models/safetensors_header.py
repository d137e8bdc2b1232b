"""Read the headers of safetensors files, and notice damage, without reading a weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path

from kronfold.base.errors import CheckpointError


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
