"""docs/kernels.md holds what the records say, and the tables compute what they claim."""

from __future__ import annotations

import json

import pytest

from benchmarks.gemm_tables import (
    few_token_table,
    limits_table,
    tile_steps_table,
    tiles_table,
    tuning_table,
)
from benchmarks.kernel_docs import PAGE, RESULTS, TABLES, fill


def result(n_tokens: int, us: float, name: str = "w4a4"):
    shape = {"n_channels": 8192, "n_inputs": 8192, "n_tokens": n_tokens}
    return {"name": name, **shape, "timing": {"graph_us": us}, "tops": 1.0}


def test_the_page_holds_the_tables_of_the_newest_records():
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page) == page, "run python -m benchmarks.kernel_docs --write"
    recorded = [
        name
        for name, (kinds, _) in TABLES.items()
        if all(any(RESULTS.glob(f"????-??-??-{kind}.json")) for kind in kinds.split())
    ]
    assert len(recorded) > 8
    assert all(f"<!-- table: {name} -->" in page for name in recorded)


def test_a_table_is_replaced_and_the_rest_stays(tmp_path):
    for date, us in (("2026-01-01", 99.0), ("2026-01-02", 20.0)):
        record = {"results": [result(1, us)]}
        (tmp_path / f"{date}-h200-gemm.json").write_text(json.dumps(record))
    page = fill("before\n<!-- table: gemm -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert page.startswith("before\n")
    assert page.endswith("| 8192x8192 | 1 | 20.0 (1) |\n<!-- end -->\nafter\n")
    assert "old" not in page
    with pytest.raises(ValueError, match="known are gemm"):
        fill("<!-- table: gem -->\n<!-- end -->", tmp_path)


def test_the_limit_is_the_largest_floor():
    rows = limits_table({"results": [result(1, 14.0), result(2, 40.0), result(4096, 650.0)]}).splitlines()[2:]
    # 8192 * (8064 / 2 + 128 + 128) + 8192 + 16384 bytes at 3.0 TB/s: 11.7 us
    assert "| 14.0 | 11.7 | 0.1 | 0.1 | bytes | 84 % |" in rows[0]
    assert "| latencies |" in rows[1]
    # products 2 * 4096 * 8192^2 / 1979e12 = 277.8 us, promotion 3 * 4096 * 8192 * 64 / 29.65e12 = 217.3 us
    assert "| 277.8 | 217.3 | products and promotion | 76 % |" in rows[2]


def test_a_step_says_what_it_brought():
    case = {"case": "8192x8192 M=1", "before_us": 17.0, "after_us": 15.06}
    record = {"steps": [{"step": "overlap", "expected": "2 us", "cases": [case]}]}
    assert tuning_table(record).splitlines()[2] == "| overlap | 2 us | 8192x8192 M=1 17.0 -> 15.1 |"


def test_the_tile_that_was_chosen_stands_out():
    variants = [
        {"tile": "1x2 two (landed)", "us": 44.04},
        {"tile": "2x2", "us": 33.5},
        {"tile": "4x1", "us": 39.0},
    ]
    cell = {"n": 8192, "k": 28672, "mode": "w4a4-progressive", "tokens": 16, "variants": variants}
    row = few_token_table({"cells": [cell]}).splitlines()[2]
    assert row == "| 8192x28672 | progressive | 16 | **44.0** |  | 33.5 |  |  |"


def test_a_tile_is_shown_beside_the_one_before_and_the_fastest():
    cell = {
        "n": 4096,
        "k": 4096,
        "tokens": 147,
        "mode": "w4a4",
        "before": {"tile": "128/64 2x1", "us": 18.02},
        "now": {"tile": "80/80 1x1x2", "us": 10.9},
        "candidates": [{"tile": "96/48 1x1x2", "us": 11.8}, {"tile": "80/80 1x1x2", "us": 10.8}],
    }
    unknown = cell | {"now": {"tile": "80/80 1x1x2", "us": None}}
    kept = cell | {"tokens": 64, "now": cell["before"]}
    rows = tiles_table({"cells": [unknown, cell, kept]}).splitlines()[2:]
    shown = "18.0 (128/64 2x1) | 10.9 (80/80 1x1x2) | 10.8 (80/80 1x1x2)"
    assert rows == [f"| 4096x4096 | exact | 147 | {shown} |"]


def test_steps_of_the_second_run_are_shown():
    step = {"scheme": "w4a4", "batch": 32, "what": "now", "ms": 3.631, "p10_ms": 3.523, "run": 2}
    rows = tile_steps_table({"steps": [step | {"run": 1}, step]}).splitlines()[2:]
    assert rows == ["| w4a4 | 32 | now | 3.63 | 3.52 |"]
