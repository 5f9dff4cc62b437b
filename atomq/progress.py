"""How long work tells how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable

# Told how much is done, of how much, and what is being done now.
OnProgress = Callable[[float, int, str], None]


def silently(_done: float, _total: int, _step: str) -> None:
    """Progress that nobody watches."""


class BlockTimes:
    """An `OnProgress` that passes on what it is told of one pass over the blocks, and notes the wall seconds
    of each block: from when the pass first spoke of it until it spoke of the next.
    """

    def __init__(self, on_progress: OnProgress) -> None:
        self._tell = on_progress
        self._since: float | None = None
        self.seconds: list[float] = []

    def __call__(self, done: float, total: int, step: str) -> None:
        now = time.perf_counter()
        if self._since is None:
            self._since = now
        elif done >= len(self.seconds) + 1:
            self.seconds.append(now - self._since)
            self._since = now
        self._tell(done, total, step)
