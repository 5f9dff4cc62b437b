"""The page of a report: one HTML file that loads nothing, runs nothing and reads well on a phone."""

from __future__ import annotations

import json
import math
from html import escape
from pathlib import Path
from typing import Any

from atomq import __version__
from atomq.report import charts
from atomq.report.facts import LinearFacts, Report
from atomq.report.records import record_sections, table
from atomq.units import human_bytes, human_seconds, percent

MOST_TABLE_ROWS = 2000  # of the table of linears; the worst ones where there are more
# The page may load nothing from anywhere: a browser enforces what the tests check.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def report_page(report: Report) -> str:
    """The whole page as HTML."""
    summary = report.summary
    title = f"{summary.model}, {summary.scheme_name} by atomq"
    lead = f"Recipe {summary.recipe_name}."
    notes = "".join(f"<p class=soft>{escape(note)}</p>" for note in report.about.get("notes") or [])
    body = (
        f"<header><h1>{escape(title)}</h1><p class=soft>{escape(lead)}</p>{notes}</header><main>"
        f"{_cards(report)}{_warnings(report.warnings)}{_errors(report.linears)}{record_sections(report.records)}"
        f"{_experts(report.starved)}{_outliers(report)}{_scales(report)}{_time(report)}{_about(report)}</main>"
    )
    return document(title, body, "atomq report OUT")


