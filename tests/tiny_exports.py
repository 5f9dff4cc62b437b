"""Checkpoints of tiny models made for export, and their reading by naive loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_checkpoints import calibration_text

from atomq import pipeline
from atomq.config import CalibrationConfig, override
from atomq.presets import find_preset


def make_checkpoint(model: Path, out: Path, preset: str, settings: dict[str, Any]) -> Path:
    """Quantize a tiny model by `preset` with `settings` over it; answer `out`."""
    recipe = override(find_preset(preset), settings)
    text = CalibrationConfig(str(calibration_text(out.parent)), n_samples=4, seq_len=32)
    pipeline.quantize(str(model), out, recipe, "cpu", calibration=text)
    return out


def unpack_words(word: int, n_bits: int) -> list[int]:
    """The unsigned codes of one int32 word whose width `n_bits` divides, lowest first."""
    word &= 0xFFFFFFFF
    return [(word >> shift) & (2**n_bits - 1) for shift in range(0, 32, n_bits)]
