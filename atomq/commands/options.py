"""Options that several commands share, named once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, a hub id, or a GGUF file.")
]
CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="A checkpoint folder made by atomq quantize.")
]
CalibDataOption = Annotated[
    str,
    typer.Option(
        "--calib-data",
        metavar="NAME|FILE",
        help="Calibration text: builtin, wikitext2, ptb, c4, or a .txt, .jsonl or .parquet file.",
        rich_help_panel="Calibration",
    ),
]
SamplesOption = Annotated[
    int | None,
    typer.Option(
        help="Calibration windows. Default: all of builtin, else 128.", rich_help_panel="Calibration"
    ),
]
SeqLenOption = Annotated[
    int | None,
    typer.Option(
        help="Tokens per window. Default: 512 for builtin, else 2048.", rich_help_panel="Calibration"
    ),
]
SeedOption = Annotated[int, typer.Option(help="Seed for drawing windows.", rich_help_panel="Calibration")]
AllExpertsOption = Annotated[
    bool,
    typer.Option(
        "--moe-calibrate-all",
        help="Every expert of a mixture sees all tokens.",
        rich_help_panel="Calibration",
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BackendOption = Annotated[
    str, typer.Option(help="simulation (torch, float32) or kernels (the GPU's INT4 kernels).")
]
ExportFormatOption = Annotated[
    str, typer.Option("--format", help="compressed-tensors, gptq, gptq_v2 or hf (plain bf16 weights).")
]
NoRecordOption = Annotated[
    bool, typer.Option("--no-record", help="Do not keep the result in the checkpoint's reports.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout, nothing else there.")
]
