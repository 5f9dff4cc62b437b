"""Keeping a command's result in the reports of the checkpoint that it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atomq.commands import console
from atomq.errors import StorageError
from atomq.report.naming import record_name

__all__ = ["keep_record", "record_name"]


def keep_record(checkpoint: Path, name: str, record: dict[str, Any]) -> None:
    """Write reports/<name>.json and the report again.

    A folder that cannot be written to is warned about only: the result itself has been had.
    """
    from atomq.report.files import save_record

    try:
        save_record(checkpoint, name, record)
    except StorageError as error:
        console.warn([f"the result is not kept in the checkpoint's reports: {error}"])
