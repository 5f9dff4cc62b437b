"""What the record of clocks keeps of a second of samples, and how it is shown."""

from __future__ import annotations

import pytest

from benchmarks.clocks import steps, table


def test_a_step_keeps_the_median_of_its_samples():
    assert steps([(2.0, 80.0), (4.0, 90.0), (24.9, 82.0), (25.0, 100.0), (80.0, 70.0)]) == [82.0, 100.0, 70.0]


@pytest.mark.parametrize(
    ("seen", "clock_and_power"),
    [
        (["1980 MHz, 300.10 W", "1455 MHz, 699.60 W", "1500 MHz, 65"], "1455 MHz | 700 W"),
        ([], "nan MHz | nan W"),
    ],
)
def test_the_table_shows_start_middle_and_extremes(seen, clock_and_power):
    us = [80.0, 81.0, 82.0, 83.0, 84.0, 90.0, 91.0, 92.0]
    rows = [{"name": "w4a4", "n_tokens": 128, "us": us, "clock_power": seen}]
    shown = table({"results": rows}).splitlines()[-1]
    assert shown == f"| w4a4 | 128 | 80.0 | 84.0 | 90.5 | 92.0 | {clock_and_power} |"
