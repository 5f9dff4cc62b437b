"""Decoders with random weights: real shapes without a download, for benchmarks.

Weights are scaled so that activations stay of one size; a benchmark needs no more of them. Each block has
weights of its own, so none is found in a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from atomq.config import KeyPosition, KVScheme
from atomq.kernels.kv_pages import HeadParameters, PageFormat
from atomq.kernels.layout import ActivationFormat
from atomq.kernels.repack import CanonicalWeight
from atomq.numerics.kv import OFFSET_TOKENS
from atomq.presets import DEFAULT_PRESET, find_preset
from atomq.runtime.decoder import Block, Decoder
from atomq.runtime.stages import Before, FloatStage, Int8Stage, Norm, Stage, W4A4Stage, W4A16Stage

Scheme = Literal["w4a4", "w4a4-progressive", "w4a16", "int8", "fp16"]
SCHEMES: tuple[Scheme, ...] = ("w4a4", "w4a4-progressive", "w4a16", "int8", "fp16")
GROUP_SIZE, N_OUTLIERS = 128, 128
_EPSILON = 1e-5
_CODE_SPREAD, _INT8_SPREAD = 4.6, 73.6  # standard deviations of uniform INT4 and INT8 codes


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Llama-like model."""

    n_layers: int
    hidden: int
    intermediate: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def n_parameters(self) -> int:
        """Of the linears of all blocks, and the output head."""
        heads = self.n_heads + self.n_kv_heads
        block = 2 * self.hidden * heads * self.head_dim + 3 * self.hidden * self.intermediate
        return self.n_layers * block + self.hidden * self.vocabulary


SHAPES: dict[str, DecoderShape] = {
    "llama-2-7b": DecoderShape(32, 4096, 11008, 32, 32, 128, 32000),
    "llama-2-13b": DecoderShape(40, 5120, 13824, 40, 40, 128, 32000),
    "llama-3-8b": DecoderShape(32, 4096, 14336, 32, 8, 128, 128256),
    "llama-3-70b": DecoderShape(80, 8192, 28672, 64, 8, 128, 128256),
    "qwen3-8b": DecoderShape(36, 4096, 12288, 32, 8, 128, 151936),
    "smollm2-135m": DecoderShape(30, 576, 1536, 9, 3, 64, 49152),
}


def cache_scheme(key_position: KeyPosition | None = None) -> KVScheme:
    """What the default preset stores of K and V.

    With `key_position`, K is coded there, less an offset if the preset's is, balanced after RoPE.
    """
    kv = find_preset(DEFAULT_PRESET).scheme.kv
    if key_position is None:
        return kv
    is_before, less_an_offset = key_position == "before_rope", kv.key_offset or kv.key_balance
    return replace(
        kv,
        key_position=key_position,
        key_offset=less_an_offset and is_before,
        key_balance=less_an_offset and not is_before,
    )


def cache_layout(shape: DecoderShape, scheme: Scheme, kv: KVScheme) -> PageFormat:
    """The KV cache that goes with a scheme: `kv` with W4A4, else INT8 or float16 after RoPE."""
    match scheme:
        case "w4a4" | "w4a4-progressive":
            return PageFormat.of(kv, shape.n_kv_heads, shape.head_dim)
        case "int8":
            return PageFormat(shape.n_kv_heads, shape.head_dim, 8, "after_rope")
        case _:
            return PageFormat(shape.n_kv_heads, shape.head_dim, 16, "after_rope")


