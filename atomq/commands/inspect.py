"""`atomq inspect`: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.options import CheckpointArgument, JsonOption
from atomq.units import human_bytes

HELP = "What a checkpoint holds, and whether it is whole."


def command(
    checkpoint: CheckpointArgument,
    check: Annotated[
        bool, typer.Option("--check", help="Compare every file's SHA-256 with the manifest.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    from atomq.checkpoints import describe

    facts = describe(checkpoint, check_hashes=check)
    if json_output:
        console.print_json(facts)
        return
    bits, source, calibration = facts["effective_bits"], facts["source"], facts["calibration"]
    rows = [
        ["source", f"{source['name']} ({source['sha256'][:12]})"],
        ["scheme", facts["scheme_name"]],
        ["bits per weight / activation / KV entry", " / ".join(f"{bits[k]:.3f}" for k in bits)],
        ["size", human_bytes(facts["size_bytes"])],
        ["blocks x linears", f"{facts['n_blocks']} x {facts['n_linears'] // facts['n_blocks']}"],
        ["calibrated on", _calibration_text(calibration)],
        [
            "files",
            f"{facts['n_files']}, "
            + ("SHA-256 equal to the manifest" if check else "sizes as in the manifest"),
        ],
        ["made with", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())],
    ]
    console.print_table(checkpoint.name, ["", ""], rows)
    tensors = [
        [name, t["dtype"], str(t["shape"]), human_bytes(t["bytes"])] for name, t in facts["block"].items()
    ]
    console.print_table("tensors of the first block", ["tensor", "dtype", "shape", "size"], tensors)
    console.warn(facts["warnings"])


def _calibration_text(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "nothing (not needed)"
    return f"{calibration['data']}: {calibration['n_samples']} x {calibration['seq_len']} tokens"
