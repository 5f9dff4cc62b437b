"""How `quantize_act.cu` and `quantize_gathered.cu` are launched: CTAs, parts of a row, warps, lanes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from atomq.errors import KernelError
from atomq.kernels.layout import ActivationFormat
from atomq.kernels.loader import DeviceLimits

MANY_LANES, FEW_LANES = 16, 4  # of a slot, where tokens are few and where they are many
_FEW_TOKENS = 2  # for each SM
_MAX_WARPS = {FEW_LANES: 8, MANY_LANES: 16}  # of a CTA; the kernel's own limits
_FEW_WARPS = {FEW_LANES: 4, MANY_LANES: 8}  # of a CTA that copies a row; its part has as many handfuls
_WARPS_OF_SM = {FEW_LANES: 24, MANY_LANES: 32}  # by registers
_WIDE_WARPS_OF_SM = 16  # with few lanes, where what is loaded ahead is wider
_MAX_CLUSTER = 4
_CTAS_PER_PLACE = 4  # that walk over tokens, for each that runs at a time: measured best from 2 to 4
_STATIC_SHARED_BYTES = 256  # no less than the kernel's own arrays take
_SIZES = np.dtype([(f"size{i}", "<i4") for i in range(8)])


@dataclass(frozen=True)
class LaunchShape:
    """A launch of `n_ctas` x `n_parts` CTAs of `n_warps`, each on one token or more, a part of their row."""

    n_ctas: int
    n_parts: int
    n_warps: int
    lanes: int
    shared_bytes: int = 0


def choose_lanes(n_tokens: int, limits: DeviceLimits) -> int:
    """Lanes of a slot: many are the shorter way, few are less work."""
    return MANY_LANES if n_tokens <= _FEW_TOKENS * limits.n_sms else FEW_LANES


def choose_shape(
    activations: ActivationFormat,
    n_tokens: int,
    limits: DeviceLimits,
    lanes: int,
    *,
    staged_bytes: int,
    is_wide: bool,
    has_clusters: bool,
) -> LaunchShape:
    """How to cut the work.

    As channels lie, CTAs walk over tokens, each on a part of the row that its warps make at once. Where a row
    goes through shared memory (gather, norm) a CTA makes one token, or a part of it, for which it has to read
    all of the row, so rows are cut only if the tokens are too few to fill the GPU. With progressive scales,
    whose base needs the row, the parts are a cluster, which Hopper has, and each makes its own at once.

    `staged_bytes`: of an element of the row in shared memory, 0 if it does not go there.

    Raises:
        KernelError: the row does not fit into shared memory.
    """
    n_padded, n_handfuls, most = pad(n_tokens), count_handfuls(activations, lanes), _MAX_WARPS[lanes]
    n_parts = max(1, min(math.ceil(n_handfuls / _FEW_WARPS[lanes]), limits.n_sms // n_padded))
    n_parts_at_once = max(n_parts, math.ceil(n_handfuls / most))  # so that each warp makes one handful
    if not (staged_bytes or activations.progressive):
        n_warps = math.ceil(n_handfuls / n_parts_at_once)
        n_parts = math.ceil(n_handfuls / n_warps)
        warps_of_sm = _WIDE_WARPS_OF_SM if is_wide and lanes == FEW_LANES else _WARPS_OF_SM[lanes]
        n_places = limits.n_sms * (warps_of_sm // n_warps)
        n_ctas = max(1, _CTAS_PER_PLACE * n_places // n_parts)
        return LaunchShape(min(n_padded, n_ctas), n_parts, n_warps, lanes)
    shared_bytes = staged_bytes * 8 * math.ceil(activations.n_channels / 8 + 1)
    room = limits.shared_bytes_of_cta - _STATIC_SHARED_BYTES
    if staged_bytes and shared_bytes > room:
        raise KernelError(
            f"quantize_act: {activations.n_channels} channels take {shared_bytes} bytes of shared memory, of "
            f"{room} here; fold the order into what produces x"
        )
    if activations.progressive:
        n_parts = 2 ** math.ceil(math.log2(n_parts_at_once))  # few kernels to compile
        n_parts = min(n_parts, _MAX_CLUSTER if has_clusters else 1)
    n_walks = math.ceil(n_handfuls / n_parts / most)
    n_warps = max(_FEW_WARPS[lanes], math.ceil(n_handfuls / n_parts / n_walks))
    return LaunchShape(n_padded, n_parts, n_warps, lanes, shared_bytes)


def pad(n_tokens: int) -> int:
    """Tokens with those that fill the last eight."""
    return math.ceil(n_tokens / 8) * 8


def sizes(n_tokens: int, activations: ActivationFormat, lanes: int) -> np.ndarray:
    """The kernels' struct Sizes."""
    return np.array(
        (
            n_tokens,
            pad(n_tokens),
            activations.n_channels,
            activations.n_normal,
            activations.n_slots,
            activations.n_outlier_slots,
            first_outlier(activations),
            count_handfuls(activations, lanes),
        ),
        dtype=_SIZES,
    )


def first_outlier(activations: ActivationFormat) -> int:
    """The warps' place of the first outlier slot; two of them begin at an even one, to lie in one warp."""
    if activations.n_outlier_slots == 2:
        return math.ceil(activations.n_slots / 2) * 2
    return activations.n_slots


def count_handfuls(activations: ActivationFormat, lanes: int) -> int:
    """Of a row: the slots that a warp makes at a time."""
    return math.ceil((first_outlier(activations) + activations.n_outlier_slots) * lanes / 32)
