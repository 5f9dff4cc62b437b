"""`atomq report`: build a checkpoint's report again."""

from __future__ import annotations

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import CheckpointArgument, JsonOption

HELP = "Build OUT/reports/report.html and report.json again from what the checkpoint and its records hold."


def command(checkpoint: CheckpointArgument, json_output: JsonOption = False) -> None:
    with loading():
        from atomq.checkpoints import open_checkpoint
        from atomq.formats.checkpoint import REPORTS
        from atomq.report.files import PAGE, write_report

    open_checkpoint(checkpoint, check_hashes=False)
    report = write_report(checkpoint)
    if json_output:
        console.print_json(report.to_dict())
        return
    console.warn(report.warnings)
    console.print_line(f"wrote {checkpoint / REPORTS / PAGE}")
