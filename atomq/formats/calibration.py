"""The artefact that `atomq calibrate` writes: channel statistics, the orders made from them, and their key.

A safetensors file with, per linear group (named by its first linear), `NAME.hessian` and `NAME.abs_mean` F32
[K] and `NAME.perm` I32 [K]; the metadata entry "atomq_calibration" is JSON with the key and facts for people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save

from atomq.config import Metric
from atomq.errors import CheckpointError
from atomq.formats.checkpoint import open_shard
from atomq.formats.files import write_file
from atomq.numerics.channels import ChannelStatistics

_METADATA = "atomq_calibration"
_VERSION = 1
_NO_ARTEFACT = "is not a calibration artefact of this version of atomq; make one with atomq calibrate"


@dataclass(frozen=True)
class CalibrationKey:
    """What statistics depend on; an artefact is reused only if all of it is equal.

    Attributes:
        model_hash: `models.source.source_hash` of the float model.
        data_hash: SHA-256 of the calibration windows' token ids.
        transforms: exact transforms folded into the model before the statistics: "rotation", or none.
        all_experts: whether the experts of a mixture saw every token.
    """

    model_hash: str
    data_hash: str
    seed: int
    metric: Metric
    n_outliers: int
    transforms: tuple[str, ...] = ()
    all_experts: bool = False


def write_calibration(
    path: Path,
    key: CalibrationKey,
    statistics: Mapping[str, ChannelStatistics],
    orders: Mapping[str, torch.Tensor],
    facts: Mapping[str, Any],
) -> None:
    """Write the artefact; equal inputs give equal bytes. `orders`, for people, may be left out."""
    tensors: dict[str, torch.Tensor] = {}
    for name, s in statistics.items():
        tensors[f"{name}.hessian"], tensors[f"{name}.abs_mean"] = s.hessian, s.abs_mean
        if name in orders:
            tensors[f"{name}.perm"] = orders[name]
    content = {"version": _VERSION, "key": asdict(key), "facts": dict(facts)}
    write_file(path, save(tensors, metadata={_METADATA: json.dumps(content, sort_keys=True)}))


def read_calibration(path: Path, key: CalibrationKey) -> dict[str, ChannelStatistics]:
    """Read the statistics, provided that they were made under `key`.

    Raises:
        CheckpointError: not such an artefact, damaged, or made under another key; the differences are named.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no calibration artefact {path}; make one with atomq calibrate")
    with _open(path) as file:
        content = _parse(path, (file.metadata() or {}).get(_METADATA))
        found = content["key"]
        wanted: dict[str, Any] = json.loads(json.dumps(asdict(key)))
        differing = [
            f"{field} is {found.get(field)!r} but {value!r} is needed"
            for field, value in wanted.items()
            if found.get(field) != value
        ]
        if differing:
            raise CheckpointError(
                f"{path.name} was made for other settings: {'; '.join(differing)}; give quantize the model, "
                f"--calib-data, --n-samples, --seq-len, --seed and outliers of calibrate, or calibrate again"
            )
        parts = ("hessian", "abs_mean", "perm")
        strange = [name for name in file.keys() if not name.endswith(tuple(f".{part}" for part in parts))]  # noqa: SIM118
        if strange:
            raise CheckpointError(f"{path.name} holds {strange[0]}, which is no statistic of a channel")
        names = [name.removesuffix(".hessian") for name in file.keys() if name.endswith(".hessian")]  # noqa: SIM118
        statistics = {}
        for name in names:
            try:
                pair = (file.get_tensor(f"{name}.hessian"), file.get_tensor(f"{name}.abs_mean"))
            except SafetensorError as error:
                raise CheckpointError(f"{path.name} lacks a statistic of {name}: {error}") from error
            if any(
                t.dtype != torch.float32 or t.ndim != 1 or not bool(torch.isfinite(t).all()) for t in pair
            ):
                raise CheckpointError(
                    f"the statistics of {name} in {path.name} are not finite vectors of float32"
                )
            statistics[name] = ChannelStatistics(*pair)
    return statistics


def is_calibration(path: Path) -> bool:
    """Whether the file is an artefact of `atomq calibrate`, of whatever version, model or text."""
    try:
        with open_shard(path) as file:
            return _METADATA in (file.metadata() or {})
    except CheckpointError:
        return False


def read_facts(path: Path) -> dict[str, Any]:
    """The facts that were written beside the statistics.

    Raises:
        CheckpointError: not such an artefact, or damaged.
    """
    with _open(path) as file:
        facts = _parse(path, (file.metadata() or {}).get(_METADATA)).get("facts")
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path.name} {_NO_ARTEFACT}")
    return facts


def _open(path: Path) -> Any:
    try:
        return open_shard(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; make another with atomq calibrate") from error


def _parse(path: Path, text: str | None) -> dict[str, Any]:
    try:
        content = json.loads(text or "")
    except (ValueError, RecursionError):
        content = None
    if (
        not isinstance(content, dict)
        or content.get("version") != _VERSION
        or not isinstance(content.get("key"), dict)
    ):
        raise CheckpointError(f"{path.name} {_NO_ARTEFACT}")
    return content
