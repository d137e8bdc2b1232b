"""Bring a published checkpoint of another tool into the kronfold form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config

from kronfold.base import results
from kronfold.base.errors import CheckpointError, InputError
from kronfold.base.files import sha256_of
from kronfold.base.job import Job
from kronfold.export.checkpoint import write_model
from kronfold.export.published_tq import model_from_tq
from kronfold.models.cost import cost
from kronfold.models.load import load_config, load_tokenizer, read_dtype
from kronfold.models.place import read_specs
from kronfold.models.weight_files import read_header

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin", "*.safetensors", "*.pt", "*.bin", "*.pth")


def import_tq(
    path: str | Path,
    output: str | Path,
    *,
    tokenizer: str | None = None,
    heads: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Read a TQCompressedGPT2 state dict and save it as a checkpoint that `from_pretrained` loads, with equal logits.

    Args:
        path: a .safetensors, .pt, .bin or .pth file, or the directory of one; a config.json beside it is read too.
        tokenizer: a model directory or hub id to take the tokenizer from; None: files beside `path`, if there are any.
        heads: number of attention heads; None: as config.json says, else of 64 channels each.
        dtype: of the saved weights; None: as they are.

    Returns the results document (schema `kronfold/import-tq`). Raises OutputError, CheckpointError, InputError, before
    anything is written.
    """
    with Job.open(output, "import-tq", inputs=[path, tokenizer], overwrite=overwrite, resumable=False) as job:
        saved_dtype = read_dtype(dtype) if dtype else None
        file = _weights_file(Path(path))
        model = model_from_tq(read_state(file), _config_beside(file), heads)
        words = _tokenizer(file, tokenizer)
        specs = read_specs(model)
        job.begin()
        write_model(model, words, job.result, saved_dtype)
        document = results.document(
            "import-tq",
            None,
            source={"file": file.name, "sha256": sha256_of(file)},
            **cost(model).to_dict(),
            head="tied" if model.config.tie_word_embeddings else "untied",
            structured=sorted(specs),
            tokenizer=words is not None,
        )
        job.finish(document)
    return document


def read_state(file: Path) -> dict[str, Tensor]:
    """Names -> tensors of a weights file. Nothing but tensors is ever unpickled. Raises CheckpointError."""
    if file.suffix == ".safetensors":
        read_header(file)
        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} cannot be read as a file of tensors ({str(error).splitlines()[0][:120]}). Files that hold more "
            "than tensors are not opened; save model.state_dict() alone."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{file} holds no state dict (names and tensors). Save model.state_dict().")
    return content


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"There is no file or directory {path}. Give the state dict of the published model.")
    found = [file for pattern in WEIGHT_FILES for file in sorted(path.glob(pattern))]
    if not found:
        raise InputError(f"{path} holds no weights file (looked for {', '.join(WEIGHT_FILES)}).")
    return found[0]


def _config_beside(file: Path) -> GPT2Config | None:
    if not (file.parent / "config.json").is_file():
        return None
    config = load_config(file.parent)
    if not isinstance(config, GPT2Config):
        raise InputError(f"{file.parent / 'config.json'} is of type {config.model_type!r}; a GPT-2 is expected.")
    return config


def _tokenizer(file: Path, named: str | None) -> Any:
    if named is not None:
        return load_tokenizer(named)
    beside = any((file.parent / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model"))
    return load_tokenizer(file.parent) if beside else None
