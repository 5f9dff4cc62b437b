"""`atomq verify`: prove a checkpoint, linear by linear."""

from __future__ import annotations

from typing import Annotated

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import CheckpointArgument, DeviceOption, JsonOption, NoRecordOption
from atomq.commands.recording import keep_record
from atomq.errors import ConfigError

HELP = (
    "Check a checkpoint: integrity, then every linear against exact integer arithmetic on its stored codes. "
    "On a GPU the kernels compute, elsewhere the float32 simulation; the result says which."
)


def command(
    checkpoint: CheckpointArgument,
    worst: Annotated[int, typer.Option(help="Show this many of the worst linears.")] = 8,
    check: Annotated[
        str,
        typer.Option(
            help="auto: the GPU's kernels where they can compute; kernels: they, or an error; exact: torch."
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    no_record: NoRecordOption = False,
    json_output: JsonOption = False,
) -> None:
    if worst < 0:
        raise ConfigError(f"--worst {worst} must be at least 0")
    with loading():
        from atomq.api import refuse_failed, verification_record
        from atomq.commands.checking import prove_checkpoint, summary_line
        from atomq.eval.verify import parse_arithmetic
        from atomq.pipeline import choose_device

    place = choose_device(device)
    arithmetic = parse_arithmetic(check, place)
    found = prove_checkpoint(checkpoint, place, arithmetic)
    record = verification_record(checkpoint, place, arithmetic, found)
    if not no_record:
        keep_record(checkpoint, "verify", record)
    if json_output:
        console.print_json(record)
    else:
        rows = [
            [v.name, f"{v.error:.2e}", f"{v.tolerance:.2e}", str(v.n_wrong_codes), v.computed_by]
            for v in found.worst(worst)
        ]
        title = f"{checkpoint.name}: the worst of {len(found.verdicts)} linears"
        if rows:
            console.print_table(
                title, ["linear", "relative error", "allowed", "wrong codes", "computed by"], rows
            )
        console.print_line(summary_line(found))
    refuse_failed(found)
