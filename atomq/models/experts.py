"""Mixtures of experts: experts as linears of their own, and which tokens they are calibrated on.

transformers keeps the experts of a block as two parameters with a leading expert dimension. Here every expert
is a module with three linears, so that each is reordered, quantized and stored like any other linear. The
router is left as it is: in full precision, and it reads the channels in their original order.

A router may send an expert few calibration tokens, or none. An expert that sees fewer than `STARVED_TOKENS`
is calibrated on all tokens instead, whether they are routed to it or not, and is named in the report.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atomq import distributed
from atomq.models.blocks import BlockInputs, InputSeen, blocks_of
from atomq.models.families import ModelFamily

STARVED_TOKENS = 128  # a quarter of fewer is too small a sample to judge codes by (method.solve)


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)); the weights are views of the fused parameters."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: nn.Module) -> None:
        """`gate_up` [2 * intermediate, hidden], gate first; `down` [hidden, intermediate]."""
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = map(_linear_of, (gate, up, down))
        self.act_fn = act_fn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return output


class Experts(nn.ModuleList):
    """The experts of one block, in place of transformers' fused module and with its forward.

    Attributes:
        on_all: experts that compute all tokens, so that calibration sees them; the result does not change.
    """

    def __init__(self, fused: Any) -> None:
        """`fused`: a module with `gate_up_proj` [n_experts, 2 * intermediate, hidden], `down_proj`
        [n_experts, hidden, intermediate] and `act_fn`.
        """
        parts = zip(fused.gate_up_proj.detach(), fused.down_proj.detach(), strict=True)
        super().__init__(Expert(gate_up, down, fused.act_fn) for gate_up, down in parts)
        self.on_all: frozenset[int] = frozenset()

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Weighted sum of the chosen experts' outputs: tokens [T, hidden], index and weights [T, top_k]."""
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            tokens, ranks = torch.where(top_k_index == index)
            if index in self.on_all:
                output = expert(hidden_states)[tokens]
            elif len(tokens):
                output = expert(hidden_states[tokens])
            else:
                continue
            result.index_add_(0, tokens, (output * top_k_weights[tokens, ranks, None]).to(result.dtype))
        return result


def _linear_of(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def expert_paths(family: ModelFamily) -> list[str]:
    """Where the blocks of a family have their experts, relative to the block."""
    return sorted({group.owner.partition(".*.")[0] for group in family.groups if group.routed})


def unfuse_experts(model: PreTrainedModel, family: ModelFamily) -> None:
    """Put `Experts` in the place of every fused module of experts, sharing its memory."""
    for block in blocks_of(model, family):
        for path in expert_paths(family):
            parent, _, name = path.rpartition(".")
            fused = getattr(block.get_submodule(parent), name, None)  # a dense block has none
            if fused is not None:
                block.set_submodule(path, Experts(fused))


class ExpertRouting:
    """Which calibration tokens the experts see.

    Attributes:
        all_experts: every expert sees all tokens.
        starved: tokens routed to each expert that saw fewer than STARVED_TOKENS, by full name.
    """

    def __init__(self, all_experts: bool = False) -> None:
        self.all_experts = all_experts
        self.starved: dict[str, int] = {}

    def open(self, block: nn.Module, prefix: str, family: ModelFamily, inputs: BlockInputs) -> None:
        """Choose the experts of `block` that are to compute all tokens of `inputs`."""
        for path in expert_paths(family):
            experts = block.get_submodule(path) if _has_module(block, path) else None
            if not isinstance(experts, Experts):
                continue
            if self.all_experts:
                experts.on_all = frozenset(range(len(experts)))
                continue
            counts = _count_tokens(block, experts, inputs)
            few = {index: n for index, n in enumerate(counts) if n < STARVED_TOKENS}
            experts.on_all = frozenset(few)
            self.starved |= {f"{prefix}.{path}.{index}": n for index, n in few.items()}

    def close(self, block: nn.Module) -> None:
        """Let every expert compute its own tokens again."""
        for module in block.modules():
            if isinstance(module, Experts):
                module.on_all = frozenset()


def _has_module(block: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return hasattr(block.get_submodule(parent), name)


def _count_tokens(block: nn.Module, experts: Experts, inputs: BlockInputs) -> list[int]:
    """Tokens that the router sends to each of `experts`, from a pass that ends at the router."""
    counts = torch.zeros(len(experts), dtype=torch.int64, device=inputs.device)

    def count(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        counts.add_(torch.bincount(args[1].flatten(), minlength=len(experts)))
        raise InputSeen

    hook = experts.register_forward_pre_hook(count)
    for batch in inputs.batches():
        inputs.observe(block, batch)
    hook.remove()
    distributed.add_up(counts)
    result: list[int] = counts.tolist()
    return result
