"""Fronts of `kv_append.cu`, `kv_read.cu` and `kv_attention.cu`: the paged KV cache and attention on it.

CPU tensors run the twins in torch, CUDA tensors the kernels; pages are the same bits (but for the rounding of
a norm's sum), attention agrees to what float16 operands of mma cost.
"""

from __future__ import annotations

import functools
import math

import torch

from atomq.errors import KernelError
from atomq.kernels import kv_reference
from atomq.kernels.kv_pages import PAGE_TOKENS, HeadParameters, PageFormat
from atomq.kernels.loader import compile_kernel, device_limits, launch
from atomq.kernels.operands import check_operand
from atomq.numerics.kv import OFFSET_TOKENS

_ELEMENTS = {torch.float16: "__half", torch.bfloat16: "__nv_bfloat16", torch.float32: "float"}
_WARPS = 4
_RING_BYTES, _SHORT_RING_BYTES = 9216, 7168  # of a warp's stages: what is on its way while others compute
_PAGE_STEPS = PAGE_TOKENS // 16  # a warp takes 16 tokens at a time
_PAGES_OF_SPLIT = 2  # at least, else joining costs more than it gains
_MAX_SPLITS = 64  # that the kernel joins


def append_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    layout: PageFormat,
    heads: HeadParameters,
) -> None:
    """Write K and V of new tokens into `pages`, in place.

    Args:
        keys, values: [T, n_heads, head_dim], float16, bfloat16 or float32, heads side by side; tokens may lie
            apart, in both alike. K as the projection gives it: before norm and RoPE.
        pages: uint8 [n_pages, n_heads, page_bytes].
        table: int32 [rows, pages of a row]: the pages of each sequence in order.
        rows, positions: int32 [T]: sequence and place of each token; a negative place leaves it out.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_tokens, device = keys.shape[0], pages.device
    check = functools.partial(check_operand, "append_kv", device=device)
    for name, x in (("keys", keys), ("values", values)):
        _check_heads("append_kv", name, x, (n_tokens, layout.n_heads, layout.head_dim), device)
    if values.dtype != keys.dtype or (n_tokens > 1 and values.stride(0) != keys.stride(0)):
        raise KernelError("append_kv: keys and values must have one dtype and one distance between tokens")
    _check_pages("append_kv", pages, table, layout, heads)
    for name, indices in (("rows", rows), ("positions", positions)):
        check(name, indices, dtype=torch.int32, shape=(n_tokens,))
    if not pages.is_cuda:
        kv_reference.append_kv(keys, values, pages, table, rows, positions, layout, heads)
        return
    if not n_tokens:
        return
    kernel = compile_kernel("kv_append", **append_defines(layout, keys.dtype))
    arguments = (
        keys,
        values,
        pages,
        table,
        rows,
        positions,
        heads.rotary,
        heads.key_norm,
        heads.key_offset,
        heads.key_scale,
        n_tokens,
        layout.n_heads,
        keys.stride(0),
        table.stride(0),
        heads.n_offset_rows,
        heads.epsilon,
        layout.clip_ratio,
    )
    n_items = 2 * n_tokens * layout.n_heads
    grid = (math.ceil(n_items / _WARPS),)
    launch(kernel, grid, (32 * _WARPS,), arguments, device=device, overlaps=True)


def read_kv(
    pages: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    layout: PageFormat,
    heads: HeadParameters,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """K after RoPE and V of cached tokens, [T, n_heads, head_dim] in `dtype`; operands as of `append_kv`.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_tokens, device = rows.shape[0], pages.device
    _check_pages("read_kv", pages, table, layout, heads)
    for name, indices in (("rows", rows), ("positions", positions)):
        check_operand("read_kv", name, indices, dtype=torch.int32, shape=(n_tokens,), device=device)
    if dtype not in _ELEMENTS:
        raise KernelError(f"read_kv: {dtype}; it must be one of {', '.join(map(str, _ELEMENTS))}")
    if not pages.is_cuda:
        return kv_reference.read_kv(pages, table, rows, positions, layout, heads, dtype)
    shape = (n_tokens, layout.n_heads, layout.head_dim)
    keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    if n_tokens:
        kernel = compile_kernel("kv_read", **append_defines(layout, dtype))
        arguments = (
            pages,
            table,
            rows,
            positions,
            heads.rotary,
            heads.key_offset,
            heads.key_scale,
            keys,
            values,
            n_tokens,
            layout.n_heads,
            table.stride(0),
            heads.n_offset_rows,
        )
        n_ctas = math.ceil(2 * n_tokens * layout.n_heads / _WARPS)
        launch(kernel, (n_ctas,), (32 * _WARPS,), arguments, device=device)
    return keys, values


