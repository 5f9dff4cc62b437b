"""What a quantized model is (`QuantScheme`) and how its codes are found (`SolverConfig`): frozen, checked
records.

`QuantScheme` is stored in the checkpoint and is all that a reader needs; `Recipe` adds the solver and is
stored in the manifest. Every combination that passes the checks here has a packed encoding (docs/format.md).
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from atomq.checks import (
    FLOAT_BITS as FLOAT_BITS,
    NumberFormat as NumberFormat,
    ScaleMode,
    check_bits,
    check_fields,
    check_number_format,
    check_positive,
    check_progressive,
    check_ratio,
    parse_setting,
)
from atomq.errors import ConfigError

OutlierPrecision = Literal["int8", "fp16", "e5m2", "e4m3"]
Metric = Literal["hessian", "abs_mean"]
KeyPosition = Literal["before_rope", "after_rope"]
Rotation = Literal["none", "hadamard"]
Span = Literal["full", "half"]
ResidualRotation = Literal["none", "fused", "auto"]

C = TypeVar("C")


@dataclass(frozen=True)
class WeightScheme:
    """Weights of the normal channels.

    Attributes:
        n_bits: 2, 3, 4, 8, or 16 for weights left in floating point.
        number_format: integers, or a 16-entry code book (4 bits).
        group_size: input channels that share a scale; None for a whole row.
        channel_group: neighbouring output rows that share a scale (Atom: 2).
        scale_mode: "progressive": scale = base of the row x integer factor 1..16 of the group.
    """

    n_bits: int = 4
    number_format: NumberFormat = "int"
    symmetric: bool = True
    group_size: int | None = 128
    channel_group: int = 1
    scale_mode: ScaleMode = "exact"

    def __post_init__(self) -> None:
        check_fields("weights", self)
        check_number_format("weights", self.n_bits, self.number_format, self.symmetric)
        check_positive("weights.channel_group", self.channel_group)
        if self.scale_mode == "progressive" and self.channel_group != 1:
            raise ConfigError(
                "weights.scale_mode progressive keeps one base per row; set weights.channel_group=1"
            )
        check_progressive("weights", self.scale_mode, self.n_bits, self.number_format, self.symmetric)


@dataclass(frozen=True)
class ActivationScheme:
    """Inputs of the linears: dynamic, per token and group. Fields as in `WeightScheme`.

    `clip_ratio` belongs to the scheme because activations are quantized at run time.

    Attributes:
        scale_span: divisor of a symmetric scale: "full" = 2^(n_bits-1) - 1, "half" = (2^n_bits - 1) / 2, as
            the compressed-tensors library has it.
        clip_search: "none" takes `clip_ratio`; "output" searches a ratio from there down for each linear
            group (`method.clip`), which then is stored beside the codes.
    """

    n_bits: int = 4
    number_format: NumberFormat = "int"
    symmetric: bool = True
    group_size: int | None = 128
    clip_ratio: float = 1.0
    scale_mode: ScaleMode = "exact"
    scale_span: Span = "full"
    clip_search: Literal["none", "output"] = "none"

    def __post_init__(self) -> None:
        check_fields("activations", self)
        if self.scale_span == "half" and not (self.symmetric and self.number_format == "int"):
            raise ConfigError(
                "activations.scale_span half divides the range of symmetric integers; "
                "set activations.scale_span=full"
            )
        if self.number_format == "exponential":
            raise ConfigError("activations.number_format exponential does not exist; it is for weights only")
        check_number_format("activations", self.n_bits, self.number_format, self.symmetric)
        check_ratio("activations.clip_ratio", self.clip_ratio)
        check_progressive("activations", self.scale_mode, self.n_bits, self.number_format, self.symmetric)

    @property
    def has_own_clips(self) -> bool:
        """Whether each linear group stores a clip ratio: it is nothing to activations in floating point."""
        return self.clip_search != "none" and self.n_bits < FLOAT_BITS


@dataclass(frozen=True)
class OutlierScheme:
    """Channels kept in higher precision, the last `n_outliers` of a linear's input.

    With `reorder` the channels are sorted by `metric`, so the last are those with the largest score;
    without, the last channels of the original order are kept.
    """

    n_outliers: int = 0
    precision: OutlierPrecision = "int8"
    metric: Metric = "hessian"
    reorder: bool = False

    def __post_init__(self) -> None:
        check_fields("outliers", self)
        if self.n_outliers < 0:
            raise ConfigError(f"outliers.n_outliers={self.n_outliers} must be 0 or more")


@dataclass(frozen=True)
class KVScheme:
    """KV cache: asymmetric integers per token and head; 16 bits for a float cache.

    Attributes:
        key_position: where K is quantized: "before_rope" (after the k norm, where there is one) or
            "after_rope".
        rotation: "hadamard": K and V of each head are coded after `transform_blocks`, undone on reading.
        key_offset: K before RoPE is coded less each channel's mean over the calibration text, which is added
            back on reading.
        key_balance: K after RoPE is coded less an offset and over a scale of each channel
            (`method.key_balance`). The query is multiplied by the scales; an offset holds for
            `kv.OFFSET_TOKENS` positions and adds the same to a query's scores of all of them.
    """

    n_bits: int = FLOAT_BITS
    clip_ratio: float = 1.0
    key_position: KeyPosition = "before_rope"
    rotation: Rotation = "none"
    key_offset: bool = False
    key_balance: bool = False

    def __post_init__(self) -> None:
        check_fields("kv", self)
        check_bits("kv.n_bits", self.n_bits)
        check_ratio("kv.clip_ratio", self.clip_ratio)
        if self.key_offset and self.key_position == "after_rope":
            raise ConfigError(
                "kv.key_offset is taken off K before RoPE, and kv.key_position=after_rope codes K after it; "
                "set kv.key_offset=false and kv.key_balance=true"
            )
        if self.key_balance and self.key_position == "before_rope":
            raise ConfigError(
                "kv.key_balance acts on K after RoPE, and kv.key_position=before_rope codes K before it; "
                "set kv.key_balance=false and kv.key_offset=true"
            )

    @property
    def has_key_offset(self) -> bool:
        """Whether blocks store `key_offset`: like all else here, it is nothing to a float cache."""
        return (self.key_offset or self.key_balance) and self.n_bits < FLOAT_BITS

    @property
    def has_key_scale(self) -> bool:
        """Whether blocks store `key_scale`."""
        return self.key_balance and self.n_bits < FLOAT_BITS


@dataclass(frozen=True)
class QuantScheme:
    """All that a reader must know to compute with a checkpoint.

    Attributes:
        transform: in-group transform of the normal channels: "hadamard" turns every group by
            `transform_groups`, weights offline and activations at run time; outliers stay as they are.
    """

    weights: WeightScheme = field(default_factory=WeightScheme)
    activations: ActivationScheme = field(default_factory=ActivationScheme)
    outliers: OutlierScheme = field(default_factory=OutlierScheme)
    kv: KVScheme = field(default_factory=KVScheme)
    transform: Rotation = "none"

    def __post_init__(self) -> None:
        check_fields("scheme", self)
        if self.weights.n_bits == FLOAT_BITS and self.activations.n_bits == FLOAT_BITS:
            if self.kv.n_bits == FLOAT_BITS:
                raise ConfigError(
                    "weights, activations and KV cache all have 16 bits: there is nothing to quantize; "
                    "lower at least one of weights.n_bits, activations.n_bits and kv.n_bits"
                )
            if self.outliers != OutlierScheme() or self.transform != "none":
                raise ConfigError(
                    "outliers and transform act on quantized weights or activations, and both have 16 bits; "
                    "set outliers.n_outliers=0, outliers.reorder=false and transform=none"
                )
        if self.transform == "hadamard" and self.weights.group_size != self.activations.group_size:
            raise ConfigError(
                f"transform hadamard needs equal groups, but weights.group_size={self.weights.group_size} "
                f"and activations.group_size={self.activations.group_size}"
            )

    @property
    def quantizes_linears(self) -> bool:
        return self.weights.n_bits < FLOAT_BITS or self.activations.n_bits < FLOAT_BITS


@dataclass(frozen=True)
class SolverConfig:
    """How weight codes are found.

    Attributes:
        method: "gptq" or "rtn" (round to nearest).
        clip_ratio: scales are made from clip_ratio x the largest magnitude of a group.
        scale_span: divisor of a symmetric scale: "half" = (2^n_bits - 1) / 2 as GPTQ has it (7.5 for 4 bits),
            "full" = 2^(n_bits-1) - 1 as rounding to nearest has it (7).
        damp_frac: fraction of the mean Hessian diagonal added to it ("percdamp" in GPTQ's code).
        clip_search: how a group's clip ratio is found: "none" takes `clip_ratio`; "mse" and "hessian" search
            ratios from `clip_ratio` down for the least rounding error, plain or weighted by how much each
            column's error costs (`method.gptq`).
        calibration: "block" collects all Hessians of a block in one pass before any is solved (Atom);
            "sequential" lets each group see the codes of the groups before it.
        descent_sweeps: sweeps of coordinate descent over codes and scales after GPTQ (`method.descent`).
        asymmetry: how much of the float model's output on its own inputs the codes aim at, from 0 (the
            output of the float weights on quantized inputs) to 1 (`method.hessian`).
        asymmetry_damp: fraction of the mean Hessian diagonal added to it for that correction.
        refine_steps: steps of block-wise refinement after all linears are solved (`method.refine`); 0: none.
        refine_rate: its learning rate, in codes.
        rotation: "fused": the residual stream and the heads of V are rotated first, in the weights alone
            (`models.rotation`); for a reader it is a model like any other. "auto": a run begins by measuring
            which of the two is better (`rotation_choice`), and records that one.
    """

    method: Literal["gptq", "rtn"] = "gptq"
    clip_ratio: float = 1.0
    scale_span: Span = "full"
    damp_frac: float = 0.01
    clip_search: Literal["none", "mse", "hessian"] = "none"
    calibration: Literal["block", "sequential"] = "block"
    descent_sweeps: int = 0
    asymmetry: float = 0.0
    asymmetry_damp: float = 0.01
    refine_steps: int = 0
    refine_rate: float = 0.01
    rotation: ResidualRotation = "none"

    def __post_init__(self) -> None:
        check_fields("solver", self)
        if not 0 <= self.descent_sweeps <= 100:
            raise ConfigError(f"solver.descent_sweeps={self.descent_sweeps} must lie between 0 and 100")
        if not 0 <= self.asymmetry <= 1:
            raise ConfigError(f"solver.asymmetry={self.asymmetry} must lie between 0 and 1")
        if not 0 < self.asymmetry_damp <= 1000:
            raise ConfigError(
                f"solver.asymmetry_damp={self.asymmetry_damp} must lie above 0 and at most at 1000"
            )
        if not 0 <= self.refine_steps <= 100_000:
            raise ConfigError(f"solver.refine_steps={self.refine_steps} must lie between 0 and 100000")
        if not 0 < self.refine_rate <= 1:
            raise ConfigError(f"solver.refine_rate={self.refine_rate} must lie above 0 and at most at 1")
        if self.method == "rtn" and (self.descent_sweeps or self.asymmetry or self.refine_steps):
            raise ConfigError(
                "solver.descent_sweeps, solver.asymmetry and solver.refine_steps start from GPTQ's codes; "
                "set all three to 0, or solver.method=gptq"
            )
        check_ratio("solver.clip_ratio", self.clip_ratio)
        if self.method == "rtn" and self.clip_search == "hessian":
            raise ConfigError(
                "solver.clip_search hessian weighs errors by GPTQ's Hessian, and solver.method=rtn has none; "
                "use solver.clip_search=mse or none"
            )
        if not 0 < self.damp_frac <= 10:
            raise ConfigError(f"solver.damp_frac={self.damp_frac} must lie above 0 and at most at 10")

    @property
    def needs_reference(self) -> bool:
        """Whether the float model's activations are carried along beside the quantized ones."""
        return self.asymmetry > 0 or self.refine_steps > 0


