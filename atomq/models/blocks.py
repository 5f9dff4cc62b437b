"""Running a model block by block: the activations of all windows pass through one block at a time."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atomq.errors import AtomqError, StorageError
from atomq.models.families import LinearGroup, LinearShape, ModelFamily
from atomq.numerics.activations import compute_dtype
from atomq.numerics.finite import is_finite
from atomq.numerics.products import half_products, waiting_dtype

TOKENS_PER_BATCH = 8192


@dataclass
class BlockInputs:
    """What the next block reads: `hidden` [n_windows, seq_len, hidden], and each block's other arguments.

    `hidden` may lie on `device`, where the blocks are, or elsewhere; batches of it visit the device, and the
    blocks compute with them in float32 whatever dtype they wait in (`products.waiting_dtype`).
    """

    hidden: torch.Tensor
    arguments: dict[nn.Module, dict[str, Any]]
    device: torch.device

    def run(
        self, block: nn.Module, name: str = "the block", on_batch: Callable[[int], None] | None = None
    ) -> None:
        """Pass all windows through `block`; its outputs take the place of `hidden`.

        `on_batch` is told the number of windows done in each batch.

        Raises:
            AtomqError: a value is not finite; named are the block `name`, the first module in it where it is
                so, and the channel.
        """
        for batch in self.batches():
            self.advance(block, batch, name)
            if on_batch is not None:
                on_batch(batch.shape[0])

    def advance(self, block: nn.Module, batch: torch.Tensor, name: str = "the block") -> None:
        """Pass one of `batches` through `block`, as `run` does with all."""
        with torch.inference_mode(), half_products(self.device):
            result = self.output(block, batch)
            if not is_finite(result):
                raise self._not_finite(block, batch, name)
            batch.copy_(result)

    def observe(self, block: nn.Module, batch: torch.Tensor) -> None:
        """Pass `batch` through `block` as far as something inside raises `InputSeen`."""
        with torch.inference_mode(), half_products(self.device), contextlib.suppress(InputSeen):
            self.output(block, batch)

    def _not_finite(self, block: nn.Module, batch: torch.Tensor, name: str) -> AtomqError:
        """Say where in `block` the first value that is not finite comes from, for a batch that has one."""
        found: list[tuple[str, int]] = []

        def look(module: str, output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(value, torch.Tensor) and not is_finite(value):
                bad = (~torch.isfinite(value)).reshape(-1, value.shape[-1]).any(0)
                found.append((module, int(bad.nonzero()[0])))

        hooks = [
            module.register_forward_hook(lambda _module, _args, output, inner=inner: look(inner, output))
            for inner, module in block.named_modules()
            if inner and next(module.children(), None) is None
        ]
        self.output(block, batch)
        for hook in hooks:
            hook.remove()
        place, channel = f"{name}.{found[0][0]}" if found else name, found[0][1] if found else 0
        return AtomqError(
            f"{place} gives values that are not finite on the calibration text, first in channel {channel} "
            f"of its output; nothing can be calibrated on them: mend the model, or give another text"
        )

    def output(self, block: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        """What `block` makes of `batch` [n, seq_len, hidden], on `device`."""
        output = block(batch.to(self.device, compute_dtype(batch.dtype)), **self.arguments[block])
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    def batches(self) -> tuple[torch.Tensor, ...]:
        """Views of `hidden` of at most TOKENS_PER_BATCH tokens, at least one window each."""
        return torch.split(self.hidden, max(1, TOKENS_PER_BATCH // self.hidden.shape[1]))

    def copy(self, scratch: Path | None) -> BlockInputs:
        """A second stream that starts where this one is; see `capture_block_inputs` for `scratch`."""
        hidden = _room(tuple(self.hidden.shape), self.hidden.dtype, self.device, scratch)
        return BlockInputs(hidden.copy_(self.hidden), dict(self.arguments), self.device)


class InputSeen(Exception):
    """Raised by an observer that has seen all that it wanted of a pass through a block."""


def blocks_of(model: PreTrainedModel, family: ModelFamily) -> nn.ModuleList:
    """The decoder blocks, in order."""
    blocks = model.get_submodule(family.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def keep_first_blocks(model: PreTrainedModel, family: ModelFamily, n_blocks: int) -> None:
    """Let `model` end after its first `n_blocks` blocks, or after all if it has fewer."""
    model.set_submodule(family.blocks, nn.ModuleList(list(blocks_of(model, family))[:n_blocks]))


def block_stages(block: nn.Module, family: ModelFamily) -> tuple[tuple[LinearGroup, ...], ...]:
    """The linear groups that `block` has, in the order of computation; those of all experts make one stage.

    Only a family with experts has groups that a block may lack: its blocks may be dense or sparse.
    """
    stages = []
    for group in family.groups:
        if group.routed:
            experts = _find_module(block, group.owner.partition(".*.")[0])
            if isinstance(experts, nn.ModuleList):
                stages.append(tuple(group.of_expert(index) for index in range(len(experts))))
        elif not family.has_experts or _find_module(block, group.owner) is not None:
            stages.append((group,))
    return tuple(stages)


def block_groups(block: nn.Module, family: ModelFamily) -> tuple[LinearGroup, ...]:
    """The linear groups that `block` has, in the order of computation."""
    return tuple(group for stage in block_stages(block, family) for group in stage)


def _find_module(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def linear_shapes(model: PreTrainedModel, family: ModelFamily) -> dict[str, LinearShape]:
    """Shapes of the linears of all blocks of an unquantized (or meta) model, by full name."""
    shapes = {}
    for index, block in enumerate(blocks_of(model, family)):
        for group in block_groups(block, family):
            for name in group.linears:
                linear: Any = block.get_submodule(name)
                full = f"{family.blocks}.{index}.{name}"
                shapes[full] = LinearShape(linear.out_features, linear.in_features, linear.bias is not None)
    return shapes


class _BlocksPassed(Exception):
    """Carries the hidden states out of a forward pass whose blocks did nothing but note their arguments."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def capture_block_inputs(
    model: PreTrainedModel,
    family: ModelFamily,
    token_ids: torch.Tensor,
    device: torch.device,
    scratch: Path | None = None,
) -> BlockInputs:
    """Inputs of the first block for windows `token_ids` int64 [n_windows, seq_len], on `device`.

    With `scratch` they lie in a file in that folder instead, which has no name and ends with the process.

    The arguments beside the hidden states (positions, mask) are each block's own for a single window; they
    hold for a batch of any size, since windows are equally long and unpadded.
    """
    blocks = blocks_of(model, family)
    arguments: dict[nn.Module, dict[str, Any]] = {}

    def pass_through(block: nn.Module, hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
        arguments[block] = rest
        if block is blocks[-1]:
            raise _BlocksPassed(hidden_states)
        return hidden_states

    hidden: torch.Tensor | None = None
    home = model.get_parameter(f"{family.embeddings}.weight").device
    try:
        for block in blocks:
            block.forward = functools.partial(pass_through, block)
        with torch.inference_mode():
            for number, window in enumerate(token_ids):
                try:
                    model(window.unsqueeze(0).to(home), use_cache=False)
                except _BlocksPassed as passed:
                    if hidden is None:
                        shape = (len(token_ids), *passed.hidden.shape[1:])
                        hidden = _room(shape, waiting_dtype(passed.hidden.dtype, device), device, scratch)
                    hidden[number].copy_(passed.hidden[0])
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)  # the class's own shows again
    assert hidden is not None
    moved: dict[int, Any] = {}
    moved_arguments = {block: _to_device(rest, device, moved) for block, rest in arguments.items()}
    return BlockInputs(hidden, moved_arguments, device)


