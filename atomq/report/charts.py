"""The charts of a report, as inline SVG without scripts: each a string, each with a title and a description.

All are drawn for a phone's width and laid side by side where there is room. Colours are classes of page.css,
which knows a light and a dark scheme.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import accumulate
from typing import NamedTuple

from atomq.report.facts import BINS_PER_OCTAVE, OutlierMap, ScaleHistogram
from atomq.units import percent

WIDTH, HEIGHT = 340, 150
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 24  # margins that hold the axes' labels
MOST_TITLED = 1500  # marks with a text of their own; more would make the page too large
MAP_BINS = 286  # columns of an outlier map, one per unit of width


class Point(NamedTuple):
    """One linear's error: `block` numbers its decoder block."""

    block: int
    error: float
    name: str


def figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


def svg(title: str, description: str, body: str, height: int = HEIGHT) -> str:
    """An image that names and describes itself to those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" xmlns="http://www.w3.org/2000/svg">'
        f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{body}</svg>"
    )


def error_range(errors: Sequence[float]) -> tuple[int, int]:
    """Whole powers of ten that hold all positive `errors`: the axis that charts share."""
    positive = [error for error in errors if error > 0 and math.isfinite(error)]
    if not positive:
        return -3, 0
    low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    return low, max(high, low + 1)


def error_chart(kind: str, points: Sequence[Point], last_block: int, axis: tuple[int, int]) -> str:
    """Errors of the linears of one kind by block, on a logarithmic axis from `error_range`.

    Errors of zero and values that are not finite lie on the axis' ends.
    """
    low, high = axis
    plot_height = HEIGHT - TOP - BOTTOM

    def x_of(block: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (block + 0.5) / (last_block + 1)

    def y_of(error: float) -> float:
        power = high if not math.isfinite(error) else math.log10(error) if error > 0 else low
        return TOP + plot_height * (high - min(max(power, low), high)) / (high - low)

    step = -(-(high - low) // 4)  # at most five lines
    lines = "".join(
        f'<path class="grid" d="M{LEFT} {y_of(10.0**power):.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="label" x="{LEFT - 4}" y="{y_of(10.0**power) + 3.5:.1f}" '
        f'text-anchor="end">{percent(10.0**power)}</text>'
        for power in range(low, high + 1, step)
    )
    places = [(x_of(point.block), y_of(point.error)) for point in points]
    one_per_block = len({point.block for point in points}) == len(points)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places) if one_per_block else ""
    marks = f'<polyline class="line" points="{line}"/>' if line else ""
    if len(points) <= MOST_TITLED:
        marks += "".join(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
            f"<title>{escape(point.name)}: {percent(point.error)}</title></circle>"
            for (x, y), point in zip(places, points, strict=True)
        )
    else:
        marks += f'<path class="dots" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'
    worst = max(points, key=lambda point: point.error)
    description = f"{len(points)} linears; the largest error is {percent(worst.error)}, of {worst.name}."
    return svg(f"Output error of {kind} by block", description, lines + marks + _block_axis(last_block, x_of))


def outlier_map(found: OutlierMap) -> str:
    """One row per block, channels from left to right, outliers darker where more of them share a place."""
    blocks = sorted(found.channels)
    row_height = min(12.0, max(2.0, 160 / len(blocks)))
    height = round(TOP + row_height * len(blocks) + BOTTOM)
    n_bins = min(MAP_BINS, found.n_channels)
    bin_width = (WIDTH - LEFT - RIGHT) / n_bins
    strong: list[str] = []
    weak: list[str] = []
    for row, block in enumerate(blocks):
        counts: dict[int, int] = {}
        for channel in found.channels[block]:
            position = channel * n_bins // found.n_channels
            counts[position] = counts.get(position, 0) + 1
        usual = -(-found.n_channels // n_bins) / 3
        for position, count in sorted(counts.items()):
            mark = f"M{LEFT + bin_width * position:.1f} {TOP + row_height * (row + 0.5):.1f}h{bin_width:.2f}"
            (strong if count > usual else weak).append(mark)
    style = f'stroke-width="{0.8 * row_height:.1f}"'
    body = (
        f'<rect class="field" x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{row_height * len(blocks):.1f}"/>'
        f'<path class="weak" {style} d="{"".join(weak)}"/>'
        f'<path class="strong" {style} d="{"".join(strong)}"/>'
        f'<text class="label" x="{LEFT - 4}" y="{TOP + 9}" text-anchor="end">block {blocks[0]}</text>'
        f'<text class="label" x="{LEFT - 4}" y="{TOP + row_height * len(blocks):.1f}" '
        f'text-anchor="end">{blocks[-1] if len(blocks) > 1 else ""}</text>'
        f'<text class="label" x="{LEFT}" y="{height - 8}">channel 0</text>'
        f'<text class="label" x="{WIDTH - RIGHT}" y="{height - 8}" '
        f'text-anchor="end">{found.n_channels - 1}</text>'
    )
    return svg(f"Outlier channels of {found.kind} by block", describe_outliers(found), body, height)


def describe_outliers(found: OutlierMap) -> str:
    """How many channels are outliers anywhere, and how many in more than half of the blocks."""
    counts: dict[int, int] = {}
    for channels in found.channels.values():
        for channel in channels:
            counts[channel] = counts.get(channel, 0) + 1
    n_often = sum(count > len(found.channels) / 2 for count in counts.values())
    return (
        f"{len(counts)} of {found.n_channels} channels are outliers in some block, "
        f"{n_often} in more than half of the {len(found.channels)} blocks."
    )


def histogram(found: ScaleHistogram) -> str:
    """Counts of scales by power of two; bars are linear from zero."""
    plot_height = HEIGHT - TOP - BOTTOM
    bar_width = (WIDTH - LEFT - RIGHT) / len(found.counts)
    highest = max(found.counts)
    bars = "".join(
        f'<rect class="mark" x="{LEFT + bar_width * i:.1f}" y="{TOP + plot_height * (1 - n / highest):.1f}" '
        f'width="{max(bar_width - 0.6, 0.4):.1f}" height="{plot_height * n / highest:.1f}">'
        f"<title>{_scale(found.start + i)} to {_scale(found.start + i + 1)}: {n}</title></rect>"
        for i, n in enumerate(found.counts)
        if n
    )
    end = found.start + len(found.counts)
    labels = (
        f'<path class="grid" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>'
        f'<text class="label" x="{LEFT}" y="{HEIGHT - 8}">{_scale(found.start)}</text>'
        f'<text class="label" x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{_scale(end)}</text>'
        f'<text class="label" x="{LEFT - 4}" y="{TOP + 8}" text-anchor="end">{highest:,}</text>'
    )
    return svg(f"Weight scales of {found.kind}", describe_scales(found), bars + labels)


def describe_scales(found: ScaleHistogram) -> str:
    """Number, span and median of the scales, as exact as the bins are."""
    total, sums = sum(found.counts), list(accumulate(found.counts))
    median = next(i for i, seen in enumerate(sums) if 2 * seen >= total)
    end = found.start + len(found.counts)
    return (
        f"{total:,} scales from {_scale(found.start)} to {_scale(end)}, "
        f"half of them below {_scale(found.start + median + 1)}."
    )


def bar(share: float) -> str:
    """A bar for a table's cell: `share` of the width, from 0 to 1; the figure stands beside it."""
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="field" width="100" height="10"/><rect class="mark" width="{width:.1f}" height="10"/>'
        "</svg>"
    )


