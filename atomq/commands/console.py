"""What people see: progress and warnings on stderr, results on stdout, as tables or as one JSON document."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from atomq.progress import OnProgress

# Of several processes that torchrun started, only the first speaks.
_QUIET = os.environ.get("RANK", "0") != "0"
out = Console(quiet=_QUIET)
err = Console(stderr=True, quiet=_QUIET)


def print_json(value: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    if out.quiet:
        return
    out.file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table for people on stdout; the first column is text, the others are figures."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


def print_line(text: str) -> None:
    """A line for people on stdout, exactly as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(sentences: list[str]) -> None:
    for sentence in sentences:
        err.print(f"[yellow]warning:[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def silence_libraries() -> None:
    """Keep transformers' own progress bars off stderr, where ours are shown."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """A live bar with ETA on a terminal's stderr; elsewhere one plain line for each tenth of the way."""
    if err.is_terminal:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[step]}"),
            console=err,
            transient=True,
        )
        task = bar.add_task(title, total=None, step="")
        with bar:
            yield lambda done, total, step: bar.update(task, completed=done, total=total, step=step)
        return
    last = ("", -1)

    def plain(done: float, total: int, step: str) -> None:
        nonlocal last
        tenth = int(10 * done / total)
        if tenth != last[1]:
            line = f"{title}: {100 * done / total:3.0f}% {step}"
            err.print(line, markup=False, highlight=False, soft_wrap=True)
        last = (step, tenth)

    yield plain