def _room(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, scratch: Path | None
) -> torch.Tensor:
    """Uninitialized room for activations: on `device`, or in a nameless file in `scratch`."""
    if scratch is None:
        return torch.empty(shape, dtype=dtype, device=device)
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    try:
        with tempfile.TemporaryFile(dir=scratch) as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)  # or a full disk would end the process by a signal
            mapped = mmap.mmap(file.fileno(), n_bytes)
    except OSError as error:
        raise StorageError(
            f"no room for {n_bytes} bytes of activations in {scratch}: {error.strerror or error}"
        ) from error
    return torch.frombuffer(mapped, dtype=dtype).view(shape)


def bytes_between_blocks(n_tokens: int, width: int, device: torch.device) -> int:
    """What the hidden states [n_tokens, width] of a float32 model take between two blocks."""
    return n_tokens * width * waiting_dtype(torch.float32, device).itemsize


def _to_device(value: Any, device: torch.device, moved: dict[int, Any]) -> Any:
    """Nested arguments on `device`; what blocks share stays shared (`moved`, by identity).

    They become tensors that gradients may be taken through, which those of inference mode are not.
    """
    if id(value) not in moved:
        if isinstance(value, torch.Tensor):
            there = value.to(device)
            moved[id(value)] = there.clone() if there.is_inference() else there
        elif isinstance(value, tuple):
            moved[id(value)] = tuple(_to_device(item, device, moved) for item in value)
        elif isinstance(value, dict):
            return {key: _to_device(item, device, moved) for key, item in value.items()}
        else:
            return value
    return moved[id(value)]
