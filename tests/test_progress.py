"""What a pass over the blocks tells of itself is passed on and timed."""

from __future__ import annotations

import atomq.progress
from atomq.progress import BlockTimes


def test_each_block_lasts_until_the_next_one_is_spoken_of(monkeypatch):
    clock = iter([10.0, 11.0, 11.5, 14.0, 14.25, 20.0, 21.0])
    monkeypatch.setattr(atomq.progress.time, "perf_counter", lambda: next(clock))
    told = []
    times = BlockTimes(lambda *args: told.append(args))
    steps = [
        (0.0, 3, "a"),
        (0.5, 3, "b"),
        (0.0, 3, "a"),
        (1.0, 3, "c"),
        (1.8, 3, "d"),
        (2.5, 3, "e"),
        (3, 3, "done"),
    ]
    for step in steps:
        times(*step)
    assert times.seconds == [4.0, 6.0, 1.0]
    assert told == steps
