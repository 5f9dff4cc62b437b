"""The paged KV cache of the decode path: what is stored, in which bits of a page; and what belongs to heads.

The layout is drawn in `kernels_cuda/kv_pages.cuh`; `PageFormat.key_places` and `value_places` say the same in
torch, for the twins.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from atomq.config import FLOAT_BITS, KeyPosition, KVScheme, Rotation
from atomq.errors import KernelError

PAGE_TOKENS = 64
PAGE_BITS = (4, 8, FLOAT_BITS)
MAX_GROUP = 16
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)


@dataclass(frozen=True)
class PageFormat:
    """How a page holds K and V of its heads.

    Attributes:
        n_heads: K and V heads.
        n_bits: 4 or 8, asymmetric per token and head as in `numerics.kv`; 16 for float16.
        key_position: where K is coded; float16 pages hold K after RoPE.
        key_rotation, value_rotation: "hadamard": coded after `transform_blocks`.
    """

    n_heads: int
    head_dim: int
    n_bits: int = 4
    key_position: KeyPosition = "before_rope"
    key_rotation: Rotation = "none"
    value_rotation: Rotation = "none"
    clip_ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.n_bits not in PAGE_BITS:
            raise KernelError(f"KV pages of {self.n_bits} bits; the kernels take {PAGE_BITS}")
        if self.head_dim not in HEAD_DIMS:
            raise KernelError(f"head_dim {self.head_dim}; the decode kernel takes {HEAD_DIMS}")
        if self.n_bits == FLOAT_BITS and (self.rotates_keys or self.key_position == "before_rope"):
            raise KernelError("KV pages of 16 bits hold K after RoPE, not rotated")
        power_of_two = self.head_dim & (self.head_dim - 1) == 0 and self.head_dim >= 64
        if self.key_mode == 2 and (self.n_bits != 4 or not power_of_two):
            raise KernelError(
                f"K before RoPE under the Hadamard with {self.n_bits} bits and head_dim {self.head_dim}; the "
                f"decode kernel takes 4 bits and 64, 128 or 256; set kv.key_position=after_rope and "
                "kv.key_offset=false"
            )

    @classmethod
    def of(cls, scheme: KVScheme, n_heads: int, head_dim: int) -> PageFormat:
        """The pages of a checkpoint's KV scheme."""
        if scheme.n_bits == FLOAT_BITS:
            return cls(n_heads, head_dim, FLOAT_BITS, "after_rope")
        rotation = scheme.rotation
        return cls(
            n_heads, head_dim, scheme.n_bits, scheme.key_position, rotation, rotation, scheme.clip_ratio
        )

    @property
    def rotates_keys(self) -> bool:
        return self.key_rotation == "hadamard"

    @property
    def rotates_values(self) -> bool:
        return self.value_rotation == "hadamard"

    @property
    def key_mode(self) -> int:
        """The kernel's KEY_MODE."""
        if self.key_position == "after_rope":
            return 0
        return 2 if self.rotates_keys else 1

    @property
    def max_group(self) -> int:
        """Most query heads for a head of K and V."""
        return MAX_GROUP if self.stored_dim <= 192 else MAX_GROUP // 2

    @property
    def stored_dim(self) -> int:
        """Channels of a head with what fills it up."""
        return math.ceil(self.head_dim / 32) * 32

    @property
    def side_bytes(self) -> int:
        """Bytes of K, or of V, of one head in a page, without ranges."""
        return PAGE_TOKENS * self.stored_dim * self.n_bits // 8

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V of all heads, with ranges."""
        return self.n_heads * self.page_bytes // PAGE_TOKENS

    @property
    def page_bytes(self) -> int:
        """Bytes of one head in a page."""
        return 2 * self.side_bytes + (PAGE_TOKENS * 8 if self.n_bits < FLOAT_BITS else 0)

    def key_places(self) -> torch.Tensor:
        """int64 [PAGE_TOKENS, head_dim]: the place of each code of K among the page's codes of `n_bits`."""
        return _key_places(self.head_dim, self.n_bits)

    def value_places(self) -> torch.Tensor:
        """As `key_places`, of V."""
        return _value_places(self.head_dim, self.n_bits)


