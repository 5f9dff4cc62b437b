"""Clip ratios of a block's activations, one for each linear group (`method.clip`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from atomq import distributed
from atomq.method.clip import search_clip
from atomq.models.blocks import BlockInputs, InputSeen
from atomq.models.families import LinearGroup
from atomq.numerics.linear import QuantizedLinear

SEARCH_TOKENS = 2048  # of all processes together, in whole windows


def choose_clips(
    block: nn.Module,
    stages: Sequence[Sequence[LinearGroup]],
    linears: Mapping[str, QuantizedLinear],
    inputs: BlockInputs,
) -> None:
    """Search the clip ratios of `stages`, each on what the quantized activations before it in `block` give.

    Looks at the first windows of `inputs`, as many as hold SEARCH_TOKENS tokens.
    """
    per_process = -(-SEARCH_TOKENS // distributed.n_processes())
    windows = inputs.hidden[: max(1, per_process // inputs.hidden.shape[1])]
    for groups in stages:
        seen: dict[str, list[torch.Tensor]] = {group.owner: [] for group in groups}
        hooks = [
            linears[name].register_forward_pre_hook(
                _keeper(linears[name], seen[name], ends=name == groups[-1].owner)
            )
            for name in seen
        ]
        inputs.observe(block, windows)
        for hook in hooks:
            hook.remove()
        for group in groups:
            owner = linears[group.owner]
            nothing = torch.empty(0, owner.in_features, device=inputs.device)  # the router may send no token
            weights = [linears[name].dense_weight(torch.float32) for name in group.linears]
            rows = torch.cat([nothing, *seen.pop(group.owner)])
            owner.set_clip_ratio(search_clip(rows, weights, owner.scheme))


def _keeper(
    linear: QuantizedLinear, seen: list[torch.Tensor], *, ends: bool
) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """Keeps the rows that `linear` is about to quantize, and `ends` the pass or not."""

    def observe(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(linear.order_input(args[0]).flatten(0, -2))
        if ends:
            raise InputSeen

    return observe
