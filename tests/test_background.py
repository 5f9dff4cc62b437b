"""Calls beside the caller: in order, none lost, and none of their errors."""

from __future__ import annotations

import threading

import pytest

from atomq.background import Background


def test_the_caller_goes_on_while_a_call_runs_and_waits_for_it_before_the_next():
    began, allowed, done = threading.Event(), threading.Event(), []

    def slow(number: int) -> None:
        began.set()
        assert allowed.wait(10)
        done.append(number)

    with Background() as background:
        background.run(slow, 1)
        assert began.wait(10)
        assert done == []
        allowed.set()
        background.run(done.append, 2)
        background.wait()
        assert done == [1, 2]
        background.run(slow, 3)
    assert done == [1, 2, 3]


def fail(message: str) -> None:
    raise OSError(message)


def test_an_error_shows_at_the_next_call_which_is_not_made():
    done: list[int] = []
    with Background() as background:
        background.run(fail, "the disk is full")
        with pytest.raises(OSError, match="the disk is full"):
            background.run(done.append, 1)
    assert done == []


def test_an_error_shows_at_the_end():
    with pytest.raises(OSError, match="the disk is full"), Background() as background:
        background.run(fail, "the disk is full")


def test_another_error_of_the_caller_counts_and_the_call_is_ended_all_the_same():
    done: list[int] = []
    allowed = threading.Event()

    def slow() -> None:
        assert allowed.wait(10)
        done.append(1)

    def interrupted() -> None:
        with Background() as background:
            background.run(slow)
            threading.Timer(0.05, allowed.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]
