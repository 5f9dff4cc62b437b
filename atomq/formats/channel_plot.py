"""The picture of `atomq calibrate`: magnitudes of all channels of every linear group, outliers marked."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib as mpl
from matplotlib.figure import Figure

from atomq.numerics.channels import ChannelStatistics

N_BLOCKS_SHOWN = 6


def draw_channels(
    statistics: Mapping[str, ChannelStatistics], metric: str, n_outliers: int, title: str, kind: str
) -> bytes:
    """Draw root-mean-square (metric hessian) or mean (abs_mean) magnitudes; one row per group, one column
    per block.

    At most N_BLOCKS_SHOWN blocks are shown, spread evenly from the first to the last. `kind` is
    "png" or "svg"; equal inputs give equal bytes.
    """
    by_block: dict[str, dict[str, ChannelStatistics]] = {}
    for name, entry in statistics.items():
        block, group = _split(name)
        by_block.setdefault(block, {})[group] = entry
    blocks = list(by_block)
    step = max(1, len(blocks) - 1)
    n_shown = min(N_BLOCKS_SHOWN, len(blocks))
    shown = [blocks[round(i * step / max(1, n_shown - 1))] for i in range(n_shown)] if n_shown > 1 else blocks
    groups = list(by_block[blocks[0]])
    figure = Figure(figsize=(2.6 * len(shown) + 1, 1.9 * len(groups) + 0.8), layout="constrained")
    axes = figure.subplots(len(groups), len(shown), squeeze=False)
    for column, block in enumerate(shown):
        for row, group in enumerate(groups):
            entry = by_block[block][group]
            values = (entry.hessian / 2).sqrt() if metric == "hessian" else entry.abs_mean
            order = values.argsort(stable=True)
            outliers = order[len(order) - n_outliers :]
            axis = axes[row][column]
            axis.vlines(
                range(len(values)), 0, values.numpy(), color="#7b8ca6", linewidth=0.5, rasterized=True
            )
            axis.plot(outliers.numpy(), values[outliers].numpy(), ".", color="#d1495b", markersize=2.5)
            axis.set_yscale("symlog", linthresh=max(float(values.median()), 1e-6))
            axis.tick_params(labelsize=6)
            axis.margins(x=0.01)
            if row == 0:
                axis.set_title(block, fontsize=8)
            if column == 0:
                axis.set_ylabel(group, fontsize=7)
    magnitude = "root mean square" if metric == "hessian" else "largest mean magnitude"
    figure.suptitle(f"{title}: {magnitude} of each input channel; red: {n_outliers} outliers", fontsize=9)
    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "atomq"}):
        metadata: dict[str, str | None] = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, dpi=130, metadata=metadata)
    return buffer.getvalue()


def _split(name: str) -> tuple[str, str]:
    """ "model.layers.3.mlp.up_proj" -> ("block 3", "mlp.up_proj")."""
    parts = name.split(".")
    position = next(i for i, part in enumerate(parts) if part.isdigit())
    return f"block {parts[position]}", ".".join(parts[position + 1 :])
