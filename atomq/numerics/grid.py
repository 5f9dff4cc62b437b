"""The grids that codes live on: integers, and code books of 16 entries.

A code is what is stored; its value is ``code * scale`` (symmetric), ``(code - zero) * scale`` (asymmetric) or
``codebook[code] * scale``. Atom section 5.4 (arXiv 2310.19102) compares INT4 with FP4; the bitsandbytes table
is the one behind the paper's FP4 figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from atomq.config import NumberFormat

# Index: bit 3 is the sign, bits 0-2 the magnitude in ascending order. Index 8 (minus zero) is never written.
_FP4_BNB = (0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
_FP4_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODEBOOKS: dict[str, tuple[float, ...]] = {
    "fp4-bnb": _FP4_BNB + tuple(-value for value in _FP4_BNB),
    "fp4-e2m1": _FP4_E2M1 + tuple(-value for value in _FP4_E2M1),
    # Powers of two. Sixteen codes hold zero and fifteen powers, so -1 (the smallest negative) gives way to
    # zero.
    "exponential": (0.0, *(2.0**j for j in range(8)), *(-(2.0**j) for j in range(1, 8))),
}


@dataclass(frozen=True)
class CodeGrid:
    """The set of codes of one quantizer.

    Attributes:
        n_bits: bits per code, 2 to 8.
        symmetric: codes -2^(n_bits-1) .. 2^(n_bits-1)-1 without zero points; else 0 .. 2^n_bits-1 with them.
        codebook: 16 values by code, or None for integers. A code book is symmetric.
    """

    n_bits: int
    symmetric: bool = True
    codebook: tuple[float, ...] | None = None

    @classmethod
    def of(cls, number_format: NumberFormat, n_bits: int, symmetric: bool = True) -> CodeGrid:
        return cls(n_bits, symmetric, CODEBOOKS.get(number_format))

    @property
    def qmin(self) -> int:
        return -(1 << (self.n_bits - 1)) if self.symmetric and self.codebook is None else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.n_bits - 1 if self.symmetric and self.codebook is None else self.n_bits)) - 1

    @property
    def signed(self) -> bool:
        """Whether codes are stored in two's complement."""
        return self.qmin < 0

    def round(self, x: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
        """Codes of `x`, already divided by its scale, as integers in `x`'s dtype.

        Integers round half to even and saturate; on a code book the nearest value wins, a tie goes to the
        smaller value. `zeros` (asymmetric only) must broadcast against `x`.
        """
        if self.codebook is not None:
            midpoints, index = _codebook_search(self.codebook, x.dtype, x.device)
            return index[torch.bucketize(x.contiguous(), midpoints)].to(x.dtype)
        codes = x.round()
        if zeros is not None:
            codes = codes + zeros
        return codes.clamp_(self.qmin, self.qmax)

    def values(self, codes: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
        """Values of integer-valued float `codes` before the multiplication by their scale."""
        if self.codebook is not None:
            return torch.tensor(self.codebook, dtype=codes.dtype, device=codes.device)[codes.long()]
        return codes if zeros is None else codes - zeros


@cache
def _codebook_search(
    codebook: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Midpoints between neighbouring values in ascending order [n-1], and the code of each value [n]."""
    order = sorted({value: code for code, value in reversed(list(enumerate(codebook)))}.items())
    values = torch.tensor([value for value, _ in order], dtype=torch.float64)
    midpoints = ((values[1:] + values[:-1]) / 2).to(dtype=dtype, device=device)
    return midpoints, torch.tensor([code for _, code in order], device=device)
