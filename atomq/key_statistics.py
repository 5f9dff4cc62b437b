"""What a block's cache takes off K before it is coded, measured on the calibration text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from atomq import distributed
from atomq.method.key_balance import BalanceStatistics, weigh_scores
from atomq.models.attention import Attended, Rotary, observed_attention
from atomq.models.blocks import BlockInputs, InputSeen
from atomq.models.families import ModelFamily
from atomq.models.quantized import attention_name, head_counts, n_positions, offset_rows
from atomq.numerics.kv import OFFSET_TOKENS, offset_row

BALANCE_TOKENS = 32768  # of all processes together, in whole windows: all scores in them are looked at
BALANCE_POSITIONS, PLACES = 8192, 8


def mean_key(block: nn.Module, family: ModelFamily, inputs: BlockInputs, head_dim: int) -> torch.Tensor:
    """Each channel's mean [n_heads * head_dim] of the block's K before RoPE, in float.

    Rounded to bfloat16, so that it is the same number in whatever dtype a model is loaded.
    """
    n_queries, n_keys = head_counts(block.get_submodule(attention_name(family)))
    first = n_queries * head_dim if family.key == family.value else 0
    total = torch.zeros(n_keys * head_dim, dtype=torch.float64, device=inputs.device)

    def add(_module: nn.Module, _args: tuple[Any, ...], output: torch.Tensor) -> None:
        by_token = output.transpose(1, 2) if family.has_keys_by_head else output
        keys = by_token.flatten(0, 1).flatten(1)[:, first : first + len(total)]
        total.add_(keys.sum(0, dtype=torch.float64))
        raise InputSeen

    hook = block.get_submodule(family.key).register_forward_hook(add)
    for batch in inputs.batches():
        inputs.observe(block, batch)
    hook.remove()
    distributed.add_up(total)
    n_tokens = distributed.total(inputs.hidden.shape[0] * inputs.hidden.shape[1])
    return (total / n_tokens).bfloat16().float()


def balance_keys(
    block: nn.Module, family: ModelFamily, inputs: BlockInputs, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The block's `key_offset` [n_rows, n_heads * head_dim] and `key_scale` [n_heads * head_dim].

    Both by windows spread evenly over the text. The scale is for positions up to BALANCE_POSITIONS: a window
    is looked at in PLACES of them, to which all but its first token, that much attention goes to, are moved.
    """
    attention: Any = block.get_submodule(attention_name(family))
    n_rows, n_tokens = offset_rows(attention.config), inputs.hidden.shape[1]
    statistics = BalanceStatistics(head_counts(attention)[1], head_dim, n_rows, inputs.device)
    rotary = Rotary(attention, _attended(block, attention, inputs, inputs.hidden[:1]).turns)
    places = torch.arange(n_tokens, device=inputs.device)
    n_free = max(0, min(n_positions(attention.config), BALANCE_POSITIONS) - n_tokens)
    starts = sorted({place * n_free // (PLACES - 1) for place in range(PLACES)})
    n_windows = distributed.total(len(inputs.hidden))
    apart = -(-n_windows // max(1, BALANCE_TOKENS // n_tokens))
    numbers = distributed.own_share(torch.arange(n_windows))
    for number, window in zip(numbers.tolist(), torch.split(inputs.hidden, 1), strict=True):
        if number % apart:
            continue
        seen = _attended(block, attention, inputs, window)
        weights = weigh_scores(
            seen.queries[0],
            seen.keys[0],
            None if seen.mask is None else seen.mask[0],
            seen.softmax_scale,
            seen.softcap,
        )
        queries, keys = (rotary.turn_back(x.transpose(1, 2), places) for x in (seen.queries, seen.keys))
        statistics.add_keys(keys[0], weights)
        for start in starts:
            moved = torch.where(places > 0, places + start, places)
            turned_queries, turned_keys = (rotary.turn(x, moved)[0] for x in (queries, keys))
            statistics.add_turned(turned_queries, turned_keys, offset_row(moved, n_rows), weights)
    statistics.finish()
    mean = statistics.mean().expand(1, n_rows, -1, -1)
    offset = rotary.turn_by_mean(mean, OFFSET_TOKENS)[0].bfloat16().float()
    return offset.flatten(1), statistics.scale(offset).flatten()


def _attended(block: nn.Module, attention: nn.Module, inputs: BlockInputs, window: torch.Tensor) -> Attended:
    """What `attention` is about to do with `window` [1, T, hidden]."""
    found: list[Attended] = []

    def keep(seen: Attended) -> None:
        found.append(seen)
        raise InputSeen

    with observed_attention(attention, keep):
        inputs.observe(block, window)
    return found[0]
