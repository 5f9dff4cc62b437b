"""Dense rotations of any width in closed form: random signs, then a Hadamard and a Hartley matrix.

``x -> x diag(signs) (H (x) C)``: H is the Sylvester-Hadamard matrix of the largest power of two that divides
the width, C the Hartley matrix of the odd rest m, (cos(2 pi jk / m) + sin(2 pi jk / m)) / sqrt(m).
All three are orthogonal, and no entry of the product is larger than sqrt(2 / width): every channel is spread
over all others. (QuaRot, arXiv 2404.00456, has tables of Hadamard matrices for some odd rests instead.)
"""

from __future__ import annotations

import math
import random

import torch

from atomq.numerics.hadamard import block_size, hadamard_matrix

_PIECE = 1 << 20  # numbers that are in float64 at a time
_FACTOR = 64  # a larger Hadamard matrix is the Kronecker product of such ones


def random_signs(width: int, seed: int) -> torch.Tensor:
    """float64 [width] of 1 and -1; the same for a seed on every machine."""
    draw = random.Random(seed)
    return torch.tensor([draw.choice((1.0, -1.0)) for _ in range(width)], dtype=torch.float64)


def rotate(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """``x diag(signs) (H (x) C)`` over the last axis [..., width], in float64; a new tensor, of float32.

    `signs`: float64 [width]; times a scale of the channels where one is to be folded in.
    """
    width = x.shape[-1]
    rows = x.reshape(-1, width)
    result = torch.empty(rows.shape, dtype=torch.float32)
    step = max(1, _PIECE // width)
    for begin in range(0, len(rows), step):
        piece = rows[begin : begin + step].double() * signs
        for factor in _factors(width):  # of the first axis; the others move up, so that all come round
            split = piece.reshape(len(piece), len(factor), -1)
            piece = (split.transpose(1, 2) @ factor).flatten(1)
        result[begin : begin + step] = piece
    return result.reshape(x.shape)


def _factors(width: int) -> list[torch.Tensor]:
    """Symmetric orthogonal matrices float64 whose Kronecker product has size `width`."""
    factors, left = [], block_size(width)
    while left > 1:
        size = min(left, _FACTOR)
        factors.append(hadamard_matrix(size, torch.float64, torch.device("cpu")))
        left //= size
    return [*factors, _hartley_matrix(width // block_size(width))]


def _hartley_matrix(size: int) -> torch.Tensor:
    steps = torch.arange(size)
    angles = (torch.outer(steps, steps) % size).double() * (2 * math.pi / size)
    return (angles.cos() + angles.sin()) / math.sqrt(size)
