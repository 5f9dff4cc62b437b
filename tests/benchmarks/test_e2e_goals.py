"""The tables of goals for decoding."""

from __future__ import annotations

from benchmarks.e2e_goals import attention_goals, decode_goals, e2e_goals


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_attention_is_held_against_the_faster_of_the_float16_caches():
    names = {"int4 x": (200.0, 0.8), "int8 after RoPE": (310.0, 1.0), "float16": (700.0, 1.0)}
    names["torch cudnn, float16"] = (640.0, 0.9)
    rows = [{"name": name, "us": us, "floor_fraction": part} for name, (us, part) in names.items()]
    found = cells(attention_goals({"gpu": "NVIDIA H100", "attention": rows}))
    assert found == {
        "int4 x: of its floor": ["0.70", "0.85", "0.80", "must"],
        "int4 x: times the best float16": ["2.50", "3.40", "3.20", "must"],
        "int4 x: times INT8": ["1.60", "1.60", "1.55", "missed"],
    }


def test_cards_stand_side_by_side_and_what_one_did_not_run_stays_empty():
    rows = [
        {"name": name, "us": us, "floor_fraction": 0.9}
        for name, us in (("int4 x", 100.0), ("int4 y", 400.0), ("int8 after RoPE", 200.0), ("float16", 400.0))
    ]
    h100 = {"gpu": "NVIDIA H100 80GB HBM3", "attention": [rows[0], *rows[2:]]}
    table = attention_goals(h100, {"gpu": "NVIDIA H200", "attention": rows})
    assert table.splitlines()[0] == "| what | must | goal | H100 | | H200 | |"
    found = cells(table)
    assert found["int4 x: times INT8"] == ["1.60", "1.60", "2.00", "goal", "2.00", "goal"]
    assert found["int4 y: times INT8"] == ["1.60", "1.60", "", "", "0.50", "missed"]


def ratio(comparison, baseline, batches, measured, at_floors, valid=True):
    return {
        "comparison": comparison,
        "scheme": "w4a4",
        "baseline": baseline,
        "batch": batches[0],
        "baseline_batch": batches[1],
        "measured": measured,
        "at_floors": at_floors,
        "baseline_is_valid": valid,
    }


def test_throughput_is_held_against_the_floors_and_invalid_baselines_meet_no_goal():
    ratios = [
        ratio("equal batch", "fp16", (8, 8), 9.0, 9.0),
        ratio("equal batch", "fp16", (32, 32), 2.5, 3.6),
        ratio("equal batch", "int8", (32, 32), 2.5, 3.6),
        ratio("largest batch", "fp16", (147, 21), 6.3, 7.0),
        ratio("largest batch", "int8", (147, 64), 2.2, 2.3, valid=False),
        ratio("largest batch", "w4a16", (147, 39), 2.2, 2.3),
    ]
    table = e2e_goals({"gpu": "NVIDIA H200", "kv_cache": {"w4a4": "4 bits"}, "ratios": ratios})
    assert table.startswith("| what | must | goal | H200, 4 bits | |")
    assert cells(table) == {
        "w4a4 over fp16, batches 32 / 32: times": ["2.20", "2.90", "2.50", "must"],
        "w4a4 over fp16, batches 147 / 21: of the floors' ratio": ["0.65", "0.85", "0.90", "goal"],
        "w4a4 over int8, batches 147 / 64: of the floors' ratio": [
            "0.80",
            "0.92",
            "0.96",
            "no valid baseline",
        ],
    }


def test_perplexity_may_lie_on_either_side_and_texts_may_part_at_near_ties():
    equal, tie, decided = (
        {},
        {"simulation_gap": 0.2, "nudged_gaps": [0.4, -0.1]},
        {"simulation_gap": 0.2, "nudged_gaps": [0.4, 0.1]},
    )
    record = {
        "ppl": {"simulation": 25.0, "float32": 24.95, "float16": 25.1},
        "greedy": {"float32": [equal, tie], "float16": [tie, decided, equal]},
    }
    found = list(cells(decode_goals(record)).values())
    assert [row[0] for row in found] == ["0.20 %", "2 of 2", "0.40 %", "2 of 3"]
    assert [row[-1] for row in found] == ["goal", "goal", "missed", "missed"]