class HeadParameters(NamedTuple):
    """What of a model belongs to its attention heads; float32 tensors on the model's device.

    Attributes:
        rotary: [positions, head_dim / 2, 2]: cosine and sine of each angle of RoPE.
        softmax_scale: factor of the scores.
        query_norm, key_norm: weights [head_dim] of the RMS norms of a head before RoPE, or None.
        epsilon: of the norms.
        key_offset: taken off K where it is coded, or None: before RoPE [n_heads, head_dim], after it
            [n_rows, n_heads, head_dim], a row for `numerics.kv.OFFSET_TOKENS` positions, the last one for all
            that follow.
        key_scale: [n_heads, head_dim], what K after RoPE less its offset is divided by; or None.
        page_turns: `rotary`'s first page as the decode kernel reads it, for K before RoPE: as it is, and as
            it turns what the Hadamard makes of K's halves (see `rebuild` of kv_keys.cuh).
    """

    rotary: torch.Tensor
    softmax_scale: float
    query_norm: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None
    epsilon: float = 0.0
    key_offset: torch.Tensor | None = None
    key_scale: torch.Tensor | None = None
    page_turns: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        rotary: torch.Tensor,
        softmax_scale: float,
        query_norm: torch.Tensor | None = None,
        key_norm: torch.Tensor | None = None,
        epsilon: float = 0.0,
        key_offset: torch.Tensor | None = None,
        key_scale: torch.Tensor | None = None,
    ) -> HeadParameters:
        """With the turns of a page made of `rotary`, which has at least a page of positions."""
        n_angles = rotary.shape[1]
        stored = math.ceil(n_angles / 16) * 16
        cosine, sine = torch.nn.functional.pad(rotary[:PAGE_TOKENS], (0, 0, 0, stored - n_angles)).unbind(-1)
        turns = torch.stack((cosine, sine, cosine - sine, cosine + sine), dim=-1)
        by_lane = turns.reshape(
            PAGE_TOKENS, 4, -1, 2, 2, 2, 2
        )  # place, t, two slots, slot, channel, kind, part
        page_turns = by_lane.permute(5, 2, 0, 1, 3, 6, 4).half().contiguous()
        return cls(rotary, softmax_scale, query_norm, key_norm, epsilon, key_offset, key_scale, page_turns)

    @property
    def n_offset_rows(self) -> int:
        """Rows of `key_offset`; 1 without rows."""
        return 1 if self.key_offset is None or self.key_offset.ndim < 3 else self.key_offset.shape[0]


@functools.cache
def _key_places(head_dim: int, n_bits: int) -> torch.Tensor:
    slots = math.ceil(head_dim / 32) * 4
    token = torch.arange(PAGE_TOKENS)[:, None]
    channel = torch.arange(head_dim)
    half, i = channel // (head_dim // 2), channel % (head_dim // 2)
    lane, slot, j = i // slots, i % slots // 2 + half * (slots // 2), i % 2
    return _places(token * 4 + lane, slot, j, slots, n_bits)


@functools.cache
def _value_places(head_dim: int, n_bits: int) -> torch.Tensor:
    slots = math.ceil(head_dim / 32) * 4
    token = torch.arange(PAGE_TOKENS)[:, None]
    channel = torch.arange(head_dim)
    chunk = token // 8 * 32 + channel // slots * 4 + token % 8 // 2
    return _places(chunk, channel % slots, token % 2, slots, n_bits)


def _places(
    chunk: torch.Tensor, slot: torch.Tensor, j: torch.Tensor, slots: int, n_bits: int
) -> torch.Tensor:
    """Codes before the one of `slot`, the first (j = 0) or second of its two, in chunk `chunk` of a side."""
    per_word = 16 // n_bits
    words = slots // per_word
    plane_words = 4 if words % 4 == 0 else 3 if words % 3 == 0 else 2
    word = slot // per_word
    at = word // plane_words * (PAGE_TOKENS * 4 * plane_words) + chunk * plane_words + word % plane_words
    return at * 2 * per_word + slot % per_word + j * per_word
