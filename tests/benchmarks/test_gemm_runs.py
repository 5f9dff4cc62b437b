"""What stays of a GEMM record when a part of it is measured anew."""

from __future__ import annotations

import pytest

from benchmarks.gemm_runs import NOTHING, without


def record():
    runs = [{"commit": "a", "tokens": [1, 64, 128]}, {"commit": "b", "tokens": [256]}]
    return {"gpu": "H100", "runs": runs, "results": [{"n_tokens": n} for n in (1, 64, 128, 256)]}


def test_every_result_that_stays_has_the_run_that_measured_it():
    runs, results = without(record(), [128, 256], "H100")
    assert runs == [{"commit": "a", "tokens": [1, 64]}]
    assert results == [{"n_tokens": 1}, {"n_tokens": 64}]


def test_results_of_two_gpus_are_not_mixed():
    with pytest.raises(ValueError, match="the record is of H100 and this is H200; measure all tokens anew"):
        without(record(), [128, 256], "H200")
    assert without(record(), [1, 64, 128, 256], "H200") == ([], [])
    assert without(NOTHING, [1], "H200") == ([], [])
