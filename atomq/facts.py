"""What the manifest and the reports say about a run."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict
from typing import Any

import safetensors
import torch
import transformers

import atomq
from atomq import distributed
from atomq.block_loop import QuantizationReport
from atomq.config import CalibrationConfig, Recipe, to_dict
from atomq.eval.windows import DEFAULT_SAMPLES, TokenWindows
from atomq.formats.journal import CHOICE
from atomq.memory import PeakMemory
from atomq.models.source import ModelSource
from atomq.numerics.channels import ChannelStatistics
from atomq.rotation_choice import RotationChoice


def window_facts(windows: TokenWindows, calibration: CalibrationConfig) -> dict[str, Any]:
    """The calibration text, and how it was used."""
    return {
        "data": windows.corpus,
        "layout": windows.layout,
        "text_sha256": windows.corpus_sha256,
        "tokens_sha256": windows.data_hash,
        "n_samples": windows.n_windows,
        "seq_len": windows.seq_len,
        "n_tokens": windows.n_tokens,
        "seed": windows.seed,
        "all_experts": calibration.all_experts,
    }


def manifest_facts(
    job: dict[str, Any],
    recipe: Recipe,
    report: QuantizationReport,
    warnings: list[str],
    statistics: dict[str, ChannelStatistics] | None,
) -> dict[str, Any]:
    """The job, and what a careful reader should know of how it went. No clock, no path.

    `dead_channels` names the channels, in their original order, that the calibration text never moved.
    """
    asked = ("gptq", recipe.solver.damp_frac) if recipe.solver.method == "gptq" else ("rtn", None)
    deviations = {
        r.name: {"method": r.method, "damp_frac": r.damp_frac}
        for r in report.linears
        if (r.method, r.damp_frac) != asked
    }
    starved = report.starved_experts
    dead = {
        name: channels
        for name, found in (statistics or {}).items()
        if (channels := (found.abs_mean == 0).nonzero().flatten().tolist())
    }
    return {
        **job,
        "deviations": deviations,
        "dead_channels": dead,
        "starved_experts": starved,
        "warnings": warnings,
    }


def job_facts(
    source: ModelSource,
    model_hash: str,
    recipe: Recipe,
    calibration: dict[str, Any] | None,
    device: torch.device,
    choice: RotationChoice | None = None,
) -> dict[str, Any]:
    """All that the bytes of a checkpoint depend on, and the `choice` of `--rotate auto`, whose outcome the
    recipe has; a run goes on only where all of it is the same.
    """
    return {
        "source": {"name": source.name, "kind": source.kind, "sha256": model_hash},
        "recipe": to_dict(recipe),
        "calibration": calibration,
        "device": device.type,
        "processes": distributed.n_processes(),  # their sums are rounded in another order
        "versions": {
            "atomq": atomq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
        **({} if choice is None else {CHOICE: asdict(choice)}),
    }


def token_warnings(
    windows: TokenWindows | None, report: QuantizationReport, recipe: Recipe, asked: CalibrationConfig
) -> list[str]:
    """Less text than by default, or too little for the widest linear: worth a word even if all went well."""
    warnings: list[str] = []
    if windows is None:
        return warnings
    n_different = len(torch.unique(windows.token_ids, dim=0))
    if n_different < windows.n_windows:
        warnings.append(
            f"{windows.n_windows - n_different} of {windows.n_windows} calibration windows of "
            f"{windows.corpus} repeat others; give a longer text for a better result"
        )
    by_default = asked.n_samples is None and asked.data != "builtin"
    if by_default and windows.n_windows < DEFAULT_SAMPLES:
        warnings.append(
            f"{windows.corpus} holds {windows.n_windows} windows of {windows.seq_len} tokens, "
            f"fewer than the {DEFAULT_SAMPLES} that are taken by default"
        )
    if recipe.solver.method == "gptq" and report.widest_input > windows.n_tokens:
        warnings.append(
            f"{windows.n_tokens} calibration tokens are fewer than the {report.widest_input} inputs of the "
            f"widest linear; give more text for a better result"
        )
    return warnings


def mean_error(report: QuantizationReport) -> float | None:
    errors = [r.relative_error for r in report.linears if r.relative_error is not None]
    return sum(errors) / len(errors) if errors else None


def host_facts(device: torch.device, memory: PeakMemory) -> dict[str, Any]:
    """What the figures depend on besides the inputs; only for reports."""
    host = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": memory.peak_bytes,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "peak_gpu_bytes": memory.peak_gpu_bytes,
    }
    return {"host": host}
