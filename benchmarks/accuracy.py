"""Perplexity of recipes on one model: quantize, evaluate, write a record.

    python benchmarks/accuracy.py MODEL --calib-data VALID.txt --data TEST.txt --save RECORD.json

Each recipe is quantized into a temporary folder, and its simulation is evaluated on the same windows as the
float model. The record holds every figure with the versions, the GPU and the time that it took.
"""

from __future__ import annotations

import json
import platform
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import atomq.hf
from atomq import pipeline
from atomq.commands import console
from atomq.commands.quantize import build_recipe
from atomq.config import CalibrationConfig
from atomq.eval.perplexity import evaluate_perplexity
from atomq.eval.windows import evaluation_windows
from atomq.models.loading import load_float_model, load_tokenizer
from atomq.models.source import resolve_source

# Name -> preset and settings. "measured" is the variant behind docs/method.md's first figures.
RECIPES: dict[str, tuple[str, list[str]]] = {
    "atom KV16": ("atom", ["kv.n_bits=16"]),
    "atom": ("atom", []),
    "variant KV16": ("atom", ["weights.channel_group=1", "solver.scale_span=full", "kv.n_bits=16"]),
    "variant": ("atom", ["weights.channel_group=1", "solver.scale_span=full"]),
    "rtn W4A4": ("rtn", []),
    "w4a16": ("w4a16", []),
    "w8a8": ("w8a8", []),
}


def main(
    model: str,
    calib_data: Annotated[str, typer.Option()],
    data: Annotated[str, typer.Option()],
    n_samples: int = 64,
    seq_len: int = 2048,
    max_windows: int | None = None,
    only: Annotated[list[str] | None, typer.Option(help="Only recipes of these names.")] = None,
    extra: Annotated[list[str] | None, typer.Option(help="NAME:PRESET:SETTING,SETTING...")] = None,
    save: Path | None = None,
    device: str = "auto",
    commit: str = "",
) -> None:
    place = pipeline.choose_device(device)
    source = resolve_source(model)
    windows = evaluation_windows(load_tokenizer(source), data, 2048, max_windows)
    float_model: Any = load_float_model(source)
    baseline = float_model.to(place)
    recipes = {name: recipe for name, recipe in RECIPES.items() if not only or name in only}
    for text in extra or []:
        name, preset, settings = text.split(":")
        recipes[name] = (preset, [s for s in settings.split(",") if s])
    rows: list[dict[str, Any]] = []
    record = {
        "model": source.name,
        "calibration": {"data": Path(calib_data).name, "n_samples": n_samples, "seq_len": seq_len, "seed": 0},
        "evaluation": {"data": windows.corpus, "n_windows": windows.n_windows, "seq_len": windows.seq_len},
        "environment": environment(place, commit),
        "float_ppl": evaluate_perplexity(baseline, windows).ppl,
        "rows": rows,
    }
    console.out.print(f"float: {record['float_ppl']:.4f}", highlight=False)
    for name, (preset, settings) in recipes.items():
        rows.append({"name": name, "preset": preset, "settings": settings})
        rows[-1] |= measure(model, preset, settings, calib_data, n_samples, seq_len, place, windows, baseline)
        figures = {key: rows[-1][key] for key in ("ppl", "kl", "quantize_seconds")}
        console.out.print(f"{name}: {json.dumps(figures)}", highlight=False, soft_wrap=True)
        if save is not None:
            save.parent.mkdir(parents=True, exist_ok=True)
            save.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(
    model: str,
    preset: str,
    settings: list[str],
    calib_data: str,
    n_samples: int,
    seq_len: int,
    device: torch.device,
    windows: Any,
    baseline: Any,
) -> dict[str, Any]:
    """Quantize by one recipe and evaluate its simulation beside `baseline`."""
    recipe = build_recipe(preset, {}, None, settings)
    config = CalibrationConfig(calib_data, n_samples, seq_len)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = pipeline.quantize(model, Path(folder) / "out", recipe, device, lambda *_: None, config)
        seconds = time.perf_counter() - started
        simulation: Any = atomq.hf.load(result.path)
    started = time.perf_counter()
    evaluated = evaluate_perplexity(simulation.to(device), windows, baseline)
    return {
        "ppl": evaluated.ppl,
        "baseline_ppl": evaluated.baseline_ppl,
        "kl": evaluated.kl,
        "quantize_seconds": seconds,
        "evaluate_seconds": time.perf_counter() - started,
        **{key: result.summary[key] for key in ("effective_bits", "size_bytes", "seconds", "warnings")},
        "mean_relative_error": result.summary["mean_relative_error"],
    }


def environment(device: torch.device, commit: str) -> dict[str, Any]:
    """Versions and hardware that figures depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    if not commit:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = asked.stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": gpu,
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "atomq": atomq.__version__,
        "commit": commit,
    }


if __name__ == "__main__":
    typer.run(main)