def decode_attention(
    query: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    layout: PageFormat,
    heads: HeadParameters,
    n_splits: int | None = None,
    *,
    is_settled: bool = False,
) -> torch.Tensor:
    """Attention of the newest token of every sequence, which is in the cache already.

    Can be captured in a CUDA graph once it has run outside of one: lengths and table are read when it runs.

    Args:
        query: [n_sequences, query heads, head_dim] as the projection gives it, before norm and RoPE; tokens
            may lie apart. Query heads are a multiple of the cache's, up to `layout.max_group` times.
        lengths: int32 [n_sequences], tokens in the cache; 0 for an empty slot, which gives 0.
        n_splits: parts that a sequence's pages are cut into, up to 64; None to fill the GPU.
        is_settled: promises that lengths, table and all tokens but each sequence's newest were written before
            a kernel ahead on the stream that begins when all before it have ended, as torch's elementwise
            ones do. Pages without a newest token are then asked for while kernels behind that one still run.

    Returns:
        [n_sequences, query heads, head_dim] in the query's dtype, contiguous, bit-equal from run to run.

    Raises:
        KernelError: an operand that does not fit, or on CUDA no CuPy.
    """
    n_sequences, n_queries, device = query.shape[0], query.shape[1], pages.device
    group = n_queries // layout.n_heads
    if n_queries != group * layout.n_heads or not 1 <= group <= layout.max_group:
        raise KernelError(
            f"decode_attention: {n_queries} query heads on {layout.n_heads} of K and V; "
            f"the kernel takes 1 to {layout.max_group} times as many"
        )
    _check_heads("decode_attention", "query", query, (n_sequences, n_queries, layout.head_dim), device)
    _check_pages("decode_attention", pages, table, layout, heads)
    if layout.key_mode and (heads.page_turns is None or heads.page_turns.shape[1] * 32 != layout.stored_dim):
        raise KernelError("decode_attention: K before RoPE needs page_turns; make heads by HeadParameters.of")
    check_operand(
        "decode_attention", "lengths", lengths, dtype=torch.int32, shape=(n_sequences,), device=device
    )
    if table.shape[0] < n_sequences:
        raise KernelError(f"decode_attention: {n_sequences} sequences; the table has {table.shape[0]} rows")
    if n_splits is not None and not 1 <= n_splits <= _MAX_SPLITS:
        raise KernelError(f"decode_attention: n_splits {n_splits}; it must lie between 1 and {_MAX_SPLITS}")
    if not pages.is_cuda:
        return kv_reference.decode_attention(query, pages, table, lengths, layout, heads)
    out = torch.empty((n_sequences, n_queries, layout.head_dim), dtype=query.dtype, device=device)
    if not n_sequences:
        return out
    n_items = n_sequences * layout.n_heads
    defines = attention_defines(layout, query.dtype, group, heads.key_offset is not None)
    n_ctas = int(defines["MIN_CTAS"]) * device_limits(device).n_sms
    n_splits = n_splits or choose_splits(n_items, table.shape[1], n_ctas)
    partials = counters = None
    if n_splits > 1:
        size = n_items * n_splits * group * (layout.stored_dim + 2)
        partials = torch.empty(size, dtype=torch.float32, device=device)
        counters = _counters(device, n_items)
    kernel = compile_kernel("kv_attention", **defines)
    turns = None
    if layout.key_mode and heads.page_turns is not None:
        turns = heads.page_turns[layout.key_mode - 1]
    arguments = (
        query,
        pages,
        table,
        lengths,
        heads.rotary,
        turns,
        heads.query_norm,
        heads.key_offset,
        heads.key_scale,
        out,
        partials,
        counters,
        query.stride(0),
        table.shape[1],
        heads.n_offset_rows,
        int(is_settled),
        heads.epsilon,
        heads.softmax_scale,
    )
    grid = (layout.n_heads, n_sequences, n_splits)
    launch(
        kernel,
        grid,
        (32 * _WARPS,),
        arguments,
        device=device,
        shared_bytes=int(defines["SHARED_BYTES"]),
        overlaps=True,
    )
    return out


