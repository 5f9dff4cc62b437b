"""A rotated model from command to checkpoint to other tools: it opens as any does, and computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import calibration_text, quantize_tiny, stored_tensors
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

import atomq.hf
from atomq.cli import main
from atomq.config import CalibrationConfig, OutlierScheme
from atomq.estimate import estimate
from atomq.export.folder import export
from atomq.models.loading import load_float_model
from atomq.models.source import resolve_source
from atomq.pipeline import calibrate
from atomq.presets import build_recipe

TOKENS = torch.randint(2, 256, (2, 40), generator=torch.Generator().manual_seed(0))
EIGHT_BITS = {"weights.n_bits": 8, "solver.damp_frac": 0.01, "solver.rotation": "fused"}


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    """A model whose head is its embeddings, with biases."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tied", "qwen2")


@pytest.fixture(scope="module")
def checkpoint(tied, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "OUT"
    quantize_tiny(tied, out, "w4a16", settings=EIGHT_BITS)
    return out


def test_a_checkpoint_computes_what_the_original_does(tied, checkpoint):
    expected = load_float_model(resolve_source(str(tied)))(TOKENS).logits
    found = atomq.hf.load(checkpoint)(TOKENS).logits
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.05


def test_it_has_a_head_of_its_own_and_says_so(checkpoint):
    stored = stored_tensors(checkpoint)
    assert stored["lm_head.weight"].shape == stored["model.embed_tokens.weight"].shape
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert all(bool((t == 1).all()) for name, t in stored.items() if name.endswith("norm.weight"))
    assert json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"] is False
    recipe = json.loads((checkpoint / "manifest.json").read_text())["recipe"]
    assert recipe["solver"]["rotation"] == "fused"


def test_another_tool_opens_its_export_without_knowing(checkpoint, tmp_path):
    dest = export(checkpoint, tmp_path / "DEST", "hf").path
    plain = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)
    expected = atomq.hf.load(checkpoint)(TOKENS).logits
    assert (plain(TOKENS).logits - expected).norm() / expected.norm() < 0.01  # bfloat16


def test_a_dry_run_counts_the_head(tied, tmp_path):
    """Beside the weights that are tied without a rotation."""
    text = CalibrationConfig(str(calibration_text(tmp_path)), 4, seq_len=32)
    found = {
        rotate: estimate(
            str(tied),
            tmp_path / "OUT",
            build_recipe("w4a16", {"rotate": rotate}, None, []),
            torch.device("cpu"),
            calibration=text,
        ).out_bytes
        for rotate in ("none", "fused")
    }
    assert found["fused"] - found["none"] == pytest.approx(256 * 48 * 4, abs=64)


def test_statistics_of_the_model_as_it_is_are_refused(tied, tmp_path, capsys):
    text = CalibrationConfig(str(calibration_text(tmp_path)), 4, seq_len=32)
    stats = tmp_path / "stats.safetensors"
    calibrate(str(tied), stats, text, OutlierScheme(8, reorder=True), "cpu")
    given = ["--preset", "atom", "--n-outliers", "8", "--rotate", "fused", "--calibration", str(stats)]
    assert main(["quantize", str(tied), str(tmp_path / "OUT"), *given, "--device", "cpu"]) == 2
    assert "this recipe rotates it first; leave --calibration away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "rotate", "words"),
    [
        ("gemma2", None, "gemma2 models cannot be rotated"),
        ("opt", None, "opt models cannot be rotated"),
        ("llama", "learned", "solver.rotation='learned' does not exist; choose one of none, fused"),
    ],
)
def test_what_cannot_be_rotated_is_refused_before_anything_is_written(kind, rotate, words, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", kind)
    given = ["--preset", "ct-w4a4", "--calib-data", str(calibration_text(model)), "--seq-len", "32"]
    given += [] if rotate is None else ["--rotate", rotate]
    assert main(["quantize", str(model), str(tmp_path / "OUT"), *given, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
