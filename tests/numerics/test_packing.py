"""Packing: against a loop over single bits, and bytes written out by hand."""

from __future__ import annotations

import pytest
import torch
from numerics import naive

from atomq.numerics.packing import pack_codes, pack_factors, packed_width, unpack_codes, unpack_factors

BITS = (2, 3, 4, 8)
WIDTHS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 63, 64, 448, 449)


def random_codes(n_bits: int, shape: tuple[int, ...], signed: bool) -> torch.Tensor:
    low = -(2 ** (n_bits - 1)) if signed else 0
    generator = torch.Generator().manual_seed(sum(shape) + n_bits)
    return torch.randint(low, low + 2**n_bits, shape, generator=generator, dtype=torch.int16)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n_bits", BITS)
def test_bytes_equal_those_of_a_loop_over_bits_and_codes_come_back(n_bits, signed):
    for width in WIDTHS:
        codes = random_codes(n_bits, (3, width), signed)
        packed = pack_codes(codes, n_bits)
        assert packed.dtype == torch.uint8
        assert packed.is_contiguous()
        assert [bytes(row.tolist()) for row in packed] == [
            naive.pack_row(row, n_bits) for row in codes.tolist()
        ]
        unpacked = unpack_codes(packed, n_bits, width, signed)
        assert unpacked.dtype == torch.int16
        assert unpacked.tolist() == codes.tolist()
        assert unpacked.tolist() == [
            naive.unpack_row(bytes(row.tolist()), n_bits, width, signed) for row in packed
        ]


@pytest.mark.parametrize(
    ("n_bits", "codes", "golden"),
    [
        (4, [1, -2, 7, -8, 3], "e1 87 03"),  # the even channel lies in the low nibble
        (4, [15, 0, 8, 9], "0f 98"),
        (2, [0, 1, -2, -1, 1], "e4 01"),
        (3, [1, -1, 3, -4, 2], "f9 28"),  # 001 | 111 | 011 | 100 | 010, least significant bits first
        (3, [7, 6, 5, 4, 3, 2, 1, 0], "77 39 05"),
        (8, [-128, 127, -1, 0], "80 7f ff 00"),
        (8, [255, 128], "ff 80"),
    ],
)
def test_small_examples_give_the_bytes_written_out_by_hand(n_bits, codes, golden):
    packed = pack_codes(torch.tensor([codes]), n_bits)
    assert bytes(packed[0].tolist()).hex(" ") == golden
    assert unpack_codes(packed, n_bits, len(codes), signed=min(codes) < 0)[0].tolist() == codes


@pytest.mark.parametrize("n_bits", BITS)
def test_bits_after_the_last_code_of_a_row_are_zero(n_bits):
    for width in (1, 3, 5, 7):
        packed = pack_codes(torch.full((2, width), -1), n_bits)
        used = width * n_bits - 8 * (packed.shape[1] - 1)
        assert packed[:, -1].tolist() == [2**used - 1] * 2


@pytest.mark.parametrize("n_bits", BITS)
def test_one_changed_bit_changes_exactly_one_code(n_bits):
    width = 13
    packed = pack_codes(random_codes(n_bits, (1, width), True), n_bits)
    before = unpack_codes(packed, n_bits, width, signed=True)
    for bit in range(width * n_bits):
        altered = packed.clone()
        altered[0, bit // 8] ^= 1 << (bit % 8)
        changed = (unpack_codes(altered, n_bits, width, signed=True) != before).nonzero()
        assert changed.tolist() == [[0, bit // n_bits]]


@pytest.mark.parametrize("n_bits", BITS)
def test_no_rows_and_no_codes_pack_to_nothing(n_bits):
    for shape in ((0, 5), (3, 0), (0, 0), (2, 0, 5)):
        packed = pack_codes(torch.zeros(shape, dtype=torch.int16), n_bits)
        assert packed.shape == (*shape[:-1], packed_width(shape[-1], n_bits))
        assert unpack_codes(packed, n_bits, shape[-1], signed=True).shape == shape


def test_leading_axes_are_rows_and_a_view_packs_like_its_copy():
    codes = random_codes(4, (2, 3, 14), True)
    assert torch.equal(pack_codes(codes, 4), torch.stack([pack_codes(part, 4) for part in codes]))
    assert torch.equal(pack_codes(codes[..., ::2], 4), pack_codes(codes[..., ::2].contiguous(), 4))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_dtype_gives_the_same_bytes(dtype):
    codes = random_codes(3, (4, 11), True)
    assert torch.equal(pack_codes(codes.to(dtype), 3), pack_codes(codes, 3))


@pytest.mark.parametrize(
    ("n_bits", "code", "message"),
    [
        (4, 16, "codes from 0 to 16 do not fit into 4 bits"),
        (4, -9, "codes from -9 to 0 do not fit into 4 bits"),
        (2, 4, "codes from 0 to 4 do not fit into 2 bits"),
        (3, -5, "codes from -5 to 0 do not fit into 3 bits"),
        (8, 256, "codes from 0 to 256 do not fit into 8 bits"),
        (5, 0, "codes of 5 bits cannot be packed; 2, 3, 4 and 8 can"),
        (16, 0, "codes of 16 bits cannot be packed"),
    ],
)
def test_codes_that_do_not_fit_are_refused(n_bits, code, message):
    with pytest.raises(ValueError, match=message):
        pack_codes(torch.tensor([[0, code]]), n_bits)


@pytest.mark.parametrize(
    ("packed", "n_bits", "width", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), 4, 7, "7 codes of 4 bits are 4 bytes of uint8 a row, not 3"),
        (torch.zeros(2, 3, dtype=torch.uint8), 3, 9, "9 codes of 3 bits are 4 bytes"),
        (torch.zeros(2, 4, dtype=torch.int8), 4, 8, "4 bytes of uint8 a row, not 4 of torch.int8"),
        (torch.zeros(2, 4, dtype=torch.uint8), 6, 8, "codes of 6 bits cannot be packed"),
    ],
)
def test_rows_of_another_length_or_dtype_are_refused(packed, n_bits, width, message):
    with pytest.raises(ValueError, match=message):
        unpack_codes(packed, n_bits, width, signed=True)


def test_factors_are_nibbles_less_one():
    factors = torch.tensor([[1, 16, 3], [2, 9, 16]], dtype=torch.float32)
    packed = pack_factors(factors)
    assert packed.tolist() == [[0xF0, 0x02], [0x81, 0x0F]]
    unpacked = unpack_factors(packed, 3)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.float(), factors)
    with pytest.raises(ValueError, match="1 bytes of uint8 a row, not 2"):
        unpack_factors(packed, 2)


def test_packed_width_counts_started_bytes():
    assert [packed_width(width, 3) for width in range(9)] == [0, 1, 1, 2, 2, 2, 3, 3, 3]
    assert packed_width(449, 4) == 225
