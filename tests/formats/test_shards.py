"""Shards written piece by piece are the bytes that the safetensors library writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save

from atomq.formats.shards import WRITTEN_NAMES, ShardTensor, shard_bytes, whole


def test_the_bytes_are_those_of_the_library():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for number, (dtype, name) in enumerate(WRITTEN_NAMES.items()):
        for shape in ((3, 5), (1,), (0,), (2, 2, 2), ()):
            raw = torch.randint(0, 100, shape, generator=generator).to(dtype)
            tensors[f"{'zyxwvutsr'[number]}.\u00e9.{name}.{len(shape)}{shape}"] = raw
    written = b"".join(bytes(piece) for piece in shard_bytes({n: whole(t) for n, t in tensors.items()}))
    assert written == save(tensors, metadata={"format": "pt"})


def test_a_tensor_may_come_in_pieces_and_in_any_layout():
    rows = torch.arange(20, dtype=torch.float32).reshape(4, 5).T
    pieces = ShardTensor(torch.float32, (5, 4), lambda: (rows[:2], rows[2:]))
    written = b"".join(bytes(piece) for piece in shard_bytes({"a": pieces}))
    assert written == save({"a": rows.contiguous()}, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("piece", "words"),
    [(torch.zeros(3, 4), "a has 48 bytes, not 80"), (torch.zeros(5, 4).double(), "a is torch.float64")],
)
def test_pieces_that_are_not_the_tensor_are_refused(piece, words):
    with pytest.raises(ValueError, match=words):
        list(shard_bytes({"a": ShardTensor(torch.float32, (5, 4), lambda: (piece,))}))
