"""What `import atomq` offers: the commands as functions, with the same names and defaults.

Results are returned instead of printed, and errors are those of `atomq.errors`. Progress goes to
`on_progress`, which by default nobody watches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from atomq import distributed, hf, pipeline
from atomq.checkpoints import is_checkpoint, open_checkpoint, stored_blocks
from atomq.config import CalibrationConfig, Metric, OutlierScheme
from atomq.errors import ConfigError, VerificationError
from atomq.eval.perplexity import PerplexityProgress, PerplexityResult, evaluate_perplexity
from atomq.eval.verify import Arithmetic, Verification, parse_arithmetic, verify_linears
from atomq.eval.windows import evaluation_windows
from atomq.export.folder import check_export, export
from atomq.formats.calibration import is_calibration
from atomq.formats.files import check_name
from atomq.opening import choose_backend, open_model, published_name
from atomq.pipeline import CalibrationResult, QuantizeResult, choose_device
from atomq.presets import DEFAULT_PRESET, REFINE_STEPS, build_recipe
from atomq.progress import OnProgress, silently
from atomq.report.files import save_record
from atomq.report.naming import record_name


@dataclass(frozen=True)
class Evaluation:
    """A perplexity, and the setup that it belongs to.

    Attributes:
        record: what `atomq eval-ppl --json` prints.
        warnings: what a careful reader should know.
    """

    result: PerplexityResult
    record: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def ppl(self) -> float:
        return self.result.ppl

    @property
    def baseline_ppl(self) -> float | None:
        return self.result.baseline_ppl

    @property
    def kl(self) -> float | None:
        """KL divergence from the baseline in nats; None without one."""
        return self.result.kl


def calibrate(
    model: str | Path,
    output: str | Path = "stats.safetensors",
    *,
    plot: str | Path | None = None,
    metric: Metric = "hessian",
    n_outliers: int = 128,
    calib_data: str = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    moe_calibrate_all: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    on_progress: OnProgress = silently,
) -> CalibrationResult:
    """Find outlier channels on a calibration text, as `atomq calibrate` does.

    Writes the artefact `output` and a picture, `plot` or beside the artefact as .png.

    Raises:
        AtomqError: every kind of bad input, before anything is written.
    """
    outliers = OutlierScheme(n_outliers, "int8", metric, reorder=True)
    config = CalibrationConfig(str(calib_data), n_samples, seq_len, seed, moe_calibrate_all)
    artefact = Path(output)
    for path in (artefact, *([] if plot is None else [Path(plot)])):
        if path.is_dir() or not path.name:
            raise ConfigError(f"{path} is a folder; name a file")
    check_name(artefact)
    picture = artefact.with_suffix(".png") if plot is None else Path(plot)
    if picture.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {picture.name} must end in .png or .svg")
    if picture == artefact:
        raise ConfigError(f"{artefact} cannot be both the artefact and the picture; name another --output")
    for path in (artefact, picture):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; name another file or add --overwrite")
    if artefact.exists() and not is_calibration(artefact):
        raise ConfigError(
            f"{artefact} exists and was not made by atomq calibrate, so --overwrite does not touch it; "
            f"name another file, or remove it yourself"
        )
    place = choose_device(device)
    return pipeline.calibrate(str(model), artefact, config, outliers, place, on_progress, picture)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    preset: str = DEFAULT_PRESET,
    w_bits: int | None = None,
    a_bits: int | None = None,
    kv_bits: int | None = None,
    group_size: int | str | None = None,
    n_outliers: int | None = None,
    refine: bool = False,
    rotate: str | None = None,
    settings: Sequence[str] | Mapping[str, Any] | None = None,
    calibration: str | Path | None = None,
    calib_data: str = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
    moe_calibrate_all: bool = False,
    overwrite: bool = False,
    format_name: str | None = None,
    check: str = "auto",
    restart: bool = False,
    activations: str = "device",
    device: str = "auto",
    on_progress: OnProgress = silently,
) -> QuantizeResult:
    """Quantize a model and write the checkpoint `out`, as `atomq quantize` does.

    Args:
        settings: any other setting, as ``["weights.n_bits=3"]`` or ``{"weights.n_bits": 3}``.
        check: proves the checkpoint when it is written, see `verify`; "off" does not.

    Raises:
        AtomqError: every kind of bad input, before anything is written.
        VerificationError: the checkpoint was written, but a linear differs from exact arithmetic.
    """
    short: dict[str, int | str | None] = {"w_bits": w_bits, "a_bits": a_bits, "kv_bits": kv_bits}
    short |= {"n_outliers": n_outliers, "refine": REFINE_STEPS if refine else None, "rotate": rotate}
    if isinstance(settings, Mapping):
        settings = [f"{name}={value}" for name, value in settings.items()]
    recipe = build_recipe(preset, short, None if group_size is None else str(group_size), settings or ())
    place = choose_device(device)
    arithmetic = None if check == "off" else parse_arithmetic(check, place, "off")
    config = CalibrationConfig(str(calib_data), n_samples, seq_len, seed, moe_calibrate_all)
    out, exported = Path(out), None
    if format_name is not None:
        exported = out.with_name(f"{out.name}-{format_name}")
        check_export(str(model), recipe.scheme, format_name, exported, overwrite=overwrite)
    statistics = None if calibration is None else Path(calibration)
    result = pipeline.quantize(
        str(model), out, recipe, place, on_progress, config, statistics, overwrite, restart, activations
    )
    if arithmetic is not None:
        refuse_failed(verify(out, check=check, device=device, on_progress=on_progress))
    if format_name is not None and exported is not None:
        export(out, exported, format_name, overwrite=overwrite)
    return result


def verify(
    checkpoint: str | Path,
    *,
    check: str = "auto",
    device: str = "auto",
    no_record: bool = False,
    on_progress: OnProgress = silently,
) -> Verification:
    """Hold every linear of a checkpoint against exact arithmetic, as `atomq verify` does; see its `failed`.

    Raises:
        CheckpointError: the files are not those of the manifest, or their content is not of the format.
        KernelError: kernels were asked for and cannot run.
    """
    folder, place = Path(checkpoint), choose_device(device)
    arithmetic = parse_arithmetic(check, place)
    opened = open_checkpoint(folder, check_hashes=True)
    n_linears, blocks = opened.n_linears, stored_blocks(folder, opened)
    found = verify_linears(blocks, n_linears, place, on_progress, arithmetic)
    if not no_record:
        save_record(folder, "verify", verification_record(folder, place, arithmetic, found))
    return found


def verification_record(
    folder: Path, device: torch.device, arithmetic: Arithmetic, found: Verification
) -> dict[str, Any]:
    """The JSON of `verify`."""
    return {"checkpoint": folder.name, "device": device.type, "check": arithmetic, **found.to_dict()}


def evaluate_ppl(
    model: str | Path,
    *,
    data: str = "wikitext2",
    seq_len: int = 2048,
    max_windows: int | None = None,
    baseline: str | Path | None = None,
    no_check: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    backend: str = "simulation",
    no_record: bool = False,
    on_progress: OnProgress = silently,
) -> Evaluation:
    """Perplexity of a model or checkpoint, beside a baseline if one is given, as `atomq eval-ppl` does.

    Raises:
        AtomqError: a model, text or option that cannot be.
        StorageError: the record cannot be written into the checkpoint's reports.
    """
    place = choose_device(device)
    with distributed.processes(place):
        tested, tokenizer = open_model(str(model), str(place), dtype, check_hashes=not no_check)
        choose_backend(tested, backend)
        windows = evaluation_windows(tokenizer, data, seq_len, max_windows)
        windows.check_vocabulary(tested.config.vocab_size)
        longest = getattr(tested.config, "max_position_embeddings", seq_len)
        reference = None
        if baseline is not None:
            reference, _ = open_model(str(baseline), str(place), dtype, check_hashes=not no_check)

        def on_window(so_far: PerplexityProgress) -> None:
            on_progress(so_far.done, so_far.total, f"PPL {so_far.ppl:.4f}")

        result = evaluate_perplexity(tested, windows, reference, on_window)
    record: dict[str, Any] = {
        "model": published_name(str(model)),
        "data": windows.corpus,
        "layout": windows.layout,
        "seq_len": result.seq_len,
        "n_windows": result.n_windows,
        "n_tokens": result.n_tokens,
        "dtype": dtype,
        "device": place.type,
        "backend": backend,
        "ppl": result.ppl,
    }
    if baseline is not None:
        record["baseline"] = published_name(str(baseline))
        record |= {"baseline_ppl": result.baseline_ppl, "kl": result.kl}
    too_long = f"windows of {seq_len} tokens are longer than the {longest} positions of the model"
    found = Evaluation(result, record, (too_long,) if seq_len > longest else ())
    if is_checkpoint(Path(model)) and not no_record and distributed.is_first():
        save_record(Path(model), ppl_record_name(found), record)
    return found


def ppl_record_name(found: Evaluation) -> str:
    """Names the text and the windows, so that equal names mean equal evaluations."""
    result = found.result
    return record_name("eval-ppl", found.record["data"], f"{result.n_windows}x{result.seq_len}")


def load(
    checkpoint: str | Path,
    *,
    no_check: bool = False,
    device: str = "auto",
    dtype: str = "float32",
    backend: str = "simulation",
) -> PreTrainedModel:
    """Load a checkpoint as a transformers model, ready for `generate`, as the commands do.

    Raises:
        CheckpointError: what differs from the manifest or the format.
        KernelError: `backend` "kernels" cannot run here.
    """
    place = choose_device(device)
    model = hf.load(checkpoint, device=str(place), dtype=dtype, check_hashes=not no_check)
    choose_backend(model, backend)
    return model


def refuse_failed(found: Verification) -> None:
    """Raise VerificationError if a linear did not pass."""
    if found.failed:
        names = ", ".join(found.failed[:5])
        raise VerificationError(f"{len(found.failed)} linears differ from exact arithmetic: {names}")