@dataclass(frozen=True)
class Recipe:
    """A scheme and the way to it: what `atomq quantize` does to a model."""

    scheme: QuantScheme = field(default_factory=QuantScheme)
    solver: SolverConfig = field(default_factory=SolverConfig)

    def __post_init__(self) -> None:
        solves = self.solver.method == "gptq" and self.scheme.weights.n_bits < FLOAT_BITS
        if self.scheme.kv.has_key_offset and not solves:
            raise ConfigError(
                "kv.key_offset and kv.key_balance are measured while codes are solved; set them to false, or "
                "use solver.method=gptq and weights.n_bits below 16"
            )
        if self.scheme.activations.has_own_clips and not solves:
            raise ConfigError(
                "activations.clip_search looks at activations while codes are solved; set it to none, or use "
                "solver.method=gptq and weights.n_bits below 16"
            )
        if self.solver.refine_steps and self.scheme.weights.number_format != "int":
            raise ConfigError(
                f"--refine learns integer codes; weights.number_format={self.scheme.weights.number_format} "
                f"has a code book: leave --refine away, or set weights.number_format=int"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether any step looks at activations."""
        solves = self.solver.method == "gptq" and self.scheme.weights.n_bits < FLOAT_BITS
        return solves or self.scheme.outliers.reorder or self.solver.rotation == "auto"


@dataclass(frozen=True)
class CalibrationConfig:
    """The calibration text: the options of `calibrate` and `quantize`.

    `n_samples` and `seq_len` None stand for the source's default (docs/method.md). `all_experts`: the experts
    of a mixture see every token, and not only those that are routed to them.
    """

    data: str = "builtin"
    n_samples: int | None = None
    seq_len: int | None = None
    seed: int = 0
    all_experts: bool = False

    def __post_init__(self) -> None:
        if self.n_samples is not None and self.n_samples < 1:
            raise ConfigError(f"--n-samples {self.n_samples} must be at least 1")
        if self.seq_len is not None and self.seq_len < 2:
            raise ConfigError(f"--seq-len {self.seq_len} must be at least 2")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain nested dictionaries, in the order of its fields."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], values: Any, where: str = "") -> C:
    """Build a config of class `cls` from `to_dict`'s result, refusing unknown and missing names.

    Raises:
        ConfigError: `values` is not such a dictionary; the message names the field.
    """
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where.removesuffix('.') or cls.__name__} must be a table of settings, not {values!r}"
        )
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    strange, absent = set(values) - set(fields), set(fields) - set(values)
    if strange or absent:
        part = where.removesuffix(".") or cls.__name__
        raise ConfigError(f"{part} has unknown settings {sorted(strange)} and lacks {sorted(absent)}")
    hints = typing.get_type_hints(cls)
    built = {}
    for name, value in values.items():
        hint = hints[name]
        nested = isinstance(hint, type) and dataclasses.is_dataclass(hint)
        built[name] = from_dict(hint, value, f"{where}{name}.") if nested else value
    return cls(**built)


def override(recipe: Recipe, assignments: dict[str, Any]) -> Recipe:
    """Return `recipe` with settings such as ``{"weights.n_bits": 3}`` replaced; values may be text.

    A name is ``part.field`` with part one of weights, activations, outliers, kv, solver, or ``transform``.

    Raises:
        ConfigError: unknown name (the message lists all), wrong type, or an impossible combination.
    """
    parts: dict[str, Any] = {
        "weights": recipe.scheme.weights,
        "activations": recipe.scheme.activations,
        "outliers": recipe.scheme.outliers,
        "kv": recipe.scheme.kv,
        "solver": recipe.solver,
    }
    transform: Any = recipe.scheme.transform
    changes: dict[str, dict[str, Any]] = {part: {} for part in parts}
    for name, value in assignments.items():
        part, _, attribute = name.partition(".")
        if name == "transform":
            transform = value
            continue
        known = {f.name for f in dataclasses.fields(parts[part])} if part in parts else set()
        if attribute not in known:
            raise ConfigError(f"unknown setting {name!r}; settings are {', '.join(setting_names())}")
        hint = typing.get_type_hints(type(parts[part]))[attribute]
        changes[part][attribute] = parse_setting(name, value, hint) if isinstance(value, str) else value
    new = {part: dataclasses.replace(config, **changes[part]) for part, config in parts.items()}
    solver = new.pop("solver")
    return Recipe(QuantScheme(**new, transform=transform), solver)


def setting_names() -> list[str]:
    """All names that `override` takes."""
    parts = {"weights": WeightScheme, "activations": ActivationScheme, "outliers": OutlierScheme}
    parts |= {"kv": KVScheme, "solver": SolverConfig}
    return [f"{part}.{f.name}" for part, cls in parts.items() for f in dataclasses.fields(cls)] + [
        "transform"
    ]
