"""The main job on tiny models, from calibration to perplexity: always the same bytes, and the right size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import files_outside_reports, shards, stored_tensors
from tiny_gguf import write_tiny_gguf
from tiny_models import byte_tokenizer, make_tiny_model, save_tiny_model

import atomq.hf
from atomq.cli import main
from atomq.numerics.linear import QuantizedLinear

TINY = ["--n-outliers", "5", "--group-size", "16"]


def run(capsys, *argv: object) -> dict:
    capsys.readouterr()
    code = main([*map(str, argv), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


def main_job(capsys, model: Path, folder: Path, text: Path, *settings: str) -> dict:
    """calibrate -> quantize -> eval-ppl -> generate; what the last two print."""
    data = ["--calib-data", text, "--n-samples", 6, "--seq-len", 64, "--seed", 5]
    artefact, out = folder / "stats.safetensors", folder / "OUT"
    run(capsys, "calibrate", model, "-o", artefact, "--n-outliers", 5, *data)
    run(capsys, "quantize", model, out, *TINY, *settings, "--calibration", artefact, *data)
    evaluation = ["--data", text, "--seq-len", 64, "--max-windows", 8]
    measured = run(capsys, "eval-ppl", out, "--baseline", model, *evaluation)
    text_made = run(capsys, "generate", out, "seven wizards", "--max-new-tokens", 8)
    return measured | {"text": text_made["text"], "n_new_tokens": text_made["n_new_tokens"]}


@pytest.mark.parametrize("kind", ["llama-mha-bias", "qwen3"])
def test_the_main_job_twice_gives_the_same_bytes_and_figures(capsys, tmp_path, text_file, kind):
    model = save_tiny_model(tmp_path / "model", kind)
    settings = ["--set", "transform=hadamard"] if kind == "qwen3" else []
    results = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        results.append(main_job(capsys, model, tmp_path / name, text_file, *settings))
    assert results[0] == results[1]
    assert files_outside_reports(tmp_path / "first") != {}
    first = files_outside_reports(tmp_path / "first" / "OUT")
    assert first == files_outside_reports(tmp_path / "second" / "OUT")
    for name in ("stats.safetensors", "stats.png"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    measured = results[0]
    assert 100 < measured["baseline_ppl"] < 1500  # a random model of 256 tokens
    assert 0 < measured["kl"] < 1
    assert abs(measured["ppl"] / measured["baseline_ppl"] - 1) < 0.5
    assert 1 <= measured["n_new_tokens"] <= 8


def test_a_gguf_file_goes_the_same_way(capsys, tmp_path, text_file):
    model = make_tiny_model("llama")
    path = write_tiny_gguf(tmp_path / "tiny.gguf", model)
    measured = main_job(capsys, path, tmp_path, text_file)
    assert measured["baseline"] == "tiny.gguf"
    assert 0 < measured["kl"] < 1
    dtypes = {t.dtype for name, t in stored_tensors(tmp_path / "OUT").items() if name.endswith("norm.weight")}
    assert dtypes == {torch.float16}  # the storage dtype of GGUF sources


def test_more_bits_diverge_less(capsys, tmp_path, text_file, tiny_dir):
    """KL from the float model with weights of 8, 4, 3 and 2 bits, rounded to nearest."""
    divergences = []
    for n_bits in (8, 4, 3, 2):
        out = tmp_path / str(n_bits)
        run(capsys, "quantize", tiny_dir, out, "--preset", "rtn", "--w-bits", n_bits, "--a-bits", 16)
        evaluation = ["--data", text_file, "--seq-len", 64, "--max-windows", 4]
        divergences.append(run(capsys, "eval-ppl", out, "--baseline", tiny_dir, *evaluation)["kl"])
    assert divergences == sorted(divergences)
    assert 0 < divergences[0] < 1e-3 < divergences[-1]


@pytest.fixture(scope="module")
def wide_dir(tmp_path_factory) -> Path:
    """A model wide enough for headers and permutations not to matter, stored in bfloat16."""
    folder = tmp_path_factory.mktemp("wide") / "wide"
    sizes = {"hidden_size": 448, "intermediate_size": 1024, "num_attention_heads": 7, "head_dim": 64}
    model = make_tiny_model("llama", num_key_value_heads=1, **sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


SIZES = {
    "atom": ["--preset", "atom", "--n-outliers", "64", "--set", "solver.method=rtn"],
    "progressive": [
        *("--preset", "atom", "--n-outliers", "64", "--set", "solver.method=rtn"),
        *("--set", "weights.channel_group=1"),
        *("--set", "weights.scale_mode=progressive", "--set", "activations.scale_mode=progressive"),
    ],
    "e4m3 outliers": [
        *("--preset", "atom", "--n-outliers", "64", "--set", "solver.method=rtn"),
        *("--set", "outliers.precision=e4m3"),
    ],
    "3 bits asymmetric": ["--preset", "rtn", "--w-bits", "3", "--set", "weights.symmetric=false"],
    "w8a8": ["--preset", "w8a8"],
    "w16a4": ["--preset", "rtn", "--w-bits", "16"],
    "kv only": ["--preset", "rtn", "--w-bits", "16", "--a-bits", "16", "--kv-bits", "4"],
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_on_disk_is_what_the_arithmetic_says(capsys, tmp_path, text_file, wide_dir, name):
    text = (
        ["--calib-data", text_file, "--n-samples", 2, "--seq-len", 64]
        if "--n-outliers" in SIZES[name]
        else []
    )
    summary = run(capsys, "quantize", wide_dir, tmp_path / "OUT", *SIZES[name], *text)
    stored = stored_tensors(tmp_path / "OUT")
    n_bytes = {key: t.numel() * t.element_size() for key, t in stored.items()}
    assert summary["size_bytes"] == sum(n_bytes.values())

    n_weights = 2 * (2 * 448 * 448 + 2 * 448 * 64 + 3 * 448 * 1024)
    n_others = 2 * 256 * 448 + 5 * 448  # embeddings, head, norms: 2 bytes each
    arithmetic = summary["effective_bits"]["weight"] * n_weights / 8
    assert arithmetic == pytest.approx(summary["linear_bytes"])
    linears = sum(n for key, n in n_bytes.items() if "proj." in key)
    assert linears == pytest.approx(arithmetic, rel=0.03)
    on_disk = sum(path.stat().st_size for path in shards(tmp_path / "OUT"))
    assert on_disk == pytest.approx(arithmetic + 2 * n_others, rel=0.03)


def test_groups_of_448_channels_are_128_128_128_and_64(capsys, tmp_path, wide_dir):
    run(capsys, "quantize", wide_dir, tmp_path / "OUT", "--preset", "rtn", "--set", "transform=hadamard")
    with safe_open(tmp_path / "OUT" / "model-00002-of-00003.safetensors", "pt") as file:
        assert file.get_slice("model.layers.0.mlp.gate_proj.scales").get_shape() == [1024, 4]
        assert file.get_slice("model.layers.0.mlp.gate_proj.qweight").get_shape() == [1024, 224]
    linear = atomq.hf.load(tmp_path / "OUT").get_submodule("model.layers.0.mlp.gate_proj")
    assert isinstance(linear, QuantizedLinear)
    original = make_tiny_model(
        "llama",
        num_key_value_heads=1,
        hidden_size=448,
        intermediate_size=1024,
        num_attention_heads=7,
        head_dim=64,
    ).get_submodule("model.layers.0.mlp.gate_proj")
    # By Sylvester's rule, written out: entry (i, j) is minus one to the number of common bits of i and j.
    turned = torch.empty(448)
    row = original.weight[0].bfloat16().double()
    for start, width in ((0, 128), (128, 128), (256, 128), (384, 64)):
        for j in range(width):
            signs = torch.tensor([(-1.0) ** (i & j).bit_count() for i in range(width)], dtype=torch.float64)
            turned[start + j] = float((row[start : start + width] * signs).sum() / width**0.5)
    stored = linear.dense_weight(torch.float32)[0]
    scales = linear._buffers["scales"][0].float().repeat_interleave(128)[:448]
    assert bool(((stored - turned).abs() <= 0.5001 * scales).all())  # the codes are those of the turned row
    assert bool(((stored - row.float()).abs() > scales).any())
