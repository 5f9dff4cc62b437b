"""W4A16: packed tokens, the choice of tiles, both kernels against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from gemm_operands import make_weight, misaligned
from sass import disassemble, stages_are_given_back_behind_a_fence

from atomq.errors import KernelError
from atomq.kernels import gemm, gemm_reference, gemm_tiles
from atomq.kernels.gemm import Tile, w4a16_gemm
from atomq.kernels.loader import compile_for
from atomq.kernels.repack import repack_weight

TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64, 65, 128, 200, 1000, 4096)
TOLERANCE = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float32: 3e-6}
LARGE, SMALL = gemm_tiles.MANY_RECORDS, 1000
TILES = list(
    dict.fromkeys(gemm.choose_w4a16_tile(n, size) for size in (SMALL, LARGE) for n in (1, 16, 32, 64))
)


def name_of(tile: Tile) -> str:
    return "sm90_w4a16_gemm" if tile.mma_sync else "sm90_w4a16_batch_gemm"


def error(result: torch.Tensor, oracle: torch.Tensor) -> float:
    return ((result.double() - oracle).norm() / oracle.norm()).item()


def tokens(n_tokens: int, n_inputs: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n_tokens, n_inputs, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU here")


def test_packed_tokens_lie_as_documented():
    x = tokens(11, 200, torch.bfloat16)
    packed = gemm_reference.pack_tokens(x)
    assert packed.shape == (4, 16, 64)
    for token, n_input in itertools.product(range(16), range(256)):
        chunk = n_input % 64 // 16 * 2 + n_input % 2  # of 16 inputs the even ones, then the odd ones
        place = 8 * (chunk ^ token % 8) + n_input % 16 // 2
        expected = x[token, n_input].item() if token < 11 and n_input < 200 else 0.0
        assert packed[n_input // 64, token, place].item() == expected


def test_mma_sync_takes_few_tokens_and_wgmma_more():
    for n_tokens in range(1, 300):
        for size in (SMALL, LARGE):
            tile = gemm.choose_w4a16_tile(n_tokens, size)
            assert tile.mma_sync == (n_tokens <= (16 if size == SMALL else 8))
            assert tile.tokens >= min(n_tokens, 64)
            assert tile.tokens < 2 * max(n_tokens, 8)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_templates_compile_without_spills_and_give_stages_back_behind_a_fence(tile, tmp_path):
    pytest.importorskip("cupy", reason="compiles with NVRTC through CuPy")
    for group_size, dtype in itertools.product((64, 128), (torch.float16, torch.bfloat16)):
        defines = gemm.sm90_w4a16_defines(tile, group_size, 2, dtype, dtype)
        kernel = compile_for(name_of(tile), "sm_90a", **defines)
        assert kernel.spill_bytes == 0, (group_size, dtype)
        assert stages_are_given_back_behind_a_fence(disassemble(kernel.cubin, tmp_path))


@pytest.mark.gpu
def test_the_front_refuses_operands_that_do_not_fit(hopper):
    packed = repack_weight(make_weight(136, 448, 0, 128, device="cuda"))
    x = torch.zeros(3, 448, dtype=torch.float16, device="cuda")
    for operand, message in (
        (x.float(), "x of .*float32.*it must be .*float16 or torch.bfloat16"),
        (x[:, :440].contiguous()[:, :436], "inputs in eights"),
        (x[:, :256].contiguous(), "weight's 4 slots"),
        (torch.zeros(448, 3, dtype=torch.float16, device="cuda").T, "has strides"),
        (x.cpu(), "on cpu; it must be .* on cuda"),
        (misaligned(x), "multiple of 16 bytes"),
    ):
        with pytest.raises(KernelError, match=message):
            w4a16_gemm(operand, packed)
    with pytest.raises(KernelError, match="multiple of 16 bytes"):
        w4a16_gemm(x, packed, out=misaligned(torch.zeros(3, 136, dtype=torch.float16, device="cuda")))
    with_outliers = repack_weight(make_weight(130, 448, 128, 128, device="cuda"))
    with pytest.raises(KernelError, match="progressive scales or outliers; use w4a4_gemm"):
        w4a16_gemm(x, with_outliers)


@pytest.mark.gpu
def test_tokens_are_packed_as_the_twin_does(hopper):
    for n_tokens, n_inputs in ((1, 8), (17, 1000), (64, 8192), (200, 1536)):
        x = tokens(n_tokens, n_inputs, torch.float16).cuda()
        assert torch.equal(gemm.pack_tokens(x), gemm_reference.pack_tokens(x.cpu()).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tile", [None, *TILES], ids=str)
def test_every_tile_matches_the_oracle_for_any_number_of_tokens(tile, dtype, hopper):
    for n_channels, n_inputs, group_size in ((100, 448, 128), (203, 1536, 64), (1000, 1000, 128)):
        weight = make_weight(
            n_channels, n_inputs, 0, group_size, float32_scales=n_inputs == 1536, device="cuda"
        )
        packed = repack_weight(weight)
        x = tokens(max(TOKENS), n_inputs, dtype).cuda()
        oracle = gemm_reference.w4a16_oracle(x, packed)
        for n_tokens in TOKENS:
            out = torch.full_like(oracle[:n_tokens], float("nan"), dtype=dtype)
            w4a16_gemm(x[:n_tokens], packed, out=out, tile=tile)
            assert error(out, oracle[:n_tokens]) <= TOLERANCE[dtype], n_tokens
            single = w4a16_gemm(x[:n_tokens], packed, torch.float32, tile=tile)
            assert error(single, oracle[:n_tokens]) <= TOLERANCE[torch.float32], n_tokens


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(2048, 8192), (8192, 28672)], ids=str)
def test_a_hundred_launches_give_the_same_bits(shape, hopper):
    """A stage given back too early spoils one slot in many thousands: a single launch hides it."""
    packed = repack_weight(make_weight(*shape, 0, 128, device="cuda"))
    for n_tokens in (8, 16, 32, 64, 200):
        x = tokens(n_tokens, shape[1], torch.float16).cuda()
        first = w4a16_gemm(x, packed)
        oracle = gemm_reference.w4a16_oracle(x, packed, torch.float32).double()
        assert error(first, oracle) <= TOLERANCE[torch.float16], n_tokens
        assert all(torch.equal(first, w4a16_gemm(x, packed)) for _ in range(100)), n_tokens
