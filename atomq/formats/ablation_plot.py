"""The picture of `atomq ablate`: a bar for each row's perplexity, from the float model's up."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atomq.formats.files import write_file


def draw_ladder(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draw rows with a "name" and a "ppl", on a logarithmic scale. PNG or SVG."""
    figure = Figure(figsize=(8, 0.32 * len(rows) + 1.3), layout="constrained")
    axis = figure.subplots()
    values = [row["ppl"] for row in rows]
    lowest, span = min(values), max(values) / min(values)
    bars = axis.barh([row["name"] for row in rows], values, color="#4878a8")
    axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(lowest / span**0.05 / 1.01, max(values) * span**0.12 * 1.05)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.invert_yaxis()  # the first step on top
    axis.set_xlabel("perplexity, on a logarithmic scale", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=130)
    write_file(path, buffer.getvalue())
