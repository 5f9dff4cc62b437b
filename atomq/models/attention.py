"""What atomq adds to the attention of transformers: capped scores, and RoPE of K taken apart."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from atomq.errors import UnsupportedModelError

ATTENTION_CAPPED = "atomq_capped_scores"

Turns = tuple[torch.Tensor, torch.Tensor]  # cosines and sines [batch, tokens, channels that turn]


def attention_for(config: Any) -> str:
    """The attention implementation that a model with `config` needs."""
    is_capped = config.model_type == "gemma2" and config.attn_logit_softcapping is not None
    return ATTENTION_CAPPED if is_capped else "sdpa"


def turn(attention: nn.Module, keys: torch.Tensor, turns: Turns | None) -> torch.Tensor:
    """RoPE as `attention` applies it, on heads [batch, tokens, n_heads, head_dim], in their dtype.

    Heads of an attention without RoPE (OPT's, and the layers without of SmolLM3) come back as they are.
    """
    rotate = _rope_of(attention)
    if rotate is None:
        return keys
    cosine, sine = _of_tokens(attention, keys, turns)
    turned: torch.Tensor = rotate(keys[:, :, :0], keys, cosine, sine, unsqueeze_dim=2)[1]  # no queries
    return turned


def inverse_turn(attention: nn.Module, keys: torch.Tensor, turns: Turns | None) -> torch.Tensor:
    """What `turn` made `keys` of, also where cosines and sines are rounded or scaled (YaRN)."""
    rotate = _rope_of(attention)
    if rotate is None:
        return keys
    cosine, sine = _of_tokens(attention, keys, turns)
    back: torch.Tensor = rotate(keys[:, :, :0], keys, cosine, -sine, unsqueeze_dim=2)[1]
    lengths = (cosine.square() + sine.square()).unsqueeze(2)
    n_turned = lengths.shape[-1]
    return torch.cat((back[..., :n_turned] / lengths, back[..., n_turned:]), dim=-1)


def _rope_of(attention: nn.Module) -> Any:
    """The function of the model's own module that applies RoPE, or None if this attention applies none."""
    if not getattr(attention, "use_rope", True):
        return None
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def _of_tokens(attention: nn.Module, keys: torch.Tensor, turns: Turns | None) -> Turns:
    if turns is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} was called without position_embeddings, by which K is coded after "
            "RoPE; quantize with --set kv.key_position=before_rope"
        )
    cosine, sine = turns
    return cosine.to(keys.dtype), sine.to(keys.dtype)


def _attend_capped(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    softcap: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention with scores s capped to softcap * tanh(s / softcap), as Gemma 2 has them."""
    n_shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(n_shared, 1), value.repeat_interleave(n_shared, 1)
    scores = softcap * torch.tanh(query @ key.mT * (kwargs["scaling"] / softcap))  # (batch, heads, T, S)
    if attention_mask is None:  # causal, and the queries are the last of the keys' tokens
        n_queries, n_keys = scores.shape[-2:]
        attention_mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device).tril(
            n_keys - n_queries
        )
    lowest = torch.finfo(scores.dtype).min  # not -inf: a padding token sees nothing, and NaN would spread
    weights = scores.masked_fill(~attention_mask, lowest).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_CAPPED, _attend_capped)
AttentionMaskInterface.register(ATTENTION_CAPPED, sdpa_mask)
