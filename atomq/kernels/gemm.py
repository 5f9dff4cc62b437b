"""GEMM with INT4 weights on a GPU: checked fronts of `sm90_w4a4_gemm.cu`, `sm80_w4a4_gemm.cu`,
`sm90_w4a16_gemm.cu`, `sm90_w4a16_batch_gemm.cu`.

`w4a4_gemm` multiplies INT4 or INT8 activations, with scales per group, a block of INT8 outliers and a bias;
on Hopper by wgmma, on sm_80, 86 and 89 by mma.sync on INT4 where it can, elsewhere by mma.sync on INT8.
`w4a16_gemm` multiplies float16 or bfloat16 activations. Operands: `atomq.kernels.repack`.
"""

from __future__ import annotations

import torch

from atomq.errors import KernelError
from atomq.kernels.gemm_schedule import problem as portable_problem, schedule
from atomq.kernels.gemm_tiles import (
    OUT_DTYPES,
    Engine,
    Tile,
    choose_tile,
    choose_w4a16_tile,
    sm80_defines,
    sm90_defines,
    sm90_w4a16_defines,
)
from atomq.kernels.loader import Argument, compile_kernel, launch
from atomq.kernels.operands import check_operand
from atomq.kernels.repack import (
    OUTLIERS_PER_SLOT,
    PANEL_ROWS,
    SLOT_INPUTS,
    PackedActivations,
    PackedWeight,
    record_bytes,
)

__all__ = [
    "OUT_DTYPES",
    "Engine",
    "Tile",
    "choose_tile",
    "choose_w4a16_tile",
    "default_engine",
    "sm80_defines",
    "sm90_defines",
    "sm90_w4a16_defines",
    "w4a4_gemm",
    "w4a16_gemm",
]


