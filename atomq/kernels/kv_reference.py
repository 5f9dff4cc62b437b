"""Twins in torch of `kv_append.cu`, `kv_read.cu` and `kv_attention.cu`: same pages and attention.

Operands are the fronts' business to check.
"""

from __future__ import annotations

import torch

from atomq.config import FLOAT_BITS
from atomq.kernels.kv_pages import PAGE_TOKENS, HeadParameters, PageFormat
from atomq.kernels.reference import butterflies
from atomq.numerics.kv import offset_row
from atomq.numerics.scales import F16_LARGEST


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
    """Twin of `atomq.kernels.kv_cache.append_kv`."""
    kept = positions >= 0
    rows, positions = rows[kept].long(), positions[kept].long()
    if not rows.numel():
        return
    stored_keys = coded_keys(keys[kept], positions, layout, heads)
    stored_values = values[kept].float()
    if layout.rotates_values:
        stored_values = butterflies(stored_values)
    ids, owner = table[rows, positions // PAGE_TOKENS].long().unique(return_inverse=True)  # type: ignore[no-untyped-call]
    opened = _Pages(pages[ids], layout)
    place = positions % PAGE_TOKENS
    opened.write(owner, place, 0, stored_keys)
    opened.write(owner, place, 1, stored_values)
    pages[ids] = opened.packed()


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
    """Twin of `atomq.kernels.kv_cache.decode_attention`; the last two arguments change nothing here."""
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    n_sequences, n_queries, head_dim = query.shape
    for i in range(n_sequences):
        length = int(lengths[i])
        if length <= 0:
            continue
        places = torch.arange(length, device=query.device)
        cached = read_kv(pages, table, torch.full_like(places, i), places, layout, heads, torch.float32)
        keys, values = (x.transpose(0, 1) for x in cached)  # [H, length, head_dim]
        position = places[-1:]
        q = rotate(head_norm(query[i : i + 1].float(), heads.query_norm, heads.epsilon), position, heads)
        q = q.reshape(layout.n_heads, n_queries // layout.n_heads, head_dim)
        weights = (q @ keys.transpose(1, 2) * heads.softmax_scale).softmax(-1)
        out[i] = (weights @ values).reshape(n_queries, head_dim).to(out.dtype)
    return out


def read_kv(
    pages: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    layout: PageFormat,
    heads: HeadParameters,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Twin of `atomq.kernels.kv_cache.read_kv`."""
    rows, positions = rows.long(), positions.long()
    ids = table[rows, positions // PAGE_TOKENS].long()
    ids, owner = ids.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    opened = _Pages(pages[ids], layout)
    place = positions % PAGE_TOKENS
    keys, values = (opened.read(side)[owner, :, place] for side in (0, 1))  # [T, H, head_dim]
    if layout.rotates_keys:
        keys = butterflies(keys)
    if layout.rotates_values:
        values = butterflies(values)
    if heads.key_scale is not None:
        keys = keys * heads.key_scale
    if heads.key_offset is not None:
        keys = keys + _offset_at(positions, heads.key_offset)
    if layout.key_position == "before_rope":
        keys = rotate(keys, positions, heads)
    return keys.to(dtype), values.to(dtype)


def coded_keys(
    keys: torch.Tensor, positions: torch.Tensor, layout: PageFormat, heads: HeadParameters
) -> torch.Tensor:
    """K [T, H, head_dim] in float32 as it is coded, but for the rounding to codes."""
    x = head_norm(keys.float(), heads.key_norm, heads.epsilon)
    if layout.key_position == "after_rope":
        x = rotate(x, positions, heads)
    if heads.key_offset is not None:
        x = x - _offset_at(positions, heads.key_offset)
    if heads.key_scale is not None:
        x = x / heads.key_scale
    return butterflies(x) if layout.rotates_keys else x


def _offset_at(positions: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """`HeadParameters.key_offset` at int64 `positions` [T]: [T or 1, H, head_dim]."""
    if offset.ndim < 3:
        return offset[None]
    return offset[offset_row(positions, len(offset))]


def rotate(x: torch.Tensor, positions: torch.Tensor, heads: HeadParameters) -> torch.Tensor:
    """RoPE on `x` [T, H, head_dim] at int64 `positions` [T]."""
    cosine, sine = heads.rotary[positions][:, None].unbind(-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cosine - high * sine, high * cosine + low * sine), dim=-1)


def head_norm(x: torch.Tensor, weight: torch.Tensor | None, epsilon: float) -> torch.Tensor:
    """RMS norm of each head of `x` [..., head_dim], if there is a weight."""
    if weight is None:
        return x
    inverse = 1 / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()
    return x * inverse * weight


class _Pages:
    """Pages [n, n_heads, page_bytes] taken apart: a code each, and the ranges."""

    def __init__(self, pages: torch.Tensor, layout: PageFormat) -> None:
        self.layout = layout
        split = 2 * layout.side_bytes
        sides = pages[..., :split].contiguous()
        if layout.n_bits == FLOAT_BITS:
            codes = sides.view(torch.float16)
        elif layout.n_bits == 8:
            codes = sides
        else:
            codes = torch.stack((sides & 15, sides >> 4), dim=-1).flatten(-2)
        self.codes = codes.reshape(*pages.shape[:2], 2, -1)  # [n, H, side, codes]
        ranges = pages[..., split:].contiguous().view(torch.float16)
        self.ranges = ranges.reshape(*pages.shape[:2], -1, 2, 2)  # [n, H, token, side, scale or minimum]
        places = layout.key_places(), layout.value_places()
        self.places = tuple(place.to(pages.device) for place in places)

    def write(self, owner: torch.Tensor, place: torch.Tensor, side: int, x: torch.Tensor) -> None:
        """Code heads `x` [T, H, head_dim] at place `place` [T] of page `owner` [T]."""
        layout, levels = self.layout, 2**self.layout.n_bits - 1
        if layout.n_bits == FLOAT_BITS:
            codes = x.clamp(-F16_LARGEST, F16_LARGEST).half()
        else:
            low, high = (end * layout.clip_ratio for end in x.aminmax(dim=-1))
            divisor = torch.tensor(float(levels), device=x.device)
            scales = ((high - low) / divisor).clamp(max=F16_LARGEST).half()
            scales = torch.where(scales > 0, scales, torch.ones_like(scales))
            minima = low.clamp(-F16_LARGEST, F16_LARGEST).half()
            ratios = (x - minima.float()[..., None]) / scales.float()[..., None]
            codes = ratios.clamp(0, levels).round().to(torch.uint8)
            self.ranges[owner, :, place, side] = torch.stack((scales, minima), dim=-1)
        targets = self.places[side][place][:, None].expand(codes.shape)  # [T, H, head_dim]
        head = torch.arange(layout.n_heads, device=x.device)[None, :, None]
        self.codes[owner[:, None, None], head, side, targets] = codes

    def read(self, side: int) -> torch.Tensor:
        """The values as stored, float32 [n, H, PAGE_TOKENS, head_dim]."""
        codes: torch.Tensor = self.codes[:, :, side][..., self.places[side]].float()
        if self.layout.n_bits == FLOAT_BITS:
            return codes
        scales, minima = self.ranges[..., side, :].float().unbind(-1)
        values: torch.Tensor = codes * scales[..., None] + minima[..., None]
        return values

    def packed(self) -> torch.Tensor:
        """The pages' bytes."""
        codes: torch.Tensor = self.codes.flatten(2)
        if self.layout.n_bits == FLOAT_BITS:
            halves: torch.Tensor = codes.contiguous().view(torch.uint8)
            return halves
        if self.layout.n_bits == 4:
            codes = codes[..., ::2] | codes[..., 1::2] << 4
        ranges = self.ranges.flatten(2).contiguous().view(torch.uint8)
        return torch.cat((codes, ranges), dim=-1)
