"""Tables of docs/kernels.md from records of `atomq bench-e2e`."""

from __future__ import annotations

import statistics
from typing import Any

_GIB = 2**30


def steps_table(record: dict[str, Any]) -> str:
    """One row for each step that was measured."""
    measured, layers = record["n_layers_measured"], record["n_layers"]
    scaling = "" if measured == layers else f"; {measured} of {layers} layers measured and scaled"
    lines = [
        f"{record['model']}, {record['context']} tokens, {record['memory_gib']:g} GiB{scaling}; floors by "
        f"{record['read_gb_per_s'] / 1000:.2f} TB/s, measured.",
        "",
        "| comparison | scheme | batch | ms a step | tokens/s | of its floor | GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for step in record["steps"]:
        size = step["memory_bytes"] / _GIB
        outside = " (over the budget)" if size > record["memory_gib"] else ""
        lines.append(
            f"| {step['comparison']} | {step['scheme']} | {step['batch']} | {1e-3 * step['step_us']:.2f} | "
            f"{step['tokens_per_s']:.0f} | {100 * step['floor_fraction']:.0f} % | {size:.1f}{outside} |"
        )
    return "\n".join(lines)


def ratios_table(record: dict[str, Any]) -> str:
    """Our schemes over each baseline, measured and at both floors."""
    lines = [
        "| comparison | scheme | over | batches | measured | at both floors | measured of that | baseline |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record["ratios"]:
        validity = "" if row["baseline_is_valid"] else "no valid baseline: "
        lines.append(
            f"| {row['comparison']} | {row['scheme']} | {row['baseline']} | "
            f"{row['batch']} / {row['baseline_batch']} | {row['measured']:.2f}x | {row['at_floors']:.2f}x | "
            f"{100 * row['measured'] / row['at_floors']:.0f} % | "
            f"{validity}{100 * row['baseline_floor_fraction']:.0f} % of its floor |"
        )
    return "\n".join(lines)


def shares_table(record: dict[str, Any]) -> str:
    """Where the time of steps and prompts goes, by kind of work, under CUDA's trace."""
    prompts = record.get("prefill", {}).items()
    measured = [(s["scheme"], s["batch"], s["shares"]) for s in record["steps"] if s["shares"]]
    measured += [(name, "prompt", times["shares"]) for name, times in prompts if times.get("shares")]
    return _shares("scheme", measured)


def _shares(what: str, measured: list[tuple[str, int | str, dict[str, float]]]) -> str:
    kinds = list(measured[0][2])
    lines = [
        f"| {what} | batch | {' | '.join(kinds)} | sum, ms |",
        "| --- " * (len(kinds) + 3) + "|",
    ]
    for scheme, batch, shares in measured:
        total = sum(shares.values())
        # scaled from a few layers, a share may come out just below nothing
        parts = " | ".join(f"{max(0.0, 100 * shares[kind] / total):.0f} %" for kind in kinds)
        lines.append(f"| {scheme} | {batch} | {parts} | {1e-3 * total:.2f} |")
    return "\n".join(lines)


def e2e_tables(record: dict[str, Any]) -> str:
    """Everything of one shape: steps, caches, ratios, and shares where they were measured."""
    caches = "; ".join(f"{name} {cache}" for name, cache in record["kv_cache"].items())
    parts = [steps_table(record), f"KV caches: {caches}.", ratios_table(record)]
    if any(step["shares"] for step in record["steps"]):
        parts.append(shares_table(record))
    if "profile" in record:
        parts.append(profile_table(record))
    if "prefill" in record:
        parts.append(prefill_table(record))
    return "\n\n".join(parts)


def prefill_table(record: dict[str, Any]) -> str:
    """A prompt of the context's length alone."""
    lines = [
        f"| a prompt of {record['context']} tokens | ms as a graph | ms launched from Python |",
        "| --- | --- | --- |",
    ]
    for name, times in record["prefill"].items():
        cells = ["" if us is None else f"{1e-3 * us:.1f}" for us in (times["graph_us"], times["launched_us"])]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def profile_table(record: dict[str, Any]) -> str:
    """Kernels of a step on a few layers by kind of work; those that overlap count twice."""
    kinds = list(record["profile"][0]["kernel_us"])
    lines = [
        f"Kernels of a step under CUDA's trace, us, {record['profile'][0]['n_layers']} layers:",
        "",
        f"| scheme | batch | launches | the step | {' | '.join(kinds)} |",
        "| --- " * (len(kinds) + 4) + "|",
    ]
    for row in record["profile"]:
        cells = " | ".join(f"{row['kernel_us'][kind]:.0f}" for kind in kinds)
        lines.append(
            f"| {row['scheme']} | {row['batch']} | {row['n_launches']} | {row['graph_us']:.0f} | {cells} |"
        )
    return "\n".join(lines)


def trace_table(record: dict[str, Any]) -> str:
    """Continuous batching of one seeded workload, each scheme with the rows of its largest batch."""
    lines = [
        f"{record['model']}, {record['memory_gib']:g} GiB, "
        f"{next(iter(record['trace'].values()))['n_requests']} requests.",
        "",
        "| scheme | rows | tokens/s | request p50 / p99, s | token p50 / p99, ms |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, t in record["trace"].items():
        lines.append(
            f"| {name} | {t['n_rows']} | {t['tokens_per_s']:.0f} | "
            f"{t['request_p50_s']:.2f} / {t['request_p99_s']:.2f} | "
            f"{t['token_p50_ms']:.1f} / {t['token_p99_ms']:.1f} |"
        )
    return "\n".join(lines)


def decode_table(record: dict[str, Any]) -> str:
    """A real checkpoint on the decode path: perplexity, greedy tokens, speed, by dtype of the activations.

    Below it, where the record has them, the shares of a step.
    """
    base, n_tokens = record["ppl"]["simulation"], record["n_tokens"]

    def noise(path: str, dtype: str = "float32") -> str:
        found = record["noise"][dtype][path]
        return f"{100 * found['differs']:.1f} % | {100 * found['distance']:.1f} %"

    lines = [
        f"{record['checkpoint']}: {record['n_windows']} windows of {record['seq_len']} tokens, "
        f"{len(next(iter(record['greedy'].values())))} prompts of {n_tokens} greedy tokens.",
        "",
        "| path | perplexity | to the simulation | equal tokens, median | another most likely token | "
        "logits off by | tokens/s (batch) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| simulation | {base:.3f} | | | {noise('simulation')} | "
        f"{record['simulation_tokens_per_s']:.0f} (1) |",
    ]
    for name, rows in record["greedy"].items():
        rates = ", ".join(
            f"{rate:.0f} ({key.rsplit(' ', 1)[1]})"
            for key, rate in record["tokens_per_s"].items()
            if key.startswith(f"{name},")
        )
        perplexity = record["ppl"][name]
        lines.append(
            f"| kernels, {name} | {perplexity:.3f} | {100 * (perplexity / base - 1):+.2f} % | "
            f"{statistics.median(row['n_equal'] for row in rows):g} of {n_tokens} | "
            f"{noise('kernels', name)} | {rates} |"
        )
    if "shares" in record:
        measured = [(name, int(batch), s) for name, of in record["shares"].items() for batch, s in of.items()]
        lines += ["", "A step half way, under CUDA's trace:", "", _shares("kernels", measured)]
    return "\n".join(lines)


def attention_table(record: dict[str, Any]) -> str:
    """Decode attention alone, and how much slower the others are than the first."""
    rows = record["attention"]
    lines = [
        f"Batch {rows[0]['batch']}, {rows[0]['context']} tokens, {rows[0]['n_heads']} heads of "
        f"{rows[0]['head_dim']} in the cache, {rows[0]['group']} query heads for each.",
        "",
        "| cache | us | of its floor | times the first |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['us']:.1f} | {100 * row['floor_fraction']:.0f} % | "
            f"{row['us'] / rows[0]['us']:.2f}x |"
        )
    return "\n".join(lines)


def variants_table(record: dict[str, Any]) -> str:
    """Launch parameters of the decode kernel, and what cutting sequences costs."""
    variants = record["variants"]
    launches = list(dict.fromkeys(tuple(row["launch"].values()) for row in variants["rows"]))
    found = {(row["name"], tuple(row["launch"].values())): row["us"] for row in variants["rows"]}
    heads = " | ".join(f"{warps} x {stages}, {ctas}" for warps, stages, ctas in launches)
    lines = [
        "us by warps x stages, CTAs of an SM asked for; then with sequences whole, in 2 and in 4 parts:",
        "",
        f"| cache | {heads} | whole | 2 | 4 |",
        "| --- " * (len(launches) + 4) + "|",
    ]
    for name, splits in variants["splits_us"].items():
        cells = [found.get((name, launch)) for launch in launches]
        shown = ["" if us is None else f"{us:.0f}" for us in (*cells, *splits.values())]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)
