"""Timing of short GPU work: candidates take turns in rounds, so that clocks, heat and caches favour none."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Launch = Callable[[], object]

CACHE_BYTES = 160e6
"""Copies of a weight together exceed this: three times the largest L2 cache."""

_WARM_UP_US = 20e3  # of all candidates together, before the first sample
_ROUNDS = 11
_COLD_SAMPLES = 9
_GRAPH_US, _GRAPH_LAUNCHES = 2000.0, 32  # a graph holds so much work or so many launches, whichever is less


@dataclass(frozen=True)
class Timing:
    """Microseconds for one launch.

    Attributes:
        graph_us: back to back in a CUDA graph, the median of all rounds.
        graph_p10_us, graph_p90_us: its 10th and 90th percentile.
        cold_us: alone in a graph, after the L2 cache was overwritten; the median.
    """

    graph_us: float
    graph_p10_us: float
    graph_p90_us: float
    cold_us: float


@dataclass(frozen=True)
class _Batch:
    """Launches in a graph, and one of them in a graph of its own."""

    many: torch.cuda.CUDAGraph
    one: torch.cuda.CUDAGraph
    n_launches: int
    estimated_us: float


def describe_method() -> dict[str, object]:
    """What a record says of how it was measured."""
    return {
        "statistic": "median",
        "rounds": _ROUNDS,
        "cold_samples": _COLD_SAMPLES,
        "warm_up_us": _WARM_UP_US,
        "rotated_bytes": CACHE_BYTES,
        "order": "candidates take turns in every round; each sample follows an untimed replay of its graph",
    }


def n_copies(n_bytes: float) -> int:
    """Copies of an operand of `n_bytes` that together leave the L2 cache behind."""
    return max(1, math.ceil(CACHE_BYTES / n_bytes))


def time_in_turns(candidates: Sequence[Sequence[Launch]]) -> list[Timing]:
    """Time candidates that do the same work, each given as one launch for every copy of its operands."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def timed(run: Callable[[], object]) -> float:
        begin.record(stream)
        run()
        end.record(stream)
        stream.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    with torch.cuda.stream(stream):
        batches = [_capture(launches, timed) for launches in candidates]
        round_us = sum(batch.estimated_us * batch.n_launches for batch in batches)
        for _ in range(math.ceil(_WARM_UP_US / max(round_us, 1.0))):
            for batch in batches:
                batch.many.replay()
        samples: list[list[float]] = [[] for _ in batches]
        for shift in range(_ROUNDS):
            for i in _rotated(len(batches), shift):
                batches[i].many.replay()  # no launch from the host lies between it and the timed one
                samples[i].append(timed(batches[i].many.replay) / batches[i].n_launches)
        flushed = torch.empty(int(CACHE_BYTES), dtype=torch.uint8, device="cuda")
        cold: list[list[float]] = [[] for _ in batches]
        for shift in range(_COLD_SAMPLES):
            for i in _rotated(len(batches), shift):
                flushed.fill_(shift)
                cold[i].append(timed(batches[i].one.replay))
    deciles = [statistics.quantiles(values, n=10) for values in samples]
    return [
        Timing(statistics.median(graph), tenths[0], tenths[8], statistics.median(alone))
        for graph, tenths, alone in zip(samples, deciles, cold, strict=True)
    ]


def _rotated(count: int, shift: int) -> list[int]:
    return [(i + shift) % count for i in range(count)]


def _capture(launches: Sequence[Launch], timed: Callable[[Launch], float]) -> _Batch:
    for launch in launches[:2]:  # kernels compile, libraries plan
        launch()
    estimate = max(min(timed(launches[0]) for _ in range(2)), 1.0)
    wanted = min(math.ceil(_GRAPH_US / estimate), _GRAPH_LAUNCHES)
    n_launches = math.ceil(wanted / len(launches)) * len(launches)
    many = _graph([launches[i % len(launches)] for i in range(n_launches)])
    return _Batch(many, _graph(launches[:1]), n_launches, estimate)


def _graph(launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
    """A graph of `launches`. Not by torch's context manager, which empties allocator caches every time."""
    graph = torch.cuda.CUDAGraph()
    graph.capture_begin()
    try:
        for launch in launches:
            launch()
    finally:
        graph.capture_end()
    return graph
