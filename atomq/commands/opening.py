"""`atomq.opening` for the commands: loaded when needed, without the libraries' own progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING

from atomq.commands import console

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_backend(model: PreTrainedModel, backend: str) -> None:
    """See `atomq.opening.choose_backend`."""
    from atomq import opening

    opening.choose_backend(model, backend)


def open_model(
    name: str, device: str, dtype: str, *, check_hashes: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """See `atomq.opening.open_model`."""
    from atomq import opening

    console.silence_libraries()
    return opening.open_model(name, device, dtype, check_hashes=check_hashes)
