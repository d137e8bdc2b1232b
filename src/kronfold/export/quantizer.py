"""The loading route: `config.json` keeps its model_type and carries the specs under `quantization_config`.

transformers calls the quantizer on the empty skeleton before any weight is read; that is where the structured modules
go in and where a checkpoint that does not fit is refused.

This file is imported while transformers itself is being imported (see autoload), so it may need nothing of it but the
quantizer classes; the rooms that work on models are imported where they are used.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from kronfold.base.errors import CheckpointError
from kronfold.base.results import versions

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

METHOD = "kronfold"
# 2: a guard under the dense name of each compressed weight, and factors that are modules (`c_fc.pivots.weight`).
# 1 had no guards and called such a factor `c_fc.pivots`; it still loads.
FORMAT_VERSION = 2
LOAD_WITH = "pip install kronfold, then `import kronfold` before from_pretrained"


class KronfoldConfig(QuantizationConfigMixin):
    """What config.json says about a compressed model.

    Args:
        specs: module name -> spec of the structured module there.
        format_version: layout of this entry; newer ones than this version knows are refused.
        kronfold_version: the version that wrote the checkpoint, for the record.
        load_with: for people who open config.json: how to load such a checkpoint.

    Raises:
        CheckpointError: a newer format, or specs that are no mapping.
    """

    def __init__(
        self,
        specs: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        kronfold_version: str | None = None,
        load_with: str = LOAD_WITH,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"This checkpoint has kronfold format version {format_version!r}; this kronfold "
                f"({versions().get('kronfold')}) reads up to {FORMAT_VERSION}. Upgrade: pip install -U kronfold."
            )
        if not isinstance(specs, dict) or unknown:
            raise CheckpointError(
                "quantization_config of config.json is not what kronfold writes: "
                + (
                    f"unknown keys {sorted(unknown)}"
                    if unknown
                    else f"'specs' is {type(specs).__name__}, not a mapping"
                )
                + ". The config is damaged or edited; restore it from the original checkpoint."
            )
        self.quant_method = METHOD
        self.format_version = format_version
        self.kronfold_version = kronfold_version or versions().get("kronfold")
        self.load_with = load_with
        self.specs = specs

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.__dict__)


class KronfoldQuantizer(HfQuantizer):
    """Puts empty structured modules into the skeleton; the weights are then read like any others."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        from kronfold.export.checkpoint import check_tensors
        from kronfold.models.place import build_skeleton
        from kronfold.models.stored_names import ignored_pattern

        specs = _for_class(model, self.quantization_config.specs)
        build_skeleton(model, specs)
        if checkpoint_files:
            check_tensors(model, specs, checkpoint_files)
        # The guards are no news to the user, those of a head that this class lacks neither.
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {ignored_pattern(model, self.quantization_config.specs)}
        _mark_initialised(model, specs)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Called once the structured modules stand: how names in the files become those in the model."""
        from kronfold.models.stored_names import earlier_names

        return [*super().update_weight_conversions(weight_conversions, model), *earlier_names(model)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from kronfold.export.checkpoint import check_gathers
        from kronfold.models.stored_names import forget_earlier_names

        forget_earlier_names(model)
        check_gathers(model)
        # The factors are ordinary floating-point parameters: .half(), .float() and full training stay allowed.
        model.is_quantized = False
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Called by `save_pretrained`: what goes into the files. Specs and guards are those of the model as it is now,
        which later stages may have changed."""
        from kronfold.models.place import read_specs
        from kronfold.models.stored_names import guards, settle_conversions

        specs = read_specs(model)
        self.quantization_config.specs, self.quantization_config.format_version = specs, FORMAT_VERSION
        self.quantization_config.load_with = LOAD_WITH
        settle_conversions(model, specs)
        return {**model.state_dict(), **guards(model, specs)}, {"kronfold": str(versions().get("kronfold"))}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | str | None = None) -> PreTrainedModel:
        import torch

        from kronfold.export.dense import to_dense

        return to_dense(model).to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _for_class(model: PreTrainedModel, specs: dict[str, Any]) -> dict[str, Any]:
    """Specs renamed for the class being loaded: a bare body has no prefix and no head, and may have been saved so."""
    modules = dict(model.named_modules())
    prefix = type(model).base_model_prefix + "."
    has_body = any(name.startswith(prefix) for name in modules)
    headless = model.get_output_embeddings() is None
    renamed = {}
    for name, spec in specs.items():
        own = name.removeprefix(prefix) if not has_body else name
        if has_body and own not in modules and prefix + own in modules:
            own = prefix + own  # saved by the bare body
        elif headless and own not in modules and not name.startswith(prefix):
            continue  # the LM head, which this class lacks
        renamed[own] = spec
    head = model.get_output_embeddings()
    if head is not None and model.config.tie_word_embeddings:
        names = {id(module): name for name, module in modules.items()}
        if names[id(model.get_input_embeddings())] in renamed:  # a body has no head to say that it follows
            renamed.setdefault(names[id(head)], {"structure": "tied_head"})
    return renamed


def _mark_initialised(model: PreTrainedModel, specs: dict[str, Any]) -> None:
    """Keep transformers from initialising what the checkpoint holds: its rules reach into parents for `.weight`.

    A parent with buffers that no checkpoint holds (GPT-Neo's causal masks) needs its rule, which works them out anew.
    """
    for name in specs:
        parent_name = name.rpartition(".")[0]
        parent = model.get_submodule(parent_name)
        if parent_name and not parent._non_persistent_buffers_set:
            parent._is_hf_initialized = True
        for module in model.get_submodule(name).modules():
            module._is_hf_initialized = True


def attach(model: PreTrainedModel) -> None:
    """Make a model that was just operated on save itself as a kronfold checkpoint (`model.save_pretrained`)."""
    from kronfold.models.place import read_specs

    config = KronfoldConfig(read_specs(model))
    model.config.quantization_config = config
    model.hf_quantizer = KronfoldQuantizer(config)
    model.quantization_method = METHOD


def register() -> None:
    """Tell transformers about the method "kronfold". Idempotent."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(KronfoldConfig)
        register_quantizer(METHOD)(KronfoldQuantizer)
