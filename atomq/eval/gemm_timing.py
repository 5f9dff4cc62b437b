"""Timing of short GPU work: candidates take turns in rounds, so that clocks, heat and caches favour none.

A turn begins with untimed replays of the candidate itself, until the GPU runs at the clock that this
candidate's own power leaves. Turns of a few milliseconds would give all of them the clock of their average:
float16 products, which draw the most, ran 25 % faster that way on an H100, and INT4 ones 15 % slower. What
draws all the power there is takes longer to settle, and its clock then goes up and down: it has `LONG_TURN`.

What draws less than that among candidates that draw all of it has `RESTED_TURN`: after cuDNN's attention an
H200's clock was low for 100 ms, and a kernel that keeps to the highest clock by itself ran 13 % slower. Its
graphs are sized by their own replays, and its samples follow each other without a pause: a graph that finds
the GPU idle begins 50 us late, which is 10 % of twelve launches of 40 us.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch

Launch = Callable[[], object]
Watch = Callable[[Launch], float]

CACHE_BYTES = 160e6
"""Copies of a weight together exceed this: three times the largest L2 cache."""

ROUNDS = 3  # turns of each candidate
_COLD_SAMPLES = 9
_IDLE_S = 0.3  # before a sustained run, for the clock and the temperature to settle
_GRAPH_US, _GRAPH_LAUNCHES = 2000.0, 32  # a graph holds so much work or so many launches, whichever is less


@dataclass(frozen=True)
class Turn:
    """Nothing for `rest_us`, untimed replays for `warm_up_us`, then `samples` timed ones, each of about 2 ms.

    They are waited for one by one; or, `in_a_row`, queued behind each other.
    """

    warm_up_us: float
    samples: int
    rest_us: float = 0.0
    in_a_row: bool = False


SHORT_TURN, LONG_TURN = Turn(25e3, 4), Turn(60e3, 12)
RESTED_TURN = Turn(60e3, 12, rest_us=150e3, in_a_row=True)


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
    """Launches in a graph that takes about `replay_us`, and one of them in a graph of its own."""

    many: torch.cuda.CUDAGraph
    one: torch.cuda.CUDAGraph
    n_launches: int
    replay_us: float


def describe_method() -> dict[str, object]:
    """What a record says of how it was measured."""
    return {
        "statistic": "median",
        "rounds": ROUNDS,
        "turn": asdict(SHORT_TURN),
        "long_turn": asdict(LONG_TURN),
        "rested_turn": asdict(RESTED_TURN),
        "cold_samples": _COLD_SAMPLES,
        "rotated_bytes": CACHE_BYTES,
        "order": "candidates take turns in every round, every second round backwards; "
        "a turn begins with untimed replays of its own graph",
    }


def n_copies(n_bytes: float) -> int:
    """Copies of an operand of `n_bytes` that together leave the L2 cache behind."""
    return max(1, math.ceil(CACHE_BYTES / n_bytes))


def time_in_turns(
    candidates: Sequence[Sequence[Launch]], rounds: int = ROUNDS, turn: Turn = SHORT_TURN
) -> list[Timing]:
    """Time candidates that do the same work, each given as one launch for every copy of its operands."""
    with _watch() as timed:
        batches = [_capture(launches, timed, by_replays=turn.in_a_row) for launches in candidates]
        samples: list[list[float]] = [[] for _ in batches]
        for number in range(rounds):
            for i in turns(len(batches), number):
                batch = batches[i]
                time.sleep(1e-6 * turn.rest_us)
                for _ in range(math.ceil(turn.warm_up_us / batch.replay_us)):
                    batch.many.replay()  # no pause lies between the last of them and the first sample
                if turn.in_a_row:
                    times = _times(batch.many.replay, turn.samples)
                else:
                    times = [timed(batch.many.replay) for _ in range(turn.samples)]
                samples[i] += [us / batch.n_launches for us in times]
        flushed = torch.empty(int(CACHE_BYTES), dtype=torch.uint8, device="cuda")
        cold: list[list[float]] = [[] for _ in batches]
        for shift in range(_COLD_SAMPLES):
            for i in turns(len(batches), shift):
                flushed.fill_(shift)
                cold[i].append(timed(batches[i].one.replay))
    deciles = [statistics.quantiles(values, n=10) for values in samples]
    return [
        Timing(statistics.median(graph), tenths[0], tenths[8], statistics.median(alone))
        for graph, tenths, alone in zip(samples, deciles, cold, strict=True)
    ]


def time_sustained(launches: Sequence[Launch], seconds: float) -> list[tuple[float, float]]:
    """One candidate without a pause: (milliseconds since the start, microseconds for one launch) over time.

    Each sample is a graph of about 2 ms. It shows the clock follow the power that the candidate draws.
    """
    with _watch() as timed:
        batch = _capture(launches, timed)
        time.sleep(_IDLE_S)
        times = _times(batch.many.replay, math.ceil(seconds * 1e6 / batch.replay_us))
    ends = itertools.accumulate(times)
    return [(1e-3 * end, us / batch.n_launches) for end, us in zip(ends, times, strict=True)]


def turns(count: int, round_number: int) -> list[int]:
    """The order of `count` candidates in a round: another one begins, and every second round runs backwards.

    So a candidate does not always follow the same one: what ran before still shows after a turn's warm-up, by
    9 % after float16 products on an H100, whose power had lowered the clock.
    """
    step = -1 if round_number % 2 else 1
    return [(round_number + step * i) % count for i in range(count)]


@contextmanager
def _watch() -> Iterator[Watch]:
    """What runs something and gives its microseconds, on a stream of its own, the current one inside."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def timed(run: Launch) -> float:
        begin.record(stream)
        run()
        end.record(stream)
        stream.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    with torch.cuda.stream(stream):
        yield timed


def _times(run: Launch, count: int) -> list[float]:
    """Microseconds of each of `count` runs on the current stream, without a pause; waits for the last."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    for mark in marks[:-1]:
        mark.record()
        run()
    marks[-1].record()
    marks[-1].synchronize()
    return [1e3 * float(begin.elapsed_time(end)) for begin, end in itertools.pairwise(marks)]


def _capture(launches: Sequence[Launch], timed: Watch, *, by_replays: bool = False) -> _Batch:
    """Graphs sized by a launch from Python or, `by_replays`, by replays of one that holds every launch."""
    for launch in launches[:2]:  # kernels compile, libraries plan
        launch()
    if by_replays:
        estimate = max(min(_times(_graph(launches).replay, 4)) / len(launches), 1.0)
    else:
        estimate = max(min(timed(launches[0]) for _ in range(2)), 1.0)
    wanted = min(math.ceil(_GRAPH_US / estimate), _GRAPH_LAUNCHES)
    n_launches = math.ceil(wanted / len(launches)) * len(launches)
    many = _graph([launches[i % len(launches)] for i in range(n_launches)])
    many.replay()
    return _Batch(many, _graph(launches[:1]), n_launches, timed(many.replay))


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
