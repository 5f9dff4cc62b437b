"""From names to files: `calibrate` and `quantize`, the two jobs behind the commands of the same names."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

import atomq
from atomq import distributed
from atomq.assist import Plan, cut_windows, expert_routing
from atomq.background import Background
from atomq.block_loop import (
    FinishedBlock,
    QuantizationReport,
    calibrate_blocks,
    check_widths,
    quantize_blocks,
)
from atomq.block_quantizer import LinearReport, group_orders
from atomq.config import CalibrationConfig, OutlierScheme, QuantScheme, Recipe, ResidualRotation, to_dict
from atomq.errors import CheckpointError, ConfigError
from atomq.eval.windows import TokenWindows
from atomq.facts import host_facts, job_facts, manifest_facts, mean_error, token_warnings, window_facts
from atomq.formats.calibration import CalibrationKey, read_calibration, read_facts, write_calibration
from atomq.formats.card import model_card
from atomq.formats.channel_plot import draw_channels
from atomq.formats.checkpoint import REPORTS
from atomq.formats.files import check_writable, write_file, write_json
from atomq.formats.schema import code_bytes, effective_bits, quantization_config
from atomq.formats.shards import ShardTensor
from atomq.formats.writer import CheckpointWriter
from atomq.memory import PeakMemory
from atomq.models.blocks import linear_shapes
from atomq.models.experts import ExpertRouting
from atomq.models.families import LinearShape, ModelFamily, find_family
from atomq.models.loading import companions, is_local_path, load_tokenizer, open_float_model
from atomq.models.quantized import head_dim_of
from atomq.models.source import resolve_source, source_hash
from atomq.models.streaming import StoredWeights, tensors_to_store
from atomq.numerics.channels import ChannelStatistics
from atomq.progress import BlockTimes, OnProgress, silently
from atomq.report.files import write_report
from atomq.rotation_choice import settle_rotation

STARVED = "starved_experts"  # in the facts of records and artefacts


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
    """What `quantize` made: the checkpoint at `path`, how it went, and its summary."""

    path: Path
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
    for file in (path, *([] if picture is None else [picture])) if distributed.is_first() else ():
        check_writable(file)
    windows = cut_windows(load_tokenizer(source), calibration)
    model, weights = open_float_model(source)
    windows.check_vocabulary(model.config.vocab_size)
    windows.check_variety()
    family = find_family(model.config.model_type)
    check_widths(model, family, QuantScheme(outliers=outliers))
    if distributed.is_first():
        weights.check_outside_blocks(family)
    routing = expert_routing(family, calibration)
    with distributed.processes(place):
        statistics = calibrate_blocks(model, windows.token_ids, place, on_progress, routing, weights)
    scheme = QuantScheme(outliers=outliers)
    orders = group_orders(statistics, scheme)
    key = _calibration_key(source_hash(source), windows, calibration, scheme)
    facts = {
        "model": source.name,
        "calibration": window_facts(windows, calibration),
        "starved_experts": routing.starved,
        "atomq": atomq.__version__,
    }
    if distributed.is_first():
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
    restart: bool = False,
    activations: str = "device",
) -> QuantizeResult:
    """Quantize a model and write the checkpoint `out`.

    Of several processes that torchrun started the first calls this, and all others `atomq.assist.assist`.

    Args:
        calibration: the text; used if the recipe looks at activations. None: the built-in text.
        calibration_file: an artefact of `calibrate` to take the statistics from.
        restart: throw away what an earlier, unfinished run left, instead of going on with it.
        activations: where those of the calibration text are kept between blocks, "device" or "disk".

    Raises:
        AtomqError: every kind of bad input, before anything is written; storage trouble later. Nothing
            half-written stays behind, but finished blocks do: the same call goes on after them.
    """
    started = time.perf_counter()
    place = choose_device(device)
    if activations not in ("device", "disk"):
        raise ConfigError(f"--activations {activations} is not one of device, disk")
    if calibration_file is not None and not recipe.scheme.outliers.reorder:
        raise ConfigError(
            f"{calibration_file.name} would not be used: this recipe chooses no outlier channels; "
            f"leave --calibration away, or set outliers.reorder=true"
        )
    if calibration_file is not None and recipe.solver.rotation != "none":
        verb = "may rotate" if recipe.solver.rotation == "auto" else "rotates"
        raise ConfigError(
            f"{calibration_file.name} has the channels of the model as it is, and this recipe {verb} it "
            f"first; leave --calibration away, or give --rotate none"
        )
    calibration = calibration or CalibrationConfig()
    source = resolve_source(model_name)
    writing = CheckpointWriter(out, overwrite=overwrite, restart=restart)
    with (
        distributed.processes(place),
        writing as writer,
        Background() as background,
        PeakMemory(place) as memory,
    ):
        tokenizer = load_tokenizer(source)  # needed in the checkpoint, whatever the recipe
        windows = cut_windows(tokenizer, calibration) if recipe.needs_calibration else None
        model, weights = open_float_model(source)
        family = find_family(model.config.model_type)
        background.run(weights.check_outside_blocks, family)
        if recipe.solver.rotation == "auto":  # which computes
            background.wait()
        settling = time.perf_counter()
        recipe, choice = settle_rotation(source, recipe, windows, place, on_progress, writer.earlier_job())
        settled = time.perf_counter()
        windows = windows if recipe.needs_calibration else None
        if recipe.solver.rotation == "fused":
            model, weights = open_float_model(source, rotation="fused")
        if windows is not None:
            windows.check_vocabulary(model.config.vocab_size)
            windows.check_variety()
        shapes = linear_shapes(model, family)
        check_widths(model, family, recipe.scheme)
        model_hash = source_hash(source)
        statistics = None
        if calibration_file is not None and windows is not None:
            key = _calibration_key(model_hash, windows, calibration, recipe.scheme, recipe.solver.rotation)
            statistics = read_calibration(calibration_file, key)
            _check_statistics(calibration_file, statistics, family, shapes)
        facts_of_text = None if windows is None else window_facts(windows, calibration)
        job = job_facts(source, model_hash, recipe, facts_of_text, place, choice)
        background.wait()
        writer.begin(job, n_shards=model.config.num_hidden_layers + 1)
        routing = expert_routing(family, calibration)
        if writer.facts_of(1) is None:
            outside = tensors_outside_blocks(model, family, weights)
            background.run(writer.write_shard, 1, outside)
        loaded = time.perf_counter()
        scratch = writer.progress if activations == "disk" else None
        if statistics is None and recipe.scheme.outliers.reorder:
            assert windows is not None
            key = _calibration_key(model_hash, windows, calibration, recipe.scheme, recipe.solver.rotation)
            statistics = _kept_statistics(writer, key, routing)
        finished = _finished_blocks(writer, family, model.config.num_hidden_layers, routing)
        reports_of_finished = {index: block.reports for index, block in finished.items()}
        first_pass, second_pass = BlockTimes(on_progress), BlockTimes(on_progress)
        distributed.from_process(0, Plan(statistics, reports_of_finished, scratch))
        if statistics is None and recipe.scheme.outliers.reorder:
            assert windows is not None
            statistics = calibrate_blocks(
                model, windows.token_ids, place, first_pass, routing, weights, scratch
            )
            write_calibration(writer.statistics, key, statistics, {}, {STARVED: routing.starved})
            writer.keep_statistics()
        gathered = time.perf_counter()

        def write_block(prefix: str, block: nn.Module, reports: list[LinearReport]) -> None:
            tensors = tensors_to_store(block, f"{prefix}.", weights.dtype)
            starved = {name: n for name, n in routing.starved.items() if name.startswith(f"{prefix}.")}
            facts = {"linears": [asdict(report) for report in reports], STARVED: starved}
            background.run(writer.write_shard, _shard_of(prefix), tensors, facts)

        report = quantize_blocks(
            model,
            recipe,
            place,
            second_pass,
            None if windows is None else windows.token_ids,
            statistics,
            write_block,
            routing,
            weights,
            finished,
            scratch,
        )
        background.wait()
        writer.write_index()
        config = model.config.to_dict()
        config["quantization_config"] = quantization_config(family, recipe.scheme)
        config.pop("_name_or_path", None)
        config = {key: value for key, value in config.items() if not is_local_path(value)}
        write_json(writer.folder / "config.json", config)
        for name, content in companions(source).items():
            write_file(writer.folder / name, content)
        bits = effective_bits(recipe.scheme, shapes, head_dim_of(model.config))
        card = model_card(source.name, recipe, bits, atomq.__version__, facts_of_text)
        write_file(writer.folder / "README.md", card.encode())
        warnings = [*token_warnings(windows, report, recipe, calibration), *report.warnings]
        writer.write_manifest(manifest_facts(job, recipe, report, warnings, statistics))
        seconds = {
            "loading": loaded - started - (settled - settling),
            **({} if choice is None else {"choosing a rotation": settled - settling}),
            "statistics": gathered - loaded,
            **report.seconds,
            "total": time.perf_counter() - started,
        }
        summary = {
            "model": source.name,
            "recipe": to_dict(recipe),
            "calibration": facts_of_text,
            "effective_bits": bits,
            "size_bytes": writer.total_size,
            "linear_bytes": code_bytes(recipe.scheme, shapes),
            "mean_relative_error": mean_error(report),
            "notes": [
                *([] if choice is None else [choice.sentence()]),
                *_resumed(len(finished), model.config.num_hidden_layers),
            ],
            "warnings": warnings,
            "seconds": seconds,
        }
        block_seconds = {"statistics": first_pass.seconds, "quantizing": second_pass.seconds}
        write_json(
            writer.folder / REPORTS / "quantize.json",
            {**report.to_dict(), **summary, "block_seconds": block_seconds, **host_facts(place, memory)},
        )
        writer.publish()
    write_report(out)
    return QuantizeResult(out, report, summary)


def _resumed(n_finished: int, n_blocks: int) -> list[str]:
    """What a user must know of times, if an earlier run had finished blocks."""
    told = f"{n_finished} of {n_blocks} blocks were finished by an earlier run; times are those of the rest"
    return [told] if n_finished else []


def _kept_statistics(
    writer: CheckpointWriter, key: CalibrationKey, routing: ExpertRouting
) -> dict[str, ChannelStatistics] | None:
    """The channel statistics that an earlier process of this run gathered, and what it saw of experts."""
    if not writer.has_statistics():
        return None
    routing.starved |= read_facts(writer.statistics)[STARVED]
    return read_calibration(writer.statistics, key)


def _shard_of(prefix: str) -> int:
    """The shard of the block `prefix`; the first one holds what is not in a block."""
    return int(prefix.rpartition(".")[2]) + 2


def _finished_blocks(
    writer: CheckpointWriter, family: ModelFamily, n_blocks: int, routing: ExpertRouting
) -> dict[int, FinishedBlock]:
    """The blocks that an earlier process finished, up to the first one that is missing; `routing` learns what
    was seen of their experts.
    """
    finished: dict[int, FinishedBlock] = {}
    for index in range(n_blocks):
        prefix = f"{family.blocks}.{index}"
        facts = writer.facts_of(_shard_of(prefix))
        if facts is None:
            break
        reports = tuple(LinearReport(**entry) for entry in facts["linears"])
        routing.starved |= facts[STARVED]

        def read(prefix: str = prefix) -> dict[str, torch.Tensor]:
            stored = writer.read_shard(_shard_of(prefix))
            own = {name.removeprefix(f"{prefix}."): tensor for name, tensor in stored.items()}
            return distributed.tensors_from(0, own, torch.device("cpu"))

        finished[index] = FinishedBlock(reports, read)
    return finished


def _calibration_key(
    model_hash: str,
    windows: TokenWindows,
    calibration: CalibrationConfig,
    scheme: QuantScheme,
    rotation: ResidualRotation = "none",
) -> CalibrationKey:
    outliers = scheme.outliers
    return CalibrationKey(
        model_hash,
        windows.data_hash,
        calibration.seed,
        outliers.metric,
        outliers.n_outliers,
        transforms=("rotation",) if rotation == "fused" else (),
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


def tensors_outside_blocks(
    model: PreTrainedModel, family: ModelFamily, weights: StoredWeights
) -> dict[str, ShardTensor]:
    """Embeddings, final norm and head, read when they are written; a tied head is stored once, as the
    embeddings.
    """
    tied = set(model.all_tied_weights_keys)
    return {
        name: ShardTensor(weights.dtype, tuple(tensor.shape), partial(weights.pieces, name))
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{family.blocks}.") and name not in tied
    }
