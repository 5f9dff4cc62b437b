"""The sections of a report that show other commands' records: perplexity, ladder, GEMM, verify, any other.

A record is known by the start of its file name; one that is not of the form expected is shown as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from atomq.report import charts

MOST_ROWS, MOST_COLUMNS = 60, 12  # of a record that is shown as it is
LADDER_FIGURES = {  # path in a row -> its column and how it is written
    "kl": ("KL (nats)", ".4f"),
    "effective_bits.weight": ("bits per weight", ".3f"),
    "effective_bits.activation": ("per activation", ".3f"),
    "effective_bits.kv": ("per KV entry", ".3f"),
    "seconds": ("seconds", ".1f"),
    "quantize_seconds": ("seconds to quantize", ".1f"),
}
# What a record raises that is not of the form known by its name.
_OTHER_FORM = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, StopIteration)
LADDER_LABELS = ("name", "step", "recipe", "what", "variant", "preset")


def table(caption: str, columns: list[str], rows: list[list[str]], classes: str = "scroll") -> str:
    """A table from cells of HTML; the first column is text, the others are figures."""
    head = "".join(
        f'<th scope="col"{_numeric(index)}>{escape(column)}</th>' for index, column in enumerate(columns)
    )
    body = "".join(
        "<tr>" + "".join(f"<td{_numeric(index)}>{cell}</td>" for index, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="{classes}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def record_sections(records: Mapping[str, Any]) -> str:
    """All records, each under its own heading; those of known kinds first, in the order of _SHOWN."""
    kinds = {name: next((kind for kind in _SHOWN if name.startswith(kind)), None) for name in records}
    order = [*_SHOWN, None]
    parts = []
    for name, kind in sorted(kinds.items(), key=lambda item: order.index(item[1])):
        record = records[name]
        heading, show = _SHOWN[kind] if kind else (name, as_it_is)
        try:
            body = show(record)
        except _OTHER_FORM:
            body = as_it_is(record)
        parts.append(f"<section><h2>{escape(heading)}</h2>{body}</section>")
    return "".join(parts)


def perplexity(record: Mapping[str, Any]) -> str:
    rows = [[escape(str(record["model"])), f"{record['ppl']:.4f}", _optional(record.get("kl"), ".5f")]]
    if record.get("baseline_ppl") is not None:
        rows.insert(0, [escape(str(record["baseline"])), f"{record['baseline_ppl']:.4f}", ""])
    caption = f"{record['data']}: {record['n_windows']} windows of {record['seq_len']} tokens"
    return table(caption, ["model", "perplexity", "KL (nats)"], rows)


def ladder(record: Mapping[str, Any]) -> str:
    """The rows of `atomq ablate`: each adds one step; a bar for its perplexity, and what else it has."""
    rows = next(v for v in record.values() if isinstance(v, list) and v and "ppl" in v[0])
    label = next(key for key in LADDER_LABELS if key in rows[0])
    finite = [row["ppl"] for row in rows if math.isfinite(row["ppl"])]
    lowest, highest = min(finite), max(finite)
    scale = math.log(highest / lowest) or 1.0
    extra = [key for key in LADDER_FIGURES if any(_figure(row, key) is not None for row in rows)]
    cells = []
    for row in rows:
        share = math.log(row["ppl"] / lowest) / scale if math.isfinite(row["ppl"]) else 1.0
        figures = [_optional(_figure(row, key), LADDER_FIGURES[key][1]) for key in extra]
        bar = charts.bar(0.04 + 0.96 * share)
        cells.append([escape(str(row[label])), f"{row['ppl']:.3f}", bar, *figures])
    note = f"<p class=soft>Bars: from {lowest:.2f} to {highest:.2f}, on a logarithmic scale.</p>"
    columns = ["step", "perplexity", "", *(LADDER_FIGURES[key][0] for key in extra)]
    return table("perplexity after each step", columns, cells) + note


def _figure(row: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path of a row; None where there is none."""
    value: Any = row
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) else None


