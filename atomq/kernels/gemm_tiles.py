"""How the GEMM kernels are cut: tiles by size of the product, split tiles, and each kernel's parameters."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from atomq.kernels.repack import PANEL_ROWS, SLOT_INPUTS, record_bytes

OUT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SM90_SHARED_BYTES = 227 * 1024
_STORE_PITCH = PANEL_ROWS * 2 + 16
MANY_RECORDS = 16384  # of 64 channels x 128 inputs: 28672 x 8192 has 29120
FEW_RECORDS = 5000  # 4096 x 4096 has 2112
MAX_COUNTERS = 16384  # tiles that may be split; a launch with more tiles splits only the last waves of them


class Engine(enum.Enum):
    """Which kernel multiplies; `None` instead of one lets the device decide."""

    WGMMA_INT8 = enum.auto()
    MMA_INT8 = enum.auto()
    MMA_INT4 = enum.auto()


@dataclass(frozen=True)
class Tile:
    """One instantiation of the Hopper kernel: 64 * n_warpgroups * row_blocks channels x tokens."""

    tokens: int
    chunk_tokens: int
    n_warpgroups: int
    row_blocks: int
    consumer_registers: int

    @property
    def panels(self) -> int:
        """Panels of 64 channels in a tile."""
        return self.n_warpgroups * self.row_blocks


def choose_tile(
    n_tokens: int,
    group_size: int,
    progressive: bool,
    *,
    token_base: bool | None = None,
    n_records: int = MANY_RECORDS,
    out_dtype: torch.dtype = torch.float16,
) -> Tile:
    """The tile for a product; docs/kernels.md has the measurements behind it.

    `progressive` weights; `token_base`: progressive activations (None: as the weights); `n_records` of the
    weight. Chunks and row blocks are as large as registers allow without spilling.
    """
    token_base = progressive if token_base is None else token_base
    if n_tokens <= 64:
        tokens = max(8, 1 << (n_tokens - 1).bit_length())
        return Tile(tokens, tokens, n_warpgroups=2, row_blocks=1, consumer_registers=0)
    chunk = 32 if group_size == 64 and not token_base else 64
    if progressive and token_base:
        chunk = 128
    if n_tokens <= 128:
        # Two panels for each warpgroup make fewer tiles: whole ones, where there are enough for the machine.
        fits = group_size == 128 and (token_base or not progressive) and out_dtype != torch.float32
        row_blocks = 2 if fits and n_records >= MANY_RECORDS else 1
        return Tile(128, chunk, n_warpgroups=2, row_blocks=row_blocks, consumer_registers=232)
    tokens = 256 if n_records * -(-n_tokens // 256) >= FEW_RECORDS else 128
    return Tile(tokens, chunk, n_warpgroups=2, row_blocks=1, consumer_registers=232)


def choose_w4a16_tile(n_tokens: int) -> Tile:
    """The W4A16 tile for a number of tokens: above 8, more warps share the conversion of codes."""
    tokens = min(32, max(8, 1 << (n_tokens - 1).bit_length()))
    n_warpgroups = 2 if tokens == 8 else 4
    return Tile(tokens, tokens, n_warpgroups=n_warpgroups, row_blocks=1, consumer_registers=0)


def sm90_defines(
    tile: Tile, group_size: int, scale_bytes: int, token_base: bool, out_dtype: torch.dtype
) -> dict[str, int]:
    """The parameters of `sm90_w4a4_gemm.cu` for a tile, with as many stages as fit into shared memory."""
    scale_rows = 1 if token_base else SLOT_INPUTS // group_size
    stage = tile.tokens * (SLOT_INPUTS + 4 * scale_rows) + tile.panels * record_bytes(group_size, scale_bytes)
    stage = -(-stage // 1024) * 1024
    fixed = 1024 + tile.n_warpgroups * min(32, tile.tokens) * _STORE_PITCH + 16
    return {
        "PROGRESSIVE": int(scale_bytes == 1),
        "TOKEN_BASE": int(token_base),
        "GROUP_SIZE": group_size,
        "SCALE_BYTES": scale_bytes,
        "OUT_DTYPE": OUT_DTYPES[out_dtype],
        "TILE_TOKENS": tile.tokens,
        "CHUNK_TOKENS": tile.chunk_tokens,
        "N_WARPGROUPS": tile.n_warpgroups,
        "ROW_BLOCKS": tile.row_blocks,
        "CONSUMER_REGISTERS": tile.consumer_registers,
        "N_STAGES": min(24, (_SM90_SHARED_BYTES - fixed) // (stage + 16)),
        "SHARED_BYTES": _SM90_SHARED_BYTES,
    }


def sm90_w4a16_defines(
    tile: Tile, group_size: int, scale_bytes: int, in_dtype: torch.dtype, out_dtype: torch.dtype
) -> dict[str, int]:
    """The parameters of `sm90_w4a16_gemm.cu` for a tile, with as many stages as fit into shared memory."""
    stage = tile.tokens * (2 * SLOT_INPUTS + 32) + tile.panels * record_bytes(group_size, scale_bytes)
    fixed = 1024 + tile.n_warpgroups * min(32, tile.tokens) * _STORE_PITCH + 16
    return {
        "GROUP_SIZE": group_size,
        "SCALE_BYTES": scale_bytes,
        "IN_BF16": int(in_dtype == torch.bfloat16),
        "OUT_DTYPE": OUT_DTYPES[out_dtype],
        "TILE_TOKENS": tile.tokens,
        "N_WARPGROUPS": tile.n_warpgroups,
        "ROW_BLOCKS": tile.row_blocks,
        "N_STAGES": min(24, (_SM90_SHARED_BYTES - fixed) // (stage + 16)),
        "SHARED_BYTES": _SM90_SHARED_BYTES,
    }


def sm80_defines(
    tile_tokens: int,
    engine: Engine,
    group_size: int,
    scale_bytes: int,
    token_base: bool,
    out_dtype: torch.dtype,
) -> dict[str, int]:
    """The parameters of `sm80_w4a4_gemm.cu`."""
    scale_rows = 1 if token_base else SLOT_INPUTS // group_size
    stage = tile_tokens * (SLOT_INPUTS + 4 * scale_rows) + 2 * record_bytes(group_size, scale_bytes)
    return {
        "PROGRESSIVE": int(scale_bytes == 1),
        "TOKEN_BASE": int(token_base),
        "GROUP_SIZE": group_size,
        "SCALE_BYTES": scale_bytes,
        "OUT_DTYPE": OUT_DTYPES[out_dtype],
        "TILE_TOKENS": tile_tokens,
        "MMA_INT4": int(engine is Engine.MMA_INT4),
        "SHARED_BYTES": 3 * stage,
    }


@dataclass(frozen=True)
class Stream:
    """The tiles that are split: `slots_per_cta` slots to each CTA, of `slots_per_tile` for every tile."""

    n_tiles: int
    slots_per_tile: int
    slots_per_cta: int


def split_tiles(n_tiles: int, n_slots: int, n_ctas: int, tile_tokens: int) -> Stream:
    """Which tiles to split, and how; the rest go out whole, one after the other.

    Splitting costs a round trip of float32 partial sums. So whole waves stay whole and a last wave that is
    nearly full does too; where tiles are few, each is cut into the same number of pieces, one for each CTA,
    unless dealing out all slots evenly (with up to two pieces for each CTA) takes a tenth less time.
    """
    decodes = tile_tokens <= 64
    if decodes and n_tiles <= MAX_COUNTERS:
        n_stream = n_tiles
    else:
        rest = n_tiles % n_ctas
        n_waves = -(-n_tiles // n_ctas)
        if n_waves * n_ctas <= 1.05 * n_tiles:
            return Stream(0, n_slots, n_slots)
        n_stream = rest if n_tiles < n_ctas else rest + n_ctas
    even = -(-n_stream * n_slots // n_ctas)
    if n_stream <= n_ctas:
        n_pieces = n_ctas // n_stream
        piece = -(-n_slots // n_pieces)
        second_piece = 2 if decodes else 8  # slots that its store and its joining cost, about
        if piece <= 1.1 * even + second_piece:
            return Stream(n_stream, n_pieces * piece, piece)
    return Stream(n_stream, n_slots, even)
