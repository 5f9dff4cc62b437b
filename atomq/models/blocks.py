"""Running a model block by block: the activations of all windows pass through one block at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atomq.models.families import LinearShape, ModelFamily

TOKENS_PER_BATCH = 8192


@dataclass
class BlockInputs:
    """What the next block reads: `hidden` [n_windows, seq_len, hidden] and the arguments all blocks share."""

    hidden: torch.Tensor
    arguments: dict[str, Any]

    def run(
        self, block: nn.Module, *, keep_output: bool, on_batch: Callable[[int], None] | None = None
    ) -> None:
        """Pass all windows through `block`; with `keep_output` its outputs take the place of `hidden`.

        `on_batch` is told the number of windows done in each batch.
        """
        step = max(1, TOKENS_PER_BATCH // self.hidden.shape[1])
        with torch.inference_mode():
            for start in range(0, self.hidden.shape[0], step):
                batch = self.hidden[start : start + step]
                output = block(batch, **self.arguments)
                if keep_output:
                    self.hidden[start : start + step] = output[0] if isinstance(output, tuple) else output
                if on_batch is not None:
                    on_batch(batch.shape[0])


def blocks_of(model: PreTrainedModel, family: ModelFamily) -> nn.ModuleList:
    """The decoder blocks, in order."""
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def linear_shapes(model: PreTrainedModel, family: ModelFamily) -> dict[str, LinearShape]:
    """Shapes of the linears of all blocks of an unquantized (or meta) model, by full name."""
    shapes = {}
    for index, block in enumerate(blocks_of(model, family)):
        for group in family.groups:
            for name in group.linears:
                linear: Any = block.get_submodule(name)
                full = f"{family.blocks}.{index}.{name}"
                shapes[full] = LinearShape(linear.out_features, linear.in_features, linear.bias is not None)
    return shapes


class _FirstBlockReached(Exception):
    """Carries what the first block was called with out of the model's forward pass."""

    def __init__(self, hidden: torch.Tensor, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.hidden, self.arguments = hidden, arguments


def capture_block_inputs(
    model: PreTrainedModel, family: ModelFamily, token_ids: torch.Tensor, device: torch.device
) -> BlockInputs:
    """Inputs of the first block for windows `token_ids` int64 [n_windows, seq_len], on `device`.

    The arguments beside the hidden states (positions, mask) are those of a single window; they hold for a
    batch of any size, since windows are equally long and unpadded.
    """

    def stop(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        raise _FirstBlockReached(hidden, kwargs)

    hook = blocks_of(model, family)[0].register_forward_pre_hook(stop, with_kwargs=True)
    hidden, arguments = [], {}
    try:
        with torch.inference_mode():
            for window in token_ids:
                try:
                    model(window.unsqueeze(0).to(model.device), use_cache=False)
                except _FirstBlockReached as reached:
                    hidden.append(reached.hidden.to(device))
                    arguments = reached.arguments
    finally:
        hook.remove()
    return BlockInputs(torch.cat(hidden), _to_device(arguments, device))


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return value
