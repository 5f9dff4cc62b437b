"""Packing of codes into bytes: the bit order of atomq's files is written here and nowhere else.

A row of codes is a string of bits: code j takes bits ``j*n_bits .. (j+1)*n_bits - 1``, least significant bit
first, and bit i of the string is bit ``i % 8`` of byte ``i // 8``. So with 4 bits the even channel lies in
the low nibble. The last byte of a row is filled up with zero bits; every row starts on a byte of its own.
Signed codes are in two's complement.
"""

from __future__ import annotations

import torch

FACTOR_BITS = 4  # of a progressive scale's factor

# Codes that fill a whole number of bytes together, and that number of bytes.
_UNITS = {2: (4, 1), 3: (8, 3), 4: (2, 1), 8: (1, 1)}


def packed_width(width: int, n_bits: int) -> int:
    """Bytes per row of `width` codes."""
    return -(-width * n_bits // 8)


def pack_codes(codes: torch.Tensor, n_bits: int) -> torch.Tensor:
    """Pack integer codes [..., width] into uint8 [..., packed_width(width, n_bits)].

    Raises:
        ValueError: `n_bits` is not 2, 3, 4 or 8, or a code does not fit into it (neither signed nor
        unsigned).
    """
    _check_bits(n_bits)
    if codes.numel():
        low, high = int(codes.min()), int(codes.max())
        if low < -(2 ** (n_bits - 1)) or high >= 2 ** (n_bits if low >= 0 else n_bits - 1):
            raise ValueError(f"codes from {low} to {high} do not fit into {n_bits} bits")
    width = codes.shape[-1]
    n_codes, n_bytes = _UNITS[n_bits]
    unsigned = codes.to(torch.int32) & (2**n_bits - 1)
    padding = -width % n_codes
    if padding:
        unsigned = torch.nn.functional.pad(unsigned, (0, padding))
    units = unsigned.reshape(*unsigned.shape[:-1], unsigned.shape[-1] // n_codes, n_codes)
    shifts = torch.arange(n_codes, device=codes.device, dtype=torch.int32) * n_bits
    words = (units << shifts).sum(-1, dtype=torch.int32)  # at most 24 bits
    shifts = torch.arange(n_bytes, device=codes.device, dtype=torch.int32) * 8
    packed = ((words.unsqueeze(-1) >> shifts) & 0xFF).to(torch.uint8).flatten(-2)
    row_bytes: torch.Tensor = packed[..., : packed_width(width, n_bits)].contiguous()
    return row_bytes


def unpack_codes(packed: torch.Tensor, n_bits: int, width: int, signed: bool) -> torch.Tensor:
    """Unpack uint8 [..., packed_width(width, n_bits)] into int16 codes [..., width] (int16 holds both signs).

    Raises:
        ValueError: wrong dtype, `n_bits` or row length; the message states what was found and expected.
    """
    _check_bits(n_bits)
    if packed.dtype != torch.uint8 or packed.shape[-1] != packed_width(width, n_bits):
        raise ValueError(
            f"{width} codes of {n_bits} bits are {packed_width(width, n_bits)} bytes of uint8 a row, "
            f"not {packed.shape[-1]} of {packed.dtype}"
        )
    n_codes, n_bytes = _UNITS[n_bits]
    if n_bytes == 1:
        shifts = torch.arange(n_codes, device=packed.device, dtype=torch.uint8) * n_bits
        codes = (packed.unsqueeze(-1) >> shifts) & (2**n_bits - 1)
        codes = codes.flatten(-2)[..., :width].to(torch.int16)
    else:
        padding = -packed.shape[-1] % n_bytes
        octets = torch.nn.functional.pad(packed, (0, padding)).to(torch.int32)
        octets = octets.reshape(*octets.shape[:-1], octets.shape[-1] // n_bytes, n_bytes)
        words = (octets << torch.arange(n_bytes, device=packed.device, dtype=torch.int32) * 8).sum(-1)
        shifts = torch.arange(n_codes, device=packed.device, dtype=torch.int32) * n_bits
        codes = ((words.unsqueeze(-1) >> shifts) & (2**n_bits - 1)).flatten(-2)[..., :width].to(torch.int16)
    if signed:
        codes = torch.where(codes >= 2 ** (n_bits - 1), codes - 2**n_bits, codes)
    result: torch.Tensor = codes
    return result


def pack_factors(factors: torch.Tensor) -> torch.Tensor:
    """Pack factors 1..16 [..., G] as unsigned codes ``factor - 1`` of FACTOR_BITS."""
    return pack_codes(factors.to(torch.int16) - 1, FACTOR_BITS)


def unpack_factors(packed: torch.Tensor, n_groups: int) -> torch.Tensor:
    """Factors 1..16 [..., n_groups] in uint8 of what `pack_factors` made.

    Raises:
        ValueError: as `unpack_codes`.
    """
    return unpack_codes(packed, FACTOR_BITS, n_groups, signed=False).to(torch.uint8) + 1


def _check_bits(n_bits: int) -> None:
    if n_bits not in _UNITS:
        raise ValueError(f"codes of {n_bits} bits cannot be packed; 2, 3, 4 and 8 can")
