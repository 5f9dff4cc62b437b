"""Memory of this process and of its machine: what a run holds at most, and what there is for one."""

from __future__ import annotations

import ctypes
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

_SECONDS_BETWEEN_SAMPLES = 0.01
_C = ctypes.CDLL(None)
_M_MMAP_THRESHOLD = -3  # of glibc's mallopt
_LARGE = 4 << 20  # bytes


def held_bytes() -> int:
    """Anonymous and shared memory of this process; pages of files that are mapped for reading do not count,
    since the system takes them back when it needs them. Where the system does not say, the most that it
    had of any memory so far.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))
    except (OSError, KeyError):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_bytes() -> int | None:
    """Memory that a process may still take: of the machine, or of its control group if that is less."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        found.append(int(limit[0]) - int(used[0]))
    return min(found, default=None)


def give_back() -> None:
    """Let the system have the pages that were freed. glibc would keep them between live ones, and a long run
    grow by some of every block.
    """
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)


def give_back_large_ones() -> None:
    """From now on let the system have large tensors as soon as they are freed. glibc learns from every one
    that is freed to keep the next, up to 32 MB each, in a heap that smaller ones then hold open: a fifth to a
    third of a small model's peak, and how much is chance. It takes about a twentieth more time.

    It holds for the whole process, so that it is the commands that call it, never the library.
    """
    if hasattr(_C, "mallopt"):
        _C.mallopt(_M_MMAP_THRESHOLD, _LARGE)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []


class PeakMemory:
    """A context in which the largest `held_bytes`, and on CUDA torch's largest allocation, are noted."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, held_bytes())

    @property
    def peak_gpu_bytes(self) -> int | None:
        """Largest allocation on the device so far; None without one."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.max_memory_allocated(self.device))

    def _sample(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_SAMPLES):
            self.peak_bytes = max(self.peak_bytes, held_bytes())
