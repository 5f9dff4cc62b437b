"""Measure the GEMM kernels on a GPU, write benchmarks/results/<date>-<gpu>-gemm.json, print the table of it.

python benchmarks/gemm.py --save benchmarks/results/2026-11-22-h100-gemm.json
python benchmarks/gemm.py --table benchmarks/results/2026-11-22-h100-gemm.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cupy

from atomq.eval.gemm_bench import Mode, bench, environment

SHAPES = [
    (28672, 8192),
    (8192, 28672),
    (8192, 8192),
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (14336, 4096),
]
FEW_TOKENS = [1, 16, 64]  # all of them before the others, which leave the card throttled for a while
MANY_TOKENS = [128, 256, 1024, 4096]
MODES: list[Mode] = ["w4a4", "w4a4-mixed", "w4a4-progressive"]
COLUMNS = ["w4a4", "w4a4-mixed", "w4a4-progressive", "w4a16", "fp16", "bf16", "int8", "fp8"]


def measure(commit: str) -> dict[str, Any]:
    """Run everything; results go to stderr as they come."""
    query = "--query-gpu=driver_version,clocks.sm,power.draw"
    smi = ["nvidia-smi", query, "--format=csv,noheader"]
    before = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip()
    results = []
    passes: list[tuple[list[Mode], list[int]]] = [([*MODES, "w4a16"], FEW_TOKENS), (MODES, MANY_TOKENS)]
    for modes, tokens in passes:
        for result in bench(SHAPES, tokens, modes):
            results.append(result.to_dict())
            shape = f"{result.n_channels}x{result.n_inputs} M={result.n_tokens}"
            line = f"{shape} {result.name} {result.timing.graph_us:.1f} us {result.tops:.0f} TOPS"
            sys.stderr.write(line + "\n")
    after = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        **environment(),
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "driver_clock_power_before": before,
        "driver_clock_power_after": after,
        "group_size": 128,
        "n_outliers": 128,
        "results": results,
    }


def table(record: dict[str, Any]) -> str:
    """Microseconds in a graph, TOPS in brackets, as a Markdown table."""
    cells = {(r["n_channels"], r["n_inputs"], r["n_tokens"], r["name"]): r for r in record["results"]}
    rows = dict.fromkeys(key[:3] for key in cells)
    lines = [f"| N x K | M | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 2) + "|"]
    for n_channels, n_inputs, n_tokens in sorted(rows, key=lambda key: (-key[0] * key[1], -key[0], key[2])):
        texts = []
        for name in COLUMNS:
            result = cells.get((n_channels, n_inputs, n_tokens, name))
            texts.append(f"{result['timing']['graph_us']:.1f} ({result['tops']:.0f})" if result else "")
        lines.append(f"| {n_channels}x{n_inputs} | {n_tokens} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    if options.save:
        options.save.write_text(json.dumps(measure(options.commit), indent=1) + "\n", encoding="utf-8")
    if options.table or options.save:
        record = json.loads((options.table or options.save).read_text(encoding="utf-8"))
        sys.stdout.write(table(record) + "\n")


if __name__ == "__main__":
    main()
