"""The launch of a GEMM kernel: its grid, its workspace for split tiles, and its `struct Problem`."""

from __future__ import annotations

import functools

import numpy as np
import torch

from atomq.kernels.gemm_tiles import MAX_COUNTERS, Tile, split_tiles
from atomq.kernels.repack import PANEL_ROWS, PackedWeight

_FIELDS = (
    "n_tokens",
    "padded_tokens",
    "n_channels",
    "n_panels",
    "n_slots",
    "n_outlier_slots",
    "n_token_tiles",
    "n_tiles",
    "n_stream_tiles",
    "slots_per_stream_tile",
    "slots_per_cta",
)
Problem = np.ndarray[tuple[int, ...], np.dtype[np.void]]


def schedule(
    n_tokens: int, padded_tokens: int, weight: PackedWeight, tile: Tile
) -> tuple[int, torch.Tensor | None, torch.Tensor | None, Problem]:
    """A persistent kernel's CTAs, partial sums and counters (None if no tile is split), and its problem."""
    device = weight.records.device
    n_token_tiles = -(-n_tokens // tile.tokens)
    n_tiles = n_token_tiles * -(-weight.records.shape[0] // tile.panels)
    n_ctas = _n_multiprocessors(device.index or 0)
    stream = split_tiles(n_tiles, weight.records.shape[1], n_ctas, tile.join_slots)
    partials = counters = None
    if stream.n_tiles:
        size = 2 * n_ctas * tile.panels * PANEL_ROWS * tile.tokens
        partials = torch.empty(size, dtype=torch.float32, device=device)
        counters = _counters(device)
    sizes = (n_token_tiles, n_tiles, stream.n_tiles, stream.slots_per_tile, stream.slots_per_cta)
    return n_ctas, partials, counters, problem(n_tokens, padded_tokens, weight, *sizes)


def problem(n_tokens: int, padded_tokens: int, weight: PackedWeight, *sizes: int) -> Problem:
    """The kernels' `struct Problem`, by value; the portable kernel's ends before `n_token_tiles`."""
    values = (
        n_tokens,
        padded_tokens,
        weight.n_channels,
        weight.records.shape[0],
        weight.n_slots,
        weight.n_outlier_slots,
        *sizes,
    )
    return np.array(values, dtype=_problem_dtype(len(values)))


@functools.cache
def _problem_dtype(n_fields: int) -> np.dtype[np.void]:
    return np.dtype([(name, np.int32) for name in _FIELDS[:n_fields]])


_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def _counters(device: torch.device) -> torch.Tensor:
    """Arrival counters of split tiles, zero between launches; one set per stream, since launches may overlap.

    On a stream first seen during a graph's capture they belong to the graph, which zeroes them at each
    replay.
    """
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    counters = _COUNTERS.get(key)
    if counters is None:
        counters = torch.zeros(MAX_COUNTERS, dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing():
            _COUNTERS[key] = counters
    return counters


@functools.cache
def _n_multiprocessors(device_index: int) -> int:
    return int(torch.cuda.get_device_properties(device_index).multi_processor_count)
