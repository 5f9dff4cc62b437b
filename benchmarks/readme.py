"""`python -m benchmarks.readme`: write the tables and the picture of PAGES again from the records.

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`. tests/test_docs.py fails when a table or
the picture is not what this makes of the records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cards import card

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "method.md")
RESULTS = "benchmarks/results"
ACCURACY = "2026-11-28-h100-presets-smollm2.json"
ACCURACY_H200 = "2026-11-28-h200-presets-smollm2.json"
BALANCED = "2026-11-28-h200-balanced-smollm2.json"  # the presets whose cache is balanced
LADDER = "2026-11-28-ladder-smollm2.json"
SPREAD = "2026-11-28-h200-spread-smollm2.json"
GEMM = "2026-11-28-h200-gemm.json"
GEMM_SHAPE = (28672, 8192)
GEMM_TOKENS = (1, 64, 256, 4096)
GEMM_COLUMNS = {
    "w4a4": "INT4, exact scales",
    "w4a4-progressive": "INT4, progressive scales",
    "fp16": "torch fp16",
    "fp8": "torch FP8",
}
# What docs/method.md calls a preset -> where it was measured, and under what name.
PRESET_ROWS = {
    "`atom`": (ACCURACY, "atom"),
    "`atomq`": (BALANCED, "atomq"),
    "`atomq --refine`": (BALANCED, "atomq --refine"),
    "`atomq`, 16-bit KV": (ACCURACY, "atomq KV16"),
    "`atomq-fast`": (BALANCED, "atomq-fast"),
    "`w4a8`": (ACCURACY_H200, "w4a8"),
    "`w4a16-int8`": (ACCURACY, "w4a16-int8"),
    "`w4a16` (no outliers, so that GPTQ files can hold it)": (ACCURACY, "w4a16"),
    "`w3a3`": (ACCURACY, "atomq W3A3 KV16"),
}
PICTURE = ROOT / "docs" / "images" / "cost.svg"


def record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / RESULTS / name).read_text(encoding="utf-8"))
    return found


def row_of(source: str, name: str) -> dict[str, Any]:
    """The row `name` of the record `source`."""
    (row,) = (row for row in record(source)["rows"] if row["name"] == name)
    found: dict[str, Any] = row
    return found


def link(name: str) -> str:
    return f"[record]({RESULTS}/{name})"


def accuracy() -> str:
    """Perplexities of the presets on the text that was calibrated for, and on another."""
    found = record(ACCURACY)
    columns = {
        "`atom` W4A4KV4": (ACCURACY, "atom"),
        "**`atomq`** W4A4KV4": (BALANCED, "atomq"),
        "`atomq --refine`": (BALANCED, "atomq --refine"),
        "`w4a16`": (ACCURACY, "w4a16"),
        "`w4a16-int8`": (ACCURACY, "w4a16-int8"),
    }
    head = ["", "unquantized", *columns]
    lines = [head, ["---"] * len(head)]
    texts = {
        f"WikiText-2 test, {found['evaluation']['n_windows']} windows": ("float_ppl", "ppl"),
        f"C4 sample, {found['second']['n_windows']} windows": ("float_second_ppl", "second_ppl"),
    }
    for text, (unquantized, quantized) in texts.items():
        measured = [f"{row_of(source, name)[quantized]:.2f}" for source, name in columns.values()]
        lines.append([text, f"{found[unquantized]:.2f}", *measured])
    seeds = record(SPREAD)["seeds"]["ppl"]
    said = f"`atomq` over three seeds: {seeds['mean']:.2f} ± {seeds['standard_deviation']:.2f}"
    gpus = [card(record(name)["environment"]["gpu"]) for name in (ACCURACY, BALANCED)]
    return (
        f"{_table(lines)}\n\nCalibrated on WikiText-2 validation; one {gpus[0]} ({link(ACCURACY)}), `atomq` "
        f"one {gpus[1]} ({link(BALANCED)}).\n"
        f"{said} ({link(SPREAD)});\n[other texts](docs/method.md#seeds-and-calibration-texts) cost more."
    )


def presets() -> str:
    """Perplexity on both texts, time and card of every preset."""
    lines = [["recipe", "perplexity", "quantized in", "on"], ["---"] * 4]
    for label, (source, name) in PRESET_ROWS.items():
        found = record(source)
        row = row_of(source, name)
        losses = f"{row['ppl']:.2f} [{row['second_ppl']:.2f}]"
        lines.append([label, losses, f"{row['quantize_seconds']:.0f} s", card(found["environment"]["gpu"])])
    return _table(lines)


def gemm() -> str:
    """Microseconds by number of tokens for one shape, the card, and how far its turns lie apart."""
    measured = record(GEMM)
    found = {
        (r["n_tokens"], r["name"]): r["timing"]
        for r in measured["results"]
        if (r["n_channels"], r["n_inputs"]) == GEMM_SHAPE
    }
    head = [f"us, {GEMM_SHAPE[0]} x {GEMM_SHAPE[1]}", *GEMM_COLUMNS.values()]
    lines = [head, ["---"] * len(head)]
    for n_tokens in GEMM_TOKENS:
        count = f"{n_tokens} token{'s' if n_tokens > 1 else ''}"
        lines.append([count, *(f"{found[n_tokens, name]['graph_us']:.1f}" for name in GEMM_COLUMNS)])
    shown = [found[n_tokens, name] for n_tokens in GEMM_TOKENS for name in GEMM_COLUMNS]
    spreads = [100 * (timing["graph_p90_us"] / timing["graph_p10_us"] - 1) for timing in shown]
    said = f"ninetieth percentiles are {min(spreads):.0f} to {max(spreads):.0f} % above the tenth"
    return f"{_table(lines)}\n\nMedians of turns on one {card(measured['gpu'])}; {said} ({link(GEMM)})."


def ladder() -> str:
    """Every step of `atomq ablate`, with the card that measured it."""
    found = record(LADDER)
    texts = [
        f"{text}, {found[use]['n_windows']} windows"
        for text, use in (("WikiText-2 test", "evaluation"), ("C4 sample", "second"))
    ]
    head = ["step", *texts, "KL, nats", "bits of weights / activations / KV", "on"]
    lines = [head, ["---"] * len(head)]
    for row in found["rows"]:
        kl = "" if row["kl"] is None else f"{row['kl']:.3f}"
        bits = " / ".join(f"{row['effective_bits'][part]:.3g}" for part in ("weight", "activation", "kv"))
        losses = [f"{row[text]:.2f}" for text in ("ppl", "second_ppl")]
        lines.append([row["name"], *losses, kl, bits, card(row["device"])])
    return _table(lines)


def spread() -> str:
    """The default preset by seed of the calibration windows, with mean and standard deviation."""
    seeds = record(SPREAD)["seeds"]
    lines = [["calibrated on", "perplexity"], ["---", "---"]]
    for row in seeds["rows"]:
        text = row["calibration"]
        drawn = f"{text['n_samples']} x {text['seq_len']} tokens, seed {text['seed']}"
        lines.append([f"WikiText-2 validation, {drawn}", f"{row['ppl']:.2f}"])
    ppl = seeds["ppl"]
    lines.append(["mean of the seeds", f"**{ppl['mean']:.2f}** ± {ppl['standard_deviation']:.2f}"])
    return _table(lines)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "presets": presets,
    "gemm": gemm,
    "ladder": ladder,
    "spread": spread,
}


def _table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_tables(text: str) -> str:
    """`text` with every marked table made anew.

    Raises:
        KeyError: a marker names a table that is not here.
    """

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- figures: (\w+) -->\n)[^<]*(<!-- end -->)", fill, text)


def picture() -> str:
    """Bars of perplexity by preset and of microseconds by kernel, for light and dark pages."""
    losses = [
        ("unquantized", record(ACCURACY)["float_ppl"]),
        ("W4A4KV4, atom", row_of(ACCURACY, "atom")["ppl"]),
        ("W4A4KV4, atomq", row_of(BALANCED, "atomq")["ppl"]),
    ]
    kernels = record(GEMM)
    found = {
        r["name"]: r["timing"]["graph_us"]
        for r in kernels["results"]
        if (r["n_channels"], r["n_inputs"], r["n_tokens"]) == (*GEMM_SHAPE, 1)
    }
    times = [
        (label, found[name])
        for name, label in (("fp16", "torch fp16"), ("fp8", "torch FP8"), ("w4a4", "INT4, exact scales"))
    ]
    title = f"us for one token, {GEMM_SHAPE[0]} x {GEMM_SHAPE[1]}, {card(kernels['gpu'])}"
    body = _panel(0, "perplexity, SmolLM2-135M, WikiText-2", losses, "{:.2f}")
    body += _panel(370, title, times, "{:.1f}")
    style = (
        "text{font:12px system-ui,sans-serif;fill:#1c2430}.h{font-weight:600}"
        ".bar{fill:#8fb4d9}.ours{fill:#2b6cb0}"
        "@media(prefers-color-scheme:dark){text{fill:#e4e9f0}.bar{fill:#35648f}.ours{fill:#6cb2f2}}"
    )
    said = "; ".join(f"{label} {value:.2f}" for label, value in [*losses, *times])
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 118" role="img">'
        f"<title>What four bits cost and bring</title><desc>{said}</desc><style>{style}</style>{body}</svg>\n"
    )


def _panel(left: int, title: str, bars: list[tuple[str, float]], form: str) -> str:
    longest = max(value for _, value in bars)
    parts = [f'<text class="h" x="{left}" y="16">{title}</text>']
    for index, (label, value) in enumerate(bars):
        y, width = 28 + 30 * index, 160 * value / longest
        kind = "ours" if label.startswith(("INT4", "W4A4KV4, atomq")) else "bar"
        parts.append(
            f'<text x="{left}" y="{y + 15}">{label}</text>'
            f'<rect class="{kind}" x="{left + 145}" y="{y}" width="{width:.1f}" height="20" rx="2"/>'
            f'<text x="{left + 151 + width:.1f}" y="{y + 15}">{form.format(value)}</text>'
        )
    return "".join(parts)


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
