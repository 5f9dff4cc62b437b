"""Fixtures that tests of several rooms share; tests marked `gpu` are skipped where there is none."""

from __future__ import annotations

import importlib.util
import signal
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny_model


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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models gain nothing from more threads, and lose much where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_counts() -> None:
    """Tests that press Ctrl-C hold in the background, too, where a shell lets it be ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer on disk. Do not change it: copy it first."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text of about 6 kB."""
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "while",
        "seven",
        "wizards",
        "mix",
        "42",
        "potions",
    ]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (1200,), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(words[i] for i in picks) + ".\n", encoding="utf-8")
    return path