def tasks(record: Mapping[str, Any]) -> str:
    """Accuracies of `atomq eval-tasks` by the paper's rule, beside the baseline's if there is one."""
    before = record.get("baseline_tasks") or {}
    rows = [
        [
            escape(name),
            escape(score["metric"]),
            str(score["n_items"]),
            _accuracy(score),
            _accuracy(before[name]) if name in before else "",
        ]
        for name, score in record["tasks"].items()
    ]
    columns = ["task", "metric", "items", str(record["model"]), str(record.get("baseline", ""))]
    return table(f"accuracy in percent, {record['num_fewshot']}-shot", columns, rows)


def _accuracy(score: Mapping[str, Any]) -> str:
    return f"{100 * score['value']:.2f} ± {100 * score['stderr']:.2f}"


def verification(record: Mapping[str, Any]) -> str:
    n_all, n_failed = record["n_linears"], record["n_failed"]
    by = ", ".join(f"{n} by {how}" for how, n in record["computed_by"].items())
    verdict = "every one passes" if not n_failed else f"{n_failed} fail: {', '.join(record['failed'][:5])}"
    return (
        f"<p>{n_all} linears held against exact integer arithmetic: {escape(verdict)} ({escape(by)}). "
        f"Largest relative error {record['largest_error']:.2e}, allowed {record['tolerance']:g}.</p>"
    )


def gemm(record: Mapping[str, Any]) -> str:
    """One table per shape: microseconds by number of tokens and kernel."""
    parts = [f"<p>On {escape(str(record['gpu']))}; microseconds for one GEMM, cold weights.</p>"]
    results = record["results"]
    names = list(dict.fromkeys(r["name"] for r in results))
    for shape in dict.fromkeys((r["n_channels"], r["n_inputs"]) for r in results):
        own = [r for r in results if (r["n_channels"], r["n_inputs"]) == shape]
        by_tokens = {(r["n_tokens"], r["name"]): f"{r['timing']['graph_us']:.1f}" for r in own}
        counts = sorted({r["n_tokens"] for r in own})
        rows = [[str(m), *(by_tokens.get((m, name), "") for name in names)] for m in counts]
        parts.append(table(f"{shape[0]} x {shape[1]}", ["tokens", *map(str, names)], rows))
    return "".join(parts)


def as_it_is(record: Mapping[str, Any]) -> str:
    """A record of any form: its single values, then its lists of objects as tables, long ones cut."""
    single = [[escape(k), escape(_brief(v))] for k, v in record.items() if not isinstance(v, list | dict)]
    parts = [table("values", ["name", "value"], single)] if single else []
    for key, value in record.items():
        rows = (
            [{"": name, **row} for name, row in value.items() if isinstance(row, dict)]
            if isinstance(value, dict)
            else value
        )
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
            columns = list(dict.fromkeys(k for row in rows for k in row))[:MOST_COLUMNS]
            cells = [[escape(_brief(row.get(c, ""))) for c in columns] for row in rows[:MOST_ROWS]]
            cut = f", the first {MOST_ROWS} of {len(rows)}" if len(rows) > MOST_ROWS else ""
            parts.append(table(f"{key}{cut}", columns, cells))
        elif isinstance(value, list | dict) and value:
            parts.append(f"<p>{escape(key)}: <code>{escape(_brief(value))}</code></p>")
    return "".join(parts)


def _brief(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _numeric(index: int) -> str:
    return ' class="number"' if index else ""


Show = Callable[[Mapping[str, Any]], str]
_SHOWN: dict[str, tuple[str, Show]] = {
    "eval-ppl": ("Perplexity", perplexity),
    "eval-tasks": ("Zero-shot tasks", tasks),
    "ablation": ("Ladder", ladder),
    "verify": ("Verification", verification),
    "gemm": ("GEMM", gemm),
    "bench-gemm": ("GEMM", gemm),
}
