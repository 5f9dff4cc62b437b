"""Figures for people: bytes, seconds, shares and counts, said the same way everywhere."""

from __future__ import annotations

import math


def human_bytes(n_bytes: float) -> str:
    """Such as "113.2 MB" (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:.1f} {unit}" if unit != "B" else f"{n_bytes:.0f} B"
        n_bytes /= 1000
    return f"{n_bytes:.1f} TB"


def human_seconds(seconds: float) -> str:
    """Such as "7.4 s", "3 min 12 s" or "2 h 05 min"."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def percent(share: float) -> str:
    """A share with three significant digits, such as "4.21 %"; "not finite" for what is none."""
    return f"{100 * share:.3g} %" if math.isfinite(share) else "not finite"