def w4a4_gemm(
    activations: PackedActivations,
    weight: PackedWeight,
    out_dtype: torch.dtype = torch.float16,
    *,
    out: torch.Tensor | None = None,
    engine: Engine | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Multiply quantized activations with a quantized linear: [M, N] of `out_dtype`, contiguous.

    y[m, n] = sum_g s_w[n, g] s_x[m, g] sum_k c_w c_x + the outliers' block + bias. Sums are INT32 inside a
    group (progressive: over the whole row), float32 across groups; the result is bit-equal from run to run.
    Runs on torch's current stream and can be captured in a CUDA graph once it has run outside of one.

    Args:
        activations: made for this weight: the same inputs, group size and number of outliers; each side may
            have exact or progressive scales.
        weight: from `repack_weight`.
        out_dtype: float16, bfloat16 or float32.
        out: where to write, [M, N] of `out_dtype`, contiguous; allocated if None.
        engine: for tests; None picks the fastest the device has.
        tile: for tuning; None picks by the number of tokens. WGMMA_INT8 only.

    Raises:
        KernelError: operands that do not fit each other, no CUDA device, or a device older than sm_80.
    """
    shape = check_operands(activations, weight, out_dtype)
    device = weight.records.device
    if out is None:
        out = torch.empty(shape, dtype=out_dtype, device=device)
    else:
        _check_out("w4a4_gemm", out, out_dtype, shape, device)
    if out.numel() == 0:
        return out
    if engine is None:
        engine = default_engine(torch.cuda.get_device_capability(device), activations, weight)
    if engine is Engine.MMA_INT4 and not _fits_int4(activations, weight):
        raise KernelError("w4a4_gemm: MMA_INT4 takes INT4 activations and exact scales; use MMA_INT8")
    if engine is Engine.WGMMA_INT8:
        tile = tile or tile_for(activations, weight, out_dtype)
        run_sm90(activations, weight, out_dtype, tile, (out,))
    else:
        _run_sm80(activations, weight, out, engine)
    return out


def w4a16_gemm(
    x: torch.Tensor,
    weight: PackedWeight,
    out_dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Multiply float16 or bfloat16 activations with a quantized linear: [M, N] of `out_dtype` (None: as `x`).

    Weights are exact in 16 bits, products and sums float32, scales are applied to a group's sum. Made for
    decoding and small batches: every 64 tokens read the weights once more. Hopper only.

    Args:
        x: [M, K] in the weight's input order, contiguous, 16-byte aligned, K = the weight's INT4 inputs, a
            multiple of 8.
        weight: from `repack_weight`, exact scales and no outliers.
        out_dtype, out: as in `w4a4_gemm`.
        tile: for tuning; row_blocks and k_teams must be 1.

    Raises:
        KernelError: operands that do not fit each other, or a device that is not sm_90.
    """
    kernel_name = "w4a16_gemm"
    device = weight.records.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        raise KernelError(f"{kernel_name}: the weight is on {device}; it takes a Hopper GPU (sm_90)")
    if weight.is_progressive or weight.n_outlier_slots:
        raise KernelError(f"{kernel_name}: the weight has progressive scales or outliers; use w4a4_gemm")
    out_dtype = out_dtype or x.dtype
    shape = (x.shape[0], weight.n_channels)
    n_inputs = x.shape[-1]
    if n_inputs % 8 or -(-n_inputs // SLOT_INPUTS) != weight.n_slots or out_dtype not in OUT_DTYPES:
        raise KernelError(
            f"{kernel_name}: x of {tuple(x.shape)}, out_dtype {out_dtype}; it takes inputs in eights, those "
            f"of the weight's {weight.n_slots} slots of {SLOT_INPUTS}, and {', '.join(map(str, OUT_DTYPES))}"
        )
    halves = (torch.float16, torch.bfloat16)
    check_operand(kernel_name, "x", x, dtype=halves, shape=(shape[0], n_inputs), device=device, alignment=16)
    if out is None:
        out = torch.empty(shape, dtype=out_dtype, device=device)
    else:
        _check_out(kernel_name, out, out_dtype, shape, device)
    if out.numel() == 0:
        return out
    n_panels, n_slots, _ = weight.records.shape
    tile = tile or choose_w4a16_tile(shape[0], n_panels * n_slots)
    defines = sm90_w4a16_defines(tile, weight.group_size, weight.scale_bytes, x.dtype, out_dtype)
    if tile.mma_sync:
        n_ctas, partials, counters, problem = schedule(shape[0], shape[0], weight, tile)
        launch(
            compile_kernel("sm90_w4a16_gemm", **defines),
            (n_ctas,),
            (128 * tile.n_warpgroups + 32,),
            (weight.records, weight.channel_scales, x, out, partials, counters, n_inputs, problem),
            device=device,
            shared_bytes=defines["SHARED_BYTES"],
        )
        return out
    tokens = pack_tokens(x)
    n_ctas, partials, counters, problem = schedule(shape[0], tokens.shape[1], weight, tile)
    launch(
        compile_kernel("sm90_w4a16_batch_gemm", **defines),
        (n_ctas,),
        (128 * (tile.n_warpgroups + 1),),
        (weight.records, weight.channel_scales, tokens, out, partials, counters, problem),
        device=device,
        shared_bytes=defines["SHARED_BYTES"],
        overlaps=True,
    )
    return out


def pack_tokens(x: torch.Tensor) -> torch.Tensor:
    """`x` [M, K] of 16 bits, checked, as `sm90_w4a16_batch_gemm.cu` reads it: [2 * slots, Mp, 64].

    `pack_tokens.cu` has the layout; M is rounded up to 8.
    """
    n_tokens, n_inputs = x.shape
    n_slots, n_rows = -(-n_inputs // SLOT_INPUTS), -(-n_tokens // 8) * 8
    packed = torch.empty((2 * n_slots, n_rows, SLOT_INPUTS // 2), dtype=x.dtype, device=x.device)
    n_pieces = n_slots * SLOT_INPUTS // 16
    launch(
        compile_kernel("pack_tokens"),
        (n_rows, -(-n_pieces // 256)),  # the first may exceed 65,535
        (256,),
        (x, packed, n_tokens, n_inputs, n_slots),
        device=x.device,
        overlaps=True,
    )
    return packed


def default_engine(
    capability: tuple[int, int], activations: PackedActivations, weight: PackedWeight
) -> Engine:
    """The fastest engine of a compute capability for these operands; INT4 mma is emulated from sm_90 on."""
    if capability < (8, 0):
        raise KernelError("w4a4_gemm: the device is sm_{}{}; it takes sm_80 or newer".format(*capability))
    if capability == (9, 0):
        return Engine.WGMMA_INT8
    is_native = capability < (9, 0) and _fits_int4(activations, weight)
    return Engine.MMA_INT4 if is_native else Engine.MMA_INT8


def _fits_int4(activations: PackedActivations, weight: PackedWeight) -> bool:
    """Whether both operands' codes are INT4: progressive ones are multiplied by their factors."""
    return activations.n_bits == 4 and not weight.is_progressive and not activations.has_base_scales


def run_sm90(
    activations: PackedActivations,
    weight: PackedWeight,
    out_dtype: torch.dtype,
    tile: Tile,
    outputs: tuple[Argument, ...],
    **heads: int,
) -> None:
    """Launch `sm90_w4a4_gemm` on checked operands; `heads` are its parameters HEAD_DIM and HEAD_HADAMARD."""
    defines = sm90_defines(
        tile, weight.group_size, weight.scale_bytes, activations.has_base_scales, out_dtype
    )
    defines |= heads
    kernel = compile_kernel("sm90_w4a4_gemm", **defines)
    n_ctas, partials, counters, problem = schedule(
        activations.n_tokens, activations.codes.shape[1], weight, tile
    )
    operands = (weight.records, weight.channel_scales, activations.codes, activations.token_scales)
    launch(
        kernel,
        (n_ctas,),
        (128 * (tile.n_warpgroups * tile.k_teams + 1),),
        (*operands, *outputs, partials, counters, problem),
        device=weight.records.device,
        shared_bytes=defines["SHARED_BYTES"],
        overlaps=True,
    )


def tile_for(activations: PackedActivations, weight: PackedWeight, out_dtype: torch.dtype) -> Tile:
    """The Hopper kernel's tile for these operands."""
    return choose_tile(
        activations.n_tokens,
        weight.group_size,
        weight.is_progressive,
        token_base=activations.has_base_scales,
        n_panels=weight.records.shape[0],
        n_slots=weight.records.shape[1],
        out_dtype=out_dtype,
    )


def _run_sm80(
    activations: PackedActivations, weight: PackedWeight, out: torch.Tensor, engine: Engine
) -> None:
    device = out.device
    tile_tokens = 16 if activations.n_tokens <= 16 else 64
    defines = sm80_defines(
        tile_tokens, engine, weight.group_size, weight.scale_bytes, activations.has_base_scales, out.dtype
    )
    if engine is Engine.MMA_INT4 and torch.cuda.get_device_capability(device) >= (9, 0):
        defines["ALLOW_EMULATED_INT4"] = 1
    kernel = compile_kernel("sm80_w4a4_gemm", **defines)
    n_token_tiles = -(-activations.n_tokens // tile_tokens)
    problem = portable_problem(out.shape[0], activations.codes.shape[1], weight)
    launch(
        kernel,
        (n_token_tiles, -(-weight.records.shape[0] // 2)),
        (256,),
        (
            weight.records,
            weight.channel_scales,
            activations.codes,
            activations.token_scales,
            out,
            problem,
        ),
        device=device,
        shared_bytes=defines["SHARED_BYTES"],
    )


def _check_out(
    kernel: str, out: torch.Tensor, out_dtype: torch.dtype, shape: tuple[int, int], device: torch.device
) -> None:
    in_vectors = shape[1] % 8 == 0  # else the kernels store element by element
    alignment = 16 if in_vectors else 1
    check_operand(kernel, "out", out, dtype=out_dtype, shape=shape, device=device, alignment=alignment)


def check_operands(
    activations: PackedActivations, weight: PackedWeight, out_dtype: torch.dtype
) -> tuple[int, int]:
    """The result's shape (M, N).

    Raises:
        KernelError: as `w4a4_gemm`.
    """
    device = weight.records.device
    if device.type != "cuda":
        raise KernelError(
            f"w4a4_gemm: the weight is on {device}; move it to a CUDA device or use gemm_reference"
        )
    if out_dtype not in OUT_DTYPES:
        raise KernelError(
            f"w4a4_gemm: out_dtype {out_dtype}; it must be one of {', '.join(map(str, OUT_DTYPES))}"
        )
    n_panels, n_all, n_bytes = weight.records.shape
    if weight.records.dtype != torch.uint8 or n_bytes != record_bytes(weight.group_size, weight.scale_bytes):
        raise KernelError("w4a4_gemm: the weight's records are not those that repack_weight makes")
    padded = -(-activations.n_tokens // 8) * 8
    code_slots = weight.n_slots + -(-weight.n_outlier_slots * OUTLIERS_PER_SLOT // SLOT_INPUTS)
    n_groups = 1 if activations.has_base_scales else weight.n_slots * (SLOT_INPUTS // weight.group_size)
    shapes = {
        "weight.records": (weight.records, torch.uint8, (n_panels, n_all, n_bytes)),
        "weight.channel_scales": (weight.channel_scales, torch.float32, (3, n_panels * PANEL_ROWS)),
        "activations.codes": (activations.codes, torch.int8, (code_slots, padded, SLOT_INPUTS)),
        "activations.token_scales": (activations.token_scales, torch.float32, (n_groups + 1, padded)),
    }
    for name, (tensor, dtype, shape) in shapes.items():
        check_operand("w4a4_gemm", name, tensor, dtype=dtype, shape=shape, device=device, alignment=16)
    return activations.n_tokens, weight.n_channels
