"""The facts of a report: read from a checkpoint's files and from the JSON records in its reports/ folder.

Nothing is measured here. What the folder does not hold is None or empty, so a report can be rebuilt at any
time, also where the run's own record is gone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from atomq.config import QuantScheme
from atomq.errors import CheckpointError
from atomq.formats.card import scheme_name
from atomq.formats.checkpoint import (
    REPORTS,
    read_config,
    read_manifest,
    read_tensors,
    tensor_headers,
)
from atomq.formats.journal import CHOICE
from atomq.formats.schema import parse_quantization_config
from atomq.numerics.groups import n_groups
from atomq.numerics.linear import TensorSpec
from atomq.numerics.packing import FACTOR_BITS, unpack_factors
from atomq.presets import stored_recipe_name

REPORT_VERSION = 1
RUN_RECORD = "quantize"  # reports/quantize.json, written by the run itself
OWN_FILES = ("report",)  # what a report writes and therefore does not read
MAX_RECORD_BYTES = 1 << 26  # nothing longer is read
BINS_PER_OCTAVE = 4  # of the histograms of scales


@dataclass(frozen=True)
class Summary:
    """The figures at the top of a report.

    Attributes:
        recipe_name: the preset, with what was set over it.
        bits: effective bits per "weight", "activation" and "kv" entry, scales included; empty if unknown.
        size_bytes, float_bytes: all tensors as stored, and with the linears' weights in 16 bits.
        peaks: peak bytes of memory by place, "host" and "gpu".
    """

    model: str
    scheme_name: str
    recipe_name: str
    bits: dict[str, float]
    size_bytes: int
    float_bytes: int | None
    seconds: dict[str, float]
    peaks: dict[str, int]


@dataclass(frozen=True)
class LinearFacts:
    """One quantized linear.

    Attributes:
        block: number of its decoder block; None outside of blocks.
        kind: its name inside the block, numbers (of experts) replaced by "*".
        relative_error: squared output error over squared output on the calibration tokens, if measured.
        method, damp_frac, n_dead: how it was solved, and inputs that were never active.
    """

    name: str
    block: int | None
    kind: str
    size_bytes: int
    relative_error: float | None
    method: str | None
    damp_frac: float | None
    n_dead: int


@dataclass(frozen=True)
class OutlierMap:
    """Which input channels of one kind of linear group are outliers, by block."""

    kind: str
    n_channels: int
    channels: dict[int, list[int]]


@dataclass(frozen=True)
class ScaleHistogram:
    """Weight scales of one kind of linear over all blocks: counts by power of two.

    Bin i holds scales from 2^((start + i) / BINS_PER_OCTAVE) up to the next bin's start.
    """

    kind: str
    start: int
    counts: list[int]


@dataclass(frozen=True)
class Report:
    """All that report.json holds.

    Attributes:
        starved: calibration tokens of each expert of a mixture that saw too few, by full name.
        records: every other JSON record in reports/, by file name without the ending.
        about: recipe, source, calibration, versions, notes and host, as manifest and run recorded them.
    """

    summary: Summary
    warnings: list[str]
    linears: list[LinearFacts]
    outliers: list[OutlierMap]
    scales: list[ScaleHistogram]
    starved: dict[str, int]
    records: dict[str, Any]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"report_version": REPORT_VERSION, **asdict(self)}


def gather(folder: Path) -> Report:
    """Gather the report of a checkpoint.

    Raises:
        CheckpointError: `folder` is no checkpoint, or one of its files cannot be read.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}; make one with atomq quantize MODEL {folder}")
    config = read_config(folder).get("quantization_config")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{folder.name} is not quantized (its config.json has no quantization_config); "
            f"make a checkpoint of it with atomq quantize {folder} OUT"
        )
    family, scheme = parse_quantization_config(config)
    manifest, headers = read_manifest(folder), tensor_headers(folder)
    records, unreadable = read_records(folder)
    run = records.pop(RUN_RECORD, {})
    if not _is_of_a_run(run):
        unreadable.append(f"{REPORTS}/{RUN_RECORD}.json was left out: it is not what quantize writes")
        run = {}
    order = {kind: i for i, kind in enumerate(name for group in family.groups for name in group.linears)}
    linears = _linears(headers, run, manifest, order)
    about = {name: manifest[name] for name in ("recipe", "source", "calibration", "versions")}
    about |= {name: manifest[name] for name in (CHOICE,) if name in manifest}
    about |= {"notes": [*map(str, run.get("notes") or [])], "host": run.get("host")}
    about |= {"scheme": config.get("scheme")}
    return Report(
        summary=_summary(scheme, headers, run, manifest),
        warnings=[*map(str, manifest["warnings"]), *unreadable],
        linears=linears,
        outliers=_outlier_maps(folder, headers, scheme),
        scales=_scale_histograms(folder, headers, scheme),
        starved=run.get("starved_experts") or {},
        records=records,
        about=about,
    )


