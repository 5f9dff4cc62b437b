"""`atomq inspect`: what a checkpoint holds, and whether it is whole."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import CheckpointArgument, JsonOption
from atomq.presets import stored_recipe_name
from atomq.units import human_bytes

HELP = "What a checkpoint holds, and whether it is whole."


def command(
    checkpoint: CheckpointArgument,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Read every file: SHA-256 as in the manifest, and no value that cannot be."
        ),
    ] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor of the first block, too.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    with loading():
        from atomq.checkpoints import describe

    facts = describe(checkpoint, check=check)
    if json_output:
        console.print_json(facts)
        return
    bits, source, calibration = facts["effective_bits"], facts["source"], facts["calibration"]
    integrity = (
        "SHA-256 equal to the manifest, values as they may be"
        if check
        else "sizes as in the manifest; --check reads them"
    )
    rows = [
        ["source", f"{source['name']} ({source['sha256'][:12]})"],
        ["scheme", facts["scheme_name"]],
        ["recipe", stored_recipe_name(facts["recipe"])],
        ["bits per weight / activation / KV entry", " / ".join(f"{bits[k]:.3f}" for k in bits)],
        ["size", human_bytes(facts["size_bytes"])],
        ["blocks x linears", f"{facts['n_blocks']} x {facts['n_linears'] // facts['n_blocks']}"],
        ["calibrated on", _calibration_text(calibration)],
        ["integrity", f"{facts['n_files']} files, {integrity}"],
        ["made with", ", ".join(f"{k} {v}" for k, v in facts["versions"].items())],
    ]
    console.print_table(checkpoint.name, ["", ""], rows, n_texts=2)
    console.print_tree(f"{checkpoint.name}, {human_bytes(facts['size_bytes'])}", _branches(facts))
    if tensors:
        cells = [
            [name, t["dtype"], str(t["shape"]), human_bytes(t["bytes"])] for name, t in facts["block"].items()
        ]
        console.print_table("tensors of the first block", ["tensor", "dtype", "shape", "size"], cells)
    console.warn(facts["warnings"])


def _branches(facts: dict[str, Any]) -> list[console.Branch]:
    """What lies outside of the blocks, and the first block's modules; experts of one kind are one branch."""
    outside: list[console.Branch] = [
        (f"{name}  {t['dtype']} {t['shape']}, {human_bytes(t['bytes'])}", [])
        for name, t in facts["outside"].items()
    ]
    linears = facts["linears"]
    leaves: dict[str, list[str]] = {}
    for name in linears:
        leaves.setdefault(re.sub(r"\d+", "*", name), []).append(name)
    modules: dict[str, list[console.Branch]] = {}
    for kind, names in leaves.items():
        first, n_bytes = linears[names[0]], sum(linears[name]["bytes"] for name in names)
        module, _, leaf = kind.rpartition(".")
        times = f"{len(names)} x " if len(names) > 1 else ""
        n_out, n_in = first["shape"]
        label = (
            f"{leaf}  {times}{n_out} x {n_in}, {first['bits_per_weight']:.3f} bits, {human_bytes(n_bytes)}"
        )
        modules.setdefault(module, []).append((label, []))
    rest = {n: t for n, t in facts["block"].items() if not n.startswith(tuple(f"{k}." for k in linears))}
    others: list[console.Branch] = [
        (f"{name}  {t['dtype']} {t['shape']}, {human_bytes(t['bytes'])}", []) for name, t in rest.items()
    ]
    size = human_bytes(sum(t["bytes"] for t in facts["block"].values()))
    block: console.Branch = (
        f"{facts['n_blocks']} blocks; the first, {size}:",
        [*((f"{module}", branches) for module, branches in modules.items()), *others],
    )
    return [*outside, block]


def _calibration_text(calibration: dict[str, Any] | None) -> str:
    if calibration is None:
        return "nothing (not needed)"
    return f"{calibration['data']}: {calibration['n_samples']} x {calibration['seq_len']} tokens"
