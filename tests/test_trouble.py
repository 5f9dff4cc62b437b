"""Numerical trouble is named with layer and channel, and recorded in the manifest."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import quantize_tiny, recipe_of
from tiny_models import save_tiny_model

from atomq import block_loop, pipeline
from atomq.cli import main
from atomq.config import CalibrationConfig
from atomq.errors import CalibrationDataError, UnsupportedModelError

GATE = "model.layers.1.mlp.gate_proj.weight"


def change_weight(folder, name, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def manifest_of(folder) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [GATE, "model.embed_tokens.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named_with_its_place(tmp_path, value, name):
    model = save_tiny_model(tmp_path / "model")
    place = (5, 7) if name != "model.norm.weight" else (5,)

    def spoil(weight: torch.Tensor) -> None:
        weight[place] = value

    change_weight(model, name, spoil)
    where = ", ".join(map(str, place))
    with pytest.raises(UnsupportedModelError, match=rf"{name} holds NaN or Inf, first at \[{where}\]"):
        quantize_tiny(model, tmp_path / "OUT")
    assert not list(tmp_path.glob(".OUT*"))


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("rotate", ["none", "auto"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_outside_of_the_blocks_it_is_named_before_any_work(
    tmp_path, text_file, capsys, monkeypatch, name, rotate, dry
):
    def compute(*_args: object) -> None:
        raise AssertionError("calibration text was passed through the model")

    monkeypatch.setattr(block_loop, "capture_block_inputs", compute)
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    change_weight(model, name, lambda weight: weight[-1:].fill_(float("nan")))
    argv = ["quantize", str(model), str(tmp_path / "OUT"), "--group-size", "16", "--n-outliers", "5"]
    argv += ["--calib-data", str(text_file), "--n-samples", "4", "--seq-len", "32", "--rotate", rotate]
    assert main([*argv, *(["--dry-run"] if dry else [])]) == 2
    place = "[47]" if name == "model.norm.weight" else "[255, 0]"
    assert f"{name} holds NaN or Inf, first at {place}; the file is broken" in capsys.readouterr().err
    assert not list(tmp_path.glob(".OUT*"))


def test_calibrate_does_not_work_for_a_model_that_quantize_would_refuse(tmp_path, text_file, capsys):
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=False)
    change_weight(model, "lm_head.weight", lambda weight: weight[3, 4:].fill_(float("inf")))
    text = ["--calib-data", str(text_file), "--n-samples", "4", "--seq-len", "32", "--n-outliers", "5"]
    assert main(["calibrate", str(model), "-o", str(tmp_path / "s.safetensors"), *text]) == 2
    assert "lm_head.weight holds NaN or Inf, first at [3, 4]; the file is broken" in capsys.readouterr().err
    assert not (tmp_path / "s.safetensors").exists()


def test_a_nan_in_embeddings_that_the_head_repeats_is_no_difference_between_them(tmp_path):
    model = save_tiny_model(tmp_path / "model", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"][3, 4] = float("nan")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UnsupportedModelError, match=r"embed_tokens.weight holds NaN or Inf, first at \[3, 4\]"
    ):
        quantize_tiny(model, tmp_path / "OUT")


def test_dead_channels_are_in_the_manifest_by_linear_and_number(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    change_weight(model, GATE, lambda weight: weight.index_fill_(0, torch.tensor([3, 9]), 0))
    quantize_tiny(model, tmp_path / "OUT")
    manifest = manifest_of(tmp_path / "OUT")
    assert manifest["dead_channels"] == {"model.layers.1.mlp.down_proj": [3, 9]}
    assert any("never active; most: model.layers.1.mlp.down_proj with 2" in w for w in manifest["warnings"])


def test_a_hessian_that_needs_more_damping_is_in_the_manifest(tmp_path, tiny_dir, monkeypatch):
    import atomq.method.solve as solve

    factorize = solve.factorize_hessian

    def with_trouble(hessian, damp_frac):
        return factorize(hessian, damp_frac * (10 if hessian.shape[0] == 80 else 1))

    monkeypatch.setattr(solve, "factorize_hessian", with_trouble)
    quantize_tiny(tiny_dir, tmp_path / "OUT")
    deviations = manifest_of(tmp_path / "OUT")["deviations"]
    assert deviations["model.layers.0.mlp.down_proj"] == {"method": "gptq", "damp_frac": 0.1}


def test_one_token_over_and_over_is_no_text(tmp_path, tiny_dir):
    (tmp_path / "same.txt").write_text("a" * 4000)
    with pytest.raises(CalibrationDataError, match=r"same\.txt is token \d+ over and over"):
        pipeline.quantize(
            str(tiny_dir),
            tmp_path / "OUT",
            recipe_of("atom"),
            "cpu",
            calibration=CalibrationConfig(str(tmp_path / "same.txt"), 4, seq_len=32),
        )
    assert not (tmp_path / "OUT").exists()


def test_windows_that_repeat_others_are_warned_of(tmp_path, tiny_dir):
    (tmp_path / "ab.txt").write_text("ab" * 3000)
    result = pipeline.quantize(
        str(tiny_dir),
        tmp_path / "OUT",
        recipe_of("atom"),
        "cpu",
        calibration=CalibrationConfig(str(tmp_path / "ab.txt"), 4, seq_len=32),
    )
    repeated = "calibration windows of ab.txt repeat others; give a longer text for a better result"
    assert any(warning.endswith(repeated) for warning in result.summary["warnings"])
    assert repeated in " ".join(manifest_of(tmp_path / "OUT")["warnings"])
