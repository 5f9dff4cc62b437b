"""What a run will take, before it is done: `quantize --dry-run`.

The first block is quantized for once, on the device and with all of the calibration text that the run would
have, and its shard is written and thrown away. Time per phase follows by the number of blocks; memory is that
of one block, since a run never holds more. What cannot fit at all is refused before that.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from atomq.assist import cut_windows, expert_routing
from atomq.background import Background
from atomq.block_loop import calibrate_blocks, check_widths, quantize_blocks
from atomq.config import FLOAT_BITS, CalibrationConfig, Recipe
from atomq.errors import ConfigError
from atomq.formats.files import write_file
from atomq.formats.journal import Hashed
from atomq.formats.shards import ShardTensor, shard_bytes, whole
from atomq.formats.writer import check_place
from atomq.memory import PeakMemory, free_bytes, held_bytes
from atomq.models.blocks import blocks_of, bytes_between_blocks, keep_first_blocks, linear_shapes
from atomq.models.families import ModelFamily, find_family
from atomq.models.loading import companions, load_tokenizer, open_float_model
from atomq.models.source import ModelSource, resolve_source, source_hash
from atomq.models.streaming import tensors_to_store
from atomq.pipeline import tensors_outside_blocks
from atomq.progress import OnProgress, silently
from atomq.rotation_choice import settle_rotation
from atomq.units import human_bytes

_SMALL_FILES = 80_000  # config, manifest, index, card, reports


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take, and what there is.

    Attributes:
        seconds: per phase, and in total.
        ram_bytes: largest anonymous and shared memory of the process, imports included.
        gpu_bytes: largest allocation on the GPU; None on the CPU.
        disk_bytes: largest use of the disk, of which `out_bytes` stay.
        free_ram_bytes, free_gpu_bytes, free_disk_bytes: what could be taken now; None if unknown.
        notes: what was chosen on the way, for people.
    """

    seconds: dict[str, float]
    ram_bytes: int
    gpu_bytes: int | None
    disk_bytes: int
    out_bytes: int
    free_ram_bytes: int | None
    free_gpu_bytes: int | None
    free_disk_bytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lacking(self) -> list[str]:
        """What of the machine is not enough, in words."""
        needs = (
            ("memory", self.ram_bytes, self.free_ram_bytes),
            ("GPU memory", self.gpu_bytes, self.free_gpu_bytes),
            ("disk", self.disk_bytes, self.free_disk_bytes),
        )
        return [
            f"{human_bytes(need)} of {what} are needed, {human_bytes(free)} are free"
            for what, need, free in needs
            if need is not None and free is not None and need > free
        ]


