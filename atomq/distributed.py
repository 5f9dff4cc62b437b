"""Several processes of torchrun at one job; in a single process, everything here does nothing.

All processes run the same program. Calibration and evaluation windows are shared out and sums over them are
added up over the processes; linear groups are solved by one process each, which then sends their codes to the
others; the first process alone writes files and speaks to people.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from atomq.errors import ConfigError

T = TypeVar("T")

_PATIENCE = datetime.timedelta(hours=2)  # one process may solve or write for long while the others wait


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Work together with the other processes that torchrun started, by NCCL on CUDA, else by gloo."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        dist.init_process_group("nccl", timeout=_PATIENCE, device_id=own)  # which connects at once
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: the others may still wait, until torchrun ends them


def n_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process is the one that writes and speaks; also true of a single one."""
    return int(os.environ.get("RANK", "0")) == 0


def own_share(windows: torch.Tensor) -> torch.Tensor:
    """This process's part of windows [n, ...]: a run of them, as long as the others' or one longer.

    Raises:
        ConfigError: there are fewer windows than processes.
    """
    if len(windows) < n_processes():
        raise ConfigError(
            f"{len(windows)} windows cannot be shared by {n_processes()} processes; "
            f"give more text, or start fewer processes"
        )
    return torch.tensor_split(windows, n_processes())[rank()]


def share_work(costs: Sequence[float]) -> list[int]:
    """Which process is to do each piece of work: the costliest first, each to the least busy; of several to
    the last, since the first also writes and speaks.
    """
    busy = [0.0] * n_processes()
    owners = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = min(range(len(busy)), key=lambda process: (busy[process], -process))
        busy[owners[index]] += costs[index]
    return owners


def add_up(*tensors: torch.Tensor) -> None:
    """Replace each tensor by its sum over the processes."""
    for tensor in tensors if n_processes() > 1 else ():
        dist.all_reduce(tensor)


def take_largest(tensor: torch.Tensor) -> None:
    """Replace a tensor by its elementwise maximum over the processes."""
    if n_processes() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)


def total(number: int) -> int:
    """The sum of the processes' numbers."""
    counter = torch.tensor(number, device=_device())
    add_up(counter)
    return int(counter)


def gather(value: T) -> list[T]:
    """The values of all processes, in their order."""
    values: list[Any] = [value] * n_processes()
    if n_processes() > 1:
        dist.all_gather_object(values, value)
    return values


def from_process(source: int, value: T) -> T:
    """What the process `source` has for `value`; those of the others do not count."""
    box: list[Any] = [value]
    if n_processes() > 1:
        dist.broadcast_object_list(box, source)
    result: T = box[0]
    return result


def tensors_from(
    source: int, tensors: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """The tensors that the process `source` has, on `device` and bit for bit."""
    if n_processes() == 1:
        return {name: tensor.to(device) for name, tensor in tensors.items()}
    specs = from_process(source, {name: (t.dtype, t.shape) for name, t in tensors.items()})
    received = {}
    for name, (dtype, shape) in specs.items():
        if rank() == source:
            tensor = tensors[name].to(_device()).contiguous()
        else:
            tensor = torch.empty(shape, dtype=dtype, device=_device())
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), source)
        received[name] = tensor.to(device)
    return received


def _device() -> torch.device:
    """Where the processes' means of communication wants its tensors."""
    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return torch.device("cuda" if nccl else "cpu")
