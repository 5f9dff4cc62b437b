"""The rules that settings of `atomq.config` are held to, and how they are read from text."""

from __future__ import annotations

import types
import typing
from typing import Any, Literal

from atomq.errors import ConfigError

FLOAT_BITS = 16
CODE_BITS = (2, 3, 4, 8)

NumberFormat = Literal["int", "fp4-bnb", "fp4-e2m1", "exponential"]
ScaleMode = Literal["exact", "progressive"]


def check_fields(where: str, config: Any) -> None:
    """Refuse values of the wrong type or not among a Literal's choices."""
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        label = name if where == "scheme" else f"{where}.{name}"
        if typing.get_origin(hint) is Literal:
            if value not in typing.get_args(hint):
                choices = ", ".join(map(str, typing.get_args(hint)))
                raise ConfigError(f"{label}={value!r} does not exist; choose one of {choices}")
            continue
        allowed = typing.get_args(hint) or (hint,)
        if float in allowed:
            allowed = (*allowed, int)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{label}={value!r} has the wrong type; expected {hint}")
    group_size = getattr(config, "group_size", None)
    if group_size is not None:
        check_positive(f"{where}.group_size", group_size)


def check_positive(label: str, value: int) -> None:
    if value < 1:
        raise ConfigError(f"{label}={value} must be at least 1")


def check_ratio(label: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ConfigError(f"{label}={value} must lie above 0 and at most at 1")


def check_bits(label: str, n_bits: int) -> None:
    if n_bits not in (*CODE_BITS, FLOAT_BITS):
        raise ConfigError(f"{label}={n_bits} must be one of 2, 3, 4, 8 or 16 (16 = floating point)")


def check_number_format(where: str, n_bits: int, number_format: NumberFormat, symmetric: bool) -> None:
    check_bits(f"{where}.n_bits", n_bits)
    if number_format != "int" and (n_bits != 4 or not symmetric):
        raise ConfigError(
            f"{where}.number_format {number_format} has 16 codes and no zero point; "
            f"it needs {where}.n_bits=4 and {where}.symmetric=true"
        )


def check_progressive(
    where: str, scale_mode: ScaleMode, n_bits: int, number_format: NumberFormat, symmetric: bool
) -> None:
    if scale_mode == "progressive" and not (n_bits <= 4 and number_format == "int" and symmetric):
        raise ConfigError(
            f"{where}.scale_mode progressive multiplies codes by factors up to 16 within INT8; "
            f"it needs symmetric integers of at most 4 bits"
        )


def parse_setting(name: str, text: str, hint: Any) -> Any:
    """`text` from the command line as a value of type `hint`."""
    or_none = ""
    if typing.get_origin(hint) is types.UnionType:
        or_none = " or none"
        if text.lower() == "none":
            return None
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if hint is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{name}={text} must be true or false")
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            raise ConfigError(f"{name}={text} must be a number{or_none}") from None
    return text
