"""`atomq quantize`: quantize a model and write a checkpoint."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from atomq.config import CalibrationConfig, to_dict
from atomq.errors import ConfigError
from atomq.presets import DEFAULT_PRESET, PRESET_HELP, REFINE_STEPS, build_recipe
from atomq.units import human_bytes, human_seconds

if TYPE_CHECKING:
    from atomq.estimate import Estimate

PRESETS_TEXT = "\n\n".join(f"- {name}: {text}" for name, text in PRESET_HELP.items())
HELP = f"Quantize MODEL and write the checkpoint OUT.\n\nPresets:\n\n{PRESETS_TEXT}"


def command(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; must not exist.")],
    preset: Annotated[str, typer.Option(help="One of those above.")] = DEFAULT_PRESET,
    w_bits: Annotated[int | None, typer.Option(help="Weights: 2, 3, 4, 8 or 16.")] = None,
    a_bits: Annotated[int | None, typer.Option(help="Activations: 2, 3, 4, 8 or 16.")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="KV cache: 2, 3, 4, 8 or 16.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Channels per scale; none = a whole row.")] = None,
    n_outliers: Annotated[int | None, typer.Option(help="Outlier channels per linear input.")] = None,
    refine: Annotated[
        bool,
        typer.Option("--refine", help="Learn each block's codes and scales together; minutes more."),
    ] = False,
    rotate: Annotated[
        str | None,
        typer.Option(
            help="Rotate the model in its weights: none, fused, or auto (tries a few blocks). Default: the "
            "preset's."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other setting; --show-recipe lists them all."),
    ] = None,
    show_recipe: Annotated[
        bool, typer.Option("--show-recipe", help="Print the recipe as JSON and stop.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Statistics made by atomq calibrate.", rich_help_panel="Calibration"),
    ] = None,
    calib_data: CalibDataOption = "builtin",
    n_samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    moe_calibrate_all: AllExpertsOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    format_name: Annotated[
        str | None,
        typer.Option("--format", help="Also export to OUT-FORMAT: compressed-tensors, gptq, gptq_v2 or hf."),
    ] = None,
    check: Annotated[
        str,
        typer.Option(
            help="Prove the checkpoint when it is written, as atomq verify does: auto, kernels, exact or off."
        ),
    ] = "auto",
    restart: Annotated[
        bool,
        typer.Option("--restart", help="Throw an unfinished run away instead of going on with it."),
    ] = False,
    activations: Annotated[
        str,
        typer.Option(
            help="Where those of the calibration text are kept: device or disk (in OUT's folder).",
            rich_help_panel="Calibration",
        ),
    ] = "device",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Probe one block, print memory, disk and time, and stop.")
    ] = False,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    short: dict[str, int | str | None] = {"w_bits": w_bits, "a_bits": a_bits, "kv_bits": kv_bits}
    short |= {"n_outliers": n_outliers, "refine": REFINE_STEPS if refine else None, "rotate": rotate}
    recipe = build_recipe(preset, short, group_size, settings or [])
    if show_recipe:
        console.print_json(to_dict(recipe))
        return
    with loading():
        from atomq import api, distributed, estimate, pipeline
        from atomq.assist import assist
        from atomq.commands import checking
        from atomq.eval.verify import parse_arithmetic
        from atomq.memory import give_back_large_ones

    give_back_large_ones()
    place = pipeline.choose_device(device)
    arithmetic = None if check == "off" else parse_arithmetic(check, place, "off")
    config = CalibrationConfig(calib_data, n_samples, seq_len, seed, moe_calibrate_all)
    if not recipe.needs_calibration and config != CalibrationConfig():
        raise ConfigError(
            f"preset {preset} with these settings looks at no activations; "
            f"leave --calib-data, --n-samples, --seq-len, --seed and --moe-calibrate-all away"
        )
    if dry_run:
        with console.progress("dry run") as on_progress:
            found = estimate.estimate(model, out, recipe, place, on_progress, config, activations, overwrite)
        console.note(list(found.notes))
        console.print_json(found.to_dict()) if json_output else _print_estimate(found)
        return
    if not distributed.is_first():
        assist(model, recipe, place, config)
        return
    exported = None
    if format_name is not None:
        from atomq.export.folder import check_export, export

        exported = out.with_name(f"{out.name}-{format_name}")
        check_export(model, recipe.scheme, format_name, exported, overwrite=overwrite)
    with console.progress("quantize") as on_progress:
        result = pipeline.quantize(
            model,
            out,
            recipe,
            place,
            on_progress,
            config,
            calibration,
            overwrite,
            restart,
            activations,
        )
    path, summary = result.path, result.summary
    console.note(summary["notes"])
    console.warn(summary["warnings"])
    proof = None if arithmetic is None else checking.prove_and_report(path, place, arithmetic)
    if format_name is not None and exported is not None and not (proof and proof.failed):
        console.warn(export(path, exported, format_name, overwrite=overwrite).notes)
        summary["exported"] = str(exported)
    if json_output:
        facts = None if proof is None else proof.summary()
        console.print_json({"out": str(out), **summary, "verification": facts})
    else:
        _print_summary(
            model, path, summary, "not asked for" if proof is None else checking.summary_line(proof)
        )
    if proof is not None:
        api.refuse_failed(proof)


def _print_estimate(found: Estimate) -> None:
    columns = ["", "needed", "free"]
    rows = [
        [what, human_bytes(need), "unknown" if free is None else human_bytes(free)]
        for what, need, free in (
            ("memory", found.ram_bytes, found.free_ram_bytes),
            ("GPU memory", found.gpu_bytes, found.free_gpu_bytes),
            ("disk", found.disk_bytes, found.free_disk_bytes),
        )
        if need is not None
    ]
    rows += [[f"time, {phase}", human_seconds(seconds), ""] for phase, seconds in found.seconds.items()]
    console.print_table("what the run would take, by a probe of one block", columns, rows)


def _print_summary(model: str, path: Path, summary: dict[str, Any], proof: str) -> None:
    bits, seconds = summary["effective_bits"], summary["seconds"]
    error = summary["mean_relative_error"]
    rows = [
        ["checkpoint", str(path)],
        ["size", human_bytes(summary["size_bytes"])],
        ["  of which linears", human_bytes(summary["linear_bytes"])],
        ["bits per weight", f"{bits['weight']:.3f}"],
        ["bits per activation", f"{bits['activation']:.3f}"],
        ["bits per KV entry", f"{bits['kv']:.3f}"],
        ["mean output error of a linear", "not measured" if error is None else f"{100 * error:.2f} %"],
        ["verified", proof],
        ["time", f"{seconds['total']:.1f} s"],
    ]
    console.print_table(f"{summary['model']} quantized", ["", ""], rows)
    if "exported" in summary:
        console.print_line(f"Exported to {summary['exported']}")
    console.print_line(f"Look at it: {path / 'reports' / 'report.html'}")
    console.print_line(f"Measure it: {shlex.join(['atomq', 'eval-ppl', str(path), '--baseline', model])}")
