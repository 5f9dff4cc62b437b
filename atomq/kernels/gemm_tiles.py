"""How the GEMM kernels are cut: tiles by size of the product, split tiles, and each kernel's parameters."""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass, replace

import torch

from atomq.kernels.repack import PANEL_ROWS, SLOT_INPUTS, record_bytes

OUT_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_STORE_PITCH = PANEL_ROWS * 2 + 16
MANY_RECORDS = 16384  # of 64 channels x 128 inputs: 28672 x 8192 has 29120
FEW_RECORDS = 5000  # 4096 x 4096 has 2112
LARGE_TILES = (160, 192, 256)  # tokens
N_SMS = 132  # of an H100 and an H200, for which tiles are chosen
MAX_COUNTERS = 1024  # no fewer than two waves of tiles, the most that are split
_NEIGHBOUR_BYTES = 48 * 1024  # shared memory left for a neighbour
_NEIGHBOUR_REGISTERS = 80  # of a thread of five warpgroups beside a neighbour


class Engine(enum.Enum):
    """Which kernel multiplies; `None` instead of one lets the device decide."""

    WGMMA_INT8 = enum.auto()
    MMA_INT8 = enum.auto()
    MMA_INT4 = enum.auto()


@dataclass(frozen=True)
class Tile:
    """One instantiation of the Hopper kernel: 64 * n_warpgroups * row_blocks channels x tokens.

    `k_teams` sets of `n_warpgroups` warpgroups take slots of K in turns. `mma_sync`: W4A16 by
    `sm90_w4a16_gemm.cu`, not by wgmma.
    `has_neighbour`: it leaves room on its SM for a CTA of the kernel that quantizes, before it or after it.
    """

    tokens: int
    chunk_tokens: int
    n_warpgroups: int
    row_blocks: int
    consumer_registers: int
    k_teams: int = 1
    mma_sync: bool = False
    has_neighbour: bool = False

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a CTA; the system takes 1 KiB for itself."""
        return 227 * 1024 - self.has_neighbour * _NEIGHBOUR_BYTES

    @property
    def max_registers(self) -> int:
        """Of a thread, so that a neighbour's fit beside; 0: no bound is needed."""
        return _NEIGHBOUR_REGISTERS if self.has_neighbour and self.n_warpgroups * self.k_teams == 4 else 0

    @property
    def join_slots(self) -> int:
        """Slots that take as long as joining tiles whose slots were dealt out evenly; measured."""
        return 4 if self.mma_sync else 13 if self.k_teams == 2 else 9

    @property
    def panels(self) -> int:
        """Panels of 64 channels in a tile."""
        return self.n_warpgroups * self.row_blocks


