"""`atomq calibrate`: find outlier channels on a calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atomq.commands import console
from atomq.commands.loading import loading
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
    with loading():
        from atomq import api
        from atomq.memory import give_back_large_ones

    give_back_large_ones()
    with console.progress("calibrate") as on_progress:
        result = api.calibrate(
            model,
            output,
            plot=plot,
            metric=metric,  # type: ignore[arg-type] # it is checked there
            n_outliers=n_outliers,
            calib_data=calib_data,
            n_samples=n_samples,
            seq_len=seq_len,
            seed=seed,
            moe_calibrate_all=moe_calibrate_all,
            overwrite=overwrite,
            device=device,
            on_progress=on_progress,
        )
    picture = plot or output.with_suffix(".png")
    rows = [[_short(name), *cells] for name, cells in strongest(result, metric, n_outliers)]
    if json_output:
        groups = {
            name: {"outliers": sorted(result.orders[name][-n_outliers:].tolist()) if n_outliers else []}
            for name in result.statistics
        }
        console.print_json({"artefact": str(output), "plot": str(picture), **result.facts, "groups": groups})
        return
    title = f"strongest channels (score over the median), {result.facts['model']}, metric {metric}"
    console.print_table(title, ["input of", *(f"#{i + 1}" for i in range(N_STRONGEST)), "in outliers"], rows)
    console.print_line(f"wrote {output} and {picture}")


def _short(name: str) -> str:
    """ "model.layers.11.mlp.down_proj" -> "11.mlp.down_proj", which fits a narrow column."""
    parts = name.split(".")
    position = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[position:])


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
