"""The picture of `atomq ablate`: a bar for each row's perplexity on each text, from the float model's up."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from atomq.formats.files import write_file


def draw_ladder(path: Path, rows: list[dict[str, Any]], title: str, texts: dict[str, str]) -> None:
    """Draw rows with a "name", on a logarithmic scale. PNG or SVG.

    Args:
        texts: key of a row's perplexity -> the text that it was taken on; each gets a panel.
    """
    figure = Figure(figsize=(5 + 3 * len(texts), 0.32 * len(rows) + 1.5), layout="constrained")
    panels = figure.subplots(1, len(texts), sharey=True, squeeze=False)[0]
    for axis, (key, text) in zip(panels, texts.items(), strict=True):
        _draw_text(axis, [row["name"] for row in rows], [row[key] for row in rows])
        axis.set_title(text, fontsize=8)
    panels[0].invert_yaxis()  # the first step on top
    figure.supxlabel("perplexity, on a logarithmic scale", fontsize=8)
    figure.suptitle(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=130)
    write_file(path, buffer.getvalue())


def _draw_text(axis: Axes, names: list[str], values: list[float]) -> None:
    lowest, span = min(values), max(values) / min(values)
    bars = axis.barh(names, values, color="#4878a8")
    axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=7)
    axis.set_xscale("log")
    axis.set_xlim(lowest / span**0.05 / 1.01, max(values) * span**0.16 * 1.05)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("")
    axis.tick_params(labelsize=7)
    axis.grid(axis="x", alpha=0.3)
