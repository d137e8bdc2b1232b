"""Open what the user calls MODEL: a hub id, a local directory, a .gguf file, or config:NAME.

Local files are checked before they are read, so that a damaged checkpoint gives one clear sentence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file
from transformers.utils import logging as hf_logging

from kronfold.base.errors import CheckpointError, InputError
from kronfold.models.families import empty_model
from kronfold.models.finite import listed, not_finite
from kronfold.models.place import build_skeleton
from kronfold.models.presets import PRESETS, preset_config
from kronfold.models.safetensors_header import read_headers
from kronfold.models.stored_names import is_old_buffer, report_faults
from kronfold.models.weight_files import WeightFiles

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NO_WEIGHTS = "{} names a size, not weights; it can be planned, not run. Give a model directory or hub id."
_NEW_HEAD = "score."  # what transformers calls the head of a decoder that classifies


def dtype_of(model: str) -> torch.dtype:
    """The dtype that a checkpoint is stored in. Raises as `load_model`."""
    dtype: torch.dtype = load_model(model, dtype="auto").dtype
    return dtype


def read_dtype(name: str) -> torch.dtype:
    """A dtype by name. Raises InputError with the names allowed."""
    if name not in DTYPES:
        raise InputError(f"Unknown dtype {name!r}. Allowed: {', '.join(DTYPES)}.")
    return DTYPES[name]


def load_config(source: str | Path) -> PretrainedConfig:
    """The config of MODEL, without its weights. Raises InputError or CheckpointError."""
    text = str(source)
    if text.startswith("config:"):
        name = text.removeprefix("config:")
        if name in PRESETS or not Path(name).is_dir():
            return preset_config(name)
        _check_config(Path(name))
        return _from_pretrained(AutoConfig, name)
    if text.endswith(".gguf"):
        return _from_gguf(AutoConfig, text)
    if (local := _local(text)) is not None:
        _check_config(local)
    return _from_pretrained(AutoConfig, text)


def load_model(source: str | Path, dtype: torch.dtype | str = torch.float32, device: str = "cpu") -> PreTrainedModel:
    """MODEL with its weights, in eval mode. `dtype` "auto" keeps that of the file, for a look at it.

    Weights that will be computed with (any other dtype) must be finite.

    Raises:
        CheckpointError: config or weights missing, cut short, not matching each other, or not finite.
        InputError: a config:NAME, which has no weights; an unknown hub id without network.
    """
    text = str(source)
    model, faults, ignored = _load(AutoModelForCausalLM, text, dtype)
    report_faults(text, faults, ignored)
    if text.endswith(".gguf"):
        model.hf_quantizer.remove_quantization_config(model)  # dequantised: ordinary numbers that train and save
    _refuse_not_finite(text, model, dtype)
    return model.eval().to(device)


def load_classifier(
    source: str | Path,
    outputs: int,
    *,
    trained: bool = False,
    labels: Sequence[str] = (),
    pad: int | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "cpu",
) -> PreTrainedModel:
    """MODEL for sequence classification with `outputs` numbers (1: regression), in eval mode.

    From a language model the body is taken and a new head drawn from torch's random state; a classifier of as many
    outputs keeps its head. Structured layers stay what they are.

    Args:
        trained: refuse a MODEL without a head for this.
        labels: names of the outputs, for the config. pad: padding token, for the config.

    Raises:
        CheckpointError, InputError: as `load_model`; also a .gguf file, or `trained` and no such head.
    """
    text = str(source)
    if text.endswith(".gguf"):
        raise InputError(f"{text}: a .gguf file cannot become a classifier; save the model as a directory first.")
    options: dict[str, Any] = {"num_labels": outputs}
    options["problem_type"] = "single_label_classification" if outputs > 1 else "regression"
    if labels:
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {name: index for index, name in enumerate(labels)}
    if pad is not None:
        options["pad_token_id"] = pad
    model, faults, ignored = _load(AutoModelForSequenceClassification, text, dtype, **options)
    # The new head, and the language model's old one.
    head = [fault for fault in faults if fault.partition(": ")[2].startswith((_NEW_HEAD, "lm_head."))]
    if trained and any(fault.partition(": ")[2].startswith(_NEW_HEAD) for fault in head):
        raise CheckpointError(
            f"{text} is no classifier with {outputs} output(s). Fine-tune it on the task first (kronfold finetune)."
        )
    report_faults(text, [fault for fault in faults if fault not in head], ignored)
    _refuse_not_finite(text, model, dtype)
    return model.to(device)


def faults_of(place: Path) -> tuple[PreTrainedModel, list[str]]:
    """Run the loading route over a model directory on the meta device, where no weight is read.

    Returns the empty model of the class that config.json names, and every way in which the files do not match it.
    Raises CheckpointError for files that are missing or damaged, and what loading itself refuses.
    """
    config = _check_config(place)
    named = (config.get("architectures") or [""])[0]
    factory = getattr(transformers, named, AutoModelForCausalLM)  # code of its own comes with the Auto class
    model, faults, _ = _load(factory, str(place), "auto", device_map="meta")
    return model, faults


def local_checkpoint(source: str | Path) -> Path:
    """The directory of MODEL on this machine, its config and safetensors files checked; no weight is read.

    Raises:
        CheckpointError: as `load_model`.
        InputError: a config:NAME, a .gguf file, or a hub id that was not downloaded.
    """
    text = str(source)
    if text.startswith("config:"):
        raise InputError(_NO_WEIGHTS.format(text))
    if text.endswith(".gguf"):
        raise InputError(f"{text}: a .gguf file cannot be read block by block; save the model as a directory first.")
    place = _local(text)
    if place is None:
        try:
            found = cached_file(text, "config.json", local_files_only=True)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{text!r} is not on this machine. Download it first (hf download {text}), or give a model directory."
            ) from error
        place = Path(found).parent
    _check_config(place)
    _check_weights(place)
    return place


def on_disk(source: str | Path) -> Path | None:
    """Where the files of MODEL lie on this machine, downloaded ones too; None where there are none."""
    text = str(source)
    if Path(text).exists():
        return Path(text)
    try:
        return Path(cached_file(text, "config.json", local_files_only=True)).parent
    except (OSError, ValueError, TypeError):
        return None


def _load(
    factory: Any, text: str, dtype: torch.dtype | str, **options: Any
) -> tuple[PreTrainedModel, list[str], list[str]]:
    """The model, every way in which its weights do not match its config, and the old buffers that were ignored."""
    if text.startswith("config:"):
        raise InputError(_NO_WEIGHTS.format(text))
    gguf = text.endswith(".gguf")
    local = None if gguf else _local(text)
    if local is not None:
        _check_config(local)
        _check_weights(local)
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()  # what the load report would warn about is told by the faults
    try:
        if gguf:
            model, info = _from_gguf(factory, text, **options)
        else:
            model, info = _from_pretrained(factory, text, use_safetensors=True, **options)
    except RuntimeError as error:  # tensors that transformers joins or splits while loading do not go together
        if local is not None and not options.get("device_map"):
            WeightFiles(local, _skeleton(local))  # tells which
        raise CheckpointError(
            f"The weights in {text} cannot be put together as its config says: {str(error).splitlines()[0]} "
            "Copy or download the checkpoint again."
        ) from error
    finally:
        hf_logging.set_verbosity(level)
    ignored = sorted(key for key in info["unexpected_keys"] if is_old_buffer(model, key))
    faults = [f"missing: {key}" for key in sorted(info["missing_keys"])]
    faults += [f"wrong shape: {key}" for key in sorted(_key(entry) for entry in info["mismatched_keys"])]
    faults += [f"not in the config: {key}" for key in sorted(info["unexpected_keys"] - set(ignored))]
    return model, faults, ignored


def _skeleton(place: Path) -> PreTrainedModel:
    """The empty causal model of a directory, structured modules included."""
    config = AutoConfig.from_pretrained(place)
    model = empty_model(config)
    build_skeleton(model, (config.to_dict().get("quantization_config") or {}).get("specs", {}))
    return model


def _key(entry: Any) -> str:
    """A mismatched entry: the name of the tensor, and its shapes where they are told."""
    return entry if isinstance(entry, str) else " ".join(str(part) for part in entry)


def _refuse_not_finite(text: str, model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Raise CheckpointError for weights that are NaN or infinite, unless they are only looked at (`auto`)."""
    if dtype != "auto" and (faults := not_finite(model.named_parameters())):
        kind = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"The weights in {text}, read as {kind}, are not finite:{listed(faults)}\nGet the checkpoint again from a "
            "source where it is whole, or train it again with a lower learning rate."
        )


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer that belongs to MODEL. Raises CheckpointError when there is none."""
    text = str(source)
    if text.endswith(".gguf"):
        return _from_gguf(AutoTokenizer, text)
    local = _local(text)
    if local is not None and not any(
        (local / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")
    ):
        raise CheckpointError(
            f"There is no tokenizer in {local} (looked for tokenizer.json, vocab.json, tokenizer.model). "
            "Copy the tokenizer files of the original model there."
        )
    return _from_pretrained(AutoTokenizer, text)


def _local(text: str) -> Path | None:
    """The directory meant, None for a hub id. What looks like a path must exist."""
    path = Path(text)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{text} is a file. Give the directory that holds config.json, or a .gguf file.")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise InputError(
            f"There is no directory {text}. Give a model directory, a hub id such as openai-community/gpt2, "
            "a .gguf file, or config:NAME."
        )
    return None


def _from_pretrained(factory: Any, text: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(text, **options)
    except InputError:
        raise
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"Could not open {text!r}: {first} If it is a local model, give its directory; "
            "if it is a hub id, check the name and the network."
        ) from error


def _check_config(path: Path) -> dict[str, Any]:
    """The content of config.json."""
    config = path / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{path} holds no config.json, so it is no model directory.")
    try:
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{config} is not valid JSON ({error}). Restore it from the original checkpoint."
        ) from error
    return content


def _check_weights(path: Path) -> None:
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{path} holds no .safetensors file. kronfold reads safetensors only; convert other formats with "
            "model.save_pretrained(...) of transformers first."
        )
    index = path / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(wanted - {file.name for file in files})
        if missing:
            raise CheckpointError(f"{path} lacks the shards {', '.join(missing)} named in {index.name}. Copy them too.")
    read_headers(files)


def _from_gguf(factory: Any, text: str, **options: Any) -> Any:
    path = Path(text)
    if not path.is_file():
        raise InputError(f"There is no file {text}.")
    try:
        return factory.from_pretrained(path.parent, gguf_file=path.name, **options)
    except ImportError as error:
        raise InputError(f"Reading {path.name} needs the gguf package: pip install 'kronfold[gguf]'.") from error
