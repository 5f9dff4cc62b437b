"""The weights of a model whose residual stream, and whose heads of V, are rotated: the same model in another
basis.

The rotations R1 and R2 of QuaRot and SpinQuant (arXiv 2404.00456, 2405.16406), folded into the weights, so
that nothing is done at run time and any tool opens the result. With Q the rotation of the residual stream, R
that of a head, a the weight of the norm before a linear and weights as torch has them:

    embeddings, q, k, v, gate, up, head: W -> W diag(a) Q      o, down: W -> Q^T W      norms: a -> 1
    v: the rows of each head W -> R^T W                        o: the columns of each head W -> W R

What a linear reads then has no outlier channels, but for o (one head) and down, whose inputs are not linear
in the stream. The head is no longer the embeddings' transpose, since only it has the final norm's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from atomq.errors import ConfigError
from atomq.models.families import RESIDUALS, ModelFamily, Residual
from atomq.models.quantized import head_dim_of
from atomq.models.weights import StoredTensor
from atomq.numerics.rotation import random_signs, rotate

_SEED_OF_STREAM, _SEED_OF_HEADS = 1, 2


def find_residual(family: ModelFamily) -> Residual:
    """How the family's blocks read and write the stream.

    Raises:
        ConfigError: a rotation cannot be folded into the family's weights.
    """
    try:
        return RESIDUALS[family.model_type]
    except KeyError:
        raise ConfigError(
            f"{family.model_type} models cannot be rotated: that needs an RMSNorm right before each linear "
            f"that reads the residual stream, and no router; use --rotate none"
        ) from None


def rotated_tensors(
    stored: dict[str, StoredTensor], family: ModelFamily, config: Any
) -> dict[str, StoredTensor]:
    """`stored`, an untied model's, with every tensor rotated when it is read, as float32.

    Raises:
        ConfigError: as `find_residual`.
    """
    residual = find_residual(family)
    stream = random_signs(config.hidden_size, _SEED_OF_STREAM)
    heads = _Heads(config.num_key_value_heads, random_signs(head_dim_of(config), _SEED_OF_HEADS))
    result = dict(stored)

    def change(name: str, function: Callable[[torch.Tensor], torch.Tensor], *, by_rows: bool = False) -> None:
        if name in result:
            result[name] = _changed(result[name], function, by_rows=by_rows)

    def change_reader(name: str, norm: str) -> None:
        scales = result[norm]

        def fold(weight: torch.Tensor) -> torch.Tensor:
            return rotate(weight, stream * (scales.read().double() + residual.norm_offset))

        change(name, fold, by_rows=True)

    def change_norm(name: str) -> None:
        change(name, lambda weight: torch.full(weight.shape, 1.0 - residual.norm_offset))

    change(f"{family.embeddings}.weight", lambda weight: rotate(weight, stream), by_rows=True)
    change_reader(f"{family.lm_head}.weight", f"{family.final_norm}.weight")
    change_norm(f"{family.final_norm}.weight")
    for index in range(config.num_hidden_layers):
        block = f"{family.blocks}.{index}"
        for norm, linears in residual.readers:
            for linear in linears:
                change_reader(f"{block}.{linear}.weight", f"{block}.{norm}.weight")
            change_norm(f"{block}.{norm}.weight")
        for kind in ("weight", "bias"):
            change(f"{block}.{family.value}.{kind}", heads.turn_values)
        change(f"{block}.{residual.writers[0]}.weight", heads.turn_inputs)
        for linear in residual.writers:
            change(f"{block}.{linear}.weight", lambda weight: rotate(weight.T, stream).T)
            change(f"{block}.{linear}.bias", lambda bias: rotate(bias, stream))
    return result


class _Heads:
    """Rotates what belongs to the heads of V, each of them alike."""

    def __init__(self, n_heads: int, signs: torch.Tensor) -> None:
        self.n_heads, self.signs = n_heads, signs

    def turn_values(self, tensor: torch.Tensor) -> torch.Tensor:
        """The weight or bias [N, ...] of the linear that makes V, or of one whose last rows do."""
        head_dim = len(self.signs)
        first = len(tensor) - self.n_heads * head_dim
        rows = tensor[first:].reshape(self.n_heads, head_dim, *tensor.shape[1:]).movedim(1, -1)
        return torch.cat((tensor[:first].float(), rotate(rows, self.signs).movedim(-1, 1).flatten(0, 1)))

    def turn_inputs(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [N, heads of Q * head_dim] of the linear that reads what attention makes of V."""
        return rotate(weight.reshape(len(weight), -1, len(self.signs)), self.signs).flatten(-2)


def _changed(
    tensor: StoredTensor, function: Callable[[torch.Tensor], torch.Tensor], *, by_rows: bool
) -> StoredTensor:
    """`tensor` with `function` over it; `by_rows`: each row's result depends on that row alone."""

    def read_rows(begin: int, end: int) -> torch.Tensor:
        return function(tensor.read_rows(begin, end)) if by_rows else function(tensor.read())[begin:end]

    return StoredTensor(tensor.shape, torch.float32, read_rows)
