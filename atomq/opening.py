"""Opening a model by the name that a user gave, and choosing what computes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atomq import checkpoints, hf
from atomq.errors import ConfigError
from atomq.kernels.linear import use_kernels
from atomq.models.loading import load_float_model, load_tokenizer
from atomq.models.source import resolve_source


def choose_backend(model: PreTrainedModel, backend: str) -> None:
    """Let the kernels compute `model` if `backend` says so.

    Raises:
        ConfigError: there is no such backend.
        KernelError: the kernels cannot run here, or do not take this model.
    """
    if backend not in ("simulation", "kernels"):
        raise ConfigError(f"--backend {backend} is not one of simulation, kernels")
    if backend == "kernels":
        use_kernels(model)


def open_model(
    name: str, device: str, dtype: str, *, check_hashes: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of atomq or an unquantized model, on `device`, with its tokenizer."""
    folder = Path(name)
    if checkpoints.is_checkpoint(folder):
        model = hf.load(folder, device=device, dtype=dtype, check_hashes=check_hashes)
        return model, checkpoints.load_checkpoint_tokenizer(folder)
    runtime_dtype = hf.runtime_dtype(dtype)
    source = resolve_source(name)
    placed: Any = load_float_model(source)
    return placed.to(device=device, dtype=runtime_dtype), load_tokenizer(source)


def published_name(name: str) -> str:
    """What a record calls a model: a path by its last part only."""
    return Path(name).name if Path(name).exists() else name
