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
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import atomq.hf
from atomq import pipeline
from atomq.block_loop import QuantizationReport
from atomq.commands import console
from atomq.config import CalibrationConfig
from atomq.eval.perplexity import evaluate_perplexity
from atomq.eval.windows import evaluation_windows
from atomq.ladder import choose_rungs
from atomq.models.loading import load_float_model, load_tokenizer
from atomq.models.source import resolve_source
from atomq.presets import PRESETS, build_recipe, changed_settings

KV16 = "kv.n_bits=16"
PAPER = ("rtn", "outliers-fp16", "outliers-int8", "groups", "clipping")
# Name -> preset and settings: the presets, and the paper's steps to `atom` (`atomq ablate` has all rungs).
RECIPES: dict[str, tuple[str, list[str]]] = {
    "atomq --refine": ("atomq", ["solver.refine_steps=200"]),
    "atomq": ("atomq", []),
    "atom": ("atom", []),
    "atomq KV16": ("atomq", [KV16]),
    "atom KV16": ("atom", [KV16]),
    "atomq-fast": ("atomq-fast", []),
    "w4a16-int8": ("w4a16-int8", []),
    "w4a8": ("w4a8", []),
    "w3a3": ("w3a3", []),
    "atom W3A3 KV16": ("atom", ["weights.n_bits=3", "activations.n_bits=3", KV16]),
    "w4a16": ("w4a16", []),
    "w8a8": ("w8a8", []),
    **{
        f"ladder: {rung.text}": (
            "atom",
            [f"{name}={value}" for name, value in changed_settings(PRESETS["atom"], rung.recipe).items()],
        )
        for rung in choose_rungs(PAPER, refine=False)
    },
}


def main(
    model: str,
    calib_data: Annotated[str, typer.Option()],
    data: Annotated[str, typer.Option()],
    second_data: Annotated[str | None, typer.Option(help="A text that was not calibrated on.")] = None,
    second_windows: int = 64,
    kl: Annotated[bool, typer.Option(help="Evaluate the float model beside each recipe.")] = True,
    n_samples: int = 64,
    seq_len: int = 2048,
    seed: int = 0,
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
    seconds = None
    if second_data is not None:
        seconds = evaluation_windows(load_tokenizer(source), second_data, 2048, second_windows)
    float_model: Any = load_float_model(source)
    baseline = float_model.to(place)
    recipes = {name: recipe for name, recipe in RECIPES.items() if not only or name in only}
    for text in extra or []:
        name, preset, changes = text.split(":")
        recipes[name] = (preset, [s for s in changes.split(",") if s])
    rows: list[dict[str, Any]] = []
    record = {
        "model": source.name,
        "calibration": {
            "data": Path(calib_data).name,
            "n_samples": n_samples,
            "seq_len": seq_len,
            "seed": seed,
        },
        "evaluation": {"data": windows.corpus, "n_windows": windows.n_windows, "seq_len": windows.seq_len},
        "environment": environment(place, commit),
        "float_ppl": evaluate_perplexity(baseline, windows).ppl,
        "second": None if seconds is None else {"data": seconds.corpus, "n_windows": seconds.n_windows},
        "float_second_ppl": None if seconds is None else evaluate_perplexity(baseline, seconds).ppl,
        "rows": rows,
    }
    console.out.print(f"float: {record['float_ppl']:.4f}, {record['float_second_ppl']}", highlight=False)
    for name, (preset, settings) in recipes.items():
        rows.append({"name": name, "preset": preset, "settings": settings})
        beside = baseline if kl else None
        config = CalibrationConfig(calib_data, n_samples, seq_len, seed)
        rows[-1] |= measure(model, preset, settings, config, place, windows, seconds, beside)
        figures = {key: rows[-1][key] for key in ("ppl", "second_ppl", "kl", "quantize_seconds", "seconds")}
        console.out.print(f"{name}: {json.dumps(figures)}", highlight=False, soft_wrap=True)
        if save is not None:
            save.parent.mkdir(parents=True, exist_ok=True)
            save.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def measure(
    model: str,
    preset: str,
    settings: list[str],
    config: CalibrationConfig,
    device: torch.device,
    windows: Any,
    seconds: Any,
    baseline: Any,
) -> dict[str, Any]:
    """Quantize by one recipe and evaluate its simulation, beside `baseline` if it is given."""
    recipe = build_recipe(preset, {}, None, settings)
    config = config if recipe.needs_calibration else CalibrationConfig()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        result = pipeline.quantize(model, Path(folder) / "out", recipe, device, lambda *_: None, config)
        quantize_seconds = time.perf_counter() - started
        simulation: Any = atomq.hf.load(result.path)
    started = time.perf_counter()
    simulation = simulation.to(device)
    evaluated = evaluate_perplexity(simulation, windows, baseline)
    second = None if seconds is None else evaluate_perplexity(simulation, seconds).ppl
    return {
        "ppl": evaluated.ppl,
        "second_ppl": second,
        "baseline_ppl": evaluated.baseline_ppl,
        "kl": evaluated.kl,
        "quantize_seconds": quantize_seconds,
        "evaluate_seconds": time.perf_counter() - started,
        **{key: result.summary[key] for key in ("effective_bits", "size_bytes", "seconds", "warnings")},
        "mean_relative_error": result.summary["mean_relative_error"],
        "clip_ratios": clip_ratios(result.report),
    }


def clip_ratios(report: QuantizationReport) -> dict[str, int]:
    """How many linears have each of the clip ratios that were searched for their inputs; none if none was."""
    found = (linear.clip_ratio for linear in report.linears if linear.clip_ratio is not None)
    return {f"{ratio:.4g}": n for ratio, n in sorted(Counter(found).items())}


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
