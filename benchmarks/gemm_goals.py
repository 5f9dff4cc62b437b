"""What the kernels must reach on one H100, and whether a record of `benchmarks.gemm` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

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


def check_goals(record: dict[str, Any]) -> str:
    """Every goal with the worst and the best figure of the record, as a Markdown table."""
    lines = [
        "| kernel, shapes, tokens | unit | worst | best | must | goal | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [line for goal in GOALS if (line := _check(goal, record["results"]))]
    for n_channels in dict.fromkeys(r["n_channels"] for r in record.get("quantize", [])):
        values = [r["of_copy"] for r in record["quantize"] if r["n_channels"] == n_channels]
        what = f"quantize_act, K = {n_channels}, all variants"
        lines.append(_line(what, "of a copy", min(values), max(values), QUANTIZE_MUST, QUANTIZE_GOAL, True))
    return "\n".join(lines)


def _check(goal: Goal, results: list[dict[str, Any]]) -> str | None:
    values = list(_values(goal, results))
    if not values:
        return None
    larger_is_better = goal.unit != "us"
    order: tuple[Callable[[list[float]], float], Callable[[list[float]], float]] = (
        (min, max) if larger_is_better else (max, min)
    )
    shapes = ", ".join(f"{n}x{k}" for n, k in goal.shapes)
    over = f" over {' and '.join(goal.peers)}" if goal.peers else ""
    what = f"{goal.kernel}, {shapes}, {goal.tokens.start}-{goal.tokens.stop - 1}{over}"
    return _line(what, goal.unit, order[0](values), order[1](values), goal.must, goal.goal, larger_is_better)


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
    what: str, unit: str, worst: float, best: float, must: float, goal: float, larger_is_better: bool
) -> str:
    sign = 1 if larger_is_better else -1
    state = "missed" if sign * (worst - must) < 0 else "must" if sign * (worst - goal) < 0 else "goal"
    figures = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (worst, best))
    return f"| {what} | {unit} | {' | '.join(figures)} | {must or ''} | {goal} | {state} |"
