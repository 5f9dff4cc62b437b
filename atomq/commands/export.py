"""`atomq export`: write a checkpoint in the format of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import CheckpointArgument, ExportFormatOption, JsonOption
from atomq.units import human_bytes

HELP = "Write the checkpoint OUT to the folder DEST in the format of another tool."


def command(
    checkpoint: CheckpointArgument,
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="Folder to write; must not exist.")],
    format_name: ExportFormatOption,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Skip the SHA-256 check.")] = False,
    json_output: JsonOption = False,
) -> None:
    with loading():
        from atomq.export.folder import export

    with console.progress("export") as on_progress:
        result = export(
            checkpoint,
            dest,
            format_name,
            overwrite=overwrite,
            check_hashes=not no_check,
            on_progress=on_progress,
        )
    console.warn(result.notes)
    if json_output:
        record = {"checkpoint": checkpoint.name, "format": format_name, "out": str(dest)}
        console.print_json({**record, "size_bytes": result.size_bytes, "notes": result.notes})
        return
    console.print_line(f"{dest}: {format_name}, {human_bytes(result.size_bytes)}")
