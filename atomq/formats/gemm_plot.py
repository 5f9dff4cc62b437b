"""The picture of `atomq bench-gemm`: speed-up over fp16 against the number of tokens, one panel per shape."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from atomq.formats.files import write_file


def draw_speedups(path: Path, results: list[dict[str, Any]], gpu: str) -> None:
    """Draw the results of a record (`Result.to_dict`) that have an fp16 time beside them. PNG or SVG."""
    shapes = list(dict.fromkeys((r["n_channels"], r["n_inputs"]) for r in results))
    n_columns = min(3, len(shapes))
    n_rows = -(-len(shapes) // n_columns)
    figure = Figure(figsize=(4.2 * n_columns, 3.2 * n_rows + 0.5), layout="constrained")
    axes = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
    for axis, shape in zip(axes, shapes, strict=False):
        of_shape = [r for r in results if (r["n_channels"], r["n_inputs"]) == shape]
        fp16 = {r["n_tokens"]: r["timing"]["graph_us"] for r in of_shape if r["name"] == "fp16"}
        for name in dict.fromkeys(r["name"] for r in of_shape):
            points = sorted(
                (r["n_tokens"], fp16[r["n_tokens"]] / r["timing"]["graph_us"])
                for r in of_shape
                if r["name"] == name and r["n_tokens"] in fp16
            )
            ours = not any(r["is_peer"] for r in of_shape if r["name"] == name)
            axis.plot(
                *zip(*points, strict=True), "o-" if ours else ".--", label=name, linewidth=1.8 if ours else 1
            )
        axis.set_xscale("log", base=2)
        axis.set_title(f"{shape[0]} x {shape[1]}", fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("times as fast as fp16", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    for axis in axes[len(shapes) :]:
        axis.remove()
    axes[0].legend(fontsize=7)
    figure.suptitle(f"GEMM on {gpu}, graph-batched launches, cold weights", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=130)
    write_file(path, buffer.getvalue())
