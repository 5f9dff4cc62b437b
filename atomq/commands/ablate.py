"""`atomq ablate`: what each step of the method is worth on one model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import (
    CalibDataOption,
    DeviceOption,
    JsonOption,
    ModelArgument,
    SamplesOption,
    SeedOption,
    SeqLenOption,
)
from atomq.config import CalibrationConfig
from atomq.ladder import LADDER, choose_rungs

HELP = (
    "Quantize MODEL by the steps of the Atom paper and by the levers of atomq, one at a time, and evaluate "
    "each. A stopped run goes on when the same command is given again."
)


def command(
    model: ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="Evaluation text: builtin, wikitext2, ptb, c4, or a .txt, .jsonl or .parquet file.",
        ),
    ] = "wikitext2",
    second_data: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help="A second evaluation text: perplexity only.")
    ] = None,
    max_windows: Annotated[int | None, typer.Option(help="Only the first N windows of each text.")] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help=f"Only these rows: {', '.join(r.name for r in LADDER)}."),
    ] = None,
    refine: Annotated[
        bool, typer.Option("--refine", help="Also atomq with refinement: takes longest.")
    ] = False,
    no_kl: Annotated[
        bool, typer.Option("--no-kl", help="Leave away the KL divergence from the float model.")
    ] = False,
    save: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Where rows, ablation.json and ablation.svg are written."),
    ] = Path("ablation"),
    calib_data: CalibDataOption = "builtin",
    n_samples: SamplesOption = None,
    seq_len: SeqLenOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    rungs = choose_rungs([] if only is None else only.split(","), refine)
    calibration = CalibrationConfig(calib_data, n_samples, seq_len, seed)
    with loading():
        from atomq.ablation import Evaluation, ablate
        from atomq.memory import give_back_large_ones

    give_back_large_ones()
    console.silence_libraries()
    evaluation = Evaluation(data, second_data, max_windows, kl=not no_kl)
    with console.progress("ablate") as on_progress:
        record = ablate(model, save, rungs, calibration, evaluation, device, on_progress)
    if json_output:
        console.print_json(record)
    else:
        _print(record, save)


def _print(record: dict[str, Any], folder: Path) -> None:
    texts = [record[use] for use in ("evaluation", "second") if use in record]
    rows = [
        [
            row["name"],
            *(f"{row[key]:.3f}" for key in ("ppl", "second_ppl") if key in row),
            "" if row["kl"] is None else f"{row['kl']:.4f}",
            "/".join(f"{round(row['effective_bits'][key], 2):g}" for key in ("weight", "activation", "kv")),
            f"{'over ' if row.get('resumed') else ''}{row['seconds']:.0f}",
        ]
        for row in record["rows"]
    ]
    used = ", then ".join(
        f"{text['data']} ({text['n_windows']} x {text['seq_len']} tokens)" for text in texts
    )
    columns = ["step", "PPL", *(["PPL, 2nd"] if "second" in record else []), "KL", "bits W/A/KV", "seconds"]
    console.print_table(f"{record['model']} on {used}", columns, rows)
    console.print_line(f"Records and picture: {folder}")
