"""A student split over the processes (FSDP2): what accelerate leaves open for heads in chunks, checkpoints and the end.

accelerate puts each block, the embedding and the head into groups whose parameters are gathered while they are used.
A copy of the student is split. The student itself waits in the host's memory, whole, and takes the weights of its
split twin for every checkpoint and at the end, so it is saved and measured as ever, and files are those of any run.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from kronfold.base import processes
from kronfold.base.errors import CheckpointError, InputError
from kronfold.distill import Method, head_parameters
from kronfold.models.weight_files import WeightFiles

_REFUSED = {  # variables that accelerate launch sets -> what is meant
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
    "FSDP_IGNORED_MODULES": "fsdp_ignored_modules",
}


def asked() -> bool:
    """Whether accelerate's configuration asks for FSDP, in a process that a launcher started."""
    return processes.launcher_says("ACCELERATE_USE_FSDP") and "LOCAL_RANK" in os.environ


def check(method: Method) -> None:
    """Raises InputError for what FSDP is asked for and cannot do here; before anything is trained."""
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("Only FSDP2 can split a student; set `fsdp_version: 2` in accelerate's configuration.")
    refused = [word for name, word in _REFUSED.items() if os.environ.get(name, "false").lower() not in ("false", "0")]
    if refused:
        raise InputError(f"Healing under FSDP2 cannot use {', '.join(refused)}; leave it out of the configuration.")
    if method.makes_inputs:
        raise InputError(
            f"Method {method.config.method} runs the student a second time inside a step, on inputs of its own, which "
            "FSDP2 does not follow. Start it with DDP (`distributed_type: MULTI_GPU`, or torchrun), or choose another "
            "method."
        )


def check_teacher(teacher: PreTrainedModel) -> None:
    """Raises InputError when the processes hold different teachers; each compares a few numbers of every tensor.

    With `fsdp_cpu_ram_efficient_loading`, accelerate launch's default, `from_pretrained` reads weights in the main
    process alone once the processes have met, and leaves the others with whatever is in memory. kronfold's commands
    switch that off.
    """
    heads = [p.detach().flatten()[:8].cpu() for p in teacher.parameters()]
    numbers = b"".join(head.contiguous().view(torch.uint8).numpy().tobytes() for head in heads)
    if len(set(processes.gather(hashlib.sha256(numbers).hexdigest()))) > 1:
        raise InputError(
            "The processes hold different teachers. Set `fsdp_cpu_ram_efficient_loading: false` in accelerate's "
            "configuration, so that each reads its own, or load the same checkpoint in all."
        )


def twin(student: PreTrainedModel) -> PreTrainedModel:
    """A copy to be split; `student` moves to the host's memory. Its weights are those of the main process for all."""
    student.to("cpu")
    for parameter in student.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP2 splits no other
    processes.copy_from_main([*student.parameters(), *student.buffers()])
    return copy.deepcopy(student)


def enable(accelerator: Any) -> None:
    """Settle the parts of accelerate's FSDP2 that are not left to its configuration.

    On a CPU accelerate never turns FSDP on, though all of it works there; it is turned on here. Every process holds the
    whole student before it is split, so none needs to be told its weights (which `cpu_ram_efficient_loading` does, and
    trips over integer buffers). Autocast does mixed precision as under DDP, so the results are those of DDP.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP


def keep_head_whole(model: PreTrainedModel) -> None:
    """What the head reads stays gathered from the forward pass until its gradients are known.

    accelerate sees to that where the head holds parameters. A head that reads a structured embedding holds none.
    """
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)


@contextlib.contextmanager
def views_allowed() -> Iterator[None]:
    """Without FSDP2's warning of outputs that are views: it fears changes in place, and no model family makes any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned a view tensor")
        yield


class Bare(nn.Module):
    """A head without its hooks: applied to a chunk, FSDP2 would take it for a whole forward pass and split it again."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self._source = (head,)  # a tuple is no submodule

    def source_parameters(self) -> Iterator[nn.Parameter]:
        yield from head_parameters(self._source[0])

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._source[0].forward(hidden)
        return logits


def gather(model: nn.Module, whole: nn.Module) -> None:
    """Put the parameters of the split `model` together in `whole`. All processes must call it."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    places = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            places[name].copy_(_whole(parameter.detach()))


def scatter(whole: nn.Module, model: nn.Module) -> None:
    """Give every process its part of the parameters of `whole`, which all processes hold alike."""
    sources = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_like(sources[name].detach(), parameter))


def read_weights(checkpoint: str | Path, whole: PreTrainedModel) -> None:
    """Fill a whole model with the weights of a checkpoint. Raises CheckpointError when they are of another model."""
    files = WeightFiles(Path(checkpoint), whole)
    state = whole.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(files.read([name])[name])


def save_state(optimizer: Any, scheduler: Any, directory: str | None) -> None:
    """Write optimiser and schedule as the Trainer writes those of a whole student; in no directory, only take part.

    All processes must call it.
    """
    found = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for index, entry in found["state"].items():
        for name, value in entry.items():
            whole = _whole(value).cpu() if isinstance(value, Tensor) else value
            if directory is not None:  # the others gather with it, and keep nothing
                state.setdefault(index, {})[name] = whole
    if directory is not None:
        torch.save({**found, "state": state}, Path(directory) / OPTIMIZER_NAME)
        torch.save(scheduler.state_dict(), Path(directory) / SCHEDULER_NAME)


def load_state(optimizer: Any, scheduler: Any, directory: str) -> None:
    """Read them back, whoever wrote them; every process takes its part.

    Raises CheckpointError when they are of another number of parameters.
    """
    found = torch.load(Path(directory) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
    groups = optimizer.param_groups
    if [len(group["params"]) for group in found["param_groups"]] != [len(group["params"]) for group in groups]:
        raise CheckpointError(f"{directory} is of another student or method; resume from another checkpoint.")
    parameters = [p for group in groups for p in group["params"]]
    state = {
        index: {
            name: _like(value, parameters[index]) if _is_of(value, parameters[index]) else value
            for name, value in entry.items()
        }
        for index, entry in found["state"].items()
    }
    optimizer.load_state_dict({**found, "state": state})
    scheduler.load_state_dict(torch.load(Path(directory) / SCHEDULER_NAME, weights_only=True))


def _is_of(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The part of `tensor` that this process keeps of `parameter`; all hold the same `tensor`, so nothing is sent."""
    tensor = tensor.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
