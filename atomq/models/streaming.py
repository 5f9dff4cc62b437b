"""A model whose weights stay in its files: parts are filled when they are needed and emptied again.

So never more than a block, and the embeddings of the tokens that occur, is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from atomq.errors import UnsupportedModelError
from atomq.memory import give_back
from atomq.models.families import ModelFamily
from atomq.models.weights import StoredTensor
from atomq.numerics.finite import is_finite

PIECE_BYTES = 8 << 20  # of a large tensor, read and written piece by piece


class StoredWeights:
    """The weights of one model, read from its files as float32 rounded to the storage dtype.

    Rounded to nearest, ties to even, so that calibration sees exactly the weights that the checkpoint holds.

    Attributes:
        name: the model's, for errors.
        dtype: the storage dtype: of what a checkpoint keeps in floating point.
    """

    def __init__(self, name: str, stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
        self.name, self.dtype = name, dtype
        self._stored = stored

    def read(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """The tensor `name`, float32 on `device`, in memory of its own.

        Raises:
            UnsupportedModelError: a value is not finite, or beyond the range of the storage dtype.
        """
        stored = self._stored[name]
        return self._rounded(name, 0, stored.read().to(device))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """The same in the storage dtype, as runs of rows of about PIECE_BYTES."""
        for begin, end in self._runs(name):
            yield self._rounded(name, begin, self._stored[name].read_rows(begin, end)).to(self.dtype)

    def select(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The given rows (int64, ascending) of a tensor; besides them a piece is in memory at a time."""
        chosen = []
        for begin, end in self._runs(name):
            own = rows[(rows >= begin) & (rows < end)] - begin
            if len(own):
                part = self._stored[name].read_rows(begin, end)[own]
                chosen.append(self._rounded(name, begin, part))
        return torch.cat(chosen)

    def fill(self, module: nn.Module, prefix: str, device: torch.device | str = "cpu") -> None:
        """Give the parameters of `module`, called `prefix` + their name, their values on `device`."""
        for name, _ in list(module.named_parameters()):
            _set_parameter(module, name, self.read(prefix + name, device))

    def check_outside_blocks(self, family: ModelFamily) -> None:
        """Look at every value of embeddings, final norm and head, a piece in memory at a time. A run reads
        them last; what is wrong with a block is found when that is first read.

        Raises:
            UnsupportedModelError: as `read` does.
        """
        for name in sorted(name for name in self._stored if not name.startswith(f"{family.blocks}.")):
            for begin, end in self._runs(name):
                self._check(name, begin, self._stored[name].read_rows(begin, end))

    @contextmanager
    def before_blocks(
        self, model: PreTrainedModel, family: ModelFamily, token_ids: torch.Tensor
    ) -> Iterator[torch.Tensor]:
        """Fill what comes before the blocks for a pass over `token_ids`; it is emptied again at the end.

        Of the embeddings only the rows that occur are read. Answers the token ids that name these rows.
        """
        needless = (f"{family.blocks}.", f"{family.lm_head}.", f"{family.final_norm}.")
        embeddings = f"{family.embeddings}.weight"
        rows, ids = torch.unique(token_ids, return_inverse=True)
        names = [name for name, _ in model.named_parameters() if not name.startswith(needless)]
        for name in names:
            value = self.select(name, rows) if name == embeddings else self.read(name)
            _set_parameter(model, name, value)
        try:
            yield ids
        finally:
            for name in names:
                shape = self._stored[name].shape
                _set_parameter(model, name, torch.empty(shape, device="meta"))

    def _runs(self, name: str) -> Iterator[tuple[int, int]]:
        """Numbers of the first and behind the last row of each piece of a tensor."""
        n_rows, *others = self._stored[name].shape
        step = max(1, PIECE_BYTES // (4 * torch.Size(others).numel()))
        for begin in range(0, n_rows, step):
            yield begin, min(begin + step, n_rows)

    def _rounded(self, name: str, first_row: int, values: torch.Tensor) -> torch.Tensor:
        rounded = values.to(self.dtype).float()
        if not is_finite(rounded):
            self._check(name, first_row, values)
        return rounded if rounded is not values else values.clone()

    def _check(self, name: str, first_row: int, values: torch.Tensor) -> None:
        """Refuse rows of the tensor `name` from `first_row` on that cannot be stored."""
        if not is_finite(values):
            place = (~values.isfinite()).nonzero()[0].tolist()
            place[0] += first_row
            raise UnsupportedModelError(
                f"{self.name}: {name} holds NaN or Inf, first at {place}; the file is broken"
            )
        largest = values.abs().max()
        if not bool(largest.to(self.dtype).isfinite()):
            raise UnsupportedModelError(
                f"{self.name}: {name} reaches {largest.item():.3g}, beyond the range of {self.dtype}, "
                f"in which it would be stored; give the model as safetensors in bfloat16 or float32"
            )


def tensors_to_store(module: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State of `module`, with floating-point parameters in the storage dtype and codes as they are."""
    parameters = {name for name, _ in module.named_parameters()}
    return {
        prefix + name: _on_host(tensor.to(dtype) if name in parameters else tensor)
        for name, tensor in module.state_dict().items()
    }


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the CPU; from a GPU in pinned memory, which torch keeps for the next block."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def empty(module: nn.Module) -> None:
    """Take the values of all parameters and buffers away again; names and shapes stay."""
    module.to("meta")
    give_back()


def empty_parameters(module: nn.Module) -> None:
    """Take the values of the parameters away; buffers keep theirs."""
    for name, parameter in list(module.named_parameters()):
        _set_parameter(module, name, torch.empty_like(parameter, device="meta"))
    give_back()


def make_buffers(model: PreTrainedModel) -> None:
    """Give the buffers of a model that is on the meta device their values; all follow from its config."""
    for module in model.modules():
        named = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        if named:
            for name, buffer in named.items():
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
            model._init_weights(module)  # type: ignore[no-untyped-call]  # of its parameters it finds nothing


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)
