"""`--rotate auto`: whether a rotation of the residual stream pays is measured, for each model and recipe.

The first blocks are quantized both ways on a part of the calibration windows, in memory. What decides is how
far the residual stream behind them is from the float model's, on windows that nothing was quantized on. A
rotation keeps lengths and distances, so the two figures mean the same, and no later block need be read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from atomq import distributed
from atomq.block_loop import first_inputs, pass_float_blocks, quantize_blocks
from atomq.config import Recipe, ResidualRotation, from_dict, override
from atomq.errors import ConfigError
from atomq.eval.windows import TokenWindows
from atomq.formats.journal import CHOICE
from atomq.models.blocks import keep_first_blocks, linear_shapes
from atomq.models.families import RESIDUALS, find_family
from atomq.models.loading import load_config, open_float_model
from atomq.models.source import ModelSource
from atomq.progress import OnProgress, silently
from atomq.units import percent

N_BLOCKS = 2  # that are quantized both ways
SHARE = 4  # one window in so many is quantized on, and at most one in so many judges
TOKENS_PER_CHANNEL = 8  # of the widest linear, that are quantized on where there are so many
MOST_JUDGES = 1 << 13  # tokens
WORTH = 0.99  # of the error without a rotation; one that gains less is not worth a head of its own


@dataclass(frozen=True)
class RotationChoice:
    """What was chosen, and by which figures.

    Attributes:
        chosen: "none" or "fused".
        error_none, error_fused: of the residual stream, as it is and rotated: squared distance over squared
            length, at most 1 (such a token is lost), mean over tokens. None: the family cannot be rotated.
        n_blocks, n_tokens: how many blocks were quantized, and how many tokens judged them.
        tokens_sha256: of the calibration windows that both kinds of tokens are from.
    """

    chosen: ResidualRotation
    error_none: float | None
    error_fused: float | None
    n_blocks: int
    n_tokens: int
    tokens_sha256: str

    def sentence(self) -> str:
        """The choice and its reason, for people."""
        if self.error_none is None or self.error_fused is None:
            return "--rotate auto took none: models of this family cannot be rotated"
        return (
            f"--rotate auto took {self.chosen}: after {self.n_blocks} blocks the residual stream errs by "
            f"{percent(self.error_fused)} rotated and by {percent(self.error_none)} as it is, on "
            f"{self.n_tokens} tokens that nothing was quantized on"
        )


def settle_rotation(
    source: ModelSource,
    recipe: Recipe,
    windows: TokenWindows | None,
    device: torch.device,
    on_progress: OnProgress = silently,
    earlier_job: Mapping[str, Any] | None = None,
) -> tuple[Recipe, RotationChoice | None]:
    """`recipe` with what its rotation "auto" comes to, and how; all processes call this together.

    Args:
        windows: the calibration text; needed by "auto" only.
        earlier_job: of the first process: the job of a run to go on with, whose choice is taken over.

    Raises:
        ConfigError: there are too few windows to quantize on some and judge on others.
        AtomqError: every kind of bad input that `open_float_model` and `quantize_blocks` name.
    """
    if recipe.solver.rotation != "auto":
        return recipe, None
    assert windows is not None
    choice = distributed.from_process(0, _choice_of(earlier_job))
    if choice is None:
        choice = _choose(source, recipe, windows, device, on_progress)
    choice = dataclasses.replace(choice, tokens_sha256=windows.data_hash)  # other ones are another job
    return with_rotation(recipe, choice.chosen), choice


def with_rotation(recipe: Recipe, rotation: ResidualRotation) -> Recipe:
    return override(recipe, {"solver.rotation": rotation})


def _choice_of(job: Mapping[str, Any] | None) -> RotationChoice | None:
    """What a job says was chosen; None if it says nothing that this version understands."""
    with contextlib.suppress(ConfigError):
        return None if job is None else from_dict(RotationChoice, job.get(CHOICE))
    return None


def _choose(
    source: ModelSource, recipe: Recipe, windows: TokenWindows, device: torch.device, on_progress: OnProgress
) -> RotationChoice:
    if load_config(source).model_type not in RESIDUALS:
        return RotationChoice("none", None, None, 0, 0, windows.data_hash)
    model, _ = open_float_model(source)
    windows.check_vocabulary(model.config.vocab_size)
    windows.check_variety()
    widest = max(s.n_in for s in linear_shapes(model, find_family(model.config.model_type)).values())
    learned, judged = _split(windows, widest, refined=recipe.solver.refine_steps > 0)

    def error(rotation: ResidualRotation) -> float:
        return _stream_error(source, with_rotation(recipe, rotation), learned, judged, device)

    on_progress(0, 2, "a few blocks as they are")
    none = error("none")
    on_progress(1, 2, "a few blocks rotated")
    fused = error("fused")
    chosen: ResidualRotation = "fused" if fused < WORTH * none else "none"
    on_progress(2, 2, f"rotation {chosen} chosen")
    n_blocks = min(N_BLOCKS, model.config.num_hidden_layers)
    return RotationChoice(chosen, none, fused, n_blocks, judged.numel(), windows.data_hash)


def _split(windows: TokenWindows, widest: int, *, refined: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The first windows, to quantize on, and the last, to judge by; each process has at least one of each."""
    n_windows, seq_len = windows.n_windows, windows.seq_len
    least = distributed.n_processes()
    n_judged = max(least, min(n_windows // SHARE, MOST_JUDGES // seq_len))
    least_learned = 2 * least if refined else least  # refinement judges by windows of its own
    wanted = max(least_learned, n_windows // SHARE, math.ceil(TOKENS_PER_CHANNEL * widest / seq_len))
    n_learned = min(wanted, n_windows - n_judged)
    if n_learned < least_learned:
        raise ConfigError(
            f"--rotate auto quantizes on some windows and judges by others, in every process; give it at "
            f"least {least_learned + least} calibration windows, not {n_windows}, or --rotate none or fused"
        )
    return windows.token_ids[:n_learned], windows.token_ids[-n_judged:]


def _stream_error(
    source: ModelSource, recipe: Recipe, learned: torch.Tensor, judged: torch.Tensor, device: torch.device
) -> float:
    """How far the stream of `judged` [n, seq_len] is from the float model's after N_BLOCKS blocks that are
    quantized on `learned`, as `RotationChoice` has it.
    """
    model, weights = open_float_model(source, rotation=recipe.solver.rotation)
    family = find_family(model.config.model_type)
    keep_first_blocks(model, family, N_BLOCKS)
    stream = first_inputs(model, family, distributed.own_share(judged), device, weights, None)
    exact = stream.copy(None)
    pass_float_blocks(model, exact, device, weights)

    def pass_on(prefix: str, block: nn.Module, _reports: object) -> None:
        stream.run(block, prefix)

    quantize_blocks(model, recipe, device, silently, learned, on_block=pass_on, weights=weights)
    wanted = exact.hidden.double().flatten(0, 1)
    distances = (stream.hidden.double().flatten(0, 1) - wanted).square().sum(1)
    total = (distances / wanted.square().sum(1)).clamp(max=1).sum()  # or one token might decide
    distributed.add_up(total)
    return float(total) / judged.numel()
