"""The timing in turns on a GPU that is made up: a clock that launches and replays move on."""

from __future__ import annotations

import contextlib
import types

import pytest

from atomq.eval import gemm_timing
from atomq.eval.gemm_timing import LONG_TURN, RESTED_TURN, SHORT_TURN, Turn, time_in_turns

_EAGER_US = 150.0  # what a launch from Python takes, whatever the kernel
_IDLE_US = 50.0  # how much later a graph begins that finds the GPU idle


class FakeGpu:
    """Microseconds so far, and whether anything was queued since the last wait."""

    def __init__(self):
        self.now, self.is_idle, self.n_replays = 0.0, True, 0
        self.rested_us: list[float] = []
        self.capturing: list[float] | None = None

    def launch(self, us):
        if self.capturing is not None:
            self.capturing.append(us)
        else:
            self.now += max(us, _EAGER_US)
            self.is_idle = False

    def rest(self, seconds):
        self.now += 1e6 * seconds
        self.rested_us.append(1e6 * seconds)
        self.is_idle = True

    def replay(self, items):
        self.now += sum(items) + (_IDLE_US if self.is_idle else 0.0)
        self.is_idle, self.n_replays = False, self.n_replays + 1


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream=None):
            self.at = gpu.now

        def synchronize(self):
            gpu.is_idle = True

        def elapsed_time(self, end):
            return 1e-3 * (end.at - self.at)

    class Graph:
        def capture_begin(self):
            gpu.capturing = []

        def capture_end(self):
            self.items, gpu.capturing = gpu.capturing, None

        def replay(self):
            gpu.replay(self.items)

    def timed(run):
        begin = gpu.now
        run()
        gpu.is_idle = True
        return gpu.now - begin

    monkeypatch.setattr(gemm_timing, "_watch", lambda: contextlib.nullcontext(timed))
    monkeypatch.setattr(gemm_timing.time, "sleep", gpu.rest)
    monkeypatch.setattr(gemm_timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(gemm_timing.torch.cuda, "CUDAGraph", Graph)
    empty = types.SimpleNamespace(fill_=lambda value: gpu.launch(_EAGER_US))
    monkeypatch.setattr(gemm_timing.torch, "empty", lambda *args, **kwargs: empty)
    return gpu


KERNELS_US = {40.0: 2, 67.0: 1, 3000.0: 5}  # of a launch: copies of its operands


def time_all(gpu, turn):
    return time_in_turns([[lambda us=us: gpu.launch(us)] * n for us, n in KERNELS_US.items()], 3, turn)


def test_samples_in_a_row_have_no_pause_in_them(gpu):
    for timing, us in zip(time_all(gpu, RESTED_TURN), KERNELS_US, strict=True):
        found = timing.graph_us, timing.graph_p10_us, timing.graph_p90_us
        assert found == pytest.approx((us, us, us))


def test_samples_that_are_waited_for_begin_late(gpu):
    for timing, us in zip(time_all(gpu, SHORT_TURN), KERNELS_US, strict=True):
        assert timing.graph_us > us
        assert timing.graph_p10_us == pytest.approx(us)  # the first one comes behind the warm-up


@pytest.mark.parametrize(("in_a_row", "sizes"), [(True, [2, 32, 1, 3, 6, 1]), (False, [14, 1, 6, 1])])
def test_graphs_are_sized_by_replays_or_by_a_launch_from_python(gpu, monkeypatch, in_a_row, sizes):
    found = []
    graph = gemm_timing._graph

    def noted(launches):
        found.append(len(launches))
        return graph(launches)

    monkeypatch.setattr(gemm_timing, "_graph", noted)
    turn = Turn(25e3, 4, in_a_row=in_a_row)
    time_in_turns([[lambda: gpu.launch(40.0)] * 2, [lambda: gpu.launch(500.0)] * 3], 1, turn)
    assert found == sizes  # the last of each is one launch alone


@pytest.mark.parametrize("turn", [LONG_TURN, RESTED_TURN])
def test_a_turn_rests_and_warms_up_for_as_long_as_it_says(gpu, turn):
    time_in_turns([[lambda: gpu.launch(1000.0)]], 3, turn)
    others = 2 + 4 * turn.in_a_row + gemm_timing._COLD_SAMPLES  # of the graphs' making, and alone
    assert gpu.n_replays - others == 3 * (30 + 12)  # 60 ms of 2 ms each, the samples
    assert gpu.rested_us == [turn.rest_us] * 3
