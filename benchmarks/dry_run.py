"""Holds `quantize --dry-run` against the run itself: memory, GPU memory, disk and time per phase.

    python benchmarks/dry_run.py MODEL --save RECORD.json -- --preset atom --n-samples 16

Both are processes of their own, one after the other; what follows `--` is given to both.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import atomq
from atomq.commands import console
from atomq.formats.files import write_json

ALLOWED = {"memory": 0.25, "GPU memory": 0.25, "disk": 0.25, "time": 0.4}


def run(*argv: str) -> dict[str, Any]:
    """What `atomq quantize ... --json` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "atomq", "quantize", *argv, "--json"],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main(
    model: Annotated[str, typer.Argument(help="As of atomq quantize.")],
    options: Annotated[list[str] | None, typer.Argument(help="More options for both, after --.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the record here.")] = None,
) -> None:
    """Estimate, run, compare."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "OUT"
        expected = run(model, str(out), *(options or []), "--dry-run")
        sys.stderr.write(f"expected: {json.dumps(expected)}\n")  # the run may take long, or be cut off
        measured = run(model, str(out), *(options or []), "--check", "off")
        host = json.loads((out / "reports" / "quantize.json").read_text(encoding="utf-8"))["host"]
        on_disk = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    pairs: dict[str, tuple[float | None, float | None]] = {
        "memory": (expected["ram_bytes"], host["peak_memory_bytes"]),
        "GPU memory": (expected["gpu_bytes"], host["peak_gpu_bytes"]),
        "disk": (expected["out_bytes"], on_disk),
        "time": (expected["seconds"]["total"], measured["seconds"]["total"]),
    }
    phases = {
        f"time, {phase}": (expected["seconds"].get(phase), seconds)
        for phase, seconds in measured["seconds"].items()
        if phase != "total"
    }
    rows, wrong = [], []
    for name, (guess, truth) in (pairs | phases).items():
        if guess is None or truth is None:
            continue
        off = guess / truth - 1 if truth else 0.0
        rows.append([name, f"{guess:.4g}", f"{truth:.4g}", f"{100 * off:+.0f} %"])
        if name in ALLOWED and abs(off) > ALLOWED[name]:
            wrong.append(name)
    console.print_table("dry run and run (bytes, seconds)", ["", "expected", "measured", "off by"], rows)
    if save is not None:
        record = {
            "what": "quantize --dry-run beside the run",
            "model": measured["model"],
            "options": options or [],
            "expected": {name: guess for name, (guess, _) in (pairs | phases).items()},
            "measured": {name: truth for name, (_, truth) in (pairs | phases).items()},
            "beyond_what_is_allowed": wrong,
            "host": {key: host[key] for key in ("gpu", "machine", "python", "threads")},
            "versions": {"atomq": atomq.__version__, "torch": torch.__version__},
        }
        write_json(save, record)
    if wrong:
        raise SystemExit(f"off by more than allowed: {', '.join(wrong)}")


if __name__ == "__main__":
    typer.run(main)
