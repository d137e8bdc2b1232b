"""What tensors are called in files and in the model: transformers' own renaming and merging, and the guards.

transformers renames keys on loading and renames them back on saving (GPT-NeoX: `embed_out` in files, `lm_head` in the
model), and makes one tensor of several (the experts of Mixtral). Here its mapping is asked, nothing is written twice.

A guard is a tensor of one byte that a compressed checkpoint holds under the dense name of each compressed weight.
Without it, transformers without kronfold would take the model for a dense one and fill those weights with random
numbers; with it, the shapes differ and it refuses by name. Our route knows the guards and skips them.

Format version 1 (kronfold 0.3) called a factor `c_fc.pivots` that is `c_fc.pivots.weight` now; both names load.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from kronfold.base.errors import CheckpointError
from kronfold.structures.layer import read_by, structured_modules

GUARD_SHAPE = (1,)
# Buffers of old versions of transformers: causal masks, rotary tables, positions. They are worked out anew.
_OLD_BUFFERS = re.compile(
    r"(masked_bias|bias|mask|causal_mask|inv_freq|position_ids|token_type_ids|(sin|cos)(_cached)?|embed_positions|"
    r"alibi|slopes)"
)


@dataclass(frozen=True)
class Converted:
    """Tensors of the files that transformers makes into one or more tensors of the model.

    Attributes:
        first: the first name it gives. sources: (stored name, pattern that met it) in natural order.
    """

    first: str
    sources: tuple[tuple[str, str], ...]
    converter: WeightConverter

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name in the model -> tensor, from tensors by stored name (those on the meta device give the shapes)."""
        own = copy.deepcopy(self.converter)
        for stored, pattern in self.sources:
            own.add_tensor(self.first, stored, pattern, tensors[stored])
        made = own.convert(self.first, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class _TermsInRows(ConversionOps):
    """A factor of several terms (terms, out, in) as one matrix (terms·out, in); a matrix stays what it is."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        tensor = found[0] if isinstance(found, list) else found
        return {kwargs["full_layer_name"]: tensor.flatten(0, -2) if tensor.dim() > 2 else tensor}


class EarlierNames(WeightConverter):
    """What makes the factors of format version 1 into the weights of the modules that hold them now."""

    __slots__ = ()


def earlier_names(model: nn.Module) -> list[EarlierNames]:
    """For transformers' loading, and `names_in_model`: at most one entry, for all factors of `model` that are modules.

    It meets names of version 1 alone. It must not be used for saving (`forget_earlier_names`).
    """
    leaves = {
        name.rpartition(".")[2]
        for _, layer in structured_modules(model)
        for name, inner in layer.named_modules()
        if isinstance(inner, nn.Linear) and all(inner is not part for part in layer.parts.values())
    }
    if not leaves:
        return []
    return [EarlierNames(rf"^(.+\.(?:{'|'.join(sorted(leaves))}))$", r"\1.weight", [_TermsInRows()])]


def forget_earlier_names(model: nn.Module) -> None:
    """After loading: what is saved has the names of this version."""
    used = getattr(model, "_weight_conversions", None)
    if used:
        kept = [entry for entry in used if not isinstance(entry, EarlierNames)]
        model._weight_conversions = kept  # type: ignore[assignment]


def names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> tuple[dict[str, str], list[Converted]]:
    """Stored name -> name in `model` for tensors that are only renamed (unknown ones too), and what is converted.

    The rules are those of transformers' loading (`core_model_loading`), prefix of the bare body included.
    """
    mapping = [*get_model_conversion_mapping(model), *earlier_names(model)]
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state, prefix = model.state_dict(keep_vars=True), model.base_model_prefix
    names: dict[str, str] = {}
    merged: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # saved under the model's own name
            name, pattern = key, None
        if pattern is None or name not in state:
            names[key] = name
        else:
            merged.setdefault(name, []).append((key, pattern))
    return names, [Converted(name, tuple(s), by_pattern[s[0][1]]) for name, s in merged.items()]


def settle_conversions(model: PreTrainedModel, specs: Iterable[str]) -> None:
    """Before saving: leave out the conversions that would need the dense weight of a structured module.

    (hrm_text files hold gate and up projection as one tensor; a structured one of them has no weight to join.) The
    others of its kind are then saved by the model's own names, which transformers loads as well.
    """
    used = getattr(model, "_weight_conversions", None)
    if used is None:  # as transformers' saving does for a model that was not loaded
        used = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    dense = [f"{name}.weight" for name in specs]
    kept = [
        entry
        for entry in used
        if not isinstance(entry, WeightConverter)
        or not any(entry.reverse_transform().rename_source_key(name)[1] is not None for name in dense)
    ]
    if len(kept) != len(used):
        model._weight_conversions = kept


def guards(model: PreTrainedModel, specs: Iterable[str]) -> dict[str, Tensor]:
    """One guard for each structured module (names in `specs`): dense name -> one byte, zero.

    A head that follows a structured embedding needs none: the guard of the embedding stands for both. A structure with
    a parameter of the dense name has it in another shape, which guards as well.
    """
    state = model.state_dict(keep_vars=True)
    return {
        f"{name}.weight": torch.zeros(GUARD_SHAPE, dtype=torch.uint8)
        for name in specs
        if f"{name}.weight" not in state and read_by(model.get_submodule(name)) is None
    }


def to_stored(model: PreTrainedModel, tensors: Mapping[str, Tensor], specs: Iterable[str]) -> dict[str, Tensor]:
    """Part of a model as it goes into files: `tensors` by the model's names, and the guards of its modules in `specs`.

    What transformers joins or splits must be there together (the experts of one block).
    """
    settle_conversions(model, specs)
    found: dict[str, Tensor] = revert_weight_conversion(model, {**tensors, **guards(model, specs)})
    return found


def is_guard(model: PreTrainedModel, name: str, shape: tuple[int, ...], specs: Iterable[str]) -> bool:
    """Whether a tensor of the files, by its name in the model, is the guard of a module in `specs`."""
    prefix = model.base_model_prefix + "."
    module, _, leaf = name.removeprefix(prefix).rpartition(".")
    return leaf == "weight" and shape == GUARD_SHAPE and module in {spec.removeprefix(prefix) for spec in specs}


def ignored_pattern(model: PreTrainedModel, specs: Iterable[str]) -> str:
    """A pattern for `_keys_to_ignore_on_load_unexpected` that meets the guards of `specs`, and nothing else."""
    prefix = model.base_model_prefix + "."
    names = "|".join(sorted(re.escape(spec.removeprefix(prefix)) for spec in specs))
    return rf"^({re.escape(prefix)})?({names})\.weight$"


def is_old_buffer(model: nn.Module, name: str) -> bool:
    """Whether an unexpected tensor is a buffer of an old version of transformers, which the model works out itself.

    A bias that the config denies to a layer is none: the layer has a place for it.
    """
    parent, _, leaf = name.rpartition(".")
    if not _OLD_BUFFERS.fullmatch(leaf):
        return False
    if parent.rpartition(".")[2].startswith("rotary"):  # once in every block, now one for all
        parent = parent.rpartition(".")[0]
    prefix = str(getattr(model, "base_model_prefix", "")) + "."
    modules: dict[str, Any] = dict(model.named_modules())
    module = modules.get(parent, modules.get(prefix + parent))
    return module is not None and leaf not in module._parameters and any(True for _ in module.children())


def report_faults(source: str | Path, faults: list[str], ignored: list[str]) -> None:
    """Raise CheckpointError for weights that do not match their config; else warn of the tensors that are left out.

    Args:
        faults: "kind: name of the tensor", each. ignored: names of old buffers.
    """
    if faults:
        more = f"\n  … and {len(faults) - 8} more ({len(faults)} in all)" if len(faults) > 8 else ""
        raise CheckpointError(
            f"The weights in {source} do not match its config{'' if str(source).endswith('.gguf') else '.json'}:\n  "
            + "\n  ".join(faults[:8])
            + more
            + "\nWhat is missing would be random numbers. Take config and weights from the same checkpoint, or copy or "
            "download it again."
        )
    if ignored:
        more = f" and {len(ignored) - 4} more" if len(ignored) > 4 else ""
        warnings.warn(
            f"{source}: ignored {', '.join(sorted(ignored)[:4])}{more}, buffers of an old version of transformers "
            "that the model works out itself.",
            stacklevel=3,
        )
