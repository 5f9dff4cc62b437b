"""The tensors of a model's files, by name: what the header says of each, and how to read it.

Headers are read and checked in full before any tensor is, so that a wrong or broken file is refused at once
and by name. GGUF and safetensors share this form, and so one path through `atomq.models.loading`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from atomq.errors import StorageError, UnsupportedModelError

_FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file that has not been read yet.

    Attributes:
        shape: as torch has it, slowest dimension first.
        dtype: the dtype that the file stores and `read` returns; None for GGUF, which stores blocks as
            well and is read as float32.
        read_rows: reads the rows from one number up to another (not included), on the CPU; the result may
            be a view of the file and is not to be changed.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    read_rows: Callable[[int, int], torch.Tensor]

    def read(self) -> torch.Tensor:
        """All of it; likewise not to be changed."""
        return self.read_rows(0, self.shape[0])


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, none of them read.

    Raises:
        UnsupportedModelError: the file is truncated or corrupt, or a tensor is not F32, F16 or BF16.
    """
    stored = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 -- not a dict
                header = file.get_slice(name)
                stored[name] = _stored(path, name, header.get_dtype(), tuple(header.get_shape()))
    except (SafetensorError, OSError) as error:
        raise UnsupportedModelError(
            f"{path} is truncated or no safetensors file ({error}); fetch it again"
        ) from error
    return stored


def _stored(path: Path, name: str, type_name: str, shape: tuple[int, ...]) -> StoredTensor:
    dtype = _FLOAT_TYPES.get(type_name)
    if dtype is None:
        raise UnsupportedModelError(
            f"{path.name} stores {name} as {type_name}; atomq quantizes float models, "
            f"whose tensors are {', '.join(_FLOAT_TYPES)}"
        )
    if min(shape, default=1) < 1:
        raise UnsupportedModelError(f"{path.name} has a corrupt header: {name} has shape {list(shape)}")

    def read_rows(begin: int, end: int) -> torch.Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                tensor: torch.Tensor = file.get_slice(name)[begin:end]
        except (SafetensorError, OSError) as error:  # its header could be read: the file is not what it was
            raise StorageError(f"{path}: {name} cannot be read any more ({error})") from error
        return tensor

    return StoredTensor(shape, dtype, read_rows)
