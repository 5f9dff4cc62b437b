"""What a checkpoint must hold: tensors of every scheme, sizes, and what `quantization_config` may say."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_checkpoints import SCHEMES, recipe_of

from atomq.config import QuantScheme, Recipe, override
from atomq.errors import CheckpointError
from atomq.formats.schema import (
    code_bytes,
    effective_bits,
    linear_tensors,
    parse_quantization_config,
    quantization_config,
    wrong_values,
)
from atomq.models.families import FAMILIES, LinearShape
from atomq.presets import PRESETS

U8, I8, I32, F16, F32 = torch.uint8, torch.int8, torch.int32, torch.float16, torch.float32
HALF, FLOAT = (F16, F32), (F32, F16, torch.bfloat16)
LLAMA = FAMILIES["llama"]
OWNER, FOLLOWER = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"
# 9 outputs and 48 inputs: with 5 outliers 43 normal channels, three groups of at most 16.
SHAPES = {OWNER: LinearShape(9, 48, has_bias=True), FOLLOWER: LinearShape(9, 48, has_bias=False)}

INT8_OUTLIERS = {"outlier_weight": ((I8,), (9, 5)), "outlier_scales": (HALF, (9,))}
NO_OUTLIERS_GROUPED = {"qweight": ((U8,), (9, 24)), "scales": (HALF, (9, 3))}
EXPECTED = {
    "atom": {"qweight": ((U8,), (9, 22)), "scales": (HALF, (5, 3)), **INT8_OUTLIERS},
    "progressive": {
        "qweight": ((U8,), (9, 22)),
        "scale_base": (HALF, (9,)),
        "scale_factors": ((U8,), (9, 2)),
        **INT8_OUTLIERS,
    },
    "asymmetric": {
        "qweight": ((U8,), (9, 22)),
        "scales": (HALF, (5, 3)),
        "zeros": ((U8,), (5, 3)),
        **INT8_OUTLIERS,
    },
    "fp4 bnb": {"qweight": ((U8,), (9, 22)), "scales": (HALF, (5, 3)), **INT8_OUTLIERS},
    "2 bits": {"qweight": ((U8,), (9, 11)), "scales": (HALF, (5, 3)), **INT8_OUTLIERS},
    "3 bits": {"qweight": ((U8,), (9, 17)), "scales": (HALF, (5, 3)), **INT8_OUTLIERS},
    "8 bits asymmetric": {
        "qweight": ((U8,), (9, 43)),
        "scales": (HALF, (5, 3)),
        "zeros": ((U8,), (5, 3)),
        **INT8_OUTLIERS,
    },
    "channel group of 7": {"qweight": ((U8,), (9, 22)), "scales": (HALF, (2, 3)), **INT8_OUTLIERS},
    "fp16 outliers": {
        "qweight": ((U8,), (9, 22)),
        "scales": (HALF, (5, 3)),
        "outlier_weight": ((F16,), (9, 5)),
    },
    "e5m2 outliers": {
        "qweight": ((U8,), (9, 22)),
        "scales": (HALF, (5, 3)),
        "outlier_weight": ((torch.float8_e5m2,), (9, 5)),
    },
    "e4m3 outliers": {
        "qweight": ((U8,), (9, 22)),
        "scales": (HALF, (5, 3)),
        "outlier_weight": ((torch.float8_e4m3fn,), (9, 5)),
    },
    "reordered without outliers": {"qweight": ((U8,), (9, 24)), "scales": (HALF, (5, 3))},
    "w16a4": {"weight": (FLOAT, (9, 48))},
    "w4a16": NO_OUTLIERS_GROUPED,
    "w8a8": {"qweight": ((U8,), (9, 48)), "scales": (HALF, (9, 1))},
    "rtn": NO_OUTLIERS_GROUPED,
    "kv only": {},
}
EXPECTED |= dict.fromkeys(
    ("hadamard", "fp4 e2m1", "exponential", "kv after rope", "outliers not reordered"), EXPECTED["atom"]
)
EXPECTED |= dict.fromkeys(("searched clips", "searched clips, not reordered"), EXPECTED["atom"])
EXPECTED |= {"progressive hadamard": EXPECTED["progressive"], "w16a4 hadamard": EXPECTED["w16a4"]}


@pytest.mark.parametrize("name", SCHEMES)
def test_every_scheme_has_exactly_its_tensors(name):
    scheme = recipe_of(name).scheme
    expected = {f"{linear}.{suffix}": spec for linear in SHAPES for suffix, spec in EXPECTED[name].items()}
    if expected:
        expected[f"{OWNER}.bias"] = (FLOAT, (9,))
    if scheme.outliers.reorder:
        expected[f"{OWNER}.perm"] = ((I32,), (48,))  # the first linear of the group, and no other
    if name.startswith("searched clips"):
        expected[f"{OWNER}.clip_ratio"] = ((F32,), (1,))
    found = linear_tensors(LLAMA, scheme, SHAPES)
    assert {key: tuple(spec) for key, spec in found.items()} == expected


def test_the_bytes_of_the_linears_are_those_of_their_tensors_with_f16_scales():
    scheme = recipe_of("asymmetric").scheme
    assert code_bytes(scheme, SHAPES) == 2 * (9 * 22 + 2 * 5 * 3 + 5 * 3 + 9 * 5 + 2 * 9)
    assert code_bytes(recipe_of("progressive").scheme, SHAPES) == 2 * (9 * 22 + 2 * 9 + 9 * 2 + 9 * 5 + 2 * 9)
    assert code_bytes(recipe_of("w16a4").scheme, SHAPES) == 2 * 2 * 9 * 48


def test_effective_bits_are_those_of_the_paper():
    """Atom, section 5.1: groups of 128 with F16 scales are 4.125 bits; KV of 128-wide heads 4.25."""
    scheme = override(Recipe(), {"kv.n_bits": 4}).scheme
    shapes = {OWNER: LinearShape(256, 512, has_bias=False)}
    bits = effective_bits(scheme, shapes, head_dim=128)
    assert bits == {"weight": 4.125, "activation": 4.25, "kv": 4.25}


def test_effective_bits_of_activations_count_base_factors_zeros_and_outliers():
    shapes = {OWNER: LinearShape(8, 48, has_bias=False)}

    def activation_bits(name: str) -> float:
        return effective_bits(recipe_of(name).scheme, shapes, head_dim=8)["activation"]

    outliers = 5 * 8 + 32
    assert activation_bits("atom") == (43 * 4 + 3 * 32 + outliers) / 48
    assert activation_bits("progressive") == (43 * 4 + 32 + 3 * 8 + outliers) / 48
    assert activation_bits("asymmetric") == (43 * 4 + 3 * 40 + outliers) / 48
    assert activation_bits("e4m3 outliers") == (43 * 4 + 3 * 32 + 5 * 8) / 48
    assert activation_bits("w8a8") == (48 * 8 + 32) / 48
    assert activation_bits("w4a16") == 16


def test_no_preset_of_four_bits_takes_more_than_atom():
    """The linears of SmolLM2-135M: the narrowest that a base for each row must pay for itself on."""
    widths = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
    shapes = {f"{OWNER}{i}": LinearShape(*width, has_bias=False) for i, width in enumerate(widths)}
    bits = {
        name: effective_bits(PRESETS[name].scheme, shapes, head_dim=64)
        for name in ("atom", "atomq", "atomq-fast")
    }
    assert bits["atomq"] == bits["atom"]
    assert all(bits["atomq-fast"][part] <= bits["atom"][part] for part in bits["atom"])


def test_16_bit_heads_cost_16_bits():
    shapes = {OWNER: LinearShape(8, 48, has_bias=False)}
    assert effective_bits(recipe_of("rtn").scheme, shapes, head_dim=8)["kv"] == 16


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_family_and_scheme_come_back_from_the_config(name, model_type):
    family, scheme = FAMILIES[model_type], recipe_of(name).scheme
    assert parse_quantization_config(quantization_config(family, scheme)) == (family, scheme)


def set_at(path: str, value):
    def change(config) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        config[last] = value

    return change


def without(path: str):
    def change(config) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            config = config[parent]
        del config[last]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_at("quant_method", "gptq"), "quant_method is 'gptq', not 'atomq'"),
        (without("quant_method"), "quant_method is None"),
        (set_at("format_version", 2), "has format_version 2; this atomq reads 1"),
        (set_at("format_version", "1"), "has format_version '1'"),
        (without("format_version"), "has format_version None"),
        (set_at("scheme", None), "must be a table of settings"),
        (set_at("scheme.transform", "fourier"), "transform='fourier' does not exist; choose one of none, h"),
        (set_at("scheme.weights.scale_mode", "log"), "weights.scale_mode='log' does not exist"),
        (set_at("scheme.weights.number_format", "nf4"), "weights.number_format='nf4' does not exist"),
        (set_at("scheme.outliers.precision", "int4"), "outliers.precision='int4' does not exist"),
        (set_at("scheme.kv.rotation", "random"), "kv.rotation='random' does not exist"),
        (set_at("scheme.kv.key_position", "never"), "kv.key_position='never' does not exist"),
        (set_at("scheme.weights.n_bits", 5), "weights.n_bits=5 must be one of"),
        (set_at("scheme.weights.n_bits", "4"), "weights.n_bits='4' has the wrong type"),
        (set_at("scheme.weights.n_bits", True), "weights.n_bits=True has the wrong type"),
        (set_at("scheme.weights.symmetric", 1), "weights.symmetric=1 has the wrong type"),
        (set_at("scheme.weights.group_size", 0), "weights.group_size=0 must be at least 1"),
        (set_at("scheme.weights.group_size", -128), "weights.group_size=-128 must be at least 1"),
        (set_at("scheme.weights.channel_group", 0), "weights.channel_group=0 must be at least 1"),
        (set_at("scheme.outliers.n_outliers", -1), "outliers.n_outliers=-1 must be 0 or more"),
        (set_at("scheme.activations.clip_ratio", 0.0), "must lie above 0"),
        (set_at("scheme.activations.clip_ratio", float("nan")), "must lie above 0"),
        (set_at("scheme.rotation", "none"), "rotation"),
        (without("scheme.kv"), "kv"),
        (without("scheme.weights.group_size"), "group_size"),
        (set_at("scheme.weights.colour", "red"), "colour"),
        (set_at("family", None), "the table of linear groups is not readable"),
        (without("family.groups"), "the table of linear groups is not readable"),
        (without("family.blocks"), "the table of linear groups is not readable"),
        (set_at("family.groups", []), "the table of linear groups is empty"),
        (
            set_at("family.groups", [{"linears": [], "absorbed_by": [], "transformed": True}]),
            "the table of linear groups is empty",
        ),
        (set_at("family.groups", [{"linears": ["a"]}]), "the table of linear groups is not readable"),
        (
            set_at("family.groups", [{"linears": ["a"], "absorbed_by": [], "transformed": 1}]),
            "the table of linear groups is not readable",
        ),
    ],
)
def test_a_config_of_another_kind_is_refused_and_the_field_named(change, words):
    config = copy.deepcopy(quantization_config(LLAMA, QuantScheme()))
    parse_quantization_config(config)
    change(config)
    with pytest.raises(CheckpointError) as caught:
        parse_quantization_config(config)
    assert words in str(caught.value)


def test_files_of_before_a_setting_came_are_read_without_it():
    scheme = recipe_of("atom").scheme
    config = quantization_config(FAMILIES["llama"], scheme)
    del config["scheme"]["kv"]["key_offset"], config["scheme"]["kv"]["key_balance"]
    del config["scheme"]["activations"]["scale_span"], config["scheme"]["activations"]["clip_search"]
    assert parse_quantization_config(config)[1] == scheme


def test_an_offset_that_turns_with_every_position_is_not_read_as_one_of_rows():
    config = quantization_config(FAMILIES["llama"], recipe_of("atom").scheme)
    config["scheme"]["kv"] |= {"key_position": "after_rope", "key_offset": True}
    del config["scheme"]["kv"]["key_balance"]
    with pytest.raises(CheckpointError, match=r"set kv\.key_offset=false and kv\.key_balance=true"):
        parse_quantization_config(config)


def test_progressive_scales_of_before_the_factors_were_packed_are_refused():
    """With one group a row the tensors of both have the same dtypes and shapes."""
    config = quantization_config(FAMILIES["llama"], recipe_of("progressive").scheme)
    parse_quantization_config(config)
    del config["scheme"]["activations"]["clip_search"]
    with pytest.raises(CheckpointError, match="a byte for each factor, which are not read any more"):
        parse_quantization_config(config)


def test_a_value_that_is_wrong_is_named_with_its_row_if_there_are_rows():
    spoilt = {
        "norm": torch.tensor(float("nan")),
        "scales": torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        "weight": torch.tensor([1.0, float("inf")], dtype=torch.bfloat16),
    }
    assert list(wrong_values("m", spoilt, QuantScheme())) == [
        "m.norm holds values that are not finite, first nan",
        "m.scales holds values that are not positive and finite, first 0 in row 1 of 2",
        "m.weight holds values that are not finite, first inf in row 1 of 2",
    ]
