"""atomq: offline INT4 quantization of LLMs: weights, activations and KV cache.

The names below load torch and transformers on first use, not on import.
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

TYPE_CHECKING = False  # as type checkers read it; the module typing would take most of this one's time
if TYPE_CHECKING:
    from typing import Any

    from atomq.api import calibrate, evaluate_ppl, load, quantize, verify

__all__ = ["__version__", "calibrate", "evaluate_ppl", "load", "quantize", "verify"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("atomq.api"), name)
    raise AttributeError(f"module 'atomq' has no attribute {name!r}")
