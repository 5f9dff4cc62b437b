"""Tables of docs/kernels.md from records of `atomq bench-e2e`."""

from __future__ import annotations

from typing import Any

_GIB = 2**30


def steps_table(record: dict[str, Any]) -> str:
    """One row for each step that was measured."""
    measured, layers = record["n_layers_measured"], record["n_layers"]
    scaling = "" if measured == layers else f"; {measured} of {layers} layers measured and scaled"
    lines = [
        f"{record['model']}, {record['context']} tokens, {record['memory_gib']:g} GiB{scaling}; floors by "
        f"{record['read_gb_per_s'] / 1000:.2f} TB/s, measured.",
        "",
        "| comparison | scheme | batch | ms a step | tokens/s | of its floor | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for step in record["steps"]:
        size = step["memory_bytes"] / _GIB
        outside = " (over the budget)" if size > record["memory_gib"] else ""
        lines.append(
            f"| {step['comparison']} | {step['scheme']} | {step['batch']} | {1e-3 * step['step_us']:.2f} | "
            f"{step['tokens_per_s']:.0f} | {100 * step['floor_fraction']:.0f} % | {size:.1f}{outside} |"
        )
    return "\n".join(lines)


def ratios_table(record: dict[str, Any]) -> str:
    """Our schemes over each baseline, measured and at both floors."""
    lines = [
        "| comparison | scheme | over | batches | measured | at both floors | measured of that | baseline |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["ratios"]:
        validity = "" if row["baseline_is_valid"] else "no valid baseline: "
        lines.append(
            f"| {row['comparison']} | {row['scheme']} | {row['baseline']} | "
            f"{row['batch']} / {row['baseline_batch']} | {row['measured']:.2f}x | {row['at_floors']:.2f}x | "
            f"{100 * row['measured'] / row['at_floors']:.0f} % | "
            f"{validity}{100 * row['baseline_floor_fraction']:.0f} % of its floor |"
        )
    return "\n".join(lines)


def attention_table(record: dict[str, Any]) -> str:
    """Decode attention alone, and how much slower the others are than the first."""
    rows = record["attention"]
    lines = [
        f"Batch {rows[0]['batch']}, {rows[0]['context']} tokens, {rows[0]['n_heads']} heads of "
        f"{rows[0]['head_dim']} in the cache, {rows[0]['group']} query heads for each.",
        "",
        "| cache | us | of its floor | times the first |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['us']:.1f} | {100 * row['floor_fraction']:.0f} % | "
            f"{row['us'] / rows[0]['us']:.2f}x |"
        )
    return "\n".join(lines)
