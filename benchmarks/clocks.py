"""What the power limit does to GEMMs on a GPU: each runs for a second from an idle card, timed all along.

python -m benchmarks.clocks --save benchmarks/results/DATE-GPU-clocks.json --commit $(git rev-parse HEAD)

The driver's clock and power are read beside it, ten times a second.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from atomq.eval.gemm_bench import all_candidates, usable
from atomq.eval.gemm_timing import time_sustained

SHAPE = (28672, 8192)
TOKENS = (64, 128, 256, 1024)
NAMES = ("w4a4", "w4a4-progressive", "fp16", "int8")
SECONDS = 1.0
_STEP_MS = 25.0  # of what is kept of the samples: their median in each step
_QUERY = "clocks.sm,power.draw.instant"


def measure(path: Path, commit: str) -> dict[str, Any]:
    """Run everything; the record is written after every case."""
    candidates = [c for c in usable(all_candidates())[0] if c.name in NAMES]
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "power_limit": ask_driver("power.limit"),
        "shape": SHAPE,
        "step_ms": _STEP_MS,
        "results": [],
    }
    for candidate in candidates:
        weights = candidate.prepare(*SHAPE, max(TOKENS))
        for n_tokens in TOKENS:
            work = weights.work(n_tokens)
            if work is None:
                continue
            with subprocess.Popen(_watch_command(), stdout=subprocess.PIPE, text=True) as watch:
                try:
                    time.sleep(0.1)
                    samples = time_sustained(work.launches, SECONDS)
                finally:
                    watch.terminate()  # it would go on for ever, and so would waiting for it
                seen = watch.communicate()[0].splitlines()
            record["results"].append(
                {"name": candidate.name, "n_tokens": n_tokens, "us": steps(samples), "clock_power": seen}
            )
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        del weights
    return record


def steps(samples: list[tuple[float, float]]) -> list[float]:
    """The median microseconds of each step of time."""
    by_step: dict[int, list[float]] = {}
    for at_ms, us in samples:
        by_step.setdefault(int(at_ms / _STEP_MS), []).append(us)
    return [round(statistics.median(values), 2) for _, values in sorted(by_step.items())]


def table(record: dict[str, Any]) -> str:
    """Microseconds at the start, after 100 ms, and over the second half, with the lowest clock seen."""
    lines = [
        "| kernel | M | first 25 ms | at 100 ms | second half | slowest 25 ms | lowest clock | most power |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in record["results"]:
        us = result["us"]
        seen = [line.split(", ") for line in result["clock_power"] if "MHz" in line]
        clock = min((float(fields[0].split()[0]) for fields in seen), default=float("nan"))
        power = max(
            (float(fields[1].split()[0]) for fields in seen if "W" in fields[1]), default=float("nan")
        )
        figures = (us[0], us[min(4, len(us) - 1)], statistics.median(us[len(us) // 2 :]), max(us))
        shown = " | ".join(f"{figure:.1f}" for figure in figures)
        lines.append(
            f"| {result['name']} | {result['n_tokens']} | {shown} | {clock:.0f} MHz | {power:.0f} W |"
        )
    return "\n".join(lines)


def ask_driver(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _watch_command() -> list[str]:
    return ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "-lms", "100"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--commit", default="")
    options = parser.parse_args()
    if options.save:
        measure(options.save, options.commit)
    path = options.table or options.save
    sys.stdout.write(table(json.loads(path.read_text(encoding="utf-8"))) + "\n")


if __name__ == "__main__":
    main()
