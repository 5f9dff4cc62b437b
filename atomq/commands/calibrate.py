"""`atomq calibrate`: find outlier channels on a calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atomq.commands import console
from atomq.commands.options import (
    AllExpertsOption,
    CalibDataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    SamplesOption,
    SeedOption,
    SeqLenOption,
)
from atomq.config import CalibrationConfig, OutlierScheme
from atomq.errors import ConfigError

if TYPE_CHECKING:
    from atomq.pipeline import CalibrationResult

HELP = "Find outlier channels on a calibration text; quantize --calibration reuses the result."
N_STRONGEST = 4


def command(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="The artefact to write.")] = Path(
        "stats.safetensors"
    ),
    plot: Annotated[
        Path | None,
        typer.Option(help="Picture of channel magnitudes, .png or .svg. Default: beside the artefact."),
    ] = None,
    metric: Annotated[str, typer.Option(help="Score of a channel: hessian or abs_mean.")] = "hessian",
    n_outliers: Annotated[int, typer.Option(help="Outlier channels per linear input.")] = 128,
    calib_data: CalibDataOption = "builtin",
    n_samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    moe_calibrate_all: AllExpertsOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    outliers = OutlierScheme(n_outliers, "int8", metric, reorder=True)  # type: ignore[arg-type] # it checks
    config = CalibrationConfig(calib_data, n_samples, seq_len, seed, moe_calibrate_all)
    for path in (output, *([] if plot is None else [plot])):
        if path.is_dir() or not path.name:
            raise ConfigError(f"{path} is a folder; name a file")
    picture = plot or output.with_suffix(".png")
    if picture.suffix not in (".png", ".svg"):
        raise ConfigError(f"--plot {picture.name} must end in .png or .svg")
    if picture == output:
        raise ConfigError(f"{output} cannot be both the artefact and the picture; name another --output")
    for path in (output, picture):
        if path.exists() and not overwrite:
            raise ConfigError(f"{path} exists; name another file or add --overwrite")
    from atomq import pipeline

    with console.progress("calibrate") as on_progress:
        result = pipeline.calibrate(
            model, output, config, outliers, pipeline.choose_device(device), on_progress, picture
        )
    rows = [[name, *cells] for name, cells in strongest(result, metric, n_outliers)]
    if json_output:
        groups = {
            name: {"outliers": sorted(result.orders[name][-n_outliers:].tolist()) if n_outliers else []}
            for name in result.statistics
        }
        console.print_json({"artefact": str(output), "plot": str(picture), **result.facts, "groups": groups})
        return
    title = f"strongest channels (score over the median), {result.facts['model']}, metric {metric}"
    console.print_table(
        title, ["input of", *(f"#{i + 1}" for i in range(N_STRONGEST)), "outliers hold"], rows
    )
    console.print_line(f"wrote {output} and {picture}")


def strongest(result: CalibrationResult, metric: str, n_outliers: int) -> list[tuple[str, list[str]]]:
    """Per linear group: its strongest channels with their score over the median, and the outliers' share of
    all.
    """
    rows = []
    for name, statistics in result.statistics.items():
        score = statistics.score(metric).double()  # type: ignore[arg-type] # checked by OutlierScheme
        order = result.orders[name].long()
        median = max(float(score.median()), 1e-30)
        top = order[-N_STRONGEST:].flip(0).tolist()
        cells = [f"{channel} ({float(score[channel]) / median:.0f}x)" for channel in top]
        share = float(score[order[len(order) - n_outliers :]].sum() / score.sum().clamp(min=1e-30))
        rows.append((name, [*cells, f"{100 * share:.1f} %"]))
    return rows
