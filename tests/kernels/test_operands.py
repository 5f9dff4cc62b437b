"""The check that every front makes of its operands: what is refused, and with what words."""

from __future__ import annotations

import pytest
import torch

from atomq.errors import KernelError
from atomq.kernels.operands import Strides, check_operand

CPU = torch.device("cpu")
# Memory whose first element lies on a multiple of 64 bytes, whatever the allocator does.
POOL = torch.zeros(4096, dtype=torch.float16)
START = -(POOL.data_ptr() % 64) % 64 // 2


def aligned(offset: int, *shape: int) -> torch.Tensor:
    """A float16 tensor that starts `offset` elements after a multiple of 64 bytes."""
    first = START + offset
    return POOL[first : first + torch.Size(shape).numel()].view(shape)


def check(tensor, **changes):
    wanted = {"dtype": torch.float16, "shape": (4, 16), "device": CPU, "alignment": 16} | changes
    check_operand("some_kernel", "x", tensor, **wanted)


def test_what_fits_passes():
    check(aligned(0, 4, 16))
    check(aligned(8, 4, 16))
    check(aligned(0, 4, 16), dtype=(torch.float32, torch.float16))
    check(aligned(0, 4, 32)[:, :16], strides=Strides.ROWS_APART)
    check(aligned(0, 16, 4).T, strides=Strides.ANY, alignment=2)
    check(aligned(3, 0, 16), shape=(0, 16))  # nothing is read of an empty tensor
    check(aligned(3, 1, 16)[:, :1], shape=(1, 1), alignment=2)


@pytest.mark.parametrize(
    ("tensor", "changes", "message"),
    [
        (aligned(0, 4, 16).float(), {}, r"x of \(4, 16\) torch.float32.*it must be .*torch.float16 on cpu"),
        (aligned(0, 4, 16).bfloat16(), {"dtype": (torch.float16, torch.float32)}, "float16 or torch.float32"),
        (aligned(0, 16, 4), {}, r"x of \(16, 4\).*it must be \(4, 16\)"),
        (aligned(0, 64), {}, r"x of \(64,\)"),
        (aligned(0, 4, 16).to("meta"), {}, r"on meta; it must be .* on cpu"),
        (aligned(0, 4, 16), {"device": torch.device("cuda:0")}, "on cpu; it must be .* on cuda:0"),
        (aligned(0, 16, 4).T, {}, r"has strides \(1, 4\); make it contiguous first"),
        (aligned(0, 4, 32)[:, :16], {}, r"has strides \(32, 1\); make it contiguous first"),
        (aligned(0, 16, 4).T, {"strides": Strides.ROWS_APART}, "has strides"),
        (aligned(0, 4, 32)[:, ::2], {"strides": Strides.ROWS_APART}, "has strides"),
        (aligned(1, 4, 16), {}, "does not start on a multiple of 16 bytes; copy it first"),
        (
            aligned(0, 4, 17)[:, :16],
            {"strides": Strides.ROWS_APART},
            "multiple of 16 bytes",
        ),  # its second row
    ],
    ids=lambda value: "" if isinstance(value, (torch.Tensor, dict)) else value[:24],
)
def test_what_does_not_fit_is_refused(tensor, changes, message):
    with pytest.raises(KernelError, match=message):
        check(tensor, **changes)
