"""What the tables call a GPU."""

from __future__ import annotations


def card(name: str) -> str:
    """H100 of NVIDIA H100 80GB HBM3; a name of one word as it stands."""
    return name.removeprefix("NVIDIA ").split()[0]
