"""What decoding must reach on one H100, and whether records show it: attention, models, a checkpoint."""

from __future__ import annotations

from typing import Any

INT8, FLOAT16 = "int8 after RoPE", "float16"
_HEAD = ["| what | measured | must | goal | |", "| --- | --- | --- | --- | --- |"]


def attention_goals(record: dict[str, Any]) -> str:
    """Of every INT4 cache: its part of the floor, and its speed over the best float16 and over INT8."""
    rows = {row["name"]: row for row in record["attention"]}
    best_float16 = min((row for name, row in rows.items() if FLOAT16 in name), key=lambda row: row["us"])
    lines = list(_HEAD)
    for name, row in rows.items():
        if not name.startswith("int4"):
            continue
        lines.append(_line(f"{name}: of its floor", row["floor_fraction"], 0.70, 0.85))
        over = f"{name}: times {best_float16['name']}"
        lines.append(_line(over, best_float16["us"] / row["us"], 2.5, 3.4))
        lines.append(_line(f"{name}: times INT8", rows[INT8]["us"] / row["us"], 1.6, 1.6))
    return "\n".join(lines)


def e2e_goals(record: dict[str, Any]) -> str:
    """Llama-2-7B's: of the ratio at both floors with the largest batches, and times float16 at batch 32."""
    lines = list(_HEAD)
    bounds = {"fp16": (0.65, 0.85), "int8": (0.80, 0.92)}
    for row in record["ratios"]:
        baseline = row["baseline"]
        what = f"{row['scheme']} over {baseline}, batches {row['batch']} / {row['baseline_batch']}"
        invalid = "" if row["baseline_is_valid"] else "no valid baseline"
        if row["comparison"] == "largest batch" and baseline in bounds:
            of_floors = row["measured"] / row["at_floors"]
            lines.append(_line(f"{what}: of the floors' ratio", of_floors, *bounds[baseline], invalid))
        elif row["comparison"] == "equal batch" and baseline == "fp16" and row["batch"] == 32:
            lines.append(_line(f"{what}: times", row["measured"], 2.2, 2.9, invalid))
    return "\n".join(lines)


def decode_goals(record: dict[str, Any]) -> str:
    """How far the kernels' perplexity lies from the simulation's, for each dtype of activations."""
    base = record["ppl"]["simulation"]
    lines = list(_HEAD)
    for name in record["greedy"]:
        off = abs(record["ppl"][name] / base - 1)
        state = "goal" if off <= 0.003 else "missed"
        lines.append(
            f"| perplexity of the kernels, {name}, off by | {100 * off:.2f} % | 0.3 % | 0.3 % | {state} |"
        )
    return "\n".join(lines)


def _line(what: str, value: float, must: float, goal: float, state: str = "") -> str:
    state = state or ("missed" if value < must else "must" if value < goal else "goal")
    return f"| {what} | {value:.2f} | {must:.2f} | {goal:.2f} | {state} |"
