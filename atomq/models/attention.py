"""The attention implementations that atomq adds to transformers, and which one a model needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from atomq.config import FLOAT_BITS, KVScheme

ATTENTION_AFTER_ROPE = "atomq_key_after_rope"
ATTENTION_CAPPED = "atomq_capped_scores"


def attention_for(kv: KVScheme, config: Any) -> str:
    """The attention implementation that `kv` and a model with `config` need."""
    if kv.n_bits < FLOAT_BITS and kv.key_position == "after_rope":
        return ATTENTION_AFTER_ROPE
    return "sdpa" if getattr(config, "attn_logit_softcapping", None) is None else ATTENTION_CAPPED


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """SDPA, or what it cannot do: scores s capped to softcap * tanh(s / softcap), as Gemma 2 has them."""
    if softcap is None:
        plain: tuple[torch.Tensor, torch.Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, *args, **kwargs
        )
        return plain
    n_shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n_shared, 1), value.repeat_interleave(n_shared, 1)
    scores = softcap * torch.tanh(query @ key.mT * (kwargs["scaling"] / softcap))  # (batch, heads, T, S)
    if attention_mask is None:  # causal, and the queries are the last of the keys' tokens
        n_queries, n_keys = scores.shape[-2:]
        attention_mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device).tril(
            n_keys - n_queries
        )
    weights = scores.masked_fill(~attention_mask, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _attend_after_rope(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention on keys [batch, heads, tokens, head_dim] as the cache gives them back; a float copy of a
    block has no quantizer.
    """
    quantizer: Any = getattr(module, "atomq_kv", None)
    if quantizer is not None:
        key = quantizer.quantize(key, quantizer.scheme, None)
    return _attend(module, query, key, *args, **kwargs)


AttentionInterface.register(ATTENTION_AFTER_ROPE, _attend_after_rope)
AttentionMaskInterface.register(ATTENTION_AFTER_ROPE, sdpa_mask)
AttentionInterface.register(ATTENTION_CAPPED, _attend)
AttentionMaskInterface.register(ATTENTION_CAPPED, sdpa_mask)
