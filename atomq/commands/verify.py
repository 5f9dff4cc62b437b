"""`atomq verify`: prove a checkpoint, linear by linear."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.options import CheckpointArgument, DeviceOption, JsonOption
from atomq.errors import VerificationError

HELP = (
    "Check a checkpoint: integrity, then every linear against exact integer arithmetic on its stored codes. "
    "On a GPU the kernels compute, elsewhere the float32 simulation; the result says which."
)


def command(
    checkpoint: CheckpointArgument,
    worst: Annotated[int, typer.Option(help="Show this many of the worst linears.")] = 8,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    from atomq import checkpoints, hf
    from atomq.eval.verify import TOLERANCE, verify_linears
    from atomq.pipeline import choose_device

    place = choose_device(device)
    console.silence_libraries()
    checkpoints.open_checkpoint(checkpoint, check_hashes=True)
    model = hf.load(checkpoint)
    with console.progress("verify") as on_progress:
        verdicts = verify_linears(model, place, on_progress)
    failed = [v.name for v in verdicts if not v.passed]
    ran = Counter(v.computed_by for v in verdicts)
    record: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "device": place.type,
        "computed_by": dict(ran),
        "tolerance": TOLERANCE,
        "n_linears": len(verdicts),
        "n_failed": len(failed),
        "failed": failed,
        "largest_error": max((v.error for v in verdicts), default=0.0),
        "n_wrong_codes": sum(v.n_wrong_codes for v in verdicts),
        "linears": {
            v.name: {"error": v.error, "computed_by": v.computed_by, "why_torch": v.reason} for v in verdicts
        },
    }
    if json_output:
        console.print_json(record)
    else:
        ranked = sorted(verdicts, key=lambda v: v.error, reverse=True)[:worst]
        rows = [[v.name, f"{v.error:.2e}", str(v.n_wrong_codes), v.computed_by] for v in ranked]
        title = f"{checkpoint.name}: the worst of {len(verdicts)} linears (allowed {TOLERANCE:g})"
        console.print_table(title, ["linear", "relative error", "wrong codes", "computed by"], rows)
        by = " and ".join(f"{count} by {how}" for how, count in ran.items()) or "none"
        console.print_line(f"{len(verdicts) - len(failed)} of {len(verdicts)} linears pass ({by})")
    if failed:
        raise VerificationError(
            f"{len(failed)} linears differ from exact arithmetic: {', '.join(failed[:5])}"
        )
