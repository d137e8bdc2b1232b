"""DeepSpeed's ZeRO 1 and 2, as accelerate's configuration asks for them: what the Trainer leaves open.

The Trainer and accelerate drive DeepSpeed. In these stages every process holds the whole student, so heads in chunks
and losses work as under DDP; the optimiser's state (1), and the gradients (2), are split. Stage 3 splits the student
itself, and there FSDP2 is what we support (`train/sharded.py`).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from kronfold.base import processes
from kronfold.base.errors import InputError
from kronfold.distill import Method

OWN = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def asked() -> bool:
    """Whether accelerate's configuration asks for DeepSpeed."""
    return processes.launcher_says("ACCELERATE_USE_DEEPSPEED")


def check(method: Method) -> None:
    """Raises InputError for what DeepSpeed is asked for and cannot do here; before anything is trained."""
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError("The configuration asks for DeepSpeed, which is missing: pip install kronfold[deepspeed].")
    if "LOCAL_RANK" not in os.environ:
        raise InputError("DeepSpeed wants a launcher: start with accelerate launch, also for a single process.")
    if method.companions or method.trains_teacher:
        raise InputError(
            f"Method {method.config.method} trains parameters of its own beside the student, which DeepSpeed does not "
            "follow. Start it with DDP (`distributed_type: MULTI_GPU`, or torchrun), with FSDP2 (`distributed_type: "
            "FSDP`, `fsdp_version: 2`), or choose another method."
        )
    _check_configuration()


def _check_configuration() -> None:
    from accelerate.utils import DeepSpeedPlugin

    config = DeepSpeedPlugin().hf_ds_config  # as TrainingArguments will read it
    stage = int(config.get_value("zero_optimization.stage", 0))
    if stage > 2:
        raise InputError(
            f"Healing under DeepSpeed does ZeRO stages 1 and 2, and the configuration asks for {stage}. Set "
            "`zero_stage: 2`, or split the student itself with FSDP2 (`distributed_type: FSDP`, `fsdp_version: 2`)."
        )
    if config.is_true("fp16.enabled"):
        raise InputError("Healing runs in bf16 or fp32; leave fp16 out of DeepSpeed's configuration.")


def settings(on_cpu: bool, bf16: bool | str) -> dict[str, Any]:
    """What TrainingArguments need besides: accelerate starts DeepSpeed where `use_cpu` is off, also without a GPU.

    Raises InputError for bf16 on a CPU, which the Trainer then refuses; "auto" means float32 there.
    """
    if not on_cpu:
        return {}
    if bf16 is True:
        raise InputError("Healing under DeepSpeed on a CPU runs in float32; leave bf16 at auto.")
    return {"use_cpu": False, "ddp_backend": "gloo", "bf16": False}


def complete(args: TrainingArguments) -> None:
    """Leave to healing what its own settings say: batch, accumulation and clipping, unless they are written out."""
    config = args.deepspeed_plugin.hf_ds_config.config
    if args.gradient_accumulation_steps != 1 and config.get("gradient_accumulation_steps") == 1:
        del config["gradient_accumulation_steps"]  # accelerate's default, not the user's
    for name in OWN:
        config.setdefault(name, "auto")


@contextmanager
def differences_named() -> Iterator[None]:
    """The Trainer's complaint that DeepSpeed's configuration says other than healing's settings, as an InputError."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, InputError) or "DeepSpeed config" not in str(error):
            raise
        raise InputError(f"{error} In kronfold they are batch_size, micro_batch, max_grad_norm and bf16.") from error


def settle(engine: Any, student: PreTrainedModel) -> None:
    """End DeepSpeed's work on a student: fp32 weights, and parameters without its hooks. All processes must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole: dict[int, nn.Parameter] = {}
    for parameter in student.parameters():
        values = safe_get_full_fp32_param(parameter)  # in bf16 the numbers trained on are copies of these
        values = parameter.detach().float() if values is None else values
        whole[id(parameter)] = nn.Parameter(values.clone(), requires_grad=parameter.requires_grad)
    engine.destroy()
    for module in student.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, name, whole[id(parameter)])
