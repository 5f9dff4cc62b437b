"""Reading a checkpoint block by block, with its linears put back in the model's own order of channels."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from atomq.checkpoints import Opened
from atomq.formats.checkpoint import read_tensors
from atomq.formats.schema import check_values
from atomq.models.blocks import block_groups, blocks_of
from atomq.models.quantized import install_linears
from atomq.numerics.linear import QuantizedLinear, transform_input
from atomq.numerics.weights import spread_rows


@dataclass(frozen=True)
class ModelCodes:
    """The codes of a linear [N, K] without outliers and progressive scales, in the model's order.

    Attributes:
        codes: int16 [N, K], signed if symmetric.
        scales: [N, G], one row of scales for every row of codes, in the dtype that is on disk.
        zeros: int16 [N, G], or None if symmetric.
        group_index: int64 [K], the group of every channel.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    group_index: torch.Tensor


@dataclass(frozen=True)
class StoredLinear:
    """A linear as a checkpoint stores it.

    Attributes:
        linear: codes or weight, in stored order.
        row_order: int64 [N] stored row -> row of the model, or None if the rows are in order.
        bias: [N] in stored order, or None.
    """

    linear: QuantizedLinear
    row_order: torch.Tensor | None
    bias: torch.Tensor | None

    def model_codes(self, group_size: int | None) -> ModelCodes:
        """The codes in the model's order; `group_index` says where reordering took the channels' groups.

        Args:
            group_size: a divisor of the checkpoint's own group size and of K, or None as the checkpoint's is.
                Smaller groups repeat the scale of the group that they are part of.
        """
        linear, weights = self.linear, self.linear.scheme.weights
        stored = linear.quantized_weight()
        assert stored.outliers is None
        n_rows, width = stored.codes.shape
        size = group_size or width
        repeats = 1 if weights.group_size is None else weights.group_size // size

        def per_group(values: torch.Tensor) -> torch.Tensor:
            rows = self._model_rows(spread_rows(values, n_rows, weights.channel_group))
            return rows.repeat_interleave(repeats, dim=1)[:, : width // size]

        return ModelCodes(
            self._model_columns(self._model_rows(stored.codes)),
            per_group(stored.scales).to(linear.get_buffer("scales").dtype),
            None if stored.zeros is None else per_group(stored.zeros).to(torch.int16),
            self._model_columns(torch.arange(width) // size),
        )

    def model_weight(self) -> torch.Tensor:
        """The weight float32 [N, K] that the codes stand for, in the model's order and basis."""
        weight = self.linear.dense_weight(torch.float32)
        if self.linear.scheme.transform == "hadamard":
            weight = transform_input(weight, self.linear.scheme)  # its own inverse
        return self._model_columns(self._model_rows(weight))

    def model_bias(self) -> torch.Tensor | None:
        """The bias [N] in the model's order."""
        return None if self.bias is None else self._model_rows(self.bias)

    def _model_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.row_order is None else tensor[self.row_order.argsort()]

    def _model_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.linear.scheme.outliers.reorder:
            return tensor
        return tensor.index_select(-1, self.linear.input_order().argsort())


@dataclass(frozen=True)
class StoredBlock:
    """One block: its linears by full name, and its other tensors (norms) by full name."""

    linears: dict[str, StoredLinear]
    others: dict[str, torch.Tensor]


def read_blocks(folder: Path, opened: Opened) -> Iterator[StoredBlock]:
    """Read the blocks of a checkpoint one by one; one block at a time is in memory.

    Raises:
        CheckpointError: a tensor holds values that no writer makes.
    """
    model, family, scheme, headers = opened
    for index, skeleton in enumerate(blocks_of(model, family)):
        prefix = f"{family.blocks}.{index}."
        tensors = dict(read_tensors(folder, {name for name in headers if name.startswith(prefix)}))
        linears = install_linears(copy.deepcopy(skeleton), family, scheme)
        row_orders: dict[str, torch.Tensor] = {}
        for name, linear in linears.items():
            for suffix in (*linear.code_names, "perm", "clip_ratio", "weight"):
                tensor = tensors.pop(f"{prefix}{name}.{suffix}", None)
                if tensor is not None:
                    linear.register_buffer(suffix, tensor)
            check_values(f"{prefix}{name}", dict(linear.named_buffers(recurse=False)), linear.scheme)
        for group in block_groups(skeleton, family) if scheme.outliers.reorder else ():
            for name in group.absorbed_by:
                row_orders[name] = _row_order(linears[group.owner].input_order(), linears[name].out_features)
        stored = {
            prefix + name: StoredLinear(
                linear, row_orders.get(name), tensors.pop(f"{prefix}{name}.bias", None)
            )
            for name, linear in linears.items()
        }
        yield StoredBlock(stored, tensors)


def _row_order(perm: torch.Tensor, n_rows: int) -> torch.Tensor:
    """The order `perm` [K] in each of the parts of K rows that a fused linear consists of."""
    starts = torch.arange(0, n_rows, len(perm)).unsqueeze(1)
    return (perm + starts).flatten()
