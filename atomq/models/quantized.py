"""Putting quantized linears and the KV quantizer into a transformer block.

The pipeline and the loader use the same functions, so a model in memory and one read from disk are built
alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from atomq.config import FLOAT_BITS, KVScheme, QuantScheme
from atomq.errors import UnsupportedModelError
from atomq.models.attention import has_rope, inverse_turn, turn
from atomq.models.blocks import block_groups
from atomq.models.families import ModelFamily
from atomq.numerics.activations import compute_dtype
from atomq.numerics.kv import OFFSET_TOKENS, fake_quantize_heads, offset_row
from atomq.numerics.linear import GroupInput, QuantizedLinear, SharedInput, TensorSpec
from atomq.numerics.scales import straight_through


def install_linears(block: nn.Module, family: ModelFamily, scheme: QuantScheme) -> dict[str, QuantizedLinear]:
    """Replace the linears of `block` by `QuantizedLinear`s without weights; answer them by name.

    Biases move over; the caller fills in weights or codes, and on the first linear of each group `perm` if
    the scheme reorders and `clip_ratio` if groups have their own.
    """
    if not scheme.quantizes_linears:
        return {}
    installed: dict[str, QuantizedLinear] = {}
    for group in block_groups(block, family):
        of_group = scheme if group.transformed else dataclasses.replace(scheme, transform="none")
        shared = SharedInput(len(group.linears)) if len(group.linears) > 1 else None
        for name in group.linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), name
            shares = None
            if scheme.outliers.reorder or scheme.activations.has_own_clips:
                owner = None if name == group.owner else installed[group.owner]
                shares = GroupInput(owner, gathered=scheme.outliers.reorder and not group.absorbed_by)
            installed[name] = QuantizedLinear(
                linear.in_features, linear.out_features, of_group, linear.bias, shares
            )
            installed[name].shared = shared
            block.set_submodule(name, installed[name])
    return installed


def install_stored(
    block: nn.Module,
    family: ModelFamily,
    scheme: QuantScheme,
    head_dim: int,
    stored: Mapping[str, TensorSpec],
) -> dict[str, QuantizedLinear]:
    """Make `block` what a checkpoint holds, without values: quantized linears with empty buffers on the meta
    device, and the KV quantizer. Answer the linears by name.

    Args:
        stored: what the checkpoint has for the block, by names relative to it.
    """
    linears = install_linears(block, family, scheme)
    for name, linear in linears.items():
        suffixes = (*linear.code_names, "perm", "clip_ratio", "weight")
        linear.allocate({s: stored[f"{name}.{s}"] for s in suffixes if f"{name}.{s}" in stored})
    install_kv_quantizer(block, family, scheme.kv, head_dim)
    return linears


def restore_block(
    block: nn.Module,
    family: ModelFamily,
    scheme: QuantScheme,
    head_dim: int,
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Make `block` compute what it did when `tensors` (names relative to it) were stored.

    What is stored in floating point beside codes and scales is widened to float32, as it was computed with.
    """
    stored = {name: TensorSpec((t.dtype,), tuple(t.shape)) for name, t in tensors.items()}
    install_stored(block, family, scheme, head_dim, stored)
    parameters = {name for name, _ in block.named_parameters()}
    values = {name: t.float() if name in parameters else t for name, t in tensors.items()}
    block.load_state_dict(values, assign=True)
    block.requires_grad_(False)


MAX_OFFSET_ROWS = 128  # 131,072 positions

# Gives heads [..., n_heads, head_dim] back as the cache would, with an offset [n_heads, head_dim] or without.
QuantizeHeads = Callable[[torch.Tensor, KVScheme, torch.Tensor | None], torch.Tensor]


