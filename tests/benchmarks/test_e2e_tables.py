"""Tables of bench-e2e's records say what the records do."""

from __future__ import annotations

from benchmarks.e2e_tables import (
    attention_table,
    e2e_tables,
    ratios_table,
    steps_table,
    trace_table,
    variants_table,
)

RECORD = {
    "model": "llama-2-7b",
    "context": 1024,
    "memory_gib": 24.0,
    "n_layers": 32,
    "n_layers_measured": 8,
    "read_gb_per_s": 3010.0,
    "steps": [
        {
            "comparison": "equal batch",
            "scheme": "fp16",
            "batch": 32,
            "step_us": 11000.0,
            "tokens_per_s": 2909.1,
            "floor_fraction": 0.91,
            "memory_bytes": 30 * 2**30,
            "shares": {"attention": 7000.0, "products": 2800.0, "launches": 200.0},
        }
    ],
    "kv_cache": {"fp16": "16 bits, K after RoPE"},
    "prefill": {
        "fp16": {
            "graph_us": 31000.0,
            "launched_us": 50500.0,
            "shares": {"attention": 2500.0, "products": 22500.0, "launches": 0.0},
        }
    },
    "trace": {
        "fp16": {
            "n_requests": 64,
            "n_rows": 18,
            "tokens_per_s": 1234.5,
            "request_p50_s": 1.5,
            "request_p99_s": 3.0,
            "token_p50_ms": 9.0,
            "token_p99_ms": 12.0,
        }
    },
    "ratios": [
        {
            "comparison": "equal batch",
            "scheme": "w4a4",
            "baseline": "fp16",
            "batch": 32,
            "baseline_batch": 32,
            "measured": 2.5,
            "at_floors": 3.125,
            "baseline_is_valid": False,
            "baseline_floor_fraction": 0.61,
        }
    ],
    "attention": [
        {"name": name, "batch": 128, "context": 1024, "n_heads": 8, "group": 4, "head_dim": 128}
        | {"us": us, "floor_fraction": 0.9}
        for name, us in (("int4", 50.0), ("float16", 175.0))
    ],
}


def test_steps_show_scaling_and_what_is_over_the_budget():
    table = steps_table(RECORD)
    assert "8 of 32 layers measured and scaled; floors by 3.01 TB/s" in table
    assert "| equal batch | fp16 | 32 | 11.00 | 2909 | 91 % | 30.0 (over the budget) |" in table
    assert "scaled" not in steps_table({**RECORD, "n_layers_measured": 32})


def test_ratios_stand_beside_those_of_the_floors():
    table = ratios_table(RECORD)
    assert "| equal batch | w4a4 | fp16 | 32 / 32 | 2.50x | 3.12x | 80 % |" in table
    assert "| no valid baseline: 61 % of its floor |" in table


def test_attention_is_compared_with_the_first():
    table = attention_table(RECORD)
    assert table.startswith("Batch 128, 1024 tokens, 8 heads of 128 in the cache, 4 query heads for each.")
    assert "| float16 | 175.0 | 90 % | 3.50x |" in table


def test_all_of_a_shape_says_what_limits_it():
    tables = e2e_tables(RECORD)
    assert "KV caches: fp16 16 bits, K after RoPE." in tables
    assert "| fp16 | 32 | 70 % | 28 % | 2 % | 10.00 |" in tables
    assert "| fp16 | prompt | 10 % | 90 % | 0 % | 25.00 |" in tables
    assert "| fp16 | 31.0 | 50.5 |" in tables
    without = {**RECORD, "steps": [{**RECORD["steps"][0], "shares": None}]}
    assert "70 %" not in e2e_tables(without)


def test_a_trace_names_its_workload():
    table = trace_table(RECORD)
    assert table.startswith("llama-2-7b, 24 GiB, 64 requests.")
    assert "| fp16 | 18 | 1234 | 1.50 / 3.00 | 9.0 / 12.0 |" in table


def test_kernels_of_a_step_by_what_they_do():
    profile = {"scheme": "w4a4", "batch": 32, "n_layers": 4, "n_launches": 54, "graph_us": 687.4}
    record = {**RECORD, "profile": [{**profile, "kernel_us": {"attention": 230.8, "products": 385.9}}]}
    assert "| w4a4 | 32 | 54 | 687 | 231 | 386 |" in e2e_tables(record)
    record["prefill"] = {"fp16": {"graph_us": None, "launched_us": 50500.0}}
    assert "| fp16 |  | 50.5 |" in e2e_tables(record)


def test_variants_that_were_not_tried_stay_empty():
    tried = {"name": "int4", "us": 63.5, "launch": {"warps": 4, "stages": 4, "min_ctas": 4}}
    other = {"name": "int8", "us": 99.8, "launch": {"warps": 2, "stages": 6, "min_ctas": 8}}
    splits = {"int4": {"1": 63.4, "2": 92.1, "4": 116.5}}
    table = variants_table({"variants": {"rows": [tried, other], "splits_us": splits}})
    assert "| cache | 4 x 4, 4 | 2 x 6, 8 | whole | 2 | 4 |" in table
    assert "| int4 | 64 |  | 63 | 92 | 116 |" in table
