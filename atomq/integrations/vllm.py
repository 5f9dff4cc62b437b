"""The entry point that vLLM calls in each of its processes (plugin group `vllm.general_plugins`)."""

from __future__ import annotations

from importlib import import_module


def register() -> None:
    """Teach vLLM the method "atomq"; more calls do nothing more."""
    import_module("atomq.integrations.vllm_method")
