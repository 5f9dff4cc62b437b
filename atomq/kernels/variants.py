"""Every kernel on every architecture that it is made for: what `bench-gemm --compile-only` builds.

No GPU is needed. One entry stands for each template: each prologue, each engine, each tile of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from atomq.kernels import gemm_tiles, kv_cache
from atomq.kernels.activations import Prologue
from atomq.kernels.gemm_tiles import Engine
from atomq.kernels.kv_pages import PageFormat
from atomq.kernels.loader import ARCHITECTURES, compile_for
from atomq.progress import OnProgress

HOPPER = "sm_90a"
NATIVE_INT4 = ("sm_80", "sm_86", "sm_89")  # from sm_90 on INT4 mma is emulated, and never built
SHOWN_TOKENS = (1, 16, 64, 128, 256, 4096)
SHOWN_PANELS = (64, 448)  # of 64 channels: a small weight and a large one
_PAGES = (  # before RoPE, with the Hadamard, after RoPE; the baselines in 8 and 16 bits
    PageFormat(8, 128),
    PageFormat(8, 128, 4, "before_rope", "hadamard", "hadamard"),
    PageFormat(8, 128, 4, "after_rope", "hadamard", "hadamard"),
    PageFormat(8, 128, 8, "after_rope"),
    PageFormat(8, 128, 16, "after_rope"),
)


@dataclass(frozen=True)
class Variant:
    """One compiled kernel; sizes in bytes, shared memory as far as it is static."""

    name: str
    arch: str
    defines: Mapping[str, int | str]
    registers: int
    shared_bytes: int
    spill_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "defines": dict(self.defines)}


def compile_variants(on_progress: OnProgress) -> Iterator[Variant]:
    """Compile all variants, telling `on_progress` of each.

    Raises:
        KernelError: no CuPy or NVRTC here, or a source that does not compile.
    """
    wanted = list(all_variants())
    for index, (name, arch, defines) in enumerate(wanted):
        on_progress(index, len(wanted), f"{name} {arch}")
        built = compile_for(name, arch, **defines)
        yield Variant(name, arch, defines, built.registers, built.shared_bytes, built.spill_bytes)
    on_progress(len(wanted), len(wanted), "done")


def all_variants() -> Iterator[tuple[str, str, Mapping[str, int | str]]]:
    """Kernel, architecture and defines of each variant."""
    for arch in ARCHITECTURES:
        for codebook in (0, 1):
            yield "gptq_block", arch, {"CODEBOOK": codebook, "N_WARPS": 8}
        for scale_bytes in (1, 2, 4):
            yield "repack_w4", arch, _repack_defines(scale_bytes)
        for prologue in Prologue:
            yield "quantize_act", arch, _quantize_defines(prologue)
        yield "quantize_gathered", arch, {"ELEMENT": "__half"}
        for hadamard in (0, 1):
            heads: dict[str, int | str] = {"ELEMENT": "__half", "HEAD_DIM": 128, "HADAMARD": hadamard}
            heads |= {"LOAD_WIDTH": 8, "STORE_WIDTH": 8, "THREADS": 256}
            yield "quantize_kv", arch, heads
            yield "dequantize_kv", arch, heads
        for before in (0, 1, 2):
            for quantize in (0, 1):
                yield "rows", arch, _rows_defines(before, quantize)
        yield "scale_sums", arch, {"ELEMENT": "__half"}
        for layout in _PAGES:
            for name in ("kv_append", "kv_read"):
                yield name, arch, kv_cache.append_defines(layout, torch.float16)
            for group in (1, 8):
                yield "kv_attention", arch, kv_cache.attention_defines(layout, torch.float16, group, False)
        for engine in (Engine.MMA_INT8, *([Engine.MMA_INT4] if arch in NATIVE_INT4 else [])):
            for tokens in (16, 64):
                yield (
                    "sm80_w4a4_gemm",
                    arch,
                    gemm_tiles.sm80_defines(tokens, engine, 128, 2, False, torch.float16),
                )
    for scale_bytes in (2, 1):
        progressive = scale_bytes == 1
        tiles = {
            gemm_tiles.choose_tile(n_tokens, 128, progressive, n_panels=n_panels): None
            for n_tokens in SHOWN_TOKENS
            for n_panels in SHOWN_PANELS
        }
        for tile in tiles if progressive else tiles | dict.fromkeys(gemm_tiles.SLOT_US):
            yield (
                "sm90_w4a4_gemm",
                HOPPER,
                gemm_tiles.sm90_defines(tile, 128, scale_bytes, progressive, torch.float16),
            )
    yield "pack_tokens", HOPPER, {}
    w4a16_tiles = {
        gemm_tiles.choose_w4a16_tile(n_tokens, n_records): None
        for n_tokens in (1, 16, 32, 64)
        for n_records in (0, gemm_tiles.MANY_RECORDS)
    }
    for tile in w4a16_tiles:
        name = "sm90_w4a16_gemm" if tile.mma_sync else "sm90_w4a16_batch_gemm"
        yield name, HOPPER, gemm_tiles.sm90_w4a16_defines(tile, 128, 2, torch.float16, torch.float16)


def _repack_defines(scale_bytes: int) -> dict[str, int | str]:
    return {
        "PROGRESSIVE": int(scale_bytes == 1),
        "GROUP_SIZE": 128,
        "SCALE_BYTES": scale_bytes,
        "CHANNEL_GROUP": 1,
    }


def _quantize_defines(prologue: Prologue) -> dict[str, int | str]:
    return {
        "ELEMENT": "__half",
        "PROLOGUE": int(prologue),
        "GATHER": 1,
        "HADAMARD": 1,
        "GROUP_SIZE": 128,
        "PROGRESSIVE": 0,
        "LOAD_WIDTH": 8,
        "ADDS": int(prologue is Prologue.RMS_NORM),
        "PARTS": 1,
        "SLOT_LANES": 4,
    }


def _rows_defines(prologue: int, quantize: int) -> dict[str, int | str]:
    return {
        "ELEMENT": "__half",
        "PROLOGUE": prologue,
        "QUANTIZE": quantize,
        "ADDS": int(prologue == 1),
        "LOAD_WIDTH": 8,
        "VECTORS": 1,
        "THREADS": 512,
    }