class KVQuantizer:
    """Forward hooks that give K or V back as the quantized cache would.

    K is given back before RoPE, where the model goes on with it: coded after RoPE, it is turned, coded and
    turned back, which is the same to the rounding of the turns.

    Attributes:
        quantize: what computes heads; torch's unless kernels take its place.
    """

    def __init__(
        self, scheme: KVScheme, head_dim: int, attention: nn.Module, keys_by_head: bool = False
    ) -> None:
        """`attention` has the buffers `key_buffers` names; `keys_by_head` as the family has it."""
        self.scheme, self.head_dim, self.attention = scheme, head_dim, attention
        self.keys_by_head = keys_by_head
        self.quantize: QuantizeHeads = fake_quantize_heads
        self._turns: tuple[torch.Tensor, torch.Tensor] | None = None
        self._positions: torch.Tensor | None = None

    def on_attention(self, _module: nn.Module, _inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        """Places [batch, tokens] of the tokens that are read now, and their cosines and sines."""
        self._turns, self._positions = arguments.get("position_embeddings"), arguments.get("position_ids")

    def on_key(self, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """K of the module that makes it, or of the k norm."""
        if self.keys_by_head:
            return self.quantize_keys(output.transpose(1, 2)).transpose(1, 2)
        heads = output.reshape(*output.shape[:-1], -1, self.head_dim) if output.ndim < 4 else output
        return self.quantize_keys(heads).reshape(output.shape)

    def quantize_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """K [batch, tokens, n_heads, head_dim] before RoPE as the cache gives it back."""
        offset, scale = self.key_offset(), self.key_scale()
        if self.scheme.key_position == "before_rope":
            return self.quantize(keys, self.scheme, offset)
        x = turn(self.attention, keys.to(compute_dtype(keys.dtype)), self._turns)
        if offset is None or scale is None:
            x = self.quantize(x, self.scheme, None)
        else:
            offset, scale = offset.to(x.dtype)[self._rows(len(offset))], scale.to(x.dtype)
            x = self.quantize((x - offset) / scale, self.scheme, None) * scale + offset
        return inverse_turn(self.attention, x, self._turns).to(keys.dtype)

    def _rows(self, n_rows: int) -> torch.Tensor:
        """Which of the rows of K's offset each token [batch, tokens] takes."""
        if not has_rope(self.attention):
            return torch.zeros((1, 1), dtype=torch.long)
        if self._positions is None:
            raise UnsupportedModelError(
                f"{type(self.attention).__name__} was called without position_ids, by which K after RoPE is "
                "balanced; quantize with --set kv.key_balance=false"
            )
        return offset_row(self._positions, n_rows)

    def on_value(self, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """V of the module that makes it."""
        heads = output.reshape(*output.shape[:-1], -1, self.head_dim)
        return self.quantize(heads, self.scheme, None).reshape(output.shape)

    def on_fused(self, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """K and V of the module that makes Q, K and V."""
        n_queries, n_keys = head_counts(self.attention)
        heads = output.reshape(*output.shape[:-1], -1, self.head_dim)
        n_before_values = n_queries + n_keys
        queries, keys = heads[..., :n_queries, :], heads[..., n_queries:n_before_values, :]
        keys = self.quantize_keys(keys)
        values = self.quantize(heads[..., n_before_values:, :], self.scheme, None)
        return torch.cat((queries, keys, values), dim=-2).reshape(output.shape)

    def key_offset(self) -> torch.Tensor | None:
        """[n_heads, head_dim] of K before RoPE, [n_rows, n_heads, head_dim] after it; None without."""
        stored = self.attention._buffers.get("key_offset")
        return None if stored is None else stored.reshape(*stored.shape[:-1], -1, self.head_dim)

    def key_scale(self) -> torch.Tensor | None:
        """[n_heads, head_dim], or None."""
        stored = self.attention._buffers.get("key_scale")
        return None if stored is None else stored.view(-1, self.head_dim)


def straight_through_heads(
    x: torch.Tensor, scheme: KVScheme, offset: torch.Tensor | None = None
) -> torch.Tensor:
    """`fake_quantize_heads` with the gradient of the identity."""
    with torch.no_grad():
        quantized = fake_quantize_heads(x, scheme, offset)
    return straight_through(x, quantized)


def install_kv_quantizer(block: nn.Module, family: ModelFamily, kv: KVScheme, head_dim: int) -> None:
    """Make `block` compute with K and V as the quantized cache gives them back.

    Both are quantized by hooks on the modules that make them. The block's attention keeps the quantizer as
    `atomq_kv`, and gets the buffers that `key_buffers` names, an offset of zeros and a scale of ones.
    """
    if kv.n_bits == FLOAT_BITS:
        return
    attention: Any = block.get_submodule(attention_name(family))
    device = next(block.parameters()).device
    for name, shape in key_buffers(attention, kv, head_dim).items():
        neutral = torch.zeros if name == "key_offset" else torch.ones
        attention.register_buffer(name, neutral(shape, device=device))
    quantizer = KVQuantizer(kv, head_dim, attention, family.has_keys_by_head)
    if family.key == family.value:
        block.get_submodule(family.value).register_forward_hook(quantizer.on_fused)
    else:
        block.get_submodule(family.value).register_forward_hook(quantizer.on_value)
        block.get_submodule(family.key).register_forward_hook(quantizer.on_key)
    if kv.key_position == "after_rope":
        attention.register_forward_pre_hook(quantizer.on_attention, with_kwargs=True)
    attention.atomq_kv = quantizer


def key_buffers(attention: Any, kv: KVScheme, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the float32 buffers that an attention has by `kv` for its K."""
    width = head_counts(attention)[1] * head_dim
    if kv.has_key_scale:
        return {"key_offset": (offset_rows(attention.config), width), "key_scale": (width,)}
    return {"key_offset": (width,)} if kv.has_key_offset else {}


def offset_rows(config: Any) -> int:
    """Rows of the offset of K after RoPE: one for OFFSET_TOKENS positions each, from 1 to MAX_OFFSET_ROWS."""
    return max(1, min(MAX_OFFSET_ROWS, -(-n_positions(config) // OFFSET_TOKENS)))


def n_positions(config: Any) -> int:
    """Positions that a model is meant for.

    Where YaRN was switched on by `rope_parameters` alone, as Qwen's pages say, max_position_embeddings still
    is what it was before.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    stretch: list[Any] = [rope.get(name) for name in ("factor", "original_max_position_embeddings")]
    is_told = all(isinstance(x, int | float) and math.isfinite(x) for x in stretch)
    return max(int(config.max_position_embeddings), int(math.prod(stretch)) if is_told else 0)


def attention_name(family: ModelFamily) -> str:
    """The attention module of a block, relative to it."""
    return family.key.rpartition(".")[0]


def head_counts(attention: Any) -> tuple[int, int]:
    """Heads of Q, and of K and V, of a block's attention."""
    config = attention.config
    n_queries = int(config.num_attention_heads)
    return n_queries, int(getattr(config, "num_key_value_heads", None) or n_queries)


def head_dim_of(config: Any) -> int:
    """Channels of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
