"""How the GEMM kernels are cut: tiles by size of the product, split tiles, and each kernel's parameters."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch

from atomq.kernels.repack import PANEL_ROWS, SLOT_INPUTS, record_bytes

OUT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STORE_PITCH = PANEL_ROWS * 2 + 16
MANY_RECORDS = 16384  # of 64 channels x 128 inputs: 28672 x 8192 has 29120
FEW_RECORDS = 5000  # 4096 x 4096 has 2112
LARGE_TILES = (160, 192, 256)  # tokens; what is stored at a time, 32 of them, divides each
FEW_PANELS = 132  # of an H100 an SM each; 8192 channels are 128
MAX_COUNTERS = 16384  # tiles that may be split; a launch with more tiles splits only the last waves of them


class Engine(enum.Enum):
    """Which kernel multiplies; `None` instead of one lets the device decide."""

    WGMMA_INT8 = enum.auto()
    MMA_INT8 = enum.auto()
    MMA_INT4 = enum.auto()


@dataclass(frozen=True)
class Tile:
    """One instantiation of the Hopper kernel: 64 * n_warpgroups * row_blocks channels x tokens.

    `k_teams` sets of `n_warpgroups` warpgroups take slots of K in turns; `ctas_per_sm` CTAs fit on an SM, so
    that one launch begins while another ends. `mma_sync`: W4A16 by `sm90_w4a16_gemm.cu`, not by wgmma.
    """

    tokens: int
    chunk_tokens: int
    n_warpgroups: int
    row_blocks: int
    consumer_registers: int
    k_teams: int = 1
    ctas_per_sm: int = 1
    mma_sync: bool = False

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA; the system takes 1 KiB for itself."""
        return (228 // self.ctas_per_sm - 1) * 1024

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
    n_panels: int = 448,
    n_slots: int = 65,
    out_dtype: torch.dtype = torch.float16,
) -> Tile:
    """The tile for a product; docs/kernels.md has the measurements behind it.

    `progressive` weights; `token_base`: progressive activations (None: as the weights); `n_panels` of 64
    channels and `n_slots` of the weight. Chunks and row blocks are as large as registers allow without
    spilling.
    """
    token_base = progressive if token_base is None else token_base
    promotes_once = progressive and token_base
    n_records = n_panels * n_slots
    if n_tokens <= 64:
        # Two teams hide the time from a stage's arrival to its promotion. One panel for each CTA where that
        # makes no more tiles than there are SMs; two of long rows, and sooner where a team waits for every
        # slot's sums, as with progressive scales. Two CTAs share an SM where launches are very short: on
        # larger weights the second disturbs the first.
        tokens = max(8, 1 << (n_tokens - 1).bit_length())
        spills = tokens == 64 and group_size == 64 and not promotes_once  # two teams of two panels
        few_panels = FEW_PANELS // 2 if promotes_once else FEW_PANELS
        if n_panels <= few_panels and (spills or n_records < MANY_RECORDS):
            ctas_per_sm = 2 if tokens <= 16 and n_records < FEW_RECORDS else 1
            return Tile(tokens, tokens, 1, 1, consumer_registers=0, k_teams=2, ctas_per_sm=ctas_per_sm)
        if spills:
            return Tile(tokens, tokens, 2, 1, consumer_registers=0)
        return Tile(tokens, tokens, 2, 1, consumer_registers=104 if tokens == 64 else 0, k_teams=2)
    chunk = 32 if group_size == 64 and not token_base else 64
    if promotes_once:
        chunk = 128
    if n_tokens <= 128:
        # Two panels for each warpgroup make fewer tiles: whole ones, where there are enough for the machine.
        # With exact scales two teams of one warpgroup hide each other's promotion.
        fits = group_size == 128 and (token_base or not progressive) and out_dtype != torch.float32
        row_blocks = 2 if fits and n_records >= MANY_RECORDS else 1
        if row_blocks == 2 and not token_base:
            return Tile(128, chunk, n_warpgroups=1, row_blocks=2, consumer_registers=232, k_teams=2)
        return Tile(128, chunk, n_warpgroups=2, row_blocks=row_blocks, consumer_registers=232)
    n_tiles = -(-n_tokens // 256)
    if n_records * n_tiles < FEW_RECORDS:
        tokens = 128
    elif n_tiles <= 2 and group_size == 128:  # a slot costs by its tokens; groups of 64 would spill
        tokens = next(size for size in LARGE_TILES if n_tiles * size >= n_tokens)
    else:
        tokens = LARGE_TILES[-1]
    return Tile(tokens, math.gcd(chunk, tokens), n_warpgroups=2, row_blocks=1, consumer_registers=232)


def choose_w4a16_tile(n_tokens: int, n_records: int = MANY_RECORDS) -> Tile:
    """The W4A16 tile for a number of tokens and a weight of `n_records` (panels x slots).

    mma.sync reads tokens as they lie; for wgmma they are packed first, which pays from 17 tokens on, on large
    weights from 9.
    """
    is_large = n_records >= MANY_RECORDS
    if n_tokens <= 8:
        return Tile(8, 8, n_warpgroups=2, row_blocks=1, consumer_registers=0, mma_sync=True)
    if n_tokens <= 16:
        if is_large:
            return Tile(16, 16, n_warpgroups=3, row_blocks=1, consumer_registers=0)
        return Tile(16, 16, n_warpgroups=4, row_blocks=1, consumer_registers=0, mma_sync=True)
    if n_tokens <= 32:
        return Tile(32, 32, n_warpgroups=4, row_blocks=1, consumer_registers=0)
    if is_large:
        return Tile(64, 64, n_warpgroups=3, row_blocks=1, consumer_registers=152)
    return Tile(64, 64, n_warpgroups=2, row_blocks=1, consumer_registers=0)


def sm90_defines(
    tile: Tile, group_size: int, scale_bytes: int, token_base: bool, out_dtype: torch.dtype
) -> dict[str, int]:
    """The parameters of `sm90_w4a4_gemm.cu` for a tile, with as many stages as fit into shared memory."""
    scale_rows = 1 if token_base else SLOT_INPUTS // group_size
    stage = tile.tokens * (SLOT_INPUTS + 4 * scale_rows) + tile.panels * record_bytes(group_size, scale_bytes)
    stage = -(-stage // 1024) * 1024
    fixed = 1024 + tile.n_warpgroups * min(32, tile.tokens) * _STORE_PITCH
    fixed += (tile.k_teams - 1) * tile.panels * PANEL_ROWS * tile.tokens * 4
    return {
        "PROGRESSIVE": int(scale_bytes == 1),
        "TOKEN_BASE": int(token_base),
        "GROUP_SIZE": group_size,
        "SCALE_BYTES": scale_bytes,
        "OUT_DTYPE": OUT_DTYPES[out_dtype],
        "HEAD_DIM": 0,
        "HEAD_HADAMARD": 0,
        "TILE_TOKENS": tile.tokens,
        "CHUNK_TOKENS": tile.chunk_tokens,
        "N_WARPGROUPS": tile.n_warpgroups,
        "ROW_BLOCKS": tile.row_blocks,
        "K_TEAMS": tile.k_teams,
        "CONSUMER_REGISTERS": tile.consumer_registers,
        "CTAS_PER_SM": tile.ctas_per_sm,
        "N_STAGES": min(24, (tile.shared_bytes - fixed) // (stage + 16) // tile.k_teams),
        "SHARED_BYTES": tile.shared_bytes,
    }


def sm90_w4a16_defines(
    tile: Tile, group_size: int, scale_bytes: int, in_dtype: torch.dtype, out_dtype: torch.dtype
) -> dict[str, int]:
    """The parameters of a W4A16 kernel for a tile, with as many stages as fit into shared memory."""
    fixed = 1024 + tile.n_warpgroups * min(32, tile.tokens) * _STORE_PITCH
    stage = tile.panels * record_bytes(group_size, scale_bytes) + tile.tokens * 2 * SLOT_INPUTS
    registers = {}
    if tile.mma_sync:
        stage += tile.tokens * 32
    else:
        stage = -(-stage // 1024) * 1024
        registers = {"CONSUMER_REGISTERS": tile.consumer_registers}
    return {
        "GROUP_SIZE": group_size,
        "SCALE_BYTES": scale_bytes,
        "IN_BF16": int(in_dtype == torch.bfloat16),
        "OUT_DTYPE": OUT_DTYPES[out_dtype],
        "TILE_TOKENS": tile.tokens,
        "N_WARPGROUPS": tile.n_warpgroups,
        "ROW_BLOCKS": tile.row_blocks,
        "K_TEAMS": tile.k_teams,
        "N_STAGES": min(24, (tile.shared_bytes - fixed) // (stage + 16)),
        "SHARED_BYTES": tile.shared_bytes,
        **registers,
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
