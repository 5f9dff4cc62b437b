"""`atomq doctor`: what atomq needs, and what this machine has."""

from __future__ import annotations

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import JsonOption
from atomq.errors import AtomqError

HELP = "What atomq needs and what this machine has: libraries, GPU, which kernels run, what to install."


def command(json_output: JsonOption = False) -> None:
    from atomq.environment import diagnose

    with loading():
        found = diagnose()
    if json_output:
        console.print_json(found.to_dict())
    else:
        rows = [[f.name, f.found, f.verdict, f.advice] for f in found.findings]
        console.print_table("atomq doctor", ["", "found", "", "what to do"], rows, n_texts=4)
        reasons = dict.fromkeys(found.kernels.values())
        for reason in reasons:
            names = ", ".join(name for name, why in found.kernels.items() if why == reason)
            console.print_line(f"kernels that {f'do not run ({reason})' if reason else 'run here'}: {names}")
        if found.usable:
            console.print_line(found.sentence)
    if not found.usable:
        raise AtomqError(found.sentence)
