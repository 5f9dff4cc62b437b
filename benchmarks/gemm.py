"""Measure the GEMM kernels and `quantize_act` on a GPU beside their peers, and print the tables of a record.

python -m benchmarks.gemm --save benchmarks/results/DATE-GPU-gemm.json --commit $(git rev-parse HEAD)
python -m benchmarks.gemm --table benchmarks/results/DATE-GPU-gemm.json
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cupy
import torch

from atomq.eval.gemm_bench import (
    Ceilings,
    all_candidates,
    bench,
    environment,
    measure_ceilings,
    usable,
)
from atomq.eval.gemm_timing import n_copies, time_in_turns
from atomq.kernels.activations import quantize_act
from atomq.kernels.layout import ActivationFormat, ChannelOrder
from atomq.kernels.repack import PackedActivations
from benchmarks.gemm_goals import check_goals
from benchmarks.gemm_runs import NOTHING, without
from benchmarks.gemm_tables import quantize_table, table

SHAPES = [
    (28672, 8192),
    (8192, 28672),
    (8192, 8192),
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (14336, 4096),
]
# The few tokens of all shapes come first: many leave the card hot for a while.
PASSES = [[1, 2, 4, 8, 16, 32, 64], [128, 256, 1024, 4096]]
QUANTIZE_TOKENS, QUANTIZE_CHANNELS = 4096, (4096, 28672)


def measure(path: Path, commit: str, from_tokens: int, to_tokens: int) -> dict[str, Any]:
    """Run the passes of `from_tokens` to `to_tokens`; what the record has of other tokens stays.

    The record is written after every shape, results go to stderr as they come. Its "runs" say which commit
    measured which numbers of tokens; the rest of its head is that of the last run.

    Raises:
        ValueError: what stays was measured on another GPU.
    """
    passes = [tokens for tokens in PASSES if tokens[0] >= from_tokens and tokens[-1] <= to_tokens]
    now_measured = [n for tokens in passes for n in tokens]
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else NOTHING
    runs, results = without(earlier, now_measured, torch.cuda.get_device_name())
    candidates, left_out = usable(all_candidates())
    ceilings = measure_ceilings()
    run: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "tokens": now_measured,
        "driver_clock_power_before": driver_clock_power(),
    }
    record: dict[str, Any] = {
        **environment(ceilings),
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "humming": installed_version("humming-kernels"),
        "left_out": left_out,
        "group_size": 128,
        "n_outliers": 128,
        "runs": [*runs, run],
        "results": results,
    }
    started = time.perf_counter()
    for tokens in passes:
        for shape in SHAPES:
            for result in bench([shape], tokens, candidates, ceilings, left_out.append):
                record["results"].append(result.to_dict())
            took = f"{time.perf_counter() - started:.0f} s"
            sys.stderr.write(f"{shape[0]}x{shape[1]}, {tokens[0]} to {tokens[-1]} tokens: {took}\n")
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record["quantize"] = list(measure_quantize(ceilings))
    run["driver_clock_power_after"] = driver_clock_power()
    run["seconds"] = time.perf_counter() - started
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def measure_quantize(ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """`quantize_act` on many tokens: bytes per second, and their fraction of a copy's."""
    for n_channels in QUANTIZE_CHANNELS:
        n_bytes = 2 * QUANTIZE_TOKENS * n_channels
        tokens = [
            torch.randn(QUANTIZE_TOKENS, n_channels, device="cuda", dtype=torch.float16)
            for _ in range(n_copies(n_bytes))
        ]
        cases = []
        for gathers in (False, True):
            for hadamard in (False, True):
                form = ActivationFormat(n_channels, 128, clip_ratio=0.9, hadamard=hadamard)
                order = ChannelOrder.of(torch.randperm(n_channels, device="cuda"), form) if gathers else None
                cases.append((gathers, hadamard, form, order))
        kept: list[PackedActivations] = []
        launches = [
            [functools.partial(quantize_and_keep, kept, x, form, order) for x in tokens]
            for _, _, form, order in cases
        ]
        for (gathers, hadamard, form, order), timing in zip(cases, time_in_turns(launches), strict=True):
            packed = quantize_act(tokens[0], form, order)
            moved = n_bytes + packed.codes.nbytes + packed.token_scales.nbytes
            yield {
                "n_tokens": QUANTIZE_TOKENS,
                "n_channels": n_channels,
                "gather": gathers,
                "hadamard": hadamard,
                "graph_us": timing.graph_us,
                "gb_per_s": 1e-3 * moved / timing.graph_us,
                "of_copy": 1e6 * moved / timing.graph_us / ceilings.bandwidth,
            }


def quantize_and_keep(
    kept: list[PackedActivations], x: torch.Tensor, form: ActivationFormat, order: ChannelOrder | None
) -> None:
    """A result that is kept is written to memory of its own; one place would stay in the cache."""
    kept.append(quantize_act(x, form, order))


def driver_clock_power() -> str:
    """What nvidia-smi says of the driver, the SMs' clock and the power drawn now."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.draw", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--table", type=Path)
    parser.add_argument("--commit", default="")
    starts, ends = ([tokens[i] for tokens in PASSES] for i in (0, -1))  # of the passes to run
    parser.add_argument("--from-tokens", type=int, choices=starts, default=starts[0])
    parser.add_argument("--to-tokens", type=int, choices=ends, default=ends[-1])
    options = parser.parse_args()
    if options.save:
        measure(options.save, options.commit, options.from_tokens, options.to_tokens)
    if options.table or options.save:
        record = json.loads((options.table or options.save).read_text(encoding="utf-8"))
        sys.stdout.write("\n\n".join((table(record), quantize_table(record), check_goals(record))) + "\n")


if __name__ == "__main__":
    main()
