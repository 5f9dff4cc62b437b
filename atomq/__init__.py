"""atomq: offline INT4 quantization of LLMs: weights, activations and KV cache.

The names below load torch and transformers on first use, not on import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from atomq.hf import load
    from atomq.pipeline import calibrate, quantize

_PLACES = {"load": "atomq.hf", "calibrate": "atomq.pipeline", "quantize": "atomq.pipeline"}

__all__ = ["__version__", "calibrate", "load", "quantize"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'atomq' has no attribute {name!r}")