def estimate(
    model_name: str,
    out: Path,
    recipe: Recipe,
    device: torch.device,
    on_progress: OnProgress = silently,
    calibration: CalibrationConfig | None = None,
    activations: str = "device",
    overwrite: bool = False,
) -> Estimate:
    """Probe one block and estimate the run of `pipeline.quantize` with the same arguments.

    Writes nothing that stays.

    Raises:
        ConfigError: the run cannot fit into what there is, or may not write `out`.
        AtomqError: every other kind of bad input, as in the run itself.
    """
    began = time.perf_counter()
    calibration = calibration or CalibrationConfig()
    source = resolve_source(model_name)
    check_place(out, overwrite=overwrite)
    with PeakMemory(device) as peak:  # of the preparations too: cutting a long text may take the most
        tokenizer = load_tokenizer(source)
        windows = cut_windows(tokenizer, calibration) if recipe.needs_calibration else None
        model, weights = open_float_model(source)
        family = find_family(model.config.model_type)
        n_blocks = len(blocks_of(model, family))
        check_widths(model, family, recipe.scheme)
        n_tokens = 0
        if windows is not None:
            windows.check_vocabulary(model.config.vocab_size)
            windows.check_variety()
            n_tokens = windows.n_tokens
        _refuse_hopeless(model, family, recipe, device, n_tokens, activations)
        weights.check_outside_blocks(family)
        settling = time.perf_counter()
        recipe, choice = settle_rotation(source, recipe, windows, device, on_progress)
        settled = time.perf_counter()
        if not recipe.needs_calibration:  # the text served the choice alone
            windows, n_tokens = None, 0
        model, weights = open_float_model(source, rotation=recipe.solver.rotation)
        source_hash(source)
        loading = time.perf_counter() - began - (settled - settling)

        outside = tensors_outside_blocks(model, family, weights)
        outer_bytes = sum(tensor.n_bytes for tensor in outside.values())
        place = next(folder for folder in (out.absolute().parent, *out.absolute().parents) if folder.is_dir())
        token_ids = None if windows is None else windows.token_ids
        with tempfile.TemporaryDirectory(prefix=".atomq-probe-", dir=place) as scratch:
            probe = _Probe(source, recipe, device, calibration, Path(scratch))
            on_disk = Path(scratch) if activations == "disk" else None
            if token_ids is not None:
                probe.run(token_ids[:1], None, {})  # compiles and warms up
            on_progress(0, 1, "probing one block")
            probe.run(token_ids, on_disk, outside)
            on_progress(1, 1, "probing one block")
    seconds = {"loading": loading}
    for phase, (once, each) in probe.phases.items():
        seconds[phase] = once + n_blocks * each
    # Files are written while the next block is computed; only what takes longer than that is waited for.
    to_disk = probe.seconds_per_byte * (n_blocks * probe.shard_bytes + outer_bytes)
    seconds["writing"] += max(0.0, to_disk - sum(seconds.values()))
    if choice is not None:
        seconds["choosing a rotation"] = settled - settling
    seconds["total"] = sum(seconds.values())
    copied_bytes = sum(map(len, companions(source).values()))
    out_bytes = n_blocks * probe.shard_bytes + outer_bytes + copied_bytes + _SMALL_FILES
    hidden_bytes = _activation_bytes(model, recipe, device, n_tokens) if activations == "disk" else 0
    free = free_bytes()
    result = Estimate(
        seconds,
        peak.peak_bytes,
        peak.peak_gpu_bytes,
        out_bytes + hidden_bytes,
        out_bytes,
        free_ram_bytes=None if free is None else free + held_bytes(),  # what is held now a run would hold too
        free_gpu_bytes=None if device.type != "cuda" else torch.cuda.mem_get_info(device)[0],
        free_disk_bytes=shutil.disk_usage(place).free,
        notes=() if choice is None else (choice.sentence(),),
    )
    if lacking := result.lacking():
        raise ConfigError(f"the run cannot fit: {'; '.join(lacking)}; {_ADVICE}")
    return result


_ADVICE = "give fewer --n-samples, --activations disk, another device, or a folder on a larger disk"


