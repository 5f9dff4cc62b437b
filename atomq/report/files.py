"""Writing reports: both files are made from what a checkpoint holds; other commands add records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from atomq.formats.checkpoint import REPORTS
from atomq.formats.files import write_file, write_json
from atomq.report.facts import Report, gather
from atomq.report.page import report_page

DATA, PAGE = "report.json", "report.html"


def write_report(folder: Path) -> Report:
    """Write reports/report.json and reports/report.html of a checkpoint.

    Raises:
        CheckpointError: `folder` is no checkpoint, or a file of it cannot be read.
        StorageError: a file cannot be written.
    """
    report = gather(folder)
    write_json(folder / REPORTS / DATA, report.to_dict())
    write_file(folder / REPORTS / PAGE, report_page(report).encode())
    return report


def save_record(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Keep a command's result as reports/<name>.json of a checkpoint, and make its report again."""
    write_json(folder / REPORTS / f"{name}.json", record)
    write_report(folder)
