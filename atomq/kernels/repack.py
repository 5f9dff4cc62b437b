"""The GEMM kernels' operands: one linear's weights as records, a batch's activations as swizzled tiles.

The layouts are drawn in `kernels_cuda/gemm_layout.cuh`; one layout serves every architecture. A checkpoint
keeps its canonical tensors; `repack_weight` turns them into records when a model is loaded (by `repack_w4.cu`
on a GPU, in torch elsewhere, with the same bytes). `pack_activations` is the twin of what the activation
quantizer writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atomq.errors import KernelError
from atomq.kernels.loader import compile_kernel, launch
from atomq.kernels.operands import check_operand

PANEL_ROWS = 64
SLOT_INPUTS = 128  # INT4 inputs of a slot; also the inputs of a tile row of activations
OUTLIERS_PER_SLOT = 64
CODE_BYTES = PANEL_ROWS * SLOT_INPUTS // 2
MAX_OUTLIERS = 256


@dataclass(frozen=True)
class CanonicalWeight:
    """One linear's tensors as a checkpoint holds them, inputs permuted, outliers cut off from the end.

    qweight: uint8 [N, ceil(Kn / 2)], two's complement nibbles, the low one the even input.
    scales: float16 or float32 [ceil(N / c), G], G = ceil(Kn / group_size), c = channel_group; or, for
        progressive scales, uint8 factors 1..16 [N, G].
    scale_base: float32 [N] with progressive scales (a group's scale is base * factor), else None.
    outlier_weight, outlier_scales: int8 [N, k] and float16 or float32 [N], or None where k is 0.
    bias: floating point [N] or None.
    n_inputs: Kn, the INT4 inputs.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    n_inputs: int
    group_size: int
    channel_group: int = 1
    scale_base: torch.Tensor | None = None
    outlier_weight: torch.Tensor | None = None
    outlier_scales: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def is_progressive(self) -> bool:
        """Whether group scales are integer multiples of one base per channel."""
        return self.scale_base is not None

    @property
    def n_outliers(self) -> int:
        """INT8 inputs."""
        return 0 if self.outlier_weight is None else self.outlier_weight.shape[1]


@dataclass(frozen=True)
class PackedWeight:
    """One linear as the kernels read it.

    records: uint8 [panels, slots, record bytes]; channel_scales: float32 [3, 64 * panels] = base scale,
        outlier scale, bias. `n_slots` of the slots are INT4, the rest outliers.
    """

    records: torch.Tensor
    channel_scales: torch.Tensor
    n_channels: int
    n_slots: int
    group_size: int
    scale_bytes: int

    @property
    def is_progressive(self) -> bool:
        """Whether the whole row accumulates in INT32."""
        return self.scale_bytes == 1

    @property
    def n_outlier_slots(self) -> int:
        """Slots of 64 INT8 outliers."""
        return self.records.shape[1] - self.n_slots


@dataclass(frozen=True)
class PackedActivations:
    """A batch of quantized activations as the kernels read it.

    codes: int8 [n_slots + ceil(outliers / 128), Mp, 128], Mp = M rounded up to 8. Row m of a slot holds token
        m's 128 inputs with 16-byte chunk c at c ^ (m % 8); inputs past the last one are 0. Outliers follow in
        slots of their own. With progressive scales a code is the INT4 code times its group's integer factor.
    token_scales: float32 [rows, Mp]; one row per group of `group_size` inputs, 128 / group_size for each slot
        (a group that is only padding has scale 0 or any finite value), or one row of base scales if
        progressive; then one row of outlier scales, always there.
    n_bits: 4 promises INT4 codes -8..7 (before factors); 8 is INT8 codes, W4A8.
    Rows past M are read and their results thrown away.
    """

    codes: torch.Tensor
    token_scales: torch.Tensor
    n_tokens: int
    n_bits: int = 4

    @property
    def has_base_scales(self) -> bool:
        """Whether the scales are progressive: one base per token (a single exact group is the same thing)."""
        return self.token_scales.shape[0] == 2


def record_bytes(group_size: int, scale_bytes: int) -> int:
    """Bytes of 64 channels x one slot."""
    return CODE_BYTES + SLOT_INPUTS // group_size * PANEL_ROWS * scale_bytes


def repack_weight(weight: CanonicalWeight) -> PackedWeight:
    """Lay out one linear's weights for the kernels, on the device they are on.

    Raises:
        KernelError: a tensor whose dtype, shape or device does not fit the others, or a parameter outside the
            kernels' envelope.
    """
    _check(weight)
    n_channels = weight.qweight.shape[0]
    n_panels = _ceil(n_channels, PANEL_ROWS)
    n_slots = _ceil(weight.n_inputs, SLOT_INPUTS)
    n_outlier_slots = _ceil(weight.n_outliers, OUTLIERS_PER_SLOT)
    scale_bytes = weight.scales.element_size()
    device = weight.qweight.device
    if device.type == "cuda":
        records = torch.empty(
            n_panels,
            n_slots + n_outlier_slots,
            record_bytes(weight.group_size, scale_bytes),
            dtype=torch.uint8,
            device=device,
        )
        if records.numel():
            kernel = compile_kernel(
                "repack_w4",
                PROGRESSIVE=int(weight.is_progressive),
                GROUP_SIZE=weight.group_size,
                SCALE_BYTES=scale_bytes,
                CHANNEL_GROUP=weight.channel_group,
            )
            outliers = weight.outlier_weight if weight.n_outliers else None
            sizes = (n_channels, weight.n_inputs, n_slots, weight.n_outliers)
            launch(
                kernel,
                (n_slots + n_outlier_slots, n_panels),
                (128,),
                (weight.qweight, weight.scales, outliers, records, *sizes),
                device=device,
            )
    else:
        records = _repack_in_torch(weight, n_panels, n_slots, n_outlier_slots)
    channel_scales = torch.zeros(3, n_panels * PANEL_ROWS, dtype=torch.float32, device=device)
    for row, values in enumerate((weight.scale_base, weight.outlier_scales, weight.bias)):
        if values is not None:
            channel_scales[row, :n_channels] = values
    return PackedWeight(records, channel_scales, n_channels, n_slots, weight.group_size, scale_bytes)


def pack_activations(
    codes: torch.Tensor,
    scales: torch.Tensor,
    outlier_codes: torch.Tensor | None,
    outlier_scales: torch.Tensor | None,
    group_size: int | None,
    n_bits: int = 4,
) -> PackedActivations:
    """Lay out quantized activations for the kernels.

    Args:
        codes: int8 [M, Kn], INT4 codes (progressive: times their factors).
        scales: float32 [M, G], one per group, or [M, 1] base scales where the weight is progressive.
        outlier_codes, outlier_scales: int8 [M, k] and float32 [M], or None.
        group_size: inputs per scale, 64 or 128; None for base scales.
        n_bits: of the codes, 4 or 8.
    """
    n_tokens, n_inputs = codes.shape
    padded = _ceil(n_tokens, 8) * 8
    n_slots = _ceil(n_inputs, SLOT_INPUTS)
    n_outliers = 0 if outlier_codes is None else outlier_codes.shape[1]
    n_outlier_slots = _ceil(n_outliers, SLOT_INPUTS)
    rows = torch.zeros(padded, n_slots + n_outlier_slots, SLOT_INPUTS, dtype=torch.int8, device=codes.device)
    rows.flatten(1)[:n_tokens, :n_inputs] = codes
    if outlier_codes is not None:
        first = n_slots * SLOT_INPUTS
        rows.flatten(1)[:n_tokens, first : first + n_outliers] = outlier_codes
    n_rows = 1 if group_size is None else n_slots * (SLOT_INPUTS // group_size)
    token_scales = torch.zeros(n_rows + 1, padded, dtype=torch.float32, device=codes.device)
    token_scales[: scales.shape[1], :n_tokens] = scales.T
    if outlier_scales is not None:
        token_scales[-1, :n_tokens] = outlier_scales
    return PackedActivations(_swizzle(rows.transpose(0, 1)).contiguous(), token_scales, n_tokens, n_bits)


def unpack_activations(activations: PackedActivations) -> torch.Tensor:
    """The codes in plain order: int8 [M, 128 * slots], INT4 inputs first, outliers in slots of their own."""
    rows = _swizzle(activations.codes).transpose(0, 1)
    return rows.reshape(rows.shape[0], -1)[: activations.n_tokens]


def unpack_weight(weight: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The record's content in plain order, padding included.

    Returns int8 INT4 codes [Np, 128 * n_slots], group scales (float32, or int32 factors) [Np, groups of all
    slots] and int8 outlier codes [Np, 64 * n_outlier_slots], Np = 64 * panels.
    """
    n_panels, n_all = weight.records.shape[:2]
    groups = SLOT_INPUTS // weight.group_size
    words = weight.records[..., :CODE_BYTES].reshape(n_panels, n_all, 2, 4, 8, 4, 2, 2, 4)
    # panel, slot, half, warp, lane / 4, lane % 4, (r >> 1), (r & 1), byte -> panel, warp, r & 1, lane / 4,
    # slot, ...
    in_order = words.permute(
        0, 3, 7, 4, 1, 2, 6, 5, 8
    )  # [..., slot, half, 16 inputs by r >> 1, lane % 4, byte]
    n_rows = n_panels * PANEL_ROWS
    packed = in_order[:, :, :, :, : weight.n_slots].reshape(n_rows, weight.n_slots, 2, 1, 32)
    nibbles = torch.cat((packed & 15, packed >> 4), dim=3).to(torch.int8)  # step 2h, step 2h + 1
    nibbles = nibbles - 8 if weight.is_progressive else (nibbles ^ 8) - 8
    outliers = in_order[:, :, :, :, weight.n_slots :].reshape(n_rows, -1).view(torch.int8)
    dtype = {1: torch.uint8, 2: torch.float16, 4: torch.float32}[weight.scale_bytes]
    scales = weight.records[:, : weight.n_slots, CODE_BYTES:].contiguous().view(dtype)
    scales = scales.reshape(n_panels, weight.n_slots, groups, 4, 8, 2).permute(0, 3, 5, 4, 1, 2)
    return (
        nibbles.reshape(n_rows, -1),
        scales.reshape(n_rows, -1).to(torch.int32 if weight.is_progressive else torch.float32),
        outliers,
    )


def _repack_in_torch(
    weight: CanonicalWeight, n_panels: int, n_slots: int, n_outlier_slots: int
) -> torch.Tensor:
    n_rows, n_channels = n_panels * PANEL_ROWS, weight.qweight.shape[0]
    groups = SLOT_INPUTS // weight.group_size
    size = record_bytes(weight.group_size, weight.scales.element_size())
    records = torch.zeros(n_panels, n_slots + n_outlier_slots, size, dtype=torch.uint8)
    offset = 8 if weight.is_progressive else 0

    both = torch.stack((weight.qweight & 15, weight.qweight >> 4), dim=2).flatten(1)[:, : weight.n_inputs]
    nibbles = torch.full((n_rows, n_slots * SLOT_INPUTS), offset, dtype=torch.uint8)
    nibbles[:n_channels, : weight.n_inputs] = both ^ offset
    steps = nibbles.reshape(n_rows, n_slots, 2, 2, 32)
    code_bytes = torch.zeros(n_rows, n_slots + n_outlier_slots, 2, 32, dtype=torch.uint8)
    code_bytes[:, :n_slots] = steps[:, :, :, 0] | steps[:, :, :, 1] << 4
    if weight.outlier_weight is not None:
        outliers = torch.zeros(n_rows, n_outlier_slots * OUTLIERS_PER_SLOT, dtype=torch.int8)
        outliers[:n_channels, : weight.n_outliers] = weight.outlier_weight
        code_bytes[:, n_slots:] = outliers.view(torch.uint8).reshape(n_rows, n_outlier_slots, 2, 32)
    # panel, warp, row & 8, lane / 4, slot, half, r >> 1, lane % 4, byte -> the order of unpack_weight's
    # `words`
    fragments = code_bytes.reshape(n_panels, 4, 2, 8, -1, 2, 2, 4, 4).permute(0, 4, 5, 1, 3, 7, 6, 2, 8)
    records[..., :CODE_BYTES] = fragments.reshape(n_panels, -1, CODE_BYTES)

    scales = torch.full(
        (n_rows, n_slots * groups), 1 if weight.is_progressive else 0, dtype=weight.scales.dtype
    )
    by_row = weight.scales.repeat_interleave(weight.channel_group, dim=0)[:n_channels]
    scales[:n_channels, : by_row.shape[1]] = by_row
    pairs = scales.reshape(n_panels, 4, 2, 8, n_slots, groups).permute(0, 4, 5, 1, 3, 2).contiguous()
    records[:, :n_slots, CODE_BYTES:] = pairs.view(torch.uint8).reshape(n_panels, n_slots, -1)
    if weight.is_progressive:
        records[:, n_slots:, CODE_BYTES:] = 1
    return records


def _swizzle(tiles: torch.Tensor) -> torch.Tensor:
    """Exchange 16-byte chunk c of row m with chunk c ^ (m % 8), in [slots, Mp, 128]; its own inverse."""
    n_slots, n_rows, _ = tiles.shape
    row = torch.arange(n_rows, device=tiles.device)[:, None] % 8
    chunk = torch.arange(8, device=tiles.device)[None, :] ^ row  # [Mp, 8]
    index = chunk[None, :, :, None].expand(n_slots, n_rows, 8, 16)
    return tiles.reshape(n_slots, n_rows, 8, 16).gather(2, index).reshape(n_slots, n_rows, 128)


def _check(weight: CanonicalWeight) -> None:
    if weight.group_size not in (64, 128):
        raise KernelError(f"repack: group_size {weight.group_size}; the GEMM kernels take 64 or 128")
    if weight.channel_group not in (1, 2):
        raise KernelError(f"repack: channel_group {weight.channel_group}; the GEMM kernels take 1 or 2")
    if weight.n_outliers > MAX_OUTLIERS:
        raise KernelError(
            f"repack: {weight.n_outliers} outliers; the GEMM kernels take {MAX_OUTLIERS} at most"
        )
    if weight.is_progressive and weight.channel_group != 1:
        raise KernelError("repack: progressive scales need channel_group 1")
    n_channels, device = weight.qweight.shape[0], weight.qweight.device
    n_groups = _ceil(weight.n_inputs, weight.group_size)
    floats = (torch.float16, torch.float32)
    vector = (n_channels,)
    check_operand(
        "repack",
        "qweight",
        weight.qweight,
        dtype=torch.uint8,
        shape=(n_channels, _ceil(weight.n_inputs, 2)),
        device=device,
    )
    check_operand(
        "repack",
        "scales",
        weight.scales,
        dtype=torch.uint8 if weight.is_progressive else floats,
        shape=(_ceil(n_channels, weight.channel_group), n_groups),
        device=device,
    )
    if weight.scale_base is not None:
        check_operand(
            "repack", "scale_base", weight.scale_base, dtype=torch.float32, shape=vector, device=device
        )
    if weight.outlier_weight is not None:
        shape = (n_channels, weight.n_outliers)
        check_operand(
            "repack", "outlier_weight", weight.outlier_weight, dtype=torch.int8, shape=shape, device=device
        )
        if weight.outlier_scales is None:
            raise KernelError("repack: outlier_weight without outlier_scales")
        check_operand(
            "repack", "outlier_scales", weight.outlier_scales, dtype=floats, shape=vector, device=device
        )
    if weight.bias is not None:
        any_float = (*floats, torch.bfloat16)
        check_operand("repack", "bias", weight.bias, dtype=any_float, shape=vector, device=device)


def _ceil(value: int, step: int) -> int:
    return -(-value // step)
