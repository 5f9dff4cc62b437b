"""compressed-tensors exports: words by the format's rule, and the real library where it is installed."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_checkpoints import stored_tensors
from tiny_exports import make_checkpoint, unpack_words
from transformers import AutoModelForCausalLM

import atomq.hf
from atomq.checkpoints import open_checkpoint
from atomq.errors import ConfigError
from atomq.export.folder import export
from atomq.export.stored import read_blocks
from atomq.export.uniform import pack_words
from atomq.numerics.linear import QuantizedLinear

TOKENS = torch.arange(5, 29)[None]
G16 = {"weights.group_size": 16, "activations.group_size": 16}
SCHEMES = {
    "w4a4": ("ct-w4a4", G16),
    "w4a4 by token": ("ct-w4a4", {"weights.group_size": 16, "activations.group_size": None}),
    "w4a16": ("w4a16", {"weights.group_size": 16}),
    "w4a16 groups that do not divide": ("w4a16", {"weights.group_size": 32}),
    "w4a16 rows reordered": ("w4a16", {"weights.group_size": None, "outliers.reorder": True}),
    "w3a16": ("w4a16", {"weights.group_size": 16, "weights.n_bits": 3}),
    "w8a8": ("w8a8", {}),
}


@pytest.fixture(scope="module")
def exported(tiny_dir, tmp_path_factory):
    """Checkpoints and exports by scheme, made once each. Do not change their folders."""
    made = {}

    def get(scheme: str):
        if scheme not in made:
            folder = tmp_path_factory.mktemp("export")
            out = make_checkpoint(tiny_dir, folder / "OUT", *SCHEMES[scheme])
            made[scheme] = (out, export(out, folder / "DEST", "compressed-tensors").path)
        return made[scheme]

    return get


def test_codes_are_packed_as_the_library_packs_them():
    words = pack_words(torch.arange(16)[None], 4)
    assert [word & 0xFFFFFFFF for word in words[0].tolist()] == [0x76543210, 0xFEDCBA98]


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "w3a16"])
def test_the_formula_gives_the_checkpoints_weights(exported, scheme):
    out, dest = exported(scheme)
    found = stored_tensors(dest)
    config = json.loads((dest / "config.json").read_text())["quantization_config"]
    weights = config["config_groups"]["group_0"]["weights"]
    n_bits, middle = weights["num_bits"], 1 << (weights["num_bits"] - 1)
    for block in read_blocks(out, open_checkpoint(out, check_hashes=False)):
        for name, stored in block.linears.items():
            n_out, n_in = found[f"{name}.weight_shape"].tolist()
            scales = found[f"{name}.weight_scale"].double().tolist()
            words = found[f"{name}.weight_packed"].tolist()
            group_size = weights["group_size"] or n_in
            dense = []
            for n in range(n_out):
                codes = [u - middle for word in words[n] for u in unpack_words(word, n_bits)][:n_in]
                groups = [k // group_size for k in range(n_in)]
                dense.append([scales[n][g] * codes[k] for k, g in enumerate(groups)])
            torch.testing.assert_close(torch.tensor(dense), stored.model_weight(), rtol=1e-6, atol=0)


def as_the_library_quantizes(x: torch.Tensor, n_bits: int, group_size: int | None) -> torch.Tensor:
    """Activations [..., K] by the library's rule: the largest magnitude is divided by 7.5 or 127.5."""
    grouped = x.unflatten(-1, (-1, group_size or x.shape[-1]))
    scales = grouped.abs().amax(-1, keepdim=True) / ((2**n_bits - 1) / 2)
    return ((grouped / scales).round().clamp(-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1) * scales).flatten(
        -2
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_real_library_computes_what_the_checkpoint_says(exported, scheme):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    out, dest = exported(scheme)
    native = atomq.hf.load(out)
    activations = open_checkpoint(out, check_hashes=False).scheme.activations
    for module in native.modules() if activations.n_bits < 16 else ():
        if isinstance(module, QuantizedLinear):
            module.quantize_input = lambda x: as_the_library_quantizes(
                x, activations.n_bits, activations.group_size
            )
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32)
        torch.testing.assert_close(loaded(TOKENS).logits, native(TOKENS).logits, rtol=1e-4, atol=1e-4)


def test_the_config_names_the_format_inside_the_group_and_what_is_left_alone(exported):
    config = json.loads((exported("w4a4")[1] / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["config_groups"]["group_0"]["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["input_activations"] == {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": 16,
        "dynamic": True,
    }


@pytest.mark.parametrize(("span", "whose"), [("full", "vLLM's kernels"), ("half", "the library")])
def test_a_note_says_whose_range_the_activations_have(tiny_dir, tmp_path, span, whose):
    settings = {**G16, "activations.scale_span": span}
    out = make_checkpoint(tiny_dir, tmp_path / "OUT", "ct-w4a4", settings)
    (note,) = export(out, tmp_path / "DEST", "compressed-tensors").notes
    assert f"rounded as in {whose}; " in note


@pytest.mark.parametrize(
    ("preset", "settings", "words"),
    [
        ("atom", {"outliers.n_outliers": 5}, "not 5 channels in int8; quantize with --preset ct-w4a4"),
        ("ct-w4a4", {"kv.n_bits": 4}, "no KV cache of 4 bits"),
        ("ct-w4a4", {**G16, "transform": "hadamard"}, "no transform of activations inside a group"),
        (
            "ct-w4a4",
            {**G16, "activations.symmetric": False, "activations.scale_span": "full"},
            "symmetric integers for the activations",
        ),
        ("ct-w4a4", {**G16, "activations.scale_mode": "progressive"}, "no progressive scales of activations"),
        ("ct-w4a4", {}, "--group-size 16"),
        (
            "ct-w4a4",
            {**G16, "activations.clip_ratio": 0.9},
            "this checkpoint has 0.9; quantize with --set activations.clip_ratio=1",
        ),
        (
            "ct-w4a4",
            {**G16, "activations.clip_search": "output"},
            "this checkpoint has one for each input; quantize with --set activations.clip_ratio=1 --set "
            "activations.clip_search=none",
        ),
        ("w4a16", {"weights.symmetric": False}, "export with --format gptq_v2 or hf"),
        ("w4a16", {"weights.group_size": 16, "outliers.reorder": True}, "these were reordered"),
        (
            "rtn",
            {"weights.n_bits": 16, "activations.n_bits": 8},
            "not weights of 16; quantize with --preset w8a8",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_the_way_out(tiny_dir, tmp_path, preset, settings, words):
    out = make_checkpoint(tiny_dir, tmp_path / "OUT", preset, settings)
    with pytest.raises(ConfigError, match=words):
        export(out, tmp_path / "DEST", "compressed-tensors")
    assert not (tmp_path / "DEST").exists()
