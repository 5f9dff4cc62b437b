"""Ctrl-C while a command's libraries load."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from atomq.errors import Interrupted


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around the imports that a command begins with: Ctrl-C there ends the process at once.

    An exception in the midst of torch's own imports may be lost, become another one, or abort the process.
    """
    is_main = threading.current_thread() is threading.main_thread()  # no other one may set a handler
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # not ours to change
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    os.write(2, f"error: {Interrupted()}\n".encode())
    os._exit(Interrupted.exit_code)
