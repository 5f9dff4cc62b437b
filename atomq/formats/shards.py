"""Safetensors files written piece by piece, so that no shard is in memory as a whole.

The bytes are those that the safetensors library writes for the same tensors: its order, widest dtypes first
and then by name, and its header. A file that the library can only make from tensors in memory would not do
for embeddings of a gigabyte.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from atomq.formats.schema import DTYPE_NAMES

WRITTEN_NAMES = {torch.int64: "I64", **DTYPE_NAMES}  # checkpoints hold no I64, exports do
# The library's order of dtypes in a file.
_RANK = {
    name: rank
    for rank, name in enumerate(("I64", "F32", "I32", "BF16", "F16", "F8_E4M3", "F8_E5M2", "I8", "U8"))
}


class ShardTensor(NamedTuple):
    """A tensor to be written: what its header says, and its values as runs of rows."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def whole(tensor: torch.Tensor) -> ShardTensor:
    """A tensor in memory, on any device."""
    return ShardTensor(tensor.dtype, tuple(tensor.shape), lambda: (tensor.detach(),))


def shard_bytes(tensors: Mapping[str, ShardTensor]) -> Iterator[bytes | memoryview]:
    """The file that holds `tensors`, in pieces.

    Raises:
        ValueError: the pieces of a tensor are not of its dtype and size.
    """
    order = sorted(tensors, key=lambda name: (_RANK[WRITTEN_NAMES[tensors[name].dtype]], name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        dtype, shape, _ = tensors[name]
        end = at + tensors[name].n_bytes
        header[name] = {"dtype": WRITTEN_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        n_bytes = 0
        for piece in tensors[name].pieces():
            if piece.dtype != tensors[name].dtype:
                raise ValueError(f"{name} is {piece.dtype}, not {tensors[name].dtype}")
            content = piece.cpu().contiguous().flatten().view(torch.uint8).numpy().data
            n_bytes += len(content)
            yield content
        if n_bytes != tensors[name].n_bytes:
            raise ValueError(f"{name} has {n_bytes} bytes, not {tensors[name].n_bytes}")
