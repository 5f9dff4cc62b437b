"""GPTQ exports: words, zero points and g_idx by the format's own formula, read with loops."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny_checkpoints import shards, stored_tensors
from tiny_exports import make_checkpoint, unpack_words
from tiny_models import save_tiny_model

from atomq.checkpoints import open_checkpoint
from atomq.errors import ConfigError
from atomq.export.folder import export
from atomq.export.stored import read_blocks

SCHEMES = {
    "symmetric": {"weights.group_size": 16},
    "asymmetric": {"weights.group_size": 16, "weights.symmetric": False},
    "whole rows": {"weights.group_size": None},
    "groups that do not divide": {"weights.group_size": 32},
    "reordered": {"weights.group_size": 32, "outliers.reorder": True, "weights.channel_group": 2},
    "whole rows reordered": {"weights.group_size": None, "outliers.reorder": True},
    "8 bits": {"weights.group_size": 16, "weights.n_bits": 8},
    "2 bits": {"weights.group_size": 16, "weights.n_bits": 2},
}
CASES = [("gptq_v2", scheme) for scheme in SCHEMES]
CASES += [("gptq", scheme) for scheme in SCHEMES if scheme != "asymmetric"]


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """A model with biases on every linear, all of whose widths are multiples of 16."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "biased", "llama-mha-bias")


def dequantize(tensors: dict[str, torch.Tensor], n_bits: int, zero_offset: int) -> torch.Tensor:
    """float64 [N, K] of one linear: scales[g_idx[k], n] * (u - zero), one number at a time."""
    per_word = 32 // n_bits
    codes = [
        [u for word in column for u in unpack_words(word, n_bits)] for column in tensors["qweight"].T.tolist()
    ]
    zeros = [[z for word in row for z in unpack_words(word, n_bits)] for row in tensors["qzeros"].tolist()]
    scales, groups = tensors["scales"].double().tolist(), tensors["g_idx"].tolist()
    n_in, n_out = tensors["qweight"].shape[0] * per_word, tensors["qweight"].shape[1]
    assert (len(groups), len(zeros[0])) == (n_in, n_out)
    return torch.tensor(
        [
            [scales[g][n] * (codes[n][k] - zeros[g][n] - zero_offset) for k, g in enumerate(groups)]
            for n in range(n_out)
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize(("version", "scheme"), CASES)
def test_the_formula_gives_the_checkpoints_weights(biased, tmp_path, version, scheme):
    out = make_checkpoint(biased, tmp_path / "OUT", "w4a16", SCHEMES[scheme])
    dest = export(out, tmp_path / "DEST", version).path
    config = json.loads((dest / "config.json").read_text())["quantization_config"]
    found = stored_tensors(dest)
    for block in read_blocks(out, open_checkpoint(out, check_hashes=False)):
        for name, stored in block.linears.items():
            parts = {key: found[f"{name}.{key}"] for key in ("qweight", "qzeros", "scales", "g_idx")}
            dense = dequantize(parts, config["bits"], 1 if version == "gptq" else 0)
            torch.testing.assert_close(dense.float(), stored.model_weight(), rtol=1e-6, atol=0)
            assert torch.equal(found[f"{name}.bias"], stored.model_bias())
    assert config == json.loads((dest / "quantize_config.json").read_text())
    assert config["desc_act"] == (scheme == "reordered")


def test_g_idx_is_the_group_of_every_channel(tiny_dir, tmp_path):
    out = make_checkpoint(tiny_dir, tmp_path / "OUT", "w4a16", SCHEMES["groups that do not divide"])
    dest = export(out, tmp_path / "DEST", "gptq").path
    g_idx = stored_tensors(dest)["model.layers.0.mlp.down_proj.g_idx"]
    assert g_idx.tolist() == [k // 16 for k in range(80)]  # 32 does not divide 48: groups of 16
    assert json.loads((dest / "config.json").read_text())["quantization_config"]["group_size"] == 16


@pytest.mark.parametrize(("version", "word"), [("gptq", 0x77777777), ("gptq_v2", 0x88888888)])
def test_symmetric_zero_points_are_the_known_words(tiny_dir, tmp_path, version, word):
    out = make_checkpoint(tiny_dir, tmp_path / "OUT", "w4a16", SCHEMES["symmetric"])
    dest = export(out, tmp_path / "DEST", version).path
    qzeros = stored_tensors(dest)["model.layers.1.self_attn.q_proj.qzeros"]
    assert {value & 0xFFFFFFFF for value in qzeros.flatten().tolist()} == {word}


def test_dtypes_and_shapes_are_those_of_the_format(tiny_dir, tmp_path):
    out = make_checkpoint(tiny_dir, tmp_path / "OUT", "w4a16", SCHEMES["symmetric"])
    dest = export(out, tmp_path / "DEST", "gptq").path
    name = "model.layers.0.mlp.gate_proj"  # [80, 48], groups of 16
    found = {key: (tensor.dtype, list(tensor.shape)) for key, tensor in stored_tensors(dest).items()}
    assert {key.removeprefix(f"{name}."): spec for key, spec in found.items() if key.startswith(name)} == {
        "qweight": (torch.int32, [6, 80]),
        "qzeros": (torch.int32, [3, 10]),
        "scales": (torch.float16, [3, 80]),
        "g_idx": (torch.int32, [48]),
    }
    with safe_open(shards(dest)[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("preset", "settings", "words"),
    [
        ("w8a8", {}, "no activations of 8 bits; quantize with --preset w4a16"),
        ("w4a16", {"kv.n_bits": 4}, "no KV cache of 4 bits; quantize with --preset w4a16"),
        ("w4a16", {"weights.n_bits": 3}, "codes of 2 or 4 or 8 bits, not weights of 3"),
        ("w4a16", {"outliers.n_outliers": 5}, "one precision for a whole linear, not 5 channels in int8"),
        ("w4a16", {"weights.number_format": "fp4-e2m1"}, "integers, not fp4-e2m1"),
        ("w4a16", {"weights.scale_mode": "progressive"}, "not progressive scales"),
        ("w4a16", {"weights.symmetric": False}, "export with --format gptq_v2"),
        (
            "w4a16",
            {"transform": "hadamard", "weights.group_size": 16, "activations.group_size": 16},
            "no transform of activations inside a group",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_way_out(tiny_dir, tmp_path, preset, settings, words):
    out = make_checkpoint(tiny_dir, tmp_path / "OUT", preset, settings)
    with pytest.raises(ConfigError, match=words):
        export(out, tmp_path / "DEST", "gptq")
    assert not (tmp_path / "DEST").exists()
