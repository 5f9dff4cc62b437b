"""Two checkpoints side by side: their figures, the settings that differ, and the error of every linear."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from atomq.presets import as_typed, flat_settings
from atomq.report import charts
from atomq.report.facts import Report
from atomq.report.page import document
from atomq.report.records import table
from atomq.units import human_bytes, human_seconds, percent

N_CHANGED = 12  # linears shown that changed most, in each direction
FORMS: dict[str, Callable[[float], str]] = {
    "bytes": human_bytes,
    "seconds": human_seconds,
    "share": percent,
    "bits": lambda value: f"{value:.3f}",
    "count": lambda value: f"{value:.0f}",
    "ppl": lambda value: f"{value:.4f}",
    "nats": lambda value: f"{value:.5f}",
}


@dataclass(frozen=True)
class Fact:
    """One figure of both; `unit` is a key of FORMS, None where a checkpoint does not have the figure."""

    name: str
    unit: str
    first: float | None
    second: float | None

    def cells(self) -> list[str]:
        """Name, both figures, and the second over the first."""
        shown = ["" if v is None else FORMS[self.unit](v) for v in (self.first, self.second)]
        ratio = f"{self.second / self.first:.3f}" if self.first and self.second is not None else ""
        return [self.name, *shown, ratio]


@dataclass(frozen=True)
class Setting:
    """A setting of the recipe that is not the same in both."""

    name: str
    first: Any
    second: Any

    def cells(self) -> list[str]:
        """Name and both values."""
        return [self.name, as_typed(self.first), as_typed(self.second)]


@dataclass(frozen=True)
class LinearPair:
    """The relative output errors of a linear that both have."""

    name: str
    first: float
    second: float

    @property
    def change(self) -> float:
        """The second error over the first, as a logarithm; zero errors count as 1e-12."""
        return math.log(max(self.second, 1e-12) / max(self.first, 1e-12))


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side; `names` are the folders', made different where they are equal."""

    names: tuple[str, str]
    facts: list[Fact]
    settings: list[Setting]
    linears: list[LinearPair]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def verdict(self) -> str:
        """In how many linears the second has the smaller error, and the geometric mean of the ratio."""
        if not self.linears:
            return "No linear has a measured error in both."
        n_better = sum(pair.second < pair.first for pair in self.linears)
        ratio = math.exp(sum(pair.change for pair in self.linears) / len(self.linears))
        return (
            f"{self.names[1]} has the smaller error in {n_better} of {len(self.linears)} linears; "
            f"its errors are {ratio:.3f} times those of {self.names[0]} (geometric mean)."
        )


def compare(first: Report, second: Report, names: tuple[str, str]) -> Comparison:
    """Put two reports side by side."""
    if names[0] == names[1]:
        names = (f"{names[0]} (A)", f"{names[1]} (B)")
    settings = [flat_settings(report.about["recipe"]) for report in (first, second)]
    known = dict.fromkeys([*settings[0], *settings[1]])
    errors = {linear.name: linear.relative_error for linear in first.linears}
    pairs = [
        LinearPair(linear.name, before, linear.relative_error)
        for linear in second.linears
        if (before := errors.get(linear.name)) is not None and linear.relative_error is not None
    ]
    return Comparison(
        names,
        _facts(first, second),
        [
            Setting(name, settings[0].get(name), settings[1].get(name))
            for name in known
            if settings[0].get(name) != settings[1].get(name)
        ],
        pairs,
    )


def comparison_page(found: Comparison) -> str:
    """The comparison as one HTML page, in the manner of a report."""
    one, two = found.names
    facts = [list(map(escape, fact.cells())) for fact in found.facts]
    body = (
        f"<header><h1>{escape(one)} and {escape(two)}</h1></header><main><section><h2>Figures</h2>"
        f"{table('side by side', ['', one, two, 'second / first'], facts)}</section>"
        f"<section><h2>Settings that differ</h2>{_settings(found)}</section>"
        f"<section><h2>Error of every linear</h2><p>{escape(found.verdict())}</p>{_linears(found)}</section>"
        "</main>"
    )
    return document(f"{one} and {two}, compared by atomq", body, "atomq compare A B --html FILE.html")


def _settings(found: Comparison) -> str:
    if not found.settings:
        return "<p>None: the recipes are equal.</p>"
    rows = [list(map(escape, setting.cells())) for setting in found.settings]
    return table("recipe", ["setting", *found.names], rows)


def _linears(found: Comparison) -> str:
    if not found.linears:
        return ""
    one, two = found.names
    pairs = [(pair.first, pair.second, pair.name) for pair in found.linears]
    title = f"Output error of each linear: {one} to the right, {two} upwards"
    chart = charts.scatter(title, found.verdict(), pairs)
    ranked = sorted(found.linears, key=lambda pair: pair.change)
    better = [pair for pair in ranked if pair.change < 0][:N_CHANGED]
    worse = [pair for pair in reversed(ranked) if pair.change > 0][:N_CHANGED]
    tables = "".join(
        table(
            caption,
            ["linear", one, two, "ratio"],
            [
                [escape(p.name), percent(p.first), percent(p.second), f"{math.exp(p.change):.3f}"]
                for p in shown
            ],
        )
        for caption, shown in (
            (f"those that {two} improves most", better),
            (f"those that {two} worsens most", worse),
        )
        if shown
    )
    return f'<div class="charts">{charts.figure(title, chart)}</div>{tables}'


def _facts(first: Report, second: Report) -> list[Fact]:
    both = (first, second)
    bits = [report.summary.bits for report in both]
    seconds = [report.summary.seconds.get("total") for report in both]
    peaks = [report.summary.peaks for report in both]
    facts = [
        Fact(f"bits per {name}", "bits", bits[0].get(key), bits[1].get(key))
        for key, name in (("weight", "weight"), ("activation", "activation"), ("kv", "KV entry"))
    ]
    facts += [
        Fact("size", "bytes", *(report.summary.size_bytes for report in both)),
        Fact("mean output error of a linear", "share", *map(_mean_error, both)),
        *_perplexities(first, second),
        Fact("time to quantize", "seconds", *seconds),
        Fact("peak memory", "bytes", *(peak.get("host") for peak in peaks)),
        Fact("peak GPU memory", "bytes", *(peak.get("gpu") for peak in peaks)),
        Fact("warnings", "count", *(len(report.warnings) for report in both)),
    ]
    return [fact for fact in facts if fact.first is not None or fact.second is not None]


def _mean_error(report: Report) -> float | None:
    errors = [linear.relative_error for linear in report.linears if linear.relative_error is not None]
    return math.fsum(errors) / len(errors) if errors else None


def _perplexities(first: Report, second: Report) -> list[Fact]:
    """Perplexity and KL of every evaluation that either has; equal file names mean equal windows."""
    facts = []
    for name in dict.fromkeys([*first.records, *second.records]):
        if name.startswith("eval-ppl"):
            records = [report.records.get(name, {}) for report in (first, second)]
            said = next(record for record in records if record)
            what = f"{said.get('data')}, {said.get('n_windows')} x {said.get('seq_len')}"
            facts.append(Fact(f"perplexity ({what})", "ppl", *(_figure(r, "ppl") for r in records)))
            facts.append(Fact(f"KL ({what})", "nats", *(_figure(r, "kl") for r in records)))
    return facts


def _figure(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else None
