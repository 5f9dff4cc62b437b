"""Running a function in two processes that work together by gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atomq import distributed
from atomq.errors import AtomqError


def in_two_processes(folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` answers in process 0 and in process 1; an error of one ends the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = [
        context.Process(target=_work, args=(rank, port, folder, function, args), daemon=True)
        for rank in (0, 1)
    ]
    for process in started:
        process.start()
    results: dict[int, Any] = {}
    ends = time.monotonic() + 120
    while len(results) < 2 and time.monotonic() < ends:
        for rank, process in enumerate(started):
            if rank not in results and not process.is_alive():
                results[rank] = torch.load(folder / f"result-{rank}.pt", weights_only=False)
                if isinstance(results[rank], Exception):  # as torchrun does
                    started[1 - rank].kill()
                    raise results[rank]
        time.sleep(0.01)
    return [results[rank] for rank in (0, 1)]


def _work(rank: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    try:
        with distributed.processes(torch.device("cpu")):
            result = function(*args)
    except (AtomqError, AssertionError) as error:
        result = error
    torch.save(result, folder / f"result-{rank}.pt")
    os._exit(0)  # nothing of pytest's is to be run at the end