def read_records(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The JSON objects in reports/ by file name without ending, and a sentence for each that is not one."""
    records, unreadable = {}, []
    for path in sorted((folder / REPORTS).glob("*.json")):
        if path.stem in OWN_FILES:
            continue
        try:
            if path.stat().st_size > MAX_RECORD_BYTES:
                raise ValueError(f"it has more than {MAX_RECORD_BYTES} bytes")
            record = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise ValueError("it is not a JSON object")
            records[path.stem] = record
        except (OSError, ValueError, RecursionError) as error:
            unreadable.append(f"{REPORTS}/{path.name} was left out: {error}")
    return records, unreadable


def _is_of_a_run(record: Mapping[str, Any]) -> bool:
    """Whether what a report takes from the record of quantize, as far as it is there, has the right form."""
    host, linears, notes = record.get("host") or {}, record.get("linears") or [], record.get("notes") or []
    if not (isinstance(host, dict) and isinstance(linears, list) and isinstance(notes, list)):
        return False
    if not all(isinstance(linear, dict) for linear in linears):
        return False
    figures = [record.get("linear_bytes"), host.get("peak_memory_bytes"), host.get("peak_gpu_bytes")]
    for name in ("seconds", "effective_bits", "starved_experts"):
        values = record.get(name) or {}
        if not isinstance(values, dict):
            return False
        figures += values.values()
    figures += [linear.get(name) for linear in linears for name in ("relative_error", "damp_frac", "n_dead")]
    return all(figure is None or isinstance(figure, int | float) for figure in figures)


def block_and_kind(name: str) -> tuple[int | None, str]:
    """ "model.layers.3.mlp.experts.7.up_proj" -> (3, "mlp.experts.*.up_proj")."""
    parts = name.split(".")
    position = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    if position is None:
        return None, name
    kind = ["*" if part.isdigit() else part for part in parts[position + 1 :]]
    return int(parts[position]), ".".join(kind)


def _linears(
    headers: Mapping[str, TensorSpec],
    run: Mapping[str, Any],
    manifest: Mapping[str, Any],
    order: Mapping[str, int],
) -> list[LinearFacts]:
    """Block by block, and in a block as they are computed (`order`, by kind)."""
    solved = {entry["name"]: entry for entry in run.get("linears", ()) if isinstance(entry.get("name"), str)}
    sizes: dict[str, int] = {}
    for tensor, spec in headers.items():
        owner = tensor.rpartition(".")[0]
        sizes[owner] = sizes.get(owner, 0) + _n_bytes(spec)
    names = [tensor.removesuffix(".qweight") for tensor in headers if tensor.endswith(".qweight")]
    linears = []
    for name in sorted(names, key=_natural):
        entry = solved.get(name, manifest.get("deviations", {}).get(name, {}))
        block, kind = block_and_kind(name)
        linears.append(
            LinearFacts(
                name,
                block,
                kind,
                sizes[name],
                entry.get("relative_error"),
                entry.get("method"),
                entry.get("damp_frac"),
                entry.get("n_dead") or 0,
            )
        )
    return sorted(linears, key=lambda linear: (linear.block or 0, order.get(linear.kind, len(order))))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts names with numbers as people do: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"[.]", name)]


def _summary(
    scheme: QuantScheme,
    headers: Mapping[str, TensorSpec],
    run: Mapping[str, Any],
    manifest: Mapping[str, Any],
) -> Summary:
    size = sum(map(_n_bytes, headers.values()))
    bits, linear_bytes = run.get("effective_bits") or {}, run.get("linear_bytes")
    float_bytes = None
    if bits.get("weight") and linear_bytes:
        n_weights = round(8 * linear_bytes / bits["weight"])
        float_bytes = size - linear_bytes + 2 * n_weights
    host = run.get("host") or {}
    peaks = {"host": host.get("peak_memory_bytes"), "gpu": host.get("peak_gpu_bytes")}
    return Summary(
        model=str(manifest["source"].get("name", "unknown")),
        scheme_name=scheme_name(scheme),
        recipe_name=stored_recipe_name(manifest["recipe"]),
        bits=bits,
        size_bytes=size,
        float_bytes=float_bytes,
        seconds=run.get("seconds") or {},
        peaks={place: n_bytes for place, n_bytes in peaks.items() if n_bytes},
    )


def _outlier_maps(folder: Path, headers: Mapping[str, TensorSpec], scheme: QuantScheme) -> list[OutlierMap]:
    n_outliers = scheme.outliers.n_outliers
    names = {name for name in headers if name.endswith(".perm")} if n_outliers else set()
    widths: dict[str, int] = {}
    found: dict[str, dict[int, list[int]]] = {}
    for name, perm in sorted(read_tensors(folder, names), key=lambda item: _natural(item[0])):
        block, kind = block_and_kind(name.removesuffix(".perm"))
        widths[kind] = max(len(perm), widths.get(kind, 0))
        if block is not None:
            known = set(found.setdefault(kind, {}).get(block, ()))  # experts of one block share a row
            found[kind][block] = sorted(known | set(perm[-n_outliers:].tolist()))
    return [OutlierMap(kind, widths[kind], channels) for kind, channels in found.items()]


def _scale_histograms(
    folder: Path, headers: Mapping[str, TensorSpec], scheme: QuantScheme
) -> list[ScaleHistogram]:
    """Of `scales`, or of `scale_base` x `scale_factors` where scales are progressive."""
    names = {name for name in headers if name.endswith((".scales", ".scale_base", ".scale_factors"))}
    bases: dict[str, torch.Tensor] = {}
    counts: dict[str, dict[int, int]] = {}
    for name, tensor in read_tensors(folder, names):  # within a shard by name: a base before its factors
        owner, _, suffix = name.rpartition(".")
        if suffix == "scale_base":
            bases[owner] = tensor
            continue
        scales = tensor.float()
        if suffix == "scale_factors":
            # A row of codes may have room for more than it holds, and then for a group more than it has.
            n_codes = 8 * headers[f"{owner}.qweight"].shape[-1] // scheme.weights.n_bits
            most = n_groups(n_codes, scheme.weights.group_size)
            factors = unpack_factors(tensor, min(most, 8 * tensor.shape[-1] // FACTOR_BITS))
            scales = bases.pop(owner).float()[:, None] * factors
        usable = scales.nan_to_num(0.0).clamp(2.0**-126, 2.0**126)  # whatever a file may hold
        positions = (usable.log2() * BINS_PER_OCTAVE).floor().long().flatten()
        first = int(positions.min())
        of_kind = counts.setdefault(block_and_kind(owner)[1], {})
        for offset, count in enumerate((positions - first).bincount().tolist()):
            of_kind[first + offset] = of_kind.get(first + offset, 0) + count
    return [
        ScaleHistogram(kind, min(found), [found.get(i, 0) for i in range(min(found), max(found) + 1)])
        for kind, found in sorted(counts.items())
    ]


def _n_bytes(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel() * spec.dtypes[0].itemsize
