"""The presets: named recipes that `--preset` chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from atomq.config import (
    FLOAT_BITS,
    ActivationScheme,
    KVScheme,
    OutlierScheme,
    QuantScheme,
    Recipe,
    SolverConfig,
    WeightScheme,
    from_dict,
    override,
    to_dict,
)
from atomq.errors import ConfigError

DEFAULT_PRESET = "atomq"
REFINE_STEPS = 200  # what `--refine` sets

# What `atom` stores and computes with; the presets of atomq differ in how it is found, and in transforms.
_OUTLIERS = OutlierScheme(n_outliers=128, precision="int8", metric="hessian", reorder=True)
_KV4 = KVScheme(n_bits=4, key_position="after_rope", rotation="hadamard", key_balance=True)
_SOLVER = SolverConfig(
    method="gptq", clip_search="hessian", descent_sweeps=4, asymmetry=0.5, asymmetry_damp=1.0
)


PRESETS: dict[str, Recipe] = {
    # The same bits and kernels as `atom`, with the levers that were measured to pay (docs/method.md).
    "atomq": Recipe(
        QuantScheme(
            WeightScheme(n_bits=4, group_size=128, channel_group=2),
            ActivationScheme(n_bits=4, group_size=128, clip_ratio=0.9),
            _OUTLIERS,
            _KV4,
            transform="hadamard",
        ),
        _SOLVER,
    ),
    # Progressive scales: a GEMM adds up all groups in INT32.
    "atomq-fast": Recipe(
        QuantScheme(
            WeightScheme(n_bits=4, group_size=128, scale_mode="progressive"),
            ActivationScheme(n_bits=4, group_size=128, clip_ratio=0.9, scale_mode="progressive"),
            _OUTLIERS,
            _KV4,
            transform="hadamard",
        ),
        _SOLVER,
    ),
    # The recipe of the Atom paper (arXiv 2310.19102, section 5.1), without the reference's defects.
    "atom": Recipe(
        QuantScheme(
            WeightScheme(n_bits=4, group_size=128, channel_group=2),
            ActivationScheme(n_bits=4, group_size=128, clip_ratio=0.9),
            _OUTLIERS,
            KVScheme(n_bits=4),
        ),
        SolverConfig(method="gptq", clip_ratio=0.85, scale_span="half", damp_frac=0.01),
    ),
    # `atomq` with the KV cache in 16 bits: both operands at three bits, or activations at eight, which lose
    # more by a clip than by a wider grid.
    "w3a3": Recipe(
        QuantScheme(
            WeightScheme(n_bits=3, group_size=128, channel_group=2),
            ActivationScheme(n_bits=3, group_size=128, clip_ratio=0.9),
            _OUTLIERS,
            transform="hadamard",
        ),
        _SOLVER,
    ),
    "w4a8": Recipe(
        QuantScheme(
            WeightScheme(n_bits=4, group_size=128, channel_group=2),
            ActivationScheme(n_bits=8, group_size=128),
            _OUTLIERS,
            transform="hadamard",
        ),
        _SOLVER,
    ),
    # INT4 weights with INT8 outlier channels; activations and KV cache in 16 bits.
    "w4a16-int8": Recipe(
        QuantScheme(
            WeightScheme(n_bits=4, group_size=128, channel_group=2),
            ActivationScheme(n_bits=FLOAT_BITS),
            _OUTLIERS,
        ),
        _SOLVER,
    ),
    # The plain baseline: what W4A4 costs without any of the method. Needs no calibration.
    "rtn": Recipe(
        QuantScheme(WeightScheme(n_bits=4, group_size=128), ActivationScheme(n_bits=4, group_size=128)),
        SolverConfig(method="rtn"),
    ),
    # W4A4 as compressed-tensors can say it: no outlier channels, which a rotation makes fewer; activations as
    # its library rounds them.
    "ct-w4a4": Recipe(
        QuantScheme(
            WeightScheme(n_bits=4, group_size=128),
            ActivationScheme(n_bits=4, group_size=128, scale_span="half"),
        ),
        SolverConfig(
            method="gptq",
            clip_search="hessian",
            calibration="sequential",
            rotation="fused",
            descent_sweeps=4,
            asymmetry=1.0,
            asymmetry_damp=1.0,
        ),
    ),
    # Weights only and without outliers, as GPTQ and compressed-tensors files hold them.
    "w4a16": Recipe(
        QuantScheme(WeightScheme(n_bits=4, group_size=128), ActivationScheme(n_bits=FLOAT_BITS)),
        SolverConfig(
            method="gptq",
            clip_search="hessian",
            damp_frac=0.1,
            calibration="sequential",
            descent_sweeps=4,
            asymmetry=1.0,
            asymmetry_damp=1.0,
        ),
    ),
    # INT8 per row and per token. Needs no calibration.
    "w8a8": Recipe(
        QuantScheme(
            WeightScheme(n_bits=8, group_size=None),
            ActivationScheme(n_bits=8, group_size=None, scale_span="half"),
        ),
        SolverConfig(method="rtn"),
    ),
}

PRESET_HELP = {
    "atomq": "W4A4KV4 at the bits of atom with a third of its loss",
    "atomq-fast": "the same with progressive scales, for the fastest GEMM",
    "atom": "the Atom paper's W4A4KV4: groups of 128, 128 INT8 outlier channels, GPTQ",
    "w3a3": "the levers of atomq at three bits; 16-bit KV cache",
    "w4a8": "the levers of atomq with 8-bit activations; 16-bit KV cache",
    "w4a16-int8": "INT4 weights, 128 INT8 outlier channels; 16-bit activations",
    "rtn": "W4A4 rounded to nearest, no outliers: the baseline; no calibration",
    "ct-w4a4": "W4A4 of the rotated model without outliers, to export to compressed-tensors",
    "w4a16": "INT4 weights without outliers by GPTQ, 16-bit activations; exports to GPTQ files",
    "w8a8": "INT8 per row and per token, rounded to nearest; no calibration",
}

# Short names for the settings that people change most; `--set` reaches all others.
SHORT_NAMES = {
    "w_bits": "weights.n_bits",
    "a_bits": "activations.n_bits",
    "kv_bits": "kv.n_bits",
    "n_outliers": "outliers.n_outliers",
    "refine": "solver.refine_steps",
    "rotate": "solver.rotation",
}


def find_preset(name: str) -> Recipe:
    """Return the preset's recipe.

    Raises:
        ConfigError: there is no such preset; the message lists those that are.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}") from None


