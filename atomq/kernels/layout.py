"""What `quantize_act` must know of a linear's input, made once per linear, and what the KV kernels store.

A linear's stored order has the INT4 channels first and the outliers last; both fill slots of 128, as drawn in
kernels_cuda/gemm_layout.cuh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from atomq.config import QuantScheme
from atomq.errors import KernelError
from atomq.kernels.repack import MAX_OUTLIERS, SLOT_INPUTS

MAX_GATHERED_CHANNELS = 65535  # an index has 16 bits, and one value stands for no channel


@dataclass(frozen=True)
class ActivationFormat:
    """Shape and arithmetic of a linear's quantized input: INT4 per token and group, INT8 outliers per token.

    Attributes:
        n_channels: channels in all; the last `n_outliers` of the stored order are the outliers.
        hadamard: groups are transformed before coding (`numerics.hadamard`), outliers are not.
        progressive: group scales are base x integer factor 1..16, and operands are code x factor.
    """

    n_channels: int
    n_outliers: int = 0
    group_size: int = 128
    clip_ratio: float = 1.0
    hadamard: bool = False
    progressive: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.n_outliers <= MAX_OUTLIERS or self.n_outliers >= self.n_channels:
            raise KernelError(
                f"{self.n_outliers} outliers of {self.n_channels} channels; "
                f"the kernels take 0 to {MAX_OUTLIERS} outliers, and at least one other channel"
            )
        if self.group_size not in (64, 128):
            raise KernelError(f"group_size {self.group_size}; the kernels take 64 and 128")
        if not 0.01 <= self.clip_ratio <= 1:
            raise KernelError(f"clip_ratio {self.clip_ratio}; the kernels take 0.01 to 1")

    @classmethod
    def of(cls, scheme: QuantScheme, n_channels: int) -> ActivationFormat:
        """The input of a linear of `scheme`, which lies inside the kernels' envelope."""
        return cls(
            n_channels,
            scheme.outliers.n_outliers,
            scheme.weights.group_size or 0,  # never None inside the envelope
            scheme.activations.clip_ratio,
            scheme.transform == "hadamard",
            scheme.activations.scale_mode == "progressive",
        )

    @property
    def n_normal(self) -> int:
        """INT4 channels."""
        return self.n_channels - self.n_outliers

    @property
    def n_slots(self) -> int:
        """Slots of INT4 channels."""
        return math.ceil(self.n_normal / SLOT_INPUTS)

    @property
    def n_outlier_slots(self) -> int:
        """Slots of outliers."""
        return math.ceil(self.n_outliers / SLOT_INPUTS)

    @property
    def n_scale_rows(self) -> int:
        """Rows of token scales, the outliers' included."""
        return (1 if self.progressive else self.n_slots * SLOT_INPUTS // self.group_size) + 1

    def fill_slots(self, rows: torch.Tensor, filler: float = 0) -> torch.Tensor:
        """[..., n_channels] in the stored order to [..., all slots, 128], `filler` in the gaps."""
        n_slots, first_outlier = self.n_slots + self.n_outlier_slots, self.n_slots * SLOT_INPUTS
        slots = rows.new_full((*rows.shape[:-1], n_slots * SLOT_INPUTS), filler)
        slots[..., : self.n_normal] = rows[..., : self.n_normal]
        slots[..., first_outlier : first_outlier + self.n_outliers] = rows[..., self.n_normal :]
        return slots.reshape(*rows.shape[:-1], n_slots, SLOT_INPUTS)


class ChannelOrder(NamedTuple):
    """Where the channels of the stored order come from.

    Attributes:
        perm: int64 [n_channels], new position -> old channel.
        slots: `perm` for the kernel: int16 [all slots, 128] with the bits of uint16, n_channels in the gaps.
    """

    perm: torch.Tensor
    slots: torch.Tensor

    @classmethod
    def of(cls, perm: torch.Tensor, activations: ActivationFormat) -> ChannelOrder:
        """From an integer permutation [n_channels], on its device.

        Raises:
            KernelError: it is no permutation of the format's channels, or there are more than 65535.
        """
        n_channels, perm = activations.n_channels, perm.long()
        if n_channels > MAX_GATHERED_CHANNELS:
            raise KernelError(f"{n_channels} channels; the kernels gather {MAX_GATHERED_CHANNELS} at most")
        if not torch.equal(perm.sort().values, torch.arange(n_channels, device=perm.device)):
            raise KernelError(f"perm of {tuple(perm.shape)} is no permutation of {n_channels} channels")
        slots = activations.fill_slots(perm, n_channels)
        return cls(perm, torch.where(slots < 2**15, slots, slots - 2**16).to(torch.int16).contiguous())


class NormParameters(NamedTuple):
    """A norm's parameters, [n_channels] in the old order and, for the kernel, in slots of the stored one."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    epsilon: float
    stored_weight: torch.Tensor
    stored_bias: torch.Tensor | None

    @classmethod
    def of(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        epsilon: float,
        activations: ActivationFormat,
        order: ChannelOrder | None = None,
    ) -> NormParameters:
        """From a norm's `weight`, `bias` (LayerNorm) and epsilon; `order` as every call will give it."""

        def store(parameter: torch.Tensor) -> torch.Tensor:
            values = parameter.detach().float()
            return activations.fill_slots(values if order is None else values[order.perm]).contiguous()

        return cls(weight, bias, epsilon, store(weight), None if bias is None else store(bias))


class Added(NamedTuple):
    """What a norm's kernel adds to its input x [T, K] first, so that no kernel is launched for a residual.

    Attributes:
        delta: [T, K] contiguous, in x's dtype.
        total: like `delta`; takes x + delta, rounded to its dtype, which is what is normed. Not x itself.
    """

    delta: torch.Tensor
    total: torch.Tensor

    @classmethod
    def to(cls, delta: torch.Tensor) -> Added:
        """With memory of its own for the sum."""
        return cls(delta, torch.empty_like(delta))


class PackedHeads(NamedTuple):
    """Quantized heads of a model's cache.

    Attributes:
        codes: uint8 [T, H, ceil(head_dim / 2)], the even channel in the low nibble.
        ranges: float16 [T, H, 2]: scale and minimum; value = code * scale + minimum.
        head_dim: channels of a head.
    """

    codes: torch.Tensor
    ranges: torch.Tensor
    head_dim: int
