"""The tensors of a model's files, by name: what the header says of each, and how to read it.

Headers are read and checked in full before any tensor is, so that a wrong or broken file is refused at
once and by name. Every size that a file states is held against the size of the file first; nothing is
allocated on the word of a header.

The safetensors container is read here in its plain form (eight bytes of length, a JSON header, data),
because GGUF and safetensors then share one path through `atomq.models.loading`; atomq's own files are
written and read with the safetensors library, in `atomq.formats`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Any

import torch

from atomq.errors import UnsupportedModelError

_FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that has not been read yet.

    Attributes:
        shape: as torch has it, slowest dimension first.
        dtype: the dtype that the file stores and `read` returns; None for GGUF, which stores blocks as
            well and is read as float32.
        read: reads the tensor into memory of its own, on the CPU.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read: Callable[[], torch.Tensor]


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, none of them read.

    Raises:
        UnsupportedModelError: the file is truncated or corrupt, or a tensor is not F32, F16 or BF16.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        data_start = 8 + header_bytes
        if size_bytes < 8 or data_start > size_bytes:
            raise UnsupportedModelError(f"{path.name} is truncated or no safetensors file; fetch it again")
        try:
            header = json.loads(file.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise UnsupportedModelError(f"{path.name} has a corrupt header: {error}") from error
    if not isinstance(header, dict):
        raise UnsupportedModelError(f"{path.name} has a corrupt header: not a JSON object")
    header.pop("__metadata__", None)
    return {name: _stored(path, name, entry, data_start, size_bytes) for name, entry in header.items()}


def _stored(path: Path, name: str, entry: Any, data_start: int, size_bytes: int) -> StoredTensor:
    try:
        type_name, shape = str(entry["dtype"]), tuple(index(n) for n in entry["shape"])
        begin, end = (index(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(f"{path.name} has a corrupt header at {name}: {error!r}") from error
    dtype = _FLOAT_TYPES.get(type_name)
    if dtype is None:
        raise UnsupportedModelError(
            f"{path.name} stores {name} as {type_name}; atomq quantizes float models, "
            f"whose tensors are {', '.join(_FLOAT_TYPES)}"
        )
    n_bytes = end - begin
    if begin < 0 or min(shape, default=1) < 1 or n_bytes != prod(shape) * dtype.itemsize:
        raise UnsupportedModelError(
            f"{path.name} has a corrupt header: {name} of shape {list(shape)} spans {n_bytes} bytes"
        )
    if data_start + end > size_bytes:
        raise UnsupportedModelError(
            f"{path.name} is truncated: {name} ends at byte {data_start + end} of {size_bytes}; "
            f"fetch it again"
        )

    def read() -> torch.Tensor:
        data = bytearray(n_bytes)  # no more than the file has: checked above
        with path.open("rb") as file:
            file.seek(data_start + begin)
            if file.readinto(data) != n_bytes:
                raise UnsupportedModelError(f"{path.name} ended while {name} was read")
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    return StoredTensor(shape, dtype, read)