def build_recipe(
    preset: str, short: Mapping[str, int | str | None], group_size: str | None, settings: Sequence[str]
) -> Recipe:
    """The preset with the options given on the command line put over it.

    Raises:
        ConfigError: unknown preset or setting, or an impossible combination.
    """
    assignments: dict[str, Any] = {SHORT_NAMES[k]: v for k, v in short.items() if v is not None}
    if group_size is not None:
        assignments |= {"weights.group_size": group_size, "activations.group_size": group_size}
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting} must look like NAME=VALUE, such as --set weights.n_bits=3")
        if name in assignments:
            raise ConfigError(f"{name} is given twice on the command line; give it once")
        assignments[name] = value
    if short.get("n_outliers"):  # outliers are chosen, unless the original order is asked for
        assignments.setdefault("outliers.reorder", True)
    return override(find_preset(preset), assignments)


def recipe_name(recipe: Recipe) -> str:
    """The preset nearest to `recipe` and what is set over it: "atom", or "atom, weights.n_bits=3"."""
    changes = {name: changed_settings(preset, recipe) for name, preset in PRESETS.items()}
    nearest = min(changes, key=lambda name: len(changes[name]))
    return ", ".join(
        (nearest, *(f"{setting}={as_typed(value)}" for setting, value in changes[nearest].items()))
    )


def stored_recipe_name(values: Any) -> str:
    """`recipe_name` of a recipe as a manifest holds it, which may be of another version of atomq."""
    try:
        return recipe_name(from_dict(Recipe, values))
    except ConfigError:
        return "with settings that this version of atomq does not know"


def changed_settings(before: Recipe, after: Recipe) -> dict[str, Any]:
    """The settings in which `after` differs, named as `override` takes them, with their values there."""
    old, new = flat_settings(to_dict(before)), flat_settings(to_dict(after))
    return {name: "none" if new[name] is None else new[name] for name in new if old[name] != new[name]}


def as_typed(value: Any) -> str:
    """A setting's value as `--set` takes it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def flat_settings(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of a recipe (`to_dict`) by the names that `override` takes."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        full = "" if name == "scheme" else f"{prefix}{name}"
        flat |= flat_settings(value, f"{full}." if full else "") if isinstance(value, dict) else {full: value}
    return flat
