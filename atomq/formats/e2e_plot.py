"""The picture of `atomq bench-e2e`: throughput against the time of a step, one panel for each comparison."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atomq.formats.files import write_file


def draw_throughput(path: Path, steps: list[dict[str, Any]], title: str) -> None:
    """Draw the steps of a record (`Step.to_dict`), labelled by their batches. PNG or SVG."""
    comparisons = list(dict.fromkeys(step["comparison"] for step in steps))
    figure = Figure(figsize=(5.2 * len(comparisons), 4.2), layout="constrained")
    axes = figure.subplots(1, len(comparisons), squeeze=False)[0]
    for axis, comparison in zip(axes, comparisons, strict=True):
        shown = [step for step in steps if step["comparison"] == comparison]
        for name in dict.fromkeys(step["scheme"] for step in shown):
            own = sorted((s for s in shown if s["scheme"] == name), key=lambda s: int(s["batch"]))
            times, rates = [1e-3 * s["step_us"] for s in own], [1e-3 * s["tokens_per_s"] for s in own]
            axis.plot(times, rates, "o-" if name.startswith("w4a4") else ".--", label=name)
            for step, x, y in zip(own, times, rates, strict=True):
                axis.annotate(
                    str(step["batch"]), (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7
                )
        axis.set_title(comparison, fontsize=9)
        axis.set_xlabel("ms per step", fontsize=8)
        axis.set_ylabel("thousand tokens per second", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=130)
    write_file(path, buffer.getvalue())
