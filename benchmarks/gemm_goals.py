"""What the kernels must reach, set for one H100, and whether records of `benchmarks.gemm` show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.cards import card

LARGE = ((28672, 8192), (8192, 28672))
SQUARE = ((8192, 8192),)
SMALL = ((4096, 4096),)
EXACT, PROGRESSIVE = "w4a4", "w4a4-progressive"
HUMMING_EXACT, HUMMING = "humming-w4a8-g128", ("humming-w4a8-g128", "humming-w4a8-channel")

Unit = Literal["us", "TOP/s", "x fp16", "x peers"]


@dataclass(frozen=True)
class Goal:
    """A bound on every case of some shapes and numbers of tokens, the worst of which counts.

    `peers` are those that a "x peers" bound is over: the fastest of them.
    """

    shapes: tuple[tuple[int, int], ...]
    tokens: range
    kernel: str
    unit: Unit
    must: float
    goal: float
    peers: tuple[str, ...] = ()


GOALS = (
    Goal(LARGE, range(1, 17), EXACT, "us", 52, 45),
    Goal(LARGE, range(1, 17), EXACT, "x peers", 1, 1, (HUMMING_EXACT,)),
    Goal(LARGE, range(1, 17), EXACT, "x peers", 0, 1, HUMMING),
    Goal(SMALL, range(1, 17), EXACT, "x fp16", 1.6, 2.2),
    Goal(SQUARE, range(1, 17), EXACT, "x fp16", 2.6, 3.0),
    Goal(LARGE, range(64, 65), EXACT, "us", 64, 50),
    Goal(LARGE, range(128, 129), EXACT, "us", 85, 60),
    Goal(LARGE, range(128, 129), EXACT, "x fp16", 2, 2),
    Goal(LARGE, range(256, 257), EXACT, "us", 160, 125),
    Goal(LARGE, range(256, 257), PROGRESSIVE, "us", 130, 105),
    Goal(LARGE + SQUARE, range(1024, 4097), EXACT, "TOP/s", 800, 1000),
    Goal(LARGE + SQUARE, range(1024, 4097), PROGRESSIVE, "TOP/s", 1150, 1350),
    Goal(LARGE + SQUARE, range(1024, 4097), PROGRESSIVE, "x peers", 1, 1, ("int8",)),
    Goal(LARGE + SQUARE, range(1024, 4097), PROGRESSIVE, "x peers", 0, 1, ("fp8", "humming-w4a8-channel")),
)
QUANTIZE_MUST, QUANTIZE_GOAL = 0.7, 0.85  # of a copy's bandwidth


def check_goals(*records: dict[str, Any]) -> str:
    """Every goal with the worst and the best figure of each record, side by side, as a Markdown table."""
    columns = "".join(f" {_source(record)}: worst | best | |" for record in records)
    lines = [
        f"| kernel, shapes, tokens | unit | must | goal |{columns}",
        "| --- | --- | --- | --- |" + " --- | --- | --- |" * len(records),
    ]
    for goal in GOALS:
        figures = [list(_values(goal, record["results"])) for record in records]
        bounds = (goal.must, goal.goal)
        if any(figures):
            lines.append(_line(_describe(goal), goal.unit, bounds, figures, goal.unit != "us"))
    widths = [r["n_channels"] for record in records for r in record.get("quantize", [])]
    for width in dict.fromkeys(widths):
        figures = [
            [r["of_copy"] for r in record.get("quantize", []) if r["n_channels"] == width]
            for record in records
        ]
        what = f"quantize_act, K = {width}, all variants"
        lines.append(_line(what, "of a copy", (QUANTIZE_MUST, QUANTIZE_GOAL), figures, True))
    return "\n".join(lines)


def _source(record: dict[str, Any]) -> str:
    commits = dict.fromkeys(run["commit"][:7] for run in record["runs"])
    return " ".join([card(record["gpu"]), *commits])


def _describe(goal: Goal) -> str:
    shapes = ", ".join(f"{n}x{k}" for n, k in goal.shapes)
    over = f" over {' and '.join(goal.peers)}" if goal.peers else ""
    first, last = goal.tokens.start, goal.tokens.stop - 1
    return f"{goal.kernel}, {shapes}, {first if first == last else f'{first}-{last}'}{over}"


def _values(goal: Goal, results: list[dict[str, Any]]) -> Iterator[float]:
    times = {
        (r["n_channels"], r["n_inputs"], r["n_tokens"], r["name"]): r["timing"]["graph_us"] for r in results
    }
    for (n, k, m, name), us in times.items():
        if name != goal.kernel or (n, k) not in goal.shapes or m not in goal.tokens:
            continue
        match goal.unit:
            case "us":
                yield us
            case "TOP/s":
                yield 2e-6 * m * n * k / us
            case _:
                peers = goal.peers or ("fp16",)
                rivals = [times[n, k, m, peer] for peer in peers if (n, k, m, peer) in times]
                if rivals:
                    yield min(rivals) / us


def _line(
    what: str, unit: str, bounds: tuple[float, float], figures: list[list[float]], larger_is_better: bool
) -> str:
    must, goal = bounds
    cells = [what, unit, f"{must or ''}", f"{goal}"]
    sign = 1 if larger_is_better else -1
    for values in figures:
        if not values:
            cells += [""] * 3
            continue
        worst, best = (
            sign * min(sign * value for value in values),
            sign * max(sign * value for value in values),
        )
        state = "missed" if sign * (worst - must) < 0 else "must" if sign * (worst - goal) < 0 else "goal"
        cells += [*(f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (worst, best)), state]
    return f"| {' | '.join(cells)} |"
