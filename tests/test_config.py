"""Configurations: every refusal by its sentence, dictionaries there and back, overrides, presets."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re

import pytest

from atomq.config import (
    ActivationScheme,
    CalibrationConfig,
    KVScheme,
    OutlierScheme,
    QuantScheme,
    Recipe,
    SolverConfig,
    WeightScheme,
    from_dict,
    override,
    setting_names,
    to_dict,
)
from atomq.errors import ConfigError
from atomq.presets import DEFAULT_PRESET, PRESET_HELP, PRESETS, as_typed, changed_settings, find_preset


def refused(message: str):
    return pytest.raises(ConfigError, match=re.escape(message))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: WeightScheme(n_bits=5),
            "weights.n_bits=5 must be one of 2, 3, 4, 8 or 16 (16 = floating point)",
        ),
        (lambda: WeightScheme(n_bits=0), "weights.n_bits=0 must be one of"),
        (lambda: WeightScheme(n_bits="4"), "weights.n_bits='4' has the wrong type; expected <class 'int'>"),
        (lambda: WeightScheme(n_bits=True), "weights.n_bits=True has the wrong type"),
        (lambda: WeightScheme(n_bits=4.0), "weights.n_bits=4.0 has the wrong type"),
        (
            lambda: WeightScheme(number_format="fp8"),
            "weights.number_format='fp8' does not exist; choose one of int, fp4-bnb, fp4-e2m1, exponential",
        ),
        (lambda: WeightScheme(symmetric=1), "weights.symmetric=1 has the wrong type"),
        (lambda: WeightScheme(group_size=0), "weights.group_size=0 must be at least 1"),
        (lambda: WeightScheme(group_size=-1), "weights.group_size=-1 must be at least 1"),
        (lambda: WeightScheme(group_size="128"), "weights.group_size='128' has the wrong type"),
        (lambda: WeightScheme(channel_group=0), "weights.channel_group=0 must be at least 1"),
        (
            lambda: WeightScheme(scale_mode="static"),
            "weights.scale_mode='static' does not exist; choose one of exact, progressive",
        ),
        (
            lambda: WeightScheme(scale_mode="progressive", channel_group=2),
            "weights.scale_mode progressive keeps one base per row; set weights.channel_group=1",
        ),
        *(
            (
                lambda changes=changes: WeightScheme(scale_mode="progressive", **changes),
                "weights.scale_mode progressive multiplies codes by factors up to 16 within INT8; "
                "it needs symmetric integers of at most 4 bits",
            )
            for changes in (
                {"n_bits": 8},
                {"n_bits": 16},
                {"symmetric": False},
                {"number_format": "fp4-bnb"},
            )
        ),
        (
            lambda: WeightScheme(n_bits=3, number_format="fp4-bnb"),
            "weights.number_format fp4-bnb has 16 codes and no zero point; it needs weights.n_bits=4 and "
            "weights.symmetric=true",
        ),
        (
            lambda: WeightScheme(number_format="exponential", symmetric=False),
            "weights.number_format exponential has 16 codes and no zero point",
        ),
        (
            lambda: ActivationScheme(number_format="exponential"),
            "activations.number_format exponential does not exist; it is for weights only",
        ),
        (
            lambda: ActivationScheme(number_format="fp4-e2m1", n_bits=8),
            "activations.number_format fp4-e2m1 has 16 codes and no zero point; it needs activations.n_",
        ),
        (lambda: ActivationScheme(n_bits=6), "activations.n_bits=6 must be one of 2, 3, 4, 8 or 16"),
        (lambda: ActivationScheme(group_size=0), "activations.group_size=0 must be at least 1"),
        (
            lambda: ActivationScheme(clip_ratio=0.0),
            "activations.clip_ratio=0.0 must lie above 0 and at most at 1",
        ),
        (lambda: ActivationScheme(clip_ratio=1.01), "activations.clip_ratio=1.01 must lie above 0"),
        (lambda: ActivationScheme(clip_ratio=float("nan")), "activations.clip_ratio=nan must lie above 0"),
        (lambda: ActivationScheme(clip_ratio="1"), "activations.clip_ratio='1' has the wrong type"),
        (
            lambda: ActivationScheme(clip_search="mse"),
            "activations.clip_search='mse' does not exist; choose one of none, output",
        ),
        (
            lambda: Recipe(
                QuantScheme(activations=ActivationScheme(clip_search="output")), SolverConfig("rtn")
            ),
            "activations.clip_search looks at activations while codes are solved; set it to none, or use "
            "solver.method=gptq and weights.n_bits below 16",
        ),
        (
            lambda: ActivationScheme(scale_mode="progressive", symmetric=False),
            "activations.scale_mode progressive multiplies codes by factors up to 16",
        ),
        (lambda: OutlierScheme(n_outliers=-1), "outliers.n_outliers=-1 must be 0 or more"),
        (lambda: OutlierScheme(n_outliers=None), "outliers.n_outliers=None has the wrong type"),
        (
            lambda: OutlierScheme(precision="fp8"),
            "outliers.precision='fp8' does not exist; choose one of int8, fp16, e5m2, e4m3",
        ),
        (
            lambda: OutlierScheme(metric="max"),
            "outliers.metric='max' does not exist; choose one of hessian, abs_mean",
        ),
        (lambda: OutlierScheme(reorder="yes"), "outliers.reorder='yes' has the wrong type"),
        (lambda: KVScheme(n_bits=5), "kv.n_bits=5 must be one of 2, 3, 4, 8 or 16"),
        (lambda: KVScheme(clip_ratio=2), "kv.clip_ratio=2 must lie above 0 and at most at 1"),
        (
            lambda: KVScheme(key_position="rope"),
            "kv.key_position='rope' does not exist; choose one of before_rope, after_rope",
        ),
        (
            lambda: KVScheme(4, key_position="after_rope", key_offset=True),
            "set kv.key_offset=false and kv.key_balance=true",
        ),
        (lambda: KVScheme(4, key_balance=True), "set kv.key_balance=false and kv.key_offset=true"),
        (
            lambda: KVScheme(rotation="random"),
            "kv.rotation='random' does not exist; choose one of none, hadamard",
        ),
        (lambda: SolverConfig(method="awq"), "solver.method='awq' does not exist; choose one of gptq, rtn"),
        (lambda: SolverConfig(clip_ratio=0), "solver.clip_ratio=0 must lie above 0 and at most at 1"),
        (lambda: SolverConfig(scale_span="7.5"), "solver.scale_span='7.5' does not exist"),
        (lambda: SolverConfig("rtn", clip_search="hessian"), "weighs errors by GPTQ's Hessian"),
        (lambda: SolverConfig(damp_frac=0), "solver.damp_frac=0 must lie above 0 and at most at 10"),
        (lambda: SolverConfig(damp_frac=11.0), "solver.damp_frac=11.0 must lie above 0"),
        (
            lambda: QuantScheme(transform="fft"),
            "transform='fft' does not exist; choose one of none, hadamard",
        ),
        (lambda: QuantScheme(weights=ActivationScheme()), "weights=ActivationScheme("),
        (lambda: QuantScheme(kv=None), "kv=None has the wrong type"),
        (
            lambda: QuantScheme(WeightScheme(16), ActivationScheme(16)),
            "weights, activations and KV cache all have 16 bits: there is nothing to quantize; lower at "
            "least one of weights.n_bits, activations.n_bits and kv.n_bits",
        ),
        *(
            (
                lambda changes=changes: QuantScheme(
                    WeightScheme(16), ActivationScheme(16), kv=KVScheme(4), **changes
                ),
                "outliers and transform act on quantized weights or activations, and both have 16 bits; set "
                "outliers.n_outliers=0, outliers.reorder=false and transform=none",
            )
            for changes in (
                {"transform": "hadamard"},
                {"outliers": OutlierScheme(8)},
                {"outliers": OutlierScheme(reorder=True)},
            )
        ),
        (
            lambda: QuantScheme(WeightScheme(group_size=64), transform="hadamard"),
            "transform hadamard needs equal groups, but weights.group_size=64 and activations.group_size=128",
        ),
        (lambda: Recipe(SolverConfig(damp_frac=20)), "solver.damp_frac=20"),
        (lambda: CalibrationConfig(n_samples=0), "--n-samples 0 must be at least 1"),
        (lambda: CalibrationConfig(seq_len=1), "--seq-len 1 must be at least 2"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, message):
    with refused(message) as caught:
        make()
    assert caught.value.exit_code == 2


def test_every_combination_of_bits_formats_and_modes_is_accepted_or_refused_by_a_config_error():
    accepted = 0
    for n_bits, number_format, symmetric, group_size, channel_group, mode in itertools.product(
        (2, 3, 4, 8, 16),
        ("int", "fp4-bnb", "fp4-e2m1", "exponential"),
        (True, False),
        (16, None),
        (1, 2),
        ("exact", "progressive"),
    ):
        allowed = number_format == "int" or (n_bits == 4 and symmetric)
        if mode == "progressive":
            allowed = allowed and n_bits <= 4 and symmetric and number_format == "int" and channel_group == 1
        try:
            WeightScheme(n_bits, number_format, symmetric, group_size, channel_group, mode)
        except ConfigError:
            assert not allowed
        else:
            assert allowed
            accepted += 1
    assert accepted == 2 * 2 * (5 * 2 + 3) + 2 * 3


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_come_back_from_their_dictionaries_also_through_json(preset):
    recipe = PRESETS[preset]
    values = to_dict(recipe)
    assert from_dict(Recipe, values) == recipe
    assert from_dict(Recipe, json.loads(json.dumps(values))) == recipe
    assert list(values["scheme"]) == ["weights", "activations", "outliers", "kv", "transform"]


def test_integers_stand_for_floats_in_json():
    values = to_dict(PRESETS["atom"])
    values["scheme"]["kv"]["clip_ratio"] = 1
    assert from_dict(Recipe, values) == PRESETS["atom"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(new=1), "Recipe has unknown settings ['new'] and lacks []"),
        (lambda v: v.pop("solver"), "Recipe has unknown settings [] and lacks ['solver']"),
        (
            lambda v: v["scheme"]["weights"].update(bits=v["scheme"]["weights"].pop("n_bits")),
            "has unknown settings ['bits'] and lacks ['n_bits']",
        ),
        (lambda v: v["scheme"].update(kv=4), "must be a table of settings, not 4"),
        (lambda v: v.update(scheme=None), "must be a table of settings, not None"),
        (lambda v: v["scheme"]["weights"].update(n_bits="4"), "weights.n_bits='4' has the wrong type"),
        (lambda v: v["scheme"]["weights"].update(n_bits=[4]), "weights.n_bits=[4] has the wrong type"),
        (lambda v: v["scheme"]["kv"].update(rotation=["none"]), "kv.rotation=['none'] does not exist"),
        (lambda v: v["scheme"].update(transform="svd"), "transform='svd' does not exist"),
        (lambda v: v["scheme"]["weights"].update(n_bits=7), "weights.n_bits=7 must be one of"),
    ],
)
def test_dictionaries_with_strange_absent_or_wrong_settings_are_refused(change, message):
    values = json.loads(json.dumps(to_dict(PRESETS["atom"])))
    change(values)
    with refused(message):
        from_dict(Recipe, values)


def test_refusals_of_a_nested_table_name_it():
    values = to_dict(PRESETS["atom"])
    values["scheme"]["outliers"]["keeper"] = 3
    with refused("scheme.outliers"):
        from_dict(Recipe, values)


@pytest.mark.parametrize(
    ("name", "text", "part", "value"),
    [
        ("weights.n_bits", "3", "weights", 3),
        ("weights.group_size", "none", "weights", None),
        ("weights.group_size", "None", "weights", None),
        ("weights.group_size", "64", "weights", 64),
        ("weights.channel_group", 1, "weights", 1),
        ("weights.symmetric", "false", "weights", False),
        ("activations.clip_ratio", "0.95", "activations", 0.95),
        ("activations.clip_ratio", "1", "activations", 1.0),
        ("activations.number_format", "fp4-e2m1", "activations", "fp4-e2m1"),
        ("outliers.n_outliers", "64", "outliers", 64),
        ("outliers.reorder", "True", "outliers", True),
        ("outliers.precision", "e4m3", "outliers", "e4m3"),
        ("kv.n_bits", "8", "kv", 8),
        ("kv.key_position", "after_rope", "kv", "after_rope"),
    ],
)
def test_an_override_changes_one_setting_and_nothing_else(name, text, part, value):
    recipe = PRESETS["atom"]
    attribute = name.partition(".")[2]
    changed = override(recipe, {name: text})
    assert getattr(getattr(changed.scheme, part), attribute) == value
    assert type(getattr(getattr(changed.scheme, part), attribute)) is type(value)
    back = dataclasses.replace(
        getattr(changed.scheme, part), **{attribute: getattr(getattr(recipe.scheme, part), attribute)}
    )
    assert dataclasses.replace(changed.scheme, **{part: back}) == recipe.scheme
    assert changed.solver == recipe.solver
    assert recipe == PRESETS["atom"]


def test_solver_and_transform_can_be_overridden():
    changed = override(PRESETS["atom"], {"solver.method": "rtn", "solver.damp_frac": "0.1"})
    assert changed.solver == SolverConfig("rtn", 0.85, "half", 0.1)
    assert override(PRESETS["atom"], {"transform": "hadamard"}).scheme.transform == "hadamard"


def test_overrides_are_judged_together():
    recipe = PRESETS["atom"]
    with refused("progressive keeps one base per row"):
        override(recipe, {"weights.scale_mode": "progressive"})
    both = override(recipe, {"weights.scale_mode": "progressive", "weights.channel_group": "1"})
    assert both.scheme.weights.scale_mode == "progressive"
    with refused("transform hadamard needs equal groups"):
        override(recipe, {"transform": "hadamard", "weights.group_size": "none"})
    assert override(recipe, {}) == recipe


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weights.bits", "4", "unknown setting 'weights.bits'; settings are weights.n_bits, "),
        ("weights", "4", "unknown setting 'weights'; settings are"),
        ("scheme.weights.n_bits", "4", "unknown setting 'scheme.weights.n_bits'"),
        ("", "4", "unknown setting ''"),
        ("transform.kind", "none", "unknown setting 'transform.kind'"),
        ("weights.n_bits", "four", "weights.n_bits=four must be a number"),
        ("weights.n_bits", "none", "weights.n_bits=none must be a number"),
        ("weights.group_size", "0", "weights.group_size=0 must be at least 1"),
        ("weights.symmetric", "yes", "weights.symmetric=yes must be true or false"),
        ("activations.clip_ratio", "", "activations.clip_ratio= must be a number"),
        ("activations.clip_ratio", "inf", "activations.clip_ratio=inf must lie above 0"),
        ("weights.n_bits", "5", "weights.n_bits=5 must be one of"),
        ("kv.rotation", "fft", "kv.rotation='fft' does not exist"),
        ("transform", "fft", "transform='fft' does not exist"),
    ],
)
def test_overrides_that_cannot_be_read_are_refused(name, value, message):
    with refused(message):
        override(PRESETS["atom"], {name: value})


def test_all_setting_names_can_be_overridden_with_their_own_value():
    recipe = PRESETS["atom"]
    names = setting_names()
    assert len(names) == len(set(names))
    values = to_dict(recipe)
    flat = {"transform": values["scheme"].pop("transform")}
    for part, settings in {**values["scheme"], "solver": values["solver"]}.items():
        flat |= {f"{part}.{name}": value for name, value in settings.items()}
    assert set(names) == set(flat)
    assert override(recipe, flat) == recipe
    as_text = {name: str(value) for name, value in flat.items()}
    assert override(recipe, as_text) == recipe


def test_presets_of_other_widths_are_atomq_but_for_bits_and_clip():
    atomq = PRESETS["atomq"]
    for name, w_bits, a_bits, clip in (("w3a3", 3, 3, 0.9), ("w4a8", 4, 8, 1.0)):
        changes = {"weights.n_bits": w_bits, "activations.n_bits": a_bits, "activations.clip_ratio": clip}
        expected = override(atomq, changes)
        found = PRESETS[name]
        assert dataclasses.replace(found.scheme, kv=atomq.scheme.kv) == expected.scheme
        assert found.scheme.kv == KVScheme()
        assert found.solver == atomq.solver


@pytest.mark.parametrize(
    ("recipe", "needs"),
    [
        (PRESETS["atom"], True),
        (PRESETS["rtn"], False),
        (PRESETS["w4a16"], True),
        (PRESETS["w8a8"], False),
        (Recipe(QuantScheme(WeightScheme(16)), SolverConfig("gptq")), False),
        (Recipe(QuantScheme(outliers=OutlierScheme(8, reorder=True)), SolverConfig("rtn")), True),
        (Recipe(QuantScheme(outliers=OutlierScheme(8)), SolverConfig("rtn")), False),
    ],
)
def test_a_recipe_needs_calibration_if_it_solves_or_reorders(recipe, needs):
    assert recipe.needs_calibration == needs


def test_linears_are_quantized_if_weights_or_activations_are():
    assert QuantScheme(WeightScheme(16)).quantizes_linears
    assert QuantScheme(activations=ActivationScheme(16)).quantizes_linears
    assert not QuantScheme(WeightScheme(16), ActivationScheme(16), kv=KVScheme(4)).quantizes_linears


def test_atom_is_the_papers_recipe():
    recipe = find_preset("atom")
    assert recipe.scheme.weights == WeightScheme(4, "int", True, 128, 2, "exact")
    assert recipe.scheme.activations == ActivationScheme(4, "int", True, 128, 0.9, "exact")
    assert recipe.scheme.outliers == OutlierScheme(128, "int8", "hessian", True)
    assert recipe.scheme.kv == KVScheme(4, 1.0, "before_rope", "none")
    assert recipe.solver == SolverConfig("gptq", 0.85, "half", 0.01)
    assert DEFAULT_PRESET == "atomq"


def test_every_preset_has_a_line_of_help_and_an_unknown_one_is_refused_with_the_list():
    assert set(PRESET_HELP) == set(PRESETS)
    with refused(f"unknown preset 'best'; presets are {', '.join(PRESETS)}"):
        find_preset("best")


def test_configurations_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["atom"].scheme.weights.n_bits = 3


def test_preset_atomq_takes_no_more_bits_than_atom():
    from atomq.formats.schema import effective_bits
    from atomq.models.families import LinearShape

    shapes = {"a": LinearShape(576, 576, False), "b": LinearShape(576, 1536, False)}
    bits = {name: effective_bits(PRESETS[name].scheme, shapes, 64) for name in ("atom", "atomq")}
    assert bits["atom"] == bits["atomq"]


def test_a_float_cache_has_no_balance_whatever_the_preset_says():
    recipe = override(find_preset("atomq"), {"kv.n_bits": 16})
    assert recipe.scheme.kv.key_balance
    assert not recipe.scheme.kv.has_key_offset
    assert not recipe.scheme.kv.has_key_scale


@pytest.mark.parametrize(
    ("assignments", "reason"),
    [
        ({"weights.n_bits": 16}, "kv.key_offset and kv.key_balance are measured while codes are solved"),
        ({"solver.method": "rtn"}, "set all three to 0, or solver.method=gptq"),
    ],
)
def test_what_the_levers_cannot_go_with_is_refused(assignments, reason):
    with refused(reason):
        override(find_preset("atomq"), assignments)


def test_settings_are_shown_as_they_are_typed():
    assert [as_typed(value) for value in (None, True, False, 4, 0.9, "rtn")] == [
        "none",
        "true",
        "false",
        "4",
        "0.9",
        "rtn",
    ]
    for one, other in itertools.permutations(PRESETS.values(), 2):
        shown = {name: as_typed(value) for name, value in changed_settings(one, other).items()}
        assert override(one, shown) == other
