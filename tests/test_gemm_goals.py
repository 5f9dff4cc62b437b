"""The table of goals: the worst case of a goal's shapes and tokens counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "gemm_goals.py"


def load_goals():
    import sys

    spec = importlib.util.spec_from_file_location("gemm_goals", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gemm_goals"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def result(name, n, k, m, us):
    return {"name": name, "n_channels": n, "n_inputs": k, "n_tokens": m, "timing": {"graph_us": us}}


def test_the_worst_case_decides():
    results = [
        result("w4a4", 28672, 8192, 1, 44.0),
        result("w4a4", 28672, 8192, 16, 50.0),
        result("w4a4", 28672, 8192, 32, 99.0),  # in no goal
        result("humming-w4a8-g128", 28672, 8192, 1, 57.0),
        result("humming-w4a8-g128", 28672, 8192, 16, 49.0),
        result("w4a4-progressive", 8192, 8192, 1024, 100.0),
        result("int8", 8192, 8192, 1024, 150.0),
        result("w4a4", 4096, 4096, 1, 10.0),
        result("fp16", 4096, 4096, 1, 17.0),
    ]
    quantize = [{"n_channels": 4096, "of_copy": 0.75}, {"n_channels": 4096, "of_copy": 0.9}]
    lines = load_goals().check_goals({"results": results, "quantize": quantize}).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    found = {(row[0].split(",")[0], row[1], row[0].partition(" over ")[2]): row[2:] for row in rows}
    assert found["w4a4", "us", ""] == ["50", "44", "52", "45", "must"]
    assert found["w4a4", "x peers", "humming-w4a8-g128"][-1] == "missed"
    assert found["w4a4-progressive", "x peers", "int8"] == ["1.5", "1.5", "1", "1", "goal"]
    assert found["w4a4-progressive", "TOP/s", ""][:2] == ["1374", "1374"]
    assert found["w4a4", "x fp16", ""] == ["1.7", "1.7", "1.6", "2.2", "must"]
    assert found["quantize_act", "of a copy", ""] == ["0.75", "0.9", "0.7", "0.85", "must"]
