"""What all processes of a job begin with, and the job of those that torchrun started beside the first.

They read the same model and text and go through the same blocks as `pipeline.quantize` in the first process,
which alone knows of files that are written, and of what an earlier run left.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from atomq import distributed
from atomq.block_loop import FinishedBlock, calibrate_blocks, quantize_blocks
from atomq.block_quantizer import LinearReport
from atomq.config import CalibrationConfig, Recipe
from atomq.errors import ConfigError
from atomq.eval.windows import TokenWindows, calibration_windows
from atomq.models.experts import ExpertRouting
from atomq.models.families import ModelFamily, find_family
from atomq.models.loading import load_tokenizer, open_float_model
from atomq.models.source import resolve_source
from atomq.numerics.channels import ChannelStatistics
from atomq.progress import silently
from atomq.rotation_choice import settle_rotation


@dataclass(frozen=True)
class Plan:
    """What the first process found and the others must know before the first block.

    Attributes:
        statistics: of all linear groups, or None if they are yet to be gathered.
        finished: the reports of the blocks that an earlier run finished.
        scratch: where activations are kept, if not on the device.
    """

    statistics: dict[str, ChannelStatistics] | None
    finished: dict[int, tuple[LinearReport, ...]]
    scratch: Path | None


def assist(model_name: str, recipe: Recipe, device: torch.device, calibration: CalibrationConfig) -> None:
    """Do this process's share of the work while the first process runs `pipeline.quantize`.

    Raises:
        AtomqError: the same bad input as there.
    """
    source = resolve_source(model_name)

    def receive() -> dict[str, torch.Tensor]:
        return distributed.tensors_from(0, {}, torch.device("cpu"))

    with distributed.processes(device):  # at the same point as the first process, or that would wait
        windows = cut_windows(load_tokenizer(source), calibration) if recipe.needs_calibration else None
        recipe, _ = settle_rotation(source, recipe, windows, device)
        token_ids = windows.token_ids if windows is not None and recipe.needs_calibration else None
        model, weights = open_float_model(source, rotation=recipe.solver.rotation)
        routing = expert_routing(find_family(model.config.model_type), calibration)
        plan = distributed.from_process(0, Plan(None, {}, None))
        scratch, statistics = plan.scratch, plan.statistics
        finished = {index: FinishedBlock(reports, receive) for index, reports in plan.finished.items()}
        if statistics is None and recipe.scheme.outliers.reorder:
            assert token_ids is not None
            statistics = calibrate_blocks(model, token_ids, device, silently, routing, weights, scratch)
        quantize_blocks(
            model, recipe, device, silently, token_ids, statistics, None, routing, weights, finished, scratch
        )


def cut_windows(tokenizer: PreTrainedTokenizerBase, calibration: CalibrationConfig) -> TokenWindows:
    return calibration_windows(
        tokenizer,
        calibration.data,
        calibration.n_samples,
        calibration.seq_len,
        calibration.seed,
    )


def expert_routing(family: ModelFamily, calibration: CalibrationConfig) -> ExpertRouting:
    """How the experts of a model are calibrated.

    Raises:
        ConfigError: all experts are to see all tokens, and there are none.
    """
    if calibration.all_experts and not family.has_experts:
        raise ConfigError(f"{family.model_type} models have no experts; leave --moe-calibrate-all away")
    return ExpertRouting(calibration.all_experts)