class _Probe:
    """Quantizes the first block of a model, as often as asked, and notes how long each phase took.

    Attributes:
        phases: seconds per phase of the last run: what is done once in a run, and what for each block.
        shard_bytes: of the block as written; `seconds_per_byte`: how fast that was.
    """

    def __init__(
        self,
        source: ModelSource,
        recipe: Recipe,
        device: torch.device,
        calibration: CalibrationConfig,
        folder: Path,
    ) -> None:
        self.source, self.recipe, self.device = source, recipe, device
        self.calibration, self.folder = calibration, folder
        self.phases: dict[str, tuple[float, float]] = {}
        self.shard_bytes, self.seconds_per_byte = 0, 0.0

    def run(
        self, token_ids: torch.Tensor | None, scratch: Path | None, outside: dict[str, ShardTensor]
    ) -> None:
        """Quantize once.

        Args:
            token_ids: int64 [n_windows, seq_len], or None if the recipe needs none.
            outside: what is not in a block. As in a run it is read and hashed beside the first pass: that
                takes memory, and a thread that computes beside the caller changes how both share the cores.
        """
        with Background() as background:
            background.run(_read, outside)
            self._run(token_ids, scratch, background)

    def _run(self, token_ids: torch.Tensor | None, scratch: Path | None, background: Background) -> None:
        model, weights = open_float_model(self.source, rotation=self.recipe.solver.rotation)
        family = find_family(model.config.model_type)
        keep_first_blocks(model, family, 1)
        routing = expert_routing(family, self.calibration)
        self.phases = {}
        statistics = None
        if self.recipe.scheme.outliers.reorder and token_ids is not None:
            first = _FirstCall()
            began = time.perf_counter()
            statistics = calibrate_blocks(model, token_ids, self.device, first, routing, weights, scratch)
            _wait(self.device)
            self.phases["statistics"] = (first.time - began, time.perf_counter() - first.time)
        background.wait()  # so that what follows is timed alone

        written: dict[str, ShardTensor] = {}

        def write(prefix: str, block: nn.Module, _reports: object) -> None:
            tensors = tensors_to_store(block, f"{prefix}.", weights.dtype)
            written.update((name, whole(tensor)) for name, tensor in tensors.items())

        first = _FirstCall()
        began = time.perf_counter()
        report = quantize_blocks(
            model,
            self.recipe,
            self.device,
            first,
            token_ids,
            statistics,
            write,
            routing,
            weights,
            None,
            scratch,
        )
        solves = "forward" in report.seconds  # and so the activations of the text were captured once more
        for phase, lasted in report.seconds.items():
            once = min(first.time - began, lasted) if solves and phase == "hessians" else 0.0
            self.phases[phase] = (once, lasted - once)
        self._write(written)

    def _write(self, tensors: dict[str, ShardTensor]) -> None:
        content = Hashed(shard_bytes(tensors))
        began = time.perf_counter()
        write_file(self.folder / "probe.safetensors", content)
        self.shard_bytes = content.n_bytes
        self.seconds_per_byte = (time.perf_counter() - began) / max(content.n_bytes, 1)


def _read(tensors: dict[str, ShardTensor]) -> None:
    """Read and hash what a shard of `tensors` would hold, without writing it."""
    for _piece in Hashed(shard_bytes(tensors)):
        pass


class _FirstCall:
    """An `OnProgress` that notes when it was first called: when the activations of the text are captured."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, _done: float, _total: int, _step: str) -> None:
        self.time = self.time or time.perf_counter()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _activation_bytes(model: PreTrainedModel, recipe: Recipe, device: torch.device, n_tokens: int) -> int:
    """Those of the calibration text between two blocks, of the float model too where it is carried along."""
    solves = recipe.solver.method == "gptq" and recipe.scheme.weights.n_bits < FLOAT_BITS
    n_streams = 2 if solves and recipe.solver.needs_reference else 1
    return n_streams * bytes_between_blocks(n_tokens, int(model.config.hidden_size), device)


def _refuse_hopeless(
    model: PreTrainedModel,
    family: ModelFamily,
    recipe: Recipe,
    device: torch.device,
    n_tokens: int,
    activations: str,
) -> None:
    """Refuse what does not fit even without all that a sum of the largest tensors leaves out.

    Raises:
        ConfigError: the activations, one block and its largest Hessian are more than there is.
    """
    block = blocks_of(model, family)[0]
    needed = 4 * sum(parameter.numel() for parameter in block.parameters())
    if activations == "device":
        needed += _activation_bytes(model, recipe, device, n_tokens)
    if recipe.solver.method == "gptq" and recipe.scheme.weights.n_bits < FLOAT_BITS:
        widest = max(shape.n_in for shape in linear_shapes(model, family).values())
        needed += (4 + 8 + 8) * widest**2  # the Hessian, and in float64 its damped copy and the factor
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_bytes()
    if free is not None and needed > free:
        where = "GPU memory" if device.type == "cuda" else "memory"
        raise ConfigError(
            f"the run cannot fit: at least {human_bytes(needed)} of {where} are needed, "
            f"{human_bytes(free)} are free; {_ADVICE}"
        )
