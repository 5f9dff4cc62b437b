"""Work beside the caller: files are written while the next block is computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any


class Background:
    """A context in which calls run one after another in a thread, while the caller goes on.

    What a call raises shows at the next one, at `wait`, or when the context is left without another error.
    Leaving it always waits for the call that is running, so that nothing is left half done.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "atomq-background")
        self._running: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def run(self, call: Callable[..., None], *args: Any) -> None:
        """Wait for the call before, and start this one."""
        self.wait()
        self._running = self._pool.submit(call, *args)

    def wait(self) -> None:
        """Until what was started is done."""
        running, self._running = self._running, None
        if running is not None:
            running.result()
