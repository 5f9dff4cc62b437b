"""What `atomq bench-e2e` shows of its record: tables for people."""

from __future__ import annotations

from typing import Any

from atomq.commands import console

_GIB = 2**30
_PAPER = (
    "Atom's own figures, 7.7x of FP16 and 2.5x of INT8, are of an RTX 4090, each scheme at its largest batch "
    "(8 to 64), by a benchmark with one layer's KV cache."
)


def print_record(record: dict[str, Any]) -> None:
    """Print every part that the record has."""
    _print_steps(record)
    _print_ratios(record["ratios"])
    prefill = record.get("prefill", {})
    _print_shares(
        [(step["scheme"], str(step["batch"]), step["shares"]) for step in record["steps"] if step["shares"]]
        + [(name, "prompt", times["shares"]) for name, times in prefill.items() if times["shares"]]
    )
    if prefill:
        rows = [
            [name, *(f"{1e-3 * times[key]:.1f}" for key in ("graph_us", "launched_us"))]
            for name, times in prefill.items()
        ]
        columns = ["scheme", "ms as a graph", "ms from Python"]
        console.print_table(f"a prompt of {record['context']} tokens", columns, rows)
    if "attention" in record:
        rows = [
            [r["name"], f"{r['us']:.1f}", f"{100 * r['floor_fraction']:.0f} %"] for r in record["attention"]
        ]
        console.print_table("decode attention, batch 128", ["cache", "us", "of floor"], rows)
    if "trace" in record:
        _print_trace(record["trace"])


def _print_steps(record: dict[str, Any]) -> None:
    title = f"{record['model']}, {record['context']} tokens, {record['gpu']}"
    measured, n_layers = record["n_layers_measured"], record["n_layers"]
    if measured < n_layers:
        title += (
            f"; {measured} of {n_layers} layers measured, "
            f"step = head + (measured - head) x {n_layers} / {measured}"
        )
    rows = [
        [
            step["comparison"],
            step["scheme"],
            str(step["batch"]),
            f"{1e-3 * step['step_us']:.2f}",
            f"{step['tokens_per_s']:.0f}",
            f"{100 * step['floor_fraction']:.0f} %",
            _memory(step["memory_bytes"] / _GIB, record["memory_gib"]),
        ]
        for step in record["steps"]
    ]
    columns = ["comparison", "scheme", "batch", "ms a step", "tokens/s", "of floor", "GiB"]
    console.print_table(title, columns, rows, n_texts=2)
    for name, cache in record["kv_cache"].items():
        console.print_line(f"KV cache of {name}: {cache}")


def _memory(gib: float, budget: float) -> str:
    return f"{gib:.1f}" if gib <= budget else f"{gib:.1f}, over {budget:g}"


def _print_ratios(ratios: list[dict[str, Any]]) -> None:
    rows = [
        [
            r["comparison"],
            r["scheme"],
            r["baseline"],
            f"{r['batch']} / {r['baseline_batch']}",
            f"{r['measured']:.2f}x",
            f"{r['at_floors']:.2f}x",
            f"{100 * r['measured'] / r['at_floors']:.0f} %",
            f"{'' if r['baseline_is_valid'] else 'no valid baseline: '}"
            f"{100 * r['baseline_floor_fraction']:.0f} % of its floor",
        ]
        for r in ratios
    ]
    columns = ["comparison", "scheme", "over", "batches", "measured", "at both floors", "of that", "baseline"]
    console.print_table("throughput over baselines", columns, rows, n_texts=3)
    if ratios:
        console.print_line(_PAPER)


def _print_shares(measured: list[tuple[str, str, dict[str, float]]]) -> None:
    """Of schemes at a batch, or of a prompt, by kind of work."""
    if not measured:
        return
    rows = [
        [scheme, batch, *(f"{1e-3 * us:.2f}" for us in shares.values())] for scheme, batch, shares in measured
    ]
    columns = ["scheme", "batch", *measured[0][2]]
    console.print_table("where the time goes, ms under CUDA's trace", columns, rows)


def _print_trace(trace: dict[str, dict[str, Any]]) -> None:
    rows = [
        [
            name,
            str(t["n_rows"]),
            f"{t['tokens_per_s']:.0f}",
            f"{t['request_p50_s']:.2f} / {t['request_p99_s']:.2f}",
            f"{t['token_p50_ms']:.1f} / {t['token_p99_ms']:.1f}",
        ]
        for name, t in trace.items()
    ]
    columns = ["scheme", "rows", "tokens/s", "request p50 / p99, s", "token p50 / p99, ms"]
    console.print_table("continuous batching", columns, rows)
