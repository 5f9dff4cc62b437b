"""Proving a checkpoint on behalf of `verify` and `quantize`: what they share, and how they show it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomq.commands import console
from atomq.commands.recording import keep_record
from atomq.errors import VerificationError

if TYPE_CHECKING:
    import torch

    from atomq.eval.verify import Arithmetic, Verification


def prove_checkpoint(folder: Path, device: torch.device, arithmetic: Arithmetic) -> Verification:
    """Integrity of the files, then every linear, with a bar of progress.

    Raises:
        CheckpointError: the files are not those of the manifest, or their content is not of the format.
        KernelError: kernels were asked for and cannot run.
    """
    from atomq import hf
    from atomq.eval.verify import verify_linears

    console.silence_libraries()
    model = hf.load(folder, check_hashes=True)
    with console.progress("verify") as on_progress:
        return verify_linears(model, device, on_progress, arithmetic)


def prove_and_report(folder: Path, device: torch.device, arithmetic: Arithmetic) -> Verification:
    """`prove_checkpoint`, whose result stays in the checkpoint's reports."""
    found = prove_checkpoint(folder, device, arithmetic)
    keep_record(folder, "verify", verification_record(folder, device, arithmetic, found))
    return found


def verification_record(
    folder: Path, device: torch.device, arithmetic: Arithmetic, found: Verification
) -> dict[str, Any]:
    """The JSON of `verify`."""
    return {"checkpoint": folder.name, "device": device.type, "check": arithmetic, **found.to_dict()}


def summary_line(found: Verification) -> str:
    """Such as "14 of 14 linears pass (14 by torch)"."""
    n_all = len(found.verdicts)
    by = " and ".join(f"{count} by {how}" for how, count in found.computed_by.items()) or "none"
    return f"{n_all - len(found.failed)} of {n_all} linears pass ({by})"


def refuse_failed(found: Verification) -> None:
    """Raise VerificationError if a linear did not pass."""
    failed = found.failed
    if failed:
        raise VerificationError(
            f"{len(failed)} linears differ from exact arithmetic: {', '.join(failed[:5])}"
        )