def document(title: str, body: str, command: str) -> str:
    """A page around `body`, with the style inside; `command` builds it again."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body>{body}<footer>Written by atomq {__version__}; rebuilt at any time by "
        f"<code>{escape(command)}</code>.</footer></body></html>\n"
    )


def card(label: str, value: str, note: str = "") -> str:
    return (
        f'<div><dt>{escape(label)}</dt><dd class="figure">{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
    )


def _cards(report: Report) -> str:
    summary = report.summary
    bits = summary.bits
    cards = [
        card(
            "bits per weight",
            f"{bits['weight']:.3f}" if bits else "unknown",
            f"activation {bits['activation']:.2f}, KV entry {bits['kv']:.2f}" if bits else "",
        ),
        _size_card(summary.float_bytes, summary.size_bytes),
        _perplexity_card(report.records),
        _error_card(report.linears),
        card("time", human_seconds(summary.seconds["total"]) if "total" in summary.seconds else "unknown"),
        card(
            "peak memory",
            human_bytes(summary.peaks["host"]) if "host" in summary.peaks else "unknown",
            f"GPU {human_bytes(summary.peaks['gpu'])}" if "gpu" in summary.peaks else "",
        ),
    ]
    return f'<dl class="cards">{"".join(cards)}</dl>'


def _size_card(before: int | None, after: int) -> str:
    if before is None:
        return card("size", human_bytes(after))
    note = f"before {human_bytes(before)} in 16 bits, {before / after:.2f} times as much"
    return card("size", human_bytes(after), note)


def _perplexity_card(records: dict[str, Any]) -> str:
    """The evaluation on the most tokens, if there is one."""
    evaluated = [
        record
        for name, record in records.items()
        if name.startswith("eval-ppl") and isinstance(record.get("ppl"), int | float)
    ]
    if not evaluated:
        return card("perplexity", "not evaluated", "atomq eval-ppl OUT --baseline MODEL")
    record = max(evaluated, key=lambda record: float(record.get("n_tokens") or 0))
    before = record.get("baseline_ppl")
    note = f"on {record.get('data')}" + (f", unquantized {before:.3f}" if before else "")
    return card("perplexity", f"{record['ppl']:.3f}", note)


def _error_card(linears: list[LinearFacts]) -> str:
    errors = [linear.relative_error for linear in linears if linear.relative_error is not None]
    if not errors:
        return card("linears", str(len(linears)), "output error not measured")
    note = f"mean output error {percent(math.fsum(errors) / len(errors))}"
    return card("linears", str(len(linears)), note)


def _warnings(warnings: list[str]) -> str:
    if not warnings:
        return "<section><h2>Warnings</h2><p>None.</p></section>"
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in warnings)
    return f'<section><h2>Warnings</h2><ul class="warnings">{items}</ul></section>'


def _errors(linears: list[LinearFacts]) -> str:
    heading = "<h2>Error of every linear</h2>"
    if not linears:
        return f"<section>{heading}<p>This recipe leaves the weights in floating point.</p></section>"
    measured = [linear for linear in linears if linear.relative_error is not None]
    if not measured:
        text = "Rounded to nearest without calibration, so no output error was measured."
        return f"<section>{heading}<p>{text}</p>{_linear_table(linears)}</section>"
    axis = charts.error_range([linear.relative_error or 0.0 for linear in measured])
    last_block = max(linear.block or 0 for linear in linears)
    kinds: dict[str, list[charts.Point]] = {}
    for linear in measured:
        point = charts.Point(linear.block or 0, linear.relative_error or 0.0, linear.name)
        kinds.setdefault(linear.kind, []).append(point)
    figures = "".join(
        charts.figure(kind, charts.error_chart(kind, points, last_block, axis))
        for kind, points in kinds.items()
    )
    text = (
        "Squared output error over squared output on the calibration tokens, by decoder block; "
        f"all {len(measured)} linears that were measured, on one logarithmic axis."
    )
    return (
        f"<section>{heading}<p class=soft>{text}</p>"
        f'<div class="charts">{figures}</div>{_linear_table(linears)}</section>'
    )


def _linear_table(linears: list[LinearFacts]) -> str:
    ranked = sorted(linears, key=lambda linear: linear.relative_error or 0.0, reverse=True)[:MOST_TABLE_ROWS]
    rows = [
        [
            escape(linear.name),
            "" if linear.relative_error is None else percent(linear.relative_error),
            escape(linear.method or ""),
            "" if linear.damp_frac is None else f"{linear.damp_frac:g}",
            str(linear.n_dead),
            human_bytes(linear.size_bytes),
        ]
        for linear in ranked
    ]
    columns = ["linear", "output error", "solved by", "damping", "dead inputs", "size"]
    cut = f" (the {MOST_TABLE_ROWS} with the largest error)" if len(linears) > MOST_TABLE_ROWS else ""
    return f"<details><summary>All {len(linears)} linears as a table{cut}</summary>" + (
        table("worst first", columns, rows) + "</details>"
    )


def _experts(starved: dict[str, int]) -> str:
    """The experts that had to be calibrated on all tokens, with those that the router gave them."""
    if not starved:
        return ""
    ranked = sorted(starved.items(), key=lambda item: item[1])[:MOST_TABLE_ROWS]
    rows = [[escape(name), str(n_tokens)] for name, n_tokens in ranked]
    body = table("fewest first", ["expert", "tokens"], rows)
    return (
        f"<section><h2>Starved experts</h2><p>{len(starved)} experts saw too few calibration tokens and were "
        f"calibrated on all of them.</p><details><summary>Which</summary>{body}</details></section>"
    )


def _outliers(report: Report) -> str:
    if not report.outliers:
        return ""
    figures = "".join(charts.figure(found.kind, charts.outlier_map(found)) for found in report.outliers)
    rows = [[escape(found.kind), escape(charts.describe_outliers(found))] for found in report.outliers]
    text = "Input channels that are kept in higher precision, a row for each block; darker where they crowd."
    words = table("outliers", ["input of", ""], rows, "words")
    return _charts("Outlier channels", text, figures, words)


def _scales(report: Report) -> str:
    if not report.scales:
        return ""
    figures = "".join(charts.figure(found.kind, charts.histogram(found)) for found in report.scales)
    rows = [[escape(found.kind), escape(charts.describe_scales(found))] for found in report.scales]
    text = "How large one step of a code is, over all blocks; the axis is logarithmic."
    return _charts("Weight scales", text, figures, table("scales", ["linear", ""], rows, "words"))


def _charts(title: str, text: str, figures: str, words: str) -> str:
    """A section of charts, with what they show in words folded below."""
    return (
        f'<section><h2>{title}</h2><p class=soft>{text}</p><div class="charts">{figures}</div>'
        f"<details><summary>In words</summary>{words}</details></section>"
    )


def _time(report: Report) -> str:
    phases = {name: s for name, s in report.summary.seconds.items() if name != "total"}
    if not phases:
        return ""
    longest = max(phases.values()) or 1.0
    rows = [
        [escape(name), human_seconds(seconds), charts.bar(seconds / longest)]
        for name, seconds in phases.items()
    ]
    return f"<section><h2>Time</h2>{table('by phase', ['phase', 'time', ''], rows, 'ladder')}</section>"


def _about(report: Report) -> str:
    about = json.dumps(report.about, indent=2, ensure_ascii=False, sort_keys=True)
    return (
        "<section><h2>Recipe and provenance</h2><details><summary>Recipe, source, calibration, versions, "
        f"machine</summary><pre>{escape(about)}</pre></details></section>"
    )
