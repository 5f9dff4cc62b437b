"""Tables of a record of `benchmarks.gemm`, as Markdown."""

from __future__ import annotations

from typing import Any

EXACT = "w4a4"
GROUP_SIZE, N_OUTLIERS = 128, 128
COPY_BANDWIDTH = 3.0e12  # bytes per second, for records that do not say
TENSOR_OPERATIONS = 1979e12  # dense INT8 operations per second, from the data sheets of the H100 and the H200
PROMOTION_LANES = 132 * 128 * 1.755e9  # instructions of one lane per second, at their clock


def table(record: dict[str, Any]) -> str:
    """Microseconds in a graph, TOP/s in brackets."""
    cells = {(r["n_channels"], r["n_inputs"], r["n_tokens"], r["name"]): r for r in record["results"]}
    names = list(dict.fromkeys(r["name"] for r in record["results"]))
    lines = [f"| N x K | M | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for n_channels, n_inputs, n_tokens in _cases(record):
        texts = []
        for name in names:
            result = cells.get((n_channels, n_inputs, n_tokens, name))
            texts.append(f"{result['timing']['graph_us']:.1f} ({result['tops']:.0f})" if result else "")
        lines.append(f"| {n_channels}x{n_inputs} | {n_tokens} | {' | '.join(texts)} |")
    return "\n".join(lines)


def limits_table(record: dict[str, Any]) -> str:
    """What limits W4A4 with exact scales: the least time of its bytes, of its products and of its promotion.

    Promotion takes three instructions for each output and group. Products and promotion share the register
    file, so that their times add up; bytes move beside them.
    """
    lines = [
        "| N x K | M | us | bytes | products | promotion | limit | of it |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    bandwidth = record.get("copy_bytes_per_s", COPY_BANDWIDTH)
    cells = {
        (r["n_channels"], r["n_inputs"], r["n_tokens"]): r for r in record["results"] if r["name"] == EXACT
    }
    for case in _cases(record):
        if case not in cells:
            continue
        n_channels, n_inputs, n_tokens = case
        us, outputs = cells[case]["timing"]["graph_us"], n_tokens * n_channels
        n_bytes = 1e6 * _least_bytes(*case) / bandwidth
        products = 2e6 * outputs * n_inputs / TENSOR_OPERATIONS
        promotion = 3e6 * outputs * -(-n_inputs // GROUP_SIZE) / PROMOTION_LANES
        floor = max(n_bytes, products + promotion)
        name = "bytes" if n_bytes >= products + promotion else "products and promotion"
        if floor < us / 2:
            name = "latencies"
        figures = f"{us:.1f} | {n_bytes:.1f} | {products:.1f} | {promotion:.1f}"
        lines.append(
            f"| {n_channels}x{n_inputs} | {n_tokens} | {figures} | {name} | {100 * floor / us:.0f} % |"
        )
    return "\n".join(lines)


def _least_bytes(n_channels: int, n_inputs: int, n_tokens: int) -> float:
    """Weights with float16 group scales, the tokens' INT8 operands and float16 outputs, once each."""
    weights = (n_inputs - N_OUTLIERS) / 2 + N_OUTLIERS + 2 * n_inputs / GROUP_SIZE
    return n_channels * weights + n_tokens * n_inputs + 2 * n_tokens * n_channels


def few_token_table(record: dict[str, Any]) -> str:
    """Microseconds by tile for few tokens, the one that was chosen until then in bold."""
    columns = {
        "1x2 two": "one panel, two CTAs an SM",
        "1x2": "one panel",
        "2x2": "two panels",
        "3x2": "three panels",
        "fp16": "torch fp16",
    }
    lines = [f"| N x K | scales | M | {' | '.join(columns.values())} |", "| --- " * (len(columns) + 3) + "|"]
    for cell in record["cells"]:
        us = {}
        for variant in cell["variants"]:
            name, landed, _ = variant["tile"].partition(" (landed)")
            us[name] = f"**{variant['us']:.1f}**" if landed else f"{variant['us']:.1f}"
        scales = "progressive" if "progressive" in cell["mode"] else "exact"
        shown = " | ".join(us.get(name, "") for name in columns)
        lines.append(f"| {cell['n']}x{cell['k']} | {scales} | {cell['tokens']} | {shown} |")
    return "\n".join(lines)


def tiles_table(record: dict[str, Any]) -> str:
    """Microseconds by the tile of before, by the one that is chosen now, and by the fastest of all timed."""
    lines = ["| N x K | scales | M | before | now | fastest timed |", "| --- " * 6 + "|"]
    for cell in record["cells"]:
        before, now = cell["before"], cell["now"]
        if now["us"] is None or (cell["tokens"] <= 64 and before["tile"] == now["tile"]):
            continue
        scales = "progressive" if "progressive" in cell["mode"] else "exact"
        fastest = min(cell["candidates"], key=lambda candidate: float(candidate["us"]))
        shown = " | ".join(f"{x['us']:.1f} ({x['tile']})" for x in (before, now, fastest))
        lines.append(f"| {cell['n']}x{cell['k']} | {scales} | {cell['tokens']} | {shown} |")
    return "\n".join(lines)


def tile_steps_table(record: dict[str, Any]) -> str:
    """Whole decoding steps by what was changed, milliseconds."""
    lines = ["| scheme | batch | what | ms a step | tenth percentile |", "| --- " * 5 + "|"]
    lines += [
        f"| {step['scheme']} | {step['batch']} | {step['what']} | {step['ms']:.2f} | {step['p10_ms']:.2f} |"
        for step in record["steps"]
        if step["run"] == 2
    ]
    return "\n".join(lines)


def quantize_table(record: dict[str, Any]) -> str:
    """`quantize_act`; one line that says so where the record has none."""
    if not record.get("quantize"):
        return "The record has no figures of it."
    lines = [
        "| M x K | gather | transform | us | GB/s | of a copy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r in record["quantize"]:
        does = " | ".join("yes" if r[key] else "no" for key in ("gather", "hadamard"))
        rates = f"{r['graph_us']:.1f} | {r['gb_per_s']:.0f} | {100 * r['of_copy']:.0f} %"
        lines.append(f"| {r['n_tokens']}x{r['n_channels']} | {does} | {rates} |")
    return "\n".join(lines)


def tuning_table(record: dict[str, Any]) -> str:
    """Steps of tuning: what each was expected to bring, and brought."""
    lines = ["| step | expected | measured, us before and after |", "| --- | --- | --- |"]
    for step in record["steps"]:
        cases = "; ".join(
            f"{c['case']} {c['before_us']:.1f} -> {c['after_us']:.1f}"
            if c["before_us"] is not None
            else f"{c['case']} {c['after_us']:.1f}"
            for c in step["cases"]
        )
        lines.append(f"| {step['step']} | {step['expected']} | {cases} |")
    return "\n".join(lines)


def _cases(record: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(N, K, M) of the record, the largest products first."""
    cases = {(r["n_channels"], r["n_inputs"], r["n_tokens"]) for r in record["results"]}
    return sorted(cases, key=lambda case: (-case[0] * case[1], -case[0], case[2]))
