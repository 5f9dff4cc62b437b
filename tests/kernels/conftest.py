"""Tests marked `gpu` are skipped, with the reason, where there is no CUDA device or no CuPy."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        reason = "no CUDA device here"
    elif importlib.util.find_spec("cupy") is None:
        reason = "CuPy is not installed here"
    else:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
