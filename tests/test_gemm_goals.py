"""The table of goals: the worst case of a goal's shapes and tokens counts."""

from __future__ import annotations

from benchmarks.gemm_goals import check_goals


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
    records = [
        {
            "gpu": "NVIDIA H100 80GB HBM3",
            "runs": [{"commit": "a" * 40}],
            "results": results,
            "quantize": quantize,
        },
        {
            "gpu": "NVIDIA H200",
            "runs": [{"commit": "b" * 40}],
            "results": [result("w4a4", 28672, 8192, 8, 30.0)],
        },
    ]
    lines = check_goals(*records).splitlines()
    assert "| H100 aaaaaaa: worst | best | | H200 bbbbbbb: worst | best | |" in lines[0]
    assert all(line.count("|") == 11 for line in lines)
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]
    found = {(row[0].split(",")[0], row[1], row[0].partition(" over ")[2]): row[2:] for row in rows}
    assert found["w4a4", "us", ""] == ["52", "45", "50", "44", "must", "30", "30", "goal"]
    assert found["w4a4", "x peers", "humming-w4a8-g128"][4:] == ["missed", "", "", ""]
    assert found["w4a4-progressive", "x peers", "int8"][:5] == ["1", "1", "1.5", "1.5", "goal"]
    assert found["w4a4-progressive", "TOP/s", ""][2:4] == ["1374", "1374"]
    assert found["w4a4", "x fp16", ""][:5] == ["1.6", "2.2", "1.7", "1.7", "must"]
    assert found["quantize_act", "of a copy", ""][:5] == ["0.7", "0.85", "0.75", "0.9", "must"]
