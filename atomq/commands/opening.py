"""Opening the model that a command was given, and choosing what computes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomq.commands import console
from atomq.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_backend(model: PreTrainedModel, backend: str) -> None:
    """Let the kernels compute `model` if `backend` says so.

    Raises:
        ConfigError: there is no such backend.
        KernelError: the kernels cannot run here, or do not take this model.
    """
    if backend not in ("simulation", "kernels"):
        raise ConfigError(f"--backend {backend} is not one of simulation, kernels")
    if backend == "kernels":
        from atomq.kernels.linear import use_kernels

        use_kernels(model)


def open_model(
    name: str, device: str, dtype: str, *, check_hashes: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of atomq or an unquantized model, on `device`, with its tokenizer."""
    from atomq import checkpoints, hf
    from atomq.models.loading import load_float_model, load_tokenizer
    from atomq.models.source import resolve_source

    console.silence_libraries()
    folder = Path(name)
    if checkpoints.is_checkpoint(folder):
        model = hf.load(folder, device=device, dtype=dtype, check_hashes=check_hashes)
        return model, checkpoints.load_checkpoint_tokenizer(folder)
    runtime_dtype = hf.runtime_dtype(dtype)
    source = resolve_source(name)
    model = load_float_model(source)
    placed: Any = model
    return placed.to(device=device, dtype=runtime_dtype), load_tokenizer(source)
