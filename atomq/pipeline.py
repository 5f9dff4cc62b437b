"""From names to files: `calibrate` and `quantize`, the two jobs behind the commands of the same names."""

from __future__ import annotations

import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import atomq
from atomq.block_loop import (
    QuantizationReport,
    calibrate_blocks,
    check_widths,
    quantize_blocks,
)
from atomq.block_quantizer import group_orders
from atomq.config import CalibrationConfig, OutlierScheme, QuantScheme, Recipe, to_dict
from atomq.errors import CheckpointError, ConfigError
from atomq.eval.windows import DEFAULT_SAMPLES, TokenWindows, calibration_windows
from atomq.formats.calibration import CalibrationKey, read_calibration, write_calibration
from atomq.formats.card import model_card
from atomq.formats.channel_plot import draw_channels
from atomq.formats.checkpoint import REPORTS
from atomq.formats.files import write_file, write_json
from atomq.formats.schema import code_bytes, effective_bits, quantization_config
from atomq.formats.writer import CheckpointWriter
from atomq.models.blocks import linear_shapes
from atomq.models.experts import ExpertRouting
from atomq.models.families import LinearShape, ModelFamily, find_family
from atomq.models.loading import companions, is_local_path, load_float_model, load_tokenizer
from atomq.models.quantized import head_dim_of
from atomq.models.source import ModelSource, resolve_source, source_hash
from atomq.numerics.channels import ChannelStatistics
from atomq.progress import OnProgress, silently
from atomq.report.files import write_report


@dataclass(frozen=True)
class CalibrationResult:
    """What `calibrate` found and wrote; `statistics` by the full name of each group's first linear."""

    path: Path
    key: CalibrationKey
    statistics: dict[str, ChannelStatistics]
    orders: dict[str, torch.Tensor]
    facts: dict[str, Any]


@dataclass(frozen=True)
class QuantizeResult:
    """What `quantize` made. `model` is the simulation of the checkpoint at `path`, on the CPU."""

    path: Path
    model: PreTrainedModel
    report: QuantizationReport
    summary: dict[str, Any]


def choose_device(device: str | torch.device) -> torch.device:
    """Resolve "auto", "cpu" or "cuda".

    Raises:
        ConfigError: another name, or CUDA where there is none.
    """
    name = str(device)
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {name} is not one of auto, cpu, cuda")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError(
            "--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA torch"
        )
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def calibrate(
    model_name: str,
    path: Path,
    calibration: CalibrationConfig,
    outliers: OutlierScheme,
    device: str | torch.device = "auto",
    on_progress: OnProgress = silently,
    picture: Path | None = None,
) -> CalibrationResult:
    """Gather channel statistics of the float model on the calibration text.

    Writes the artefact `path` and, if asked, a `picture` (.png or .svg) of the channels.
    """
    place = choose_device(device)
    source = resolve_source(model_name)
    windows = _cut_windows(load_tokenizer(source), calibration)
    model = load_float_model(source)
    windows.check_vocabulary(model.config.vocab_size)
    family = find_family(model.config.model_type)
    check_widths(model, family, QuantScheme(outliers=outliers))
    routing = _expert_routing(family, calibration)
    statistics = calibrate_blocks(model, windows.token_ids, place, on_progress, routing)
    scheme = QuantScheme(outliers=outliers)
    orders = group_orders(statistics, scheme)
    key = _calibration_key(source, windows, calibration, scheme)
    facts = {
        "model": source.name,
        "calibration": _window_facts(windows),
        "starved_experts": routing.starved,
        "atomq": atomq.__version__,
    }
    if picture is not None:
        kind = picture.suffix.removeprefix(".")
        content = draw_channels(statistics, outliers.metric, outliers.n_outliers, source.name, kind)
        write_file(picture, content)
    write_calibration(path, key, statistics, orders, facts)
    return CalibrationResult(path, key, statistics, orders, facts)


