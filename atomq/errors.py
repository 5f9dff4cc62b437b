"""The errors that atomq raises for its users.

Every message names what was given, what is allowed and what to do next. `atomq.cli.main` is the only
place that catches them; it prints the sentence and ends with the error's exit code.
"""

from __future__ import annotations

from typing import ClassVar


class AtomqError(Exception):
    """Base of all errors meant for a user's eyes; `exit_code` is the process's exit code."""

    exit_code: ClassVar[int] = 1


class ConfigError(AtomqError, ValueError):
    """An option or a combination of options that cannot work (exit code 2)."""

    exit_code = 2


class UnsupportedModelError(AtomqError):
    """A model that is not there, not whole, or of a family that atomq does not know (exit code 2)."""

    exit_code = 2


class CalibrationDataError(AtomqError):
    """A calibration or evaluation text that is missing, unreadable or too short (exit code 2)."""

    exit_code = 2


class CheckpointError(AtomqError):
    """A quantized checkpoint or calibration artefact that is broken or does not fit (exit code 2)."""

    exit_code = 2


class KernelError(AtomqError):
    """A CUDA kernel that cannot be compiled or run here (exit code 1)."""

    exit_code = 1


class VerificationError(AtomqError):
    """Something computed differs from what it must be (exit code 1)."""

    exit_code = 1


class StorageError(AtomqError, OSError):
    """A file that cannot be written, or no longer read: disk full, no permission, I/O error (exit code 1)."""

    exit_code = 1


class Interrupted(AtomqError):
    """Ctrl-C during a command (exit code 130)."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__(
            "interrupted; nothing half-written was left behind (what quantize has finished is kept: "
            "the same command goes on after it)"
        )
