"""How long work tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Told how much is done, of how much, and what is being done now.
OnProgress = Callable[[float, int, str], None]


def silently(_done: float, _total: int, _step: str) -> None:
    """Progress that nobody watches."""