def random_balance(
    kv: KVScheme, layout: PageFormat, n_positions: int, device: torch.device | str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`HeadParameters.key_offset` and `key_scale`, each if the scheme has it; scales lie around 1."""
    shape = (layout.n_heads, layout.head_dim)
    rows = (math.ceil(n_positions / OFFSET_TOKENS),) if kv.has_key_scale else ()
    offset = torch.randn((*rows, *shape), device=device) if kv.has_key_offset else None
    scale = torch.rand(shape, device=device) + 0.5 if kv.has_key_scale else None
    return offset, scale


def random_decoder(
    shape: DecoderShape,
    scheme: Scheme,
    n_layers: int,
    max_positions: int,
    device: torch.device,
    key_position: KeyPosition | None = None,
) -> Decoder:
    """`n_layers` blocks of a shape, computed by a scheme, float16 between the products.

    `key_position` as of `cache_scheme`; it changes W4A4 alone.
    """
    kv = cache_scheme(key_position)
    layout = cache_layout(shape, scheme, kv)
    stored = kv if layout.n_bits == kv.n_bits else KVScheme()
    offset, scale = random_balance(stored, layout, max_positions, device)
    heads = HeadParameters.of(
        _rotary(shape.head_dim, max_positions, device),
        shape.head_dim**-0.5,
        key_offset=offset,
        key_scale=scale,
    )
    make = _maker(scheme, device)
    norm = Norm(torch.ones(shape.hidden, device=device), _EPSILON)
    width, kv_width = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    blocks = tuple(
        Block(
            qkv=make(width + 2 * kv_width, shape.hidden, Before.RMS_NORM, norm),
            o=make(shape.hidden, width, Before.NOTHING, None),
            gate_up=make(2 * shape.intermediate, shape.hidden, Before.RMS_NORM, norm),
            down=make(shape.hidden, shape.intermediate, Before.SILU_MUL, None),
            heads=heads,
        )
        for _ in range(n_layers)
    )
    embeddings, head = (
        torch.randn(shape.vocabulary, shape.hidden, device=device, dtype=torch.float16) for _ in range(2)
    )
    head *= shape.hidden**-0.5
    return Decoder(embeddings, blocks, norm, head, shape.n_heads, layout)


def _rotary(head_dim: int, max_positions: int, device: torch.device) -> torch.Tensor:
    frequencies = 1e4 ** -(torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.arange(max_positions, device=device)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=-1).contiguous()


def _maker(scheme: Scheme, device: torch.device) -> Callable[[int, int, Before, Norm | None], Stage]:
    """Makes a stage of (outputs, inputs, what comes before, norm)."""

    def make(n_out: int, n_in: int, before: Before, norm: Norm | None) -> Stage:
        spread = n_in**-0.5
        if scheme == "fp16":
            weight = torch.randn(n_out, n_in, device=device, dtype=torch.float16) * spread
            return FloatStage(weight, before, norm)
        if scheme == "int8":
            scales = torch.full((n_out,), spread / _INT8_SPREAD, device=device)
            return Int8Stage(_int8(n_out, n_in, device), scales, before, norm)
        if scheme == "w4a16":
            return W4A16Stage(_int4(n_out, n_in, 0, False, device), None, before, norm)
        perm = None if before is Before.SILU_MUL else torch.randperm(n_in, device=device)
        is_progressive = scheme == "w4a4-progressive"
        activations = ActivationFormat(n_in, N_OUTLIERS, GROUP_SIZE, 0.9, True, is_progressive)
        return W4A4Stage(
            _int4(n_out, n_in, N_OUTLIERS, is_progressive, device), activations, perm, before, norm
        )

    return make


def _int4(
    n_out: int, n_in: int, n_outliers: int, is_progressive: bool, device: torch.device
) -> CanonicalWeight:
    n_normal = n_in - n_outliers
    groups = (n_out, math.ceil(n_normal / GROUP_SIZE))
    spread = n_in**-0.5 / _CODE_SPREAD
    factors = torch.randint(1, 17, groups, device=device, dtype=torch.uint8) if is_progressive else None
    exact = (torch.rand(groups, device=device) + 0.5) * spread
    return CanonicalWeight(
        torch.randint(0, 256, (n_out, math.ceil(n_normal / 2)), device=device, dtype=torch.uint8),
        exact.half() if factors is None else factors,
        n_normal,
        GROUP_SIZE,
        scale_base=torch.full((n_out,), spread / 8.5, device=device) if is_progressive else None,
        outlier_weight=_int8(n_out, n_outliers, device) if n_outliers else None,
        outlier_scales=torch.full((n_out,), n_in**-0.5 / _INT8_SPREAD, device=device) if n_outliers else None,
    )


def _int8(n_out: int, n_in: int, device: torch.device) -> torch.Tensor:
    return torch.randint(-127, 128, (n_out, n_in), device=device, dtype=torch.int8)
