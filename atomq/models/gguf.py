"""The GGUF container: a header of metadata and a table of tensors, read and checked; dequantization.

The container is read here, not by the gguf package's reader, since that one believes every count in the
header and so hangs or fills the memory on a broken file; dequantization is the package's. What the
metadata means for a model is in `atomq.models.gguf_model` and `atomq.models.gguf_tokenizer`.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import isfinite, prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from atomq.errors import UnsupportedModelError

_MAGIC = b"GGUF"

# Metadata value types of the GGUF specification: struct codes of the scalars, then the two others.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # of ggml


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the tensor table: shape slowest dimension first, bytes `begin` to `end` of the file."""

    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    begin: int
    end: int


@dataclass(frozen=True)
class GgufFile:
    """The checked header of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key` under the architecture's prefix."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def require(self, key: str) -> int:
        """The same for a key that must be there and be a positive integer."""
        value = self.get(key)
        if not isinstance(value, int) or value <= 0:
            raise UnsupportedModelError(
                f"{self.path.name}: {self.architecture}.{key} is {value!r}; a positive integer is needed"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The same for a number; the shortest decimal of the float32: 1e-05, not 9.99999974e-06."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or not isfinite(value):
            raise UnsupportedModelError(
                f"{self.path.name}: {self.architecture}.{key} is {value!r}; a number is needed"
            )
        return float(str(np.float32(value)))


class _Cursor:
    """Walks over the header and refuses every step beyond the end of the file."""

    def __init__(self, data: mmap.mmap, name: str) -> None:
        self.data = data
        self.name = name
        self.position = 0

    def fail(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.name} is truncated or corrupt: {what}; fetch it again")

    def take(self, n_bytes: int) -> int:
        """Step over `n_bytes` and return where they begin."""
        begin = self.position
        if n_bytes > len(self.data) - begin:
            raise self.fail(f"{n_bytes} bytes wanted at byte {begin} of {len(self.data)}")
        self.position += n_bytes
        return begin

    def number(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.take(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        begin = self.take(self.number("Q"))
        try:
            return self.data[begin : self.position].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the string at byte {begin} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.fail(f"metadata value type {kind} at byte {self.position}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            item_bytes = struct.calcsize(f"<{_SCALARS[kind]}")
            begin = self.take(count * item_bytes)
            return list(struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, begin))
        if kind != _STRING:
            raise self.fail(f"an array of value type {kind} at byte {self.position}")
        return [self.string() for _ in range(count)]  # ends at the end of the file at the latest


def read_gguf(path: Path) -> GgufFile:
    """Read and check the header of a GGUF file (version 2 or 3); no tensor is read.

    Raises:
        UnsupportedModelError: it is no GGUF file, or it is truncated or corrupt.
    """
    if path.stat().st_size < 24:
        raise UnsupportedModelError(f"{path.name} is not a GGUF file: it has less than 24 bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        cursor = _Cursor(data, path.name)
        cursor.take(len(_MAGIC))
        if data[: len(_MAGIC)] != _MAGIC:
            raise UnsupportedModelError(f"{path.name} is not a GGUF file: it begins with {data[:4]!r}")
        version, n_tensors, n_keys = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if version not in (2, 3):
            raise UnsupportedModelError(
                f"{path.name} is GGUF version {version}; atomq reads versions 2 and 3, little-endian"
            )
        metadata = {}
        for _ in range(n_keys):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("I"))
        table = [_table_entry(cursor) for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise cursor.fail(f"general.alignment is {alignment!r}")
        data_begin = -(-cursor.position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in table:
            begin = data_begin + offset
            end = begin + _size_bytes(name, shape, kind, cursor)
            if end > len(data):
                raise cursor.fail(f"{name} ends at byte {end} of {len(data)}")
            if name in tensors:
                raise cursor.fail(f"{name} is there twice")
            tensors[name] = GgufTensor(shape, kind, begin, end)
    return GgufFile(path, metadata, tensors)


def _table_entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]:
    name, n_dims = cursor.string(), cursor.number("I")
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.fail(f"{name} has {n_dims} dimensions")
    shape = tuple(reversed([cursor.number("Q") for _ in range(n_dims)]))  # ggml: fastest dimension first
    kind = cursor.number("I")
    try:
        return name, shape, gguf.GGMLQuantizationType(kind), cursor.number("Q")
    except ValueError:
        raise cursor.fail(f"{name} has the unknown tensor type {kind}") from None


def _size_bytes(name: str, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, cursor: _Cursor) -> int:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block_size:
        raise cursor.fail(f"{name} has rows of {shape[-1]}, not a multiple of {kind.name}'s {block_size}")
    return int(prod(shape) // block_size * block_bytes)


def read_tensor(file: GgufFile, name: str) -> torch.Tensor:
    """Read and dequantize a tensor of the file, to float32.

    Raises:
        UnsupportedModelError: the tensor is of a type that the gguf package cannot dequantize.
    """
    return read_rows(file, name, 0, file.tensors[name].shape[0])


def read_rows(file: GgufFile, name: str, begin: int, end: int) -> torch.Tensor:
    """The same for the rows `begin` up to `end` of the tensor's slowest dimension; no other row is read."""
    tensor = file.tensors[name]
    if len(tensor.shape) == 1:  # a block of a quantized type holds many of these rows
        return _dequantize(file, name, (tensor.begin, tensor.end), tensor.shape)[begin:end]
    row_bytes = (tensor.end - tensor.begin) // tensor.shape[0]
    place = (tensor.begin + begin * row_bytes, tensor.begin + end * row_bytes)
    return _dequantize(file, name, place, (end - begin, *tensor.shape[1:]))


def _dequantize(file: GgufFile, name: str, place: tuple[int, int], shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes `place` of the file as a part of tensor `name` of this `shape`."""
    kind = file.tensors[name].type
    with file.path.open("rb") as stream:
        stream.seek(place[0])
        data = np.frombuffer(stream.read(place[1] - place[0]), dtype=np.uint8)
    try:
        values = gguf.dequantize(data.reshape(*shape[:-1], -1), kind)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"{file.path.name} stores {name} as {kind.name}, which gguf cannot dequantize; "
            f"take a file of another type, such as F16, BF16 or Q8_0"
        ) from None
    # A copy, since the data of an F32 tensor would be read-only.
    return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape)
