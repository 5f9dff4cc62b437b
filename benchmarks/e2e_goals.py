"""What decoding must reach, set for an H100, and whether records show it: attention, models, a checkpoint."""

from __future__ import annotations

from typing import Any

from benchmarks.cards import card

INT8, FLOAT16 = "int8 after RoPE", "float16"
Goals = dict[tuple[str, float, float], tuple[float, str]]
"""What, must and goal -> what was measured, and a word on it where there is one."""


def attention_goals(*records: dict[str, Any]) -> str:
    """Of every INT4 cache: its part of the floor, and its speed over the best float16 and over INT8."""
    return _side_by_side([(card(record["gpu"]), _attention(record)) for record in records])


def e2e_goals(*records: dict[str, Any]) -> str:
    """Llama-2-7B's: of the ratio at both floors with the largest batches, and times float16 at batch 32."""
    heads = [f"{card(record['gpu'])}, {record['kv_cache']['w4a4']}" for record in records]
    return _side_by_side(list(zip(heads, map(_e2e, records), strict=True)))


def _attention(record: dict[str, Any]) -> Goals:
    rows = {row["name"]: row for row in record["attention"]}
    best_float16 = min(row["us"] for name, row in rows.items() if FLOAT16 in name)
    found: Goals = {}
    for name, row in rows.items():
        if name.startswith("int4"):
            found[f"{name}: of its floor", 0.70, 0.85] = row["floor_fraction"], ""
            found[f"{name}: times the best float16", 2.5, 3.4] = best_float16 / row["us"], ""
            found[f"{name}: times INT8", 1.6, 1.6] = rows[INT8]["us"] / row["us"], ""
    return found


def _e2e(record: dict[str, Any]) -> Goals:
    found: Goals = {}
    bounds = {"fp16": (0.65, 0.85), "int8": (0.80, 0.92)}
    for row in record["ratios"]:
        baseline = row["baseline"]
        what = f"{row['scheme']} over {baseline}, batches {row['batch']} / {row['baseline_batch']}"
        invalid = "" if row["baseline_is_valid"] else "no valid baseline"
        if row["comparison"] == "largest batch" and baseline in bounds:
            of_floors = row["measured"] / row["at_floors"]
            found[f"{what}: of the floors' ratio", *bounds[baseline]] = of_floors, invalid
        elif row["comparison"] == "equal batch" and baseline == "fp16" and row["batch"] == 32:
            found[f"{what}: times", 2.2, 2.9] = row["measured"], invalid
    return found


def decode_goals(record: dict[str, Any]) -> str:
    """How far the kernels' perplexity lies from the simulation's, and where greedy texts part, by dtype.

    A near tie is a first difference that the simulation makes of its own rounding: of `nudged_gaps`, one for
    each time that its embeddings were off by a unit in the last place, one at least is not above zero.
    """
    base = record["ppl"]["simulation"]
    lines = ["| what | measured | must | goal | |", "| --- | --- | --- | --- | --- |"]
    for name, rows in record["greedy"].items():
        off = abs(record["ppl"][name] / base - 1)
        state = "goal" if off <= 0.003 else "missed"
        lines.append(
            f"| perplexity of the kernels, {name}, off by | {100 * off:.2f} % | 0.3 % | 0.3 % | {state} |"
        )
        parted = [row.get("nudged_gaps") for row in rows if "simulation_gap" in row]
        if None in parted:  # a record of before
            continue
        n_held = len(rows) - sum(min(gaps) > 0 for gaps in parted)
        lines.append(
            f"| greedy texts, {name}, that stay equal or part at a near tie | {n_held} of {len(rows)} | "
            f"{len(rows)} | {len(rows)} | {'goal' if n_held == len(rows) else 'missed'} |"
        )
    return "\n".join(lines)


def _side_by_side(records: list[tuple[str, Goals]]) -> str:
    lines = [
        f"| what | must | goal |{''.join(f' {head} | |' for head, _ in records)}",
        "| --- | --- | --- |" + " --- | --- |" * len(records),
    ]
    for key in dict.fromkeys(key for _, found in records for key in found):
        what, must, goal = key
        cells = [_cells(*found[key], must, goal) if key in found else "  |  " for _, found in records]
        lines.append(f"| {what} | {must:.2f} | {goal:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(value: float, state: str, must: float, goal: float) -> str:
    return f"{value:.2f} | {state or ('missed' if value < must else 'must' if value < goal else 'goal')}"