def scatter(title: str, description: str, pairs: Sequence[tuple[float, float, str]]) -> str:
    """Pairs (x, y, name) on equal logarithmic axes, with the diagonal where both are equal."""
    size = WIDTH - LEFT - RIGHT
    height = TOP + size + BOTTOM
    low, high = error_range([value for x, y, _ in pairs for value in (x, y)])

    def along(value: float) -> float:
        power = math.log10(value) if value > 0 else low
        return size * (min(max(power, low), high) - low) / (high - low)

    ticks = "".join(
        f'<path class="grid" d="M{LEFT} {TOP + size - along(10.0**power):.1f}h{size}"/>'
        f'<text class="label" x="{LEFT - 4}" y="{TOP + size - along(10.0**power) + 3.5:.1f}" '
        f'text-anchor="end">{percent(10.0**power)}</text>'
        f'<text class="label" x="{LEFT + along(10.0**power):.1f}" y="{height - 8}" '
        f'text-anchor="{"start" if power == low else "end" if power == high else "middle"}">'
        f"{percent(10.0**power)}</text>"
        for power in range(low, high + 1, -(-(high - low) // 3))
    )
    diagonal = f'<path class="line" d="M{LEFT} {TOP + size}l{size} {-size}"/>'
    if len(pairs) <= MOST_TITLED:
        marks = "".join(
            f'<circle class="mark" cx="{LEFT + along(x):.1f}" cy="{TOP + size - along(y):.1f}" r="2.6">'
            f"<title>{escape(name)}: {percent(x)}, {percent(y)}</title></circle>"
            for x, y, name in pairs
        )
    else:
        dots = "".join(f"M{LEFT + along(x):.1f} {TOP + size - along(y):.1f}h0" for x, y, _ in pairs)
        marks = f'<path class="dots" d="{dots}"/>'
    return svg(title, description, ticks + diagonal + marks, height)


def _block_axis(last_block: int, x_of: Callable[[int], float]) -> str:
    shown = sorted({0, last_block // 2, last_block})
    return "".join(
        f'<text class="label" x="{x_of(block):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{block}</text>'
        for block in shown
    )


def _scale(position: int) -> str:
    return f"{2 ** (position / BINS_PER_OCTAVE):.2g}"
