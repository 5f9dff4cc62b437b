"""Putting quantized linears and the KV quantizer into a transformer block.

The pipeline and the loader use the same functions, so a model in memory and one read from disk are built
alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from atomq.config import FLOAT_BITS, KVScheme, QuantScheme
from atomq.models.blocks import block_groups
from atomq.models.families import ModelFamily
from atomq.numerics.kv import fake_quantize_heads
from atomq.numerics.linear import InputOrder, QuantizedLinear, TensorSpec


def install_linears(block: nn.Module, family: ModelFamily, scheme: QuantScheme) -> dict[str, QuantizedLinear]:
    """Replace the linears of `block` by `QuantizedLinear`s without weights; answer them by name.

    Biases move over; the caller fills in weights or codes, and `perm` on the first linear of each group if
    the scheme reorders.
    """
    if not scheme.quantizes_linears:
        return {}
    installed: dict[str, QuantizedLinear] = {}
    for group in block_groups(block, family):
        of_group = scheme if group.transformed else dataclasses.replace(scheme, transform="none")
        for name in group.linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), name
            order = None
            if scheme.outliers.reorder:
                owner = None if name == group.owner else installed[group.owner]
                order = InputOrder(owner, gathered=not group.absorbed_by)
            installed[name] = QuantizedLinear(
                linear.in_features, linear.out_features, of_group, linear.bias, order
            )
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
        suffixes = (*linear.code_names, "perm", "weight")
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


class KVQuantizer:
    """A forward hook that gives K or V back as the quantized cache would.

    Attributes:
        first_head: the heads before it are none of the cache's, and stay.
        quantize: what computes heads [..., head_dim]; torch's unless kernels take its place.
    """

    def __init__(self, scheme: KVScheme, head_dim: int, first_head: int = 0) -> None:
        self.scheme, self.head_dim, self.first_head = scheme, head_dim, first_head
        self.quantize: Callable[[torch.Tensor, KVScheme], torch.Tensor] = fake_quantize_heads

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        heads = output.reshape(*output.shape[:-1], output.shape[-1] // self.head_dim, self.head_dim)
        if self.first_head:
            cached = self.quantize(heads[..., self.first_head :, :], self.scheme)
            return torch.cat((heads[..., : self.first_head, :], cached), dim=-2).reshape(output.shape)
        return self.quantize(heads, self.scheme).reshape(output.shape)


def install_kv_quantizer(block: nn.Module, family: ModelFamily, kv: KVScheme, head_dim: int) -> None:
    """Make `block` compute with K and V as the quantized cache gives them back.

    V, and K before RoPE, are quantized by hooks on the modules that make them. K after RoPE needs the model's
    attention to be the one that `models.attention` names. The block's attention keeps the quantizer as
    `atomq_kv`.
    """
    if kv.n_bits == FLOAT_BITS:
        return
    attention: Any = block.get_submodule(family.key.rpartition(".")[0])
    first_head = 0
    if family.key == family.value:
        config = attention.config
        first_head = config.num_attention_heads  # of Q; then those of K, then those of V
        first_head += config.num_key_value_heads if kv.key_position == "after_rope" else 0
    quantizer = KVQuantizer(kv, head_dim, first_head)
    block.get_submodule(family.value).register_forward_hook(quantizer)
    if kv.key_position == "before_rope" and family.key != family.value:
        block.get_submodule(family.key).register_forward_hook(quantizer)
    attention.atomq_kv = quantizer


def head_dim_of(config: Any) -> int:
    """Channels of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)