def quantize(
    model_name: str,
    out: Path,
    recipe: Recipe,
    device: str | torch.device = "auto",
    on_progress: OnProgress = silently,
    calibration: CalibrationConfig | None = None,
    calibration_file: Path | None = None,
    overwrite: bool = False,
) -> QuantizeResult:
    """Quantize a model and write the checkpoint `out`.

    Args:
        calibration: the text; used if the recipe looks at activations. None: the built-in text.
        calibration_file: an artefact of `calibrate` to take the statistics from.

    Raises:
        AtomqError: every kind of bad input, before anything is written; storage trouble later. Nothing
        half-written
            stays behind.
    """
    started = time.perf_counter()
    place = choose_device(device)
    if calibration_file is not None and not recipe.scheme.outliers.reorder:
        raise ConfigError(
            f"{calibration_file.name} would not be used: this recipe chooses no outlier channels; "
            f"leave --calibration away, or set outliers.reorder=true"
        )
    calibration = calibration or CalibrationConfig()
    source = resolve_source(model_name)
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        tokenizer = load_tokenizer(source)  # needed in the checkpoint, whatever the recipe
        windows = _cut_windows(tokenizer, calibration) if recipe.needs_calibration else None
        statistics = None
        if calibration_file is not None and windows is not None:
            key = _calibration_key(source, windows, calibration, recipe.scheme)
            statistics = read_calibration(calibration_file, key)
        model = load_float_model(source)
        if windows is not None:
            windows.check_vocabulary(model.config.vocab_size)
        family = find_family(model.config.model_type)
        shapes = linear_shapes(model, family)
        if calibration_file is not None and statistics is not None:
            _check_statistics(calibration_file, statistics, family, shapes)
        writer.n_shards = model.config.num_hidden_layers + 1
        storage_dtype = model.config.dtype
        assert isinstance(storage_dtype, torch.dtype)

        def write_block(prefix: str, block: nn.Module) -> None:
            number = int(prefix.rpartition(".")[2]) + 2  # the first shard holds what is not in a block
            writer.write_shard(number, _stored_tensors(block, f"{prefix}.", storage_dtype))

        loaded = time.perf_counter()
        report = quantize_blocks(
            model,
            recipe,
            place,
            on_progress,
            None if windows is None else windows.token_ids,
            statistics,
            write_block,
            _expert_routing(family, calibration),
        )
        writer.write_shard(1, _tensors_outside_blocks(model, f"{family.blocks}.", storage_dtype))
        writer.write_index()
        config = model.config.to_dict()
        config["quantization_config"] = quantization_config(family, recipe.scheme)
        config.pop("_name_or_path", None)
        config = {key: value for key, value in config.items() if not is_local_path(value)}
        write_json(writer.folder / "config.json", config)
        for name, content in companions(source).items():
            write_file(writer.folder / name, content)
        bits = effective_bits(recipe.scheme, shapes, head_dim_of(model.config))
        card = model_card(source.name, recipe, bits, atomq.__version__)
        write_file(writer.folder / "README.md", card.encode())
        warnings = [*_token_warnings(windows, report, recipe, calibration), *report.warnings]
        writer.write_manifest(_manifest_facts(source, recipe, windows, report, warnings, place))
        seconds = {"loading": loaded - started, **report.seconds, "total": time.perf_counter() - started}
        summary = {
            "model": source.name,
            "recipe": to_dict(recipe),
            "calibration": None if windows is None else _window_facts(windows),
            "effective_bits": bits,
            "size_bytes": writer.total_size,
            "linear_bytes": code_bytes(recipe.scheme, shapes),
            "mean_relative_error": _mean_error(report),
            "warnings": warnings,
            "seconds": seconds,
        }
        write_json(
            writer.folder / REPORTS / "quantize.json", {**report.to_dict(), **summary, **_host_facts(place)}
        )
        writer.publish()
    write_report(out)
    return QuantizeResult(out, model, report, summary)


def _cut_windows(tokenizer: PreTrainedTokenizerBase, calibration: CalibrationConfig) -> TokenWindows:
    return calibration_windows(
        tokenizer,
        calibration.data,
        calibration.n_samples,
        calibration.seq_len,
        calibration.seed,
    )


def _expert_routing(family: ModelFamily, calibration: CalibrationConfig) -> ExpertRouting:
    if calibration.all_experts and not family.has_experts:
        raise ConfigError(f"{family.model_type} models have no experts; leave --moe-calibrate-all away")
    return ExpertRouting(calibration.all_experts)