SLOT_US = {
    Tile(80, 80, 1, 1, 232, 2): 0.245,
    Tile(80, 80, 2, 1, 232): 0.5,
    Tile(80, 80, 3, 1, 152): 0.69,
    Tile(96, 48, 1, 1, 232, 2): 0.295,
    Tile(96, 96, 2, 1, 232): 0.582,
    Tile(96, 96, 3, 1, 152): 0.785,
    Tile(128, 128, 1, 1, 232, 2): 0.36,
    Tile(128, 64, 2, 1, 232): 0.68,
    Tile(128, 64, 3, 1, 152): 0.945,
    Tile(160, 80, 1, 1, 232, 2): 0.424,
    Tile(160, 80, 2, 1, 232): 0.79,
    Tile(192, 96, 1, 1, 232, 2): 0.47,
    Tile(192, 96, 2, 1, 232): 0.89,
    Tile(256, 64, 2, 1, 232): 1.18,
}
"""Tiles for 65 to 512 tokens, and microseconds of a slot with exact scales in groups of 128 on an H200."""


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
    is_plain = group_size == 128 and out_dtype != torch.float32  # others would spill
    if n_tokens <= 64:
        # Two teams hide the time from a stage's arrival to its promotion. One panel for each CTA where that
        # makes no more tiles than there are SMs; two of long rows, and sooner where a team waits for every
        # slot's sums, as with progressive scales.
        tokens = max(8, 1 << (n_tokens - 1).bit_length())
        spills = tokens == 64 and group_size == 64 and not promotes_once  # two teams of two panels
        few_panels = N_SMS // 2 if promotes_once else N_SMS
        if n_panels <= few_panels and (spills or n_records < MANY_RECORDS):
            tile = Tile(tokens, tokens, 1, 1, consumer_registers=0, k_teams=2)
        elif spills:
            tile = Tile(tokens, tokens, 2, 1, consumer_registers=0)
        else:
            tile = Tile(tokens, tokens, 2, 1, consumer_registers=104 if tokens == 64 else 0, k_teams=2)
        return replace(tile, has_neighbour=is_plain and tokens <= 32)
    is_exact = not progressive and not token_base
    chooses_alike = promotes_once and 128 < n_tokens <= 192 and n_records < MANY_RECORDS
    if is_plain and ((is_exact and n_tokens <= 512) or chooses_alike):
        return _fastest_tile(n_tokens, n_panels, n_slots)
    chunk = 32 if group_size == 64 and not token_base else 64
    if promotes_once:
        chunk = 128
    if n_tokens <= 128:
        # Two panels for each warpgroup make fewer tiles: whole ones, where there are enough for the machine.
        row_blocks = 2 if is_plain and token_base and n_records >= MANY_RECORDS else 1
        return Tile(128, chunk, n_warpgroups=2, row_blocks=row_blocks, consumer_registers=232)
    n_tiles = -(-n_tokens // 256)
    if n_records * n_tiles < FEW_RECORDS:
        tokens = 128
    elif n_tiles <= 2 and group_size == 128:  # a slot costs by its tokens; groups of 64 would spill
        tokens = next(size for size in LARGE_TILES if n_tiles * size >= n_tokens)
        chunk = 80 if tokens == 160 else math.gcd(chunk, tokens)
    else:
        tokens = LARGE_TILES[-1]
    return Tile(tokens, chunk, n_warpgroups=2, row_blocks=1, consumer_registers=232)


@functools.cache
def _fastest_tile(n_tokens: int, n_panels: int, n_slots: int) -> Tile:
    """Of `SLOT_US`, by the slots of the CTA that has most and what joining takes.

    Within 5 % of the measured best, nearly everywhere (docs/kernels.md).
    """

    def microseconds(tile: Tile) -> float:
        n_tiles = -(-n_tokens // tile.tokens) * -(-n_panels // tile.panels)
        return SLOT_US[tile] * split_tiles(n_tiles, n_slots, N_SMS, tile.join_slots).cost

    return min(SLOT_US, key=microseconds)


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
        "MAX_REGISTERS": tile.max_registers,
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
    """The tiles that are split: `slots_per_cta` slots to each CTA, of `slots_per_tile` for every tile.

    `cost`: slots of the CTA that has most, with those that joining takes.
    """

    n_tiles: int
    slots_per_tile: int
    slots_per_cta: int
    cost: int


def split_tiles(n_tiles: int, n_slots: int, n_ctas: int, join_slots: int) -> Stream:
    """Which tiles to split, and how; the rest go out whole, one after the other.

    Splitting costs a round trip of float32 partial sums, so what costs least is taken: all tiles whole; those
    beyond whole waves in pieces, as many of each as there are CTAs for; or their slots and those of a wave
    before dealt out evenly, which leaves each CTA up to two pieces to join (`join_slots`, of the tile).
    """
    rest, n_whole = n_tiles % n_ctas, n_tiles // n_ctas
    if not rest:
        return Stream(0, n_slots, n_slots, n_whole * n_slots)
    n_pieces = n_ctas // rest
    piece = -(-n_slots // n_pieces)
    n_even = rest + (n_ctas if n_whole else 0)
    even = -(-n_even * n_slots // n_ctas)
    options = [
        Stream(0, n_slots, n_slots, (n_whole + 1) * n_slots),
        Stream(rest, n_pieces * piece, piece, n_whole * n_slots + piece + join_slots // 2 + n_pieces),
        Stream(n_even, n_slots, even, max(n_whole - 1, 0) * n_slots + even + join_slots),
    ]
    return min(options, key=lambda stream: stream.cost)
