"""Putting quantized linears and the KV quantizer into a transformer block.

The pipeline and the loader use the same functions, so a model in memory and one read from disk are built
alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atomq.config import FLOAT_BITS, KVScheme, QuantScheme
from atomq.models.families import ModelFamily
from atomq.numerics.kv import fake_quantize_heads
from atomq.numerics.linear import InputOrder, QuantizedLinear

ATTENTION_AFTER_ROPE = "atomq_key_after_rope"


def install_linears(block: nn.Module, family: ModelFamily, scheme: QuantScheme) -> dict[str, QuantizedLinear]:
    """Replace the linears of `block` by `QuantizedLinear`s without weights; answer them by name.

    Biases move over; the caller fills in weights or codes, and `perm` on the first linear of each group if
    the scheme reorders.
    """
    if not scheme.quantizes_linears:
        return {}
    installed: dict[str, QuantizedLinear] = {}
    for group in family.groups:
        for name in group.linears:
            linear = block.get_submodule(name)
            assert isinstance(linear, nn.Linear), name
            order = None
            if scheme.outliers.reorder:
                owner = None if name == group.owner else installed[group.owner]
                order = InputOrder(owner, gathered=not group.absorbed_by)
            installed[name] = QuantizedLinear(
                linear.in_features, linear.out_features, scheme, linear.bias, order
            )
            block.set_submodule(name, installed[name])
    return installed


def install_kv_quantizer(block: nn.Module, family: ModelFamily, kv: KVScheme, head_dim: int) -> None:
    """Make `block` compute with K and V as the quantized cache gives them back.

    V, and K before RoPE, are quantized by hooks on the modules that make them. K after RoPE needs the model's
    attention to be ATTENTION_AFTER_ROPE (`attention_for`), which finds its scheme on the attention module.
    """
    if kv.n_bits == FLOAT_BITS:
        return

    def quantize_output(_module: nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        heads = output.reshape(*output.shape[:-1], output.shape[-1] // head_dim, head_dim)
        return fake_quantize_heads(heads, kv).reshape(output.shape)

    block.get_submodule(family.value).register_forward_hook(quantize_output)
    if kv.key_position == "before_rope":
        block.get_submodule(family.key).register_forward_hook(quantize_output)
    else:
        attention = block.get_submodule(family.key.rpartition(".")[0])
        attention.atomq_kv = kv  # type: ignore[assignment]


def attention_for(kv: KVScheme) -> str:
    """The attention implementation that `kv` needs."""
    after_rope = kv.n_bits < FLOAT_BITS and kv.key_position == "after_rope"
    return ATTENTION_AFTER_ROPE if after_rope else "sdpa"


def head_dim_of(config: Any) -> int:
    """Channels of one attention head."""
    explicit = getattr(config, "head_dim", None)
    return int(explicit or config.hidden_size // config.num_attention_heads)


def _attend_after_rope(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA on keys [batch, heads, tokens, head_dim] as the cache gives them back."""
    key = fake_quantize_heads(key, module.atomq_kv)  # type: ignore[arg-type]
    result: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
        module, query, key, value, *args, **kwargs
    )
    return result


AttentionInterface.register(ATTENTION_AFTER_ROPE, _attend_after_rope)
AttentionMaskInterface.register(ATTENTION_AFTER_ROPE, sdpa_mask)