def _calibration_key(
    source: ModelSource, windows: TokenWindows, calibration: CalibrationConfig, scheme: QuantScheme
) -> CalibrationKey:
    outliers = scheme.outliers
    return CalibrationKey(
        source_hash(source),
        windows.data_hash,
        calibration.seed,
        outliers.metric,
        outliers.n_outliers,
        all_experts=calibration.all_experts,
    )


def _check_statistics(
    path: Path,
    statistics: dict[str, ChannelStatistics],
    family: ModelFamily,
    shapes: dict[str, LinearShape],
) -> None:
    """Refuse an artefact that does not hold the statistics of every linear group of the model."""
    widths = {name: shape.n_in for name, shape in shapes.items() if family.owns_group(name)}
    found = {name: len(s.hessian) for name, s in statistics.items() if len(s.hessian) == len(s.abs_mean)}
    wrong = [
        name for name in sorted(widths.keys() | statistics.keys()) if found.get(name) != widths.get(name)
    ]
    if wrong:
        raise CheckpointError(
            f"{path.name} is damaged: the statistics of {wrong[0]} are not those of this model; "
            f"run atomq calibrate again"
        )


def _window_facts(windows: TokenWindows) -> dict[str, Any]:
    return {
        "data": windows.corpus,
        "layout": windows.layout,
        "text_sha256": windows.corpus_sha256,
        "tokens_sha256": windows.data_hash,
        "n_samples": windows.n_windows,
        "seq_len": windows.seq_len,
        "n_tokens": windows.n_tokens,
        "seed": windows.seed,
    }


def _stored_tensors(module: nn.Module, prefix: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """State of `module`, with floating-point parameters in the storage dtype and codes as they are."""
    parameters = {name for name, _ in module.named_parameters()}
    return {
        prefix + name: tensor.to(dtype) if name in parameters else tensor
        for name, tensor in module.state_dict().items()
    }


def _tensors_outside_blocks(
    model: PreTrainedModel, blocks: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Embeddings, final norm and head; a tied head is stored once, as the embeddings."""
    tied = set(model.all_tied_weights_keys)
    return {
        name: tensor.to(dtype)
        for name, tensor in model.state_dict().items()
        if not name.startswith(blocks) and name not in tied
    }


def _manifest_facts(
    source: ModelSource,
    recipe: Recipe,
    windows: TokenWindows | None,
    report: QuantizationReport,
    warnings: list[str],
    device: torch.device,
) -> dict[str, Any]:
    """All that the bytes depend on, and what a careful reader should know. No clock, no path."""
    asked = ("gptq", recipe.solver.damp_frac) if recipe.solver.method == "gptq" else ("rtn", None)
    deviations = {
        r.name: {"method": r.method, "damp_frac": r.damp_frac}
        for r in report.linears
        if (r.method, r.damp_frac) != asked
    }
    return {
        "source": {"name": source.name, "kind": source.kind, "sha256": source_hash(source)},
        "recipe": to_dict(recipe),
        "calibration": None if windows is None else _window_facts(windows),
        "deviations": deviations,
        "starved_experts": report.starved_experts,
        "warnings": warnings,
        "device": device.type,
        "versions": {
            "atomq": atomq.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
        },
    }


def _token_warnings(
    windows: TokenWindows | None, report: QuantizationReport, recipe: Recipe, asked: CalibrationConfig
) -> list[str]:
    """Less text than by default, or too little for the widest linear: worth a word even if all went well."""
    warnings: list[str] = []
    if windows is None:
        return warnings
    by_default = asked.n_samples is None and asked.data != "builtin"
    if by_default and windows.n_windows < DEFAULT_SAMPLES:
        warnings.append(
            f"{windows.corpus} holds {windows.n_windows} windows of {windows.seq_len} tokens, "
            f"fewer than the {DEFAULT_SAMPLES} that are taken by default"
        )
    if recipe.solver.method == "gptq" and report.widest_input > windows.n_tokens:
        warnings.append(
            f"{windows.n_tokens} calibration tokens are fewer than the {report.widest_input} inputs of the "
            f"widest linear; give more text for a better result"
        )
    return warnings


def _mean_error(report: QuantizationReport) -> float | None:
    errors = [r.relative_error for r in report.linears if r.relative_error is not None]
    return sum(errors) / len(errors) if errors else None


def _host_facts(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the inputs; only for reports."""
    host = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    return {"host": host}