def choose_splits(n_items: int, n_pages: int, n_ctas: int) -> int:
    """Splits of each of `n_items` heads of sequences; the GPU holds `n_ctas` CTAs at a time."""
    return max(1, min(n_ctas // n_items, n_pages // _PAGES_OF_SPLIT, _MAX_SPLITS))


def append_defines(layout: PageFormat, dtype: torch.dtype) -> dict[str, int | str]:
    """The parameters of `kv_append.cu` and `kv_read.cu`."""
    return {
        "ELEMENT": _ELEMENTS[dtype],
        "HEAD_DIM": layout.head_dim,
        "BITS": layout.n_bits,
        "OFFSET_TOKENS": OFFSET_TOKENS,
        "KEY_AFTER_ROPE": int(layout.key_mode == 0),
        "KEY_HADAMARD": int(layout.rotates_keys),
        "VALUE_HADAMARD": int(layout.rotates_values),
    }


def attention_defines(
    layout: PageFormat, dtype: torch.dtype, group: int, has_offset: bool
) -> dict[str, int | str]:
    """The parameters of `kv_attention.cu`; as many stages as a warp's share of shared memory holds."""
    mode, dim = layout.key_mode, layout.stored_dim
    adds_offset = mode > 0 and has_offset
    tiles = math.ceil(group / 8)
    stage_words, range_words = dim * layout.n_bits, 2 * PAGE_TOKENS if layout.n_bits < 16 else 0
    query_rows = group if mode and group in (1, 2, 4) else tiles * 8
    fixed_words = query_rows * (dim + 8)
    if mode:
        fixed_words += 32 * dim + (dim // 2 if adds_offset else 0)
    if mode and dim > 128:  # the kernel's PARKS_OPERAND
        fixed_words += _WARPS * 32 * tiles * (dim // 8)
    ring_bytes = _SHORT_RING_BYTES if mode else _RING_BYTES
    stages = max(2, min(_PAGE_STEPS + 1, ring_bytes // (4 * stage_words + range_words * 4 // _PAGE_STEPS)))
    share_words = (dim // 8 * 9 + 13) // 16 * 16 + 4  # the kernel's SHARE_STRIDE
    ring_words = _WARPS * max(stages * stage_words + 2 * range_words, group * share_words)
    is_large = dim * tiles > 128 or layout.n_bits == 16
    return {
        "ELEMENT": _ELEMENTS[dtype],
        "HEAD_DIM": layout.head_dim,
        "BITS": layout.n_bits,
        "OFFSET_TOKENS": OFFSET_TOKENS,
        "GROUP": group,
        "KEY_MODE": mode,
        "KEY_HADAMARD": int(layout.rotates_keys),
        "VALUE_HADAMARD": int(layout.rotates_values),
        "KEY_OFFSET": int(adds_offset),
        "N_WARPS": _WARPS,
        "STAGES": stages,
        "MIN_CTAS": 2 if is_large else 4 if mode == 0 or layout.n_bits == 4 else 3,
        "SHARED_BYTES": 4 * (fixed_words + ring_words),
    }


def _check_heads(
    kernel: str, name: str, x: torch.Tensor, shape: tuple[int, int, int], device: torch.device
) -> None:
    if x.dtype not in _ELEMENTS or tuple(x.shape) != shape or x.device != device:
        raise KernelError(
            f"{kernel}: {name} of {tuple(x.shape)} {x.dtype} on {x.device}; it must be {shape}, float16, "
            f"bfloat16 or float32, on {device}"
        )
    if x.numel() and (x.stride(2) != 1 or (shape[1] > 1 and x.stride(1) != shape[2])):
        raise KernelError(f"{kernel}: {name} has strides {x.stride()}; a token's heads must lie side by side")


def _check_pages(
    kernel: str, pages: torch.Tensor, table: torch.Tensor, layout: PageFormat, heads: HeadParameters
) -> None:
    check = functools.partial(check_operand, kernel, device=pages.device)
    shape = (pages.shape[0], layout.n_heads, layout.page_bytes)
    check("pages", pages, dtype=torch.uint8, shape=shape, alignment=16)
    check("table", table, dtype=torch.int32, shape=(table.shape[0], table.shape[-1]))
    shape = (heads.rotary.shape[0], layout.head_dim // 2, 2)
    check("rotary", heads.rotary, dtype=torch.float32, shape=shape, alignment=8)
    if shape[0] < PAGE_TOKENS:
        raise KernelError(f"{kernel}: rotary has {shape[0]} positions; a page has {PAGE_TOKENS}")
    for name, norm in (("query_norm", heads.query_norm), ("key_norm", heads.key_norm)):
        if norm is not None:
            check(name, norm, dtype=torch.float32, shape=(layout.head_dim,))
    shape_of_key = (layout.n_heads, layout.head_dim)
    if heads.key_scale is not None:
        check("key_scale", heads.key_scale, dtype=torch.float32, shape=shape_of_key)
    if heads.key_offset is not None:
        rows = () if layout.key_position == "before_rope" else (heads.n_offset_rows,)
        check("key_offset", heads.key_offset, dtype=torch.float32, shape=(*rows, *shape_of_key))
    if layout.key_position == "before_rope" and heads.key_scale is not None:
        raise KernelError(f"{kernel}: key_scale; it divides K after RoPE, and these pages hold K before it")
    if layout.key_position == "after_rope" and (heads.key_offset is None) != (heads.key_scale is None):
        raise KernelError(f"{kernel}: key_offset or key_scale alone; K after RoPE takes both or neither")


_COUNTERS: dict[tuple[torch.device, int], torch.Tensor] = {}


def _counters(device: torch.device, n_items: int) -> torch.Tensor:
    """Arrival counters, zero between launches; one set per stream, since launches may overlap.

    Made during a graph's capture they belong to the graph, which zeroes them at each replay.
    """
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    counters = _COUNTERS.get(key)
    if counters is None or counters.numel() < n_items:
        counters = torch.zeros(max(n_items, 4096), dtype=torch.int32, device=device)
        if not torch.cuda.is_current_stream_capturing():
            _COUNTERS[key] = counters
    return counters
