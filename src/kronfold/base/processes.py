"""Several processes of one job, as torchrun and accelerate launch start them: who is this, and what do all agree on.

The Trainer looks after gradients and losses. This is the rest: process 0, the main one, decides, writes and reports;
what it finds is handed to the others, and so are its errors. In a single process every function here is a plain call.

torch is imported inside functions, and only under a launcher.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

from kronfold.base.errors import InputError, KronfoldError

T = TypeVar("T")

# The others wait while the main process decomposes a large model. The launcher ends them when it dies; no clock has to.
_PATIENCE = timedelta(days=7)
_LAST_WORDS = 60.0  # seconds, at most, for the process that speaks for all; its end then ends the others


def count() -> int:
    """How many processes the launcher started; 1 without one."""
    _read_mpi()
    return max(1, int(os.environ.get("WORLD_SIZE", "1"))) if "RANK" in os.environ else 1


def launcher_says(name: str) -> bool:
    """Whether a variable by which `accelerate launch` hands on its configuration is set to true."""
    return os.environ.get(name, "false").lower() in ("true", "1")


_MPI = ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_")  # Open MPI; MPICH and Intel MPI; MVAPICH


def _read_mpi() -> None:
    """`accelerate launch --cpu --mpirun_hostfile` leaves it to MPI to number the processes; say it as torchrun does."""
    if "RANK" in os.environ or not launcher_says("ACCELERATE_USE_CPU"):
        return
    for prefix in _MPI:
        if f"{prefix}SIZE" in os.environ:
            rank = os.environ[f"{prefix}RANK"]
            os.environ.update(RANK=rank, WORLD_SIZE=os.environ[f"{prefix}SIZE"])
            os.environ.setdefault("LOCAL_RANK", os.environ.get(f"{prefix}LOCAL_RANK", rank))
            return


def index() -> int:
    """The number of this process, from 0, over all machines."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def is_main() -> bool:
    """Whether this process writes files, prints and reports. True without a launcher."""
    return index() == 0


def usable(device: str) -> str:
    """`device`, where it is there; `auto` is CUDA if there is one, else the CPU. Raises InputError."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if ":" in device:
        raise InputError(f"Device {device!r}: choose one GPU with CUDA_VISIBLE_DEVICES and give --device cuda.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"Device {device!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}. Try --device cpu."
        ) from error
    return device


def start(device: str = "auto") -> None:
    """Join the other processes, and take this process's own GPU unless `device` is cpu. Done once; later calls pass.

    The Trainer finds the group made here, by `accelerate`, whose environment variables therefore count.
    """
    if count() == 1:
        return
    # Every process reads whole models: a student in shards (FSDP) is split later, and its teacher is not.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    import torch

    if not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState(cpu=device == "cpu" or not torch.cuda.is_available())


def stop() -> None:
    """Leave the group, if there is one."""
    if count() > 1 and "torch" in sys.modules:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
            _channel.cache_clear()


@cache
def _channel() -> Any:
    """A group for messages between the processes, through memory whatever the training uses; it may wait for hours."""
    import torch

    start()
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def from_main(value: T) -> T:
    """The main process's `value`, on every process. All must call it; none goes on before the main one came here."""
    if count() == 1:
        return value
    import torch

    box = [value if is_main() else None]
    torch.distributed.broadcast_object_list(box, src=0, group=_channel())
    return value if is_main() else box[0]  # type: ignore[return-value]


def copy_from_main(tensors: Iterable[Any]) -> None:
    """Fill tensors in the host's memory with the main process's numbers. All must call it, with tensors alike."""
    if count() == 1:
        return
    import torch

    for tensor in tensors:
        whole = tensor.detach().contiguous()
        torch.distributed.broadcast(whole, src=0, group=_channel())
        tensor.data.copy_(whole)


def gather(value: T) -> list[T]:
    """The `value` of every process, by its number, on every process. All must call it."""
    if count() == 1:
        return [value]
    import torch

    box: list[Any] = [None] * count()
    torch.distributed.all_gather_object(box, value, group=_channel())
    return box


def barrier() -> None:
    """Wait until every process is here."""
    gather(None)


def on_main(work: Callable[[], T], share: bool = True) -> T:
    """Do `work` in the main process alone; its result, or its error, is that of every process.

    `share`: False keeps the result in the main process (the others get None), for what is large or of no use to them.
    """
    if count() == 1:
        return work()
    if not is_main():
        found: Any = from_main(None)
        if found[1] is not None:
            raise found[1]
        return found[0]
    try:
        result = work()
    except Exception as error:
        from_main((None, _portable(error)))
        raise
    from_main((result if share else None, None))
    return result


def _portable(error: Exception) -> Exception:
    """The same error as far as another process needs it; not everything raised can be pickled."""
    if isinstance(error, KronfoldError):
        return type(error)(str(error))
    return RuntimeError(f"{type(error).__name__}: {error}")


def speaks_for_all() -> bool:
    """Asked by a process that failed: True for the first one that asks, which then says why; the others stay silent.

    An error that comes over a process because another one has ended is never the first.
    """
    if count() == 1:
        return True
    first = _asks_first()
    if not first:
        hold_on()
    return first


def hold_on() -> None:
    """Stay until the launcher ends this process, so that its end does not cut off the one that speaks."""
    time.sleep(_LAST_WORDS)


def _asks_first() -> bool:
    from torch.distributed import TCPStore

    key = f"kronfold/failed/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))
        return store.add(key, 1) == 1
    except (KeyError, RuntimeError):  # the launcher keeps no store, or it is gone
        return is_main()


def split_batch(batch: int, micro_batch: int | None) -> tuple[int, int]:
    """(blocks per process and micro-batch, micro-batches per step) of steps over `batch` blocks in all.

    `micro_batch`: the most blocks a process takes through the models at once; None for its whole share.
    Raises InputError when the batch cannot be split into equal parts.
    """
    processes = count()
    if batch % processes:
        fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        raise InputError(
            f"A batch of {batch} blocks cannot be shared equally by {processes} processes. Start a number of them that "
            f"divides it ({fitting}), or choose a batch size that is a multiple of {processes}."
        )
    share = batch // processes
    if micro_batch is None or micro_batch >= share:
        return share, 1
    if micro_batch < 1 or share % micro_batch:
        raise InputError(
            f"A micro-batch of {micro_batch} does not divide the {share} blocks that each of {processes} process(es) "
            f"takes per step. Choose one of {', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}."
        )
    return micro_batch, share // micro_batch
