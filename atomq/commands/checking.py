"""Proving a checkpoint on behalf of `verify` and `quantize`: what they share, and how they show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from atomq.commands import console
from atomq.commands.recording import keep_record

if TYPE_CHECKING:
    import torch

    from atomq.eval.verify import Arithmetic, Verification


def prove_checkpoint(folder: Path, device: torch.device, arithmetic: Arithmetic) -> Verification:
    """`atomq.api.verify` with a bar of progress."""
    from atomq import api

    console.silence_libraries()
    with console.progress("verify") as on_progress:
        return api.verify(
            folder, check=arithmetic, device=str(device), no_record=True, on_progress=on_progress
        )


def prove_and_report(folder: Path, device: torch.device, arithmetic: Arithmetic) -> Verification:
    """`prove_checkpoint`, whose result stays in the checkpoint's reports."""
    from atomq import api

    found = prove_checkpoint(folder, device, arithmetic)
    keep_record(folder, "verify", api.verification_record(folder, device, arithmetic, found))
    return found


def summary_line(found: Verification) -> str:
    """Such as "14 of 14 linears pass (14 by torch)"."""
    n_all = len(found.verdicts)
    by = " and ".join(f"{count} by {how}" for how, count in found.computed_by.items()) or "none"
    return f"{n_all - len(found.failed)} of {n_all} linears pass ({by})"
