"""What atomq adds to the attention of transformers: capped scores, an observer, and RoPE of K taken apart."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from atomq.errors import UnsupportedModelError

ATTENTION_CAPPED = "atomq_capped_scores"
ATTENTION_OBSERVED = "atomq_observed"

Turns = tuple[torch.Tensor, torch.Tensor]  # cosines and sines [batch, tokens, channels that turn]


def attention_for(config: Any) -> str:
    """The attention implementation that a model with `config` needs."""
    is_capped = config.model_type == "gemma2" and config.attn_logit_softcapping is not None
    return ATTENTION_CAPPED if is_capped else "sdpa"


class Attended(NamedTuple):
    """What an attention is about to compute with: queries and K [batch, heads, T, head_dim] after RoPE.

    `mask` as `weigh_scores` of method.key_balance has it, with the batch before it; `softcap` None without.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    softmax_scale: float
    softcap: float | None
    turns: Turns | None


@contextlib.contextmanager
def observed_attention(attention: Any, observer: Callable[[Attended], None]) -> Iterator[None]:
    """Let `attention` tell `observer` what it would attend with, instead of attending; that ends the pass."""
    config, own = attention.config, attention.config._attn_implementation

    def keep_turns(_module: nn.Module, _args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        attention.atomq_observer = functools.partial(_tell, observer, arguments.get("position_embeddings"))

    hook = attention.register_forward_pre_hook(keep_turns, with_kwargs=True)
    config._attn_implementation = ATTENTION_OBSERVED
    try:
        yield
    finally:
        config._attn_implementation = own
        attention.__dict__.pop("atomq_observer", None)
        hook.remove()


def _tell(
    observer: Callable[[Attended], None],
    turns: Turns | None,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> None:
    softmax_scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    observer(Attended(query, key, mask, softmax_scale, softcap, turns))


def _observe(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    _value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *_args: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> None:
    module.atomq_observer(query, key, attention_mask, scaling, softcap)


class Rotary:
    """RoPE of one attention at any positions, found from how it turns position 1.

    Where angles depend on the length of the text (LongRoPE, dynamic NTK), all positions given at once are
    those of a text that ends at the last of them, as the model's own code takes them.
    """

    def __init__(self, attention: nn.Module, turns: Turns | None) -> None:
        """`turns` of a text's first tokens, at least one; None will do for an attention without RoPE."""
        self._attention, self._length, self._angle = attention, None, None
        if turns is not None:
            cosine, sine = (x[0, :2].double()[-1] for x in turns)
            self._length, self._angle = torch.hypot(cosine, sine), torch.atan2(sine, cosine)

    def turn(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """RoPE on `heads` [1, T, n_heads, head_dim] at `positions` [T]."""
        return turn(self._attention, heads, self._turns(positions))

    def turn_back(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What `turn` made `heads` of."""
        return inverse_turn(self._attention, heads, self._turns(positions))

    def turn_by_mean(self, heads: torch.Tensor, n_positions: int) -> torch.Tensor:
        """`heads` [1, T, n_heads, head_dim], the t-th by the mean turn of positions t * n_positions up to
        (t + 1) * n_positions - 1, where a text ends.
        """
        means = []
        for first in range(0, heads.shape[1] * n_positions, n_positions):
            turns = self._turns(torch.arange(first, first + n_positions, device=heads.device))
            means.append(turns and tuple(x.mean(1, keepdim=True) for x in turns))
        cosine, sine = (torch.cat(x, 1) for x in zip(*means, strict=True)) if means[0] else (None, None)
        return turn(self._attention, heads, None if cosine is None or sine is None else (cosine, sine))

    def _turns(self, positions: torch.Tensor) -> Turns | None:
        """Float64 cosines and sines [1, T, channels]."""
        if self._angle is None or self._length is None:
            return None
        angle = _angle_by_length(self._attention, positions)
        angles = positions.double()[:, None] * (self._angle if angle is None else angle)
        return (angles.cos() * self._length)[None], (angles.sin() * self._length)[None]


def _angle_by_length(attention: Any, positions: torch.Tensor) -> torch.Tensor | None:
    """The angle [channels that turn] from one position to the next in a text that ends at the last of
    `positions`; None where it is the same in every text.
    """
    kind = (getattr(attention.config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "longrope" and "dynamic" not in kind:
        return None
    length = int(positions.max()) + 1
    of_pairs, _ = ROPE_INIT_FUNCTIONS[kind](attention.config, positions.device, seq_len=length)
    return torch.cat((of_pairs, of_pairs)).double()


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


def has_rope(attention: nn.Module) -> bool:
    """Whether `turn` does anything."""
    return _rope_of(attention) is not None


def _rope_of(attention: nn.Module) -> Any:
    """The function of the model's own module that applies RoPE, or None if this attention applies none."""
    if not getattr(attention, "use_rope", True):
        return None
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def _of_tokens(attention: nn.Module, keys: torch.Tensor, turns: Turns | None) -> Turns:
    if turns is None:
        raise UnsupportedModelError(
            f"{type(attention).__name__} was called without position_embeddings, by which K is coded after "
            "RoPE; quantize with --set kv.key_position=before_rope --set kv.key_balance=false"
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
AttentionInterface.register(ATTENTION_OBSERVED, _observe)
