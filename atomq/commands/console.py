"""What people see: progress and warnings on stderr, results on stdout, as tables or as one JSON document."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.tree import Tree

from atomq.progress import OnProgress, silently
from atomq.units import human_bytes, human_seconds

# Of several processes that torchrun started, only the first speaks.
_SILENT = os.environ.get("RANK", "0") != "0"
out = Console(quiet=_SILENT)  # both honour NO_COLOR, and write no escape codes where there is no terminal
err = Console(stderr=True, quiet=_SILENT)
Branch: TypeAlias = tuple[str, list["Branch"]]  # a label and what is below it
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)


def print_json(value: dict[str, Any]) -> None:
    """One JSON document on stdout, with escapes where its encoding needs them."""
    if out.quiet:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(out.encoding)
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    out.file.write(text + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]], n_texts: int = 1) -> None:
    """A table for people on stdout; the first `n_texts` columns are text, the others are figures."""
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < n_texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    out.print(table)


def print_tree(title: str, branches: list[Branch]) -> None:
    """A tree for people on stdout."""
    tree = Tree(escape(title), guide_style="dim")
    _grow(tree, branches)
    out.print(tree, highlight=False)


def _grow(tree: Tree, branches: list[Branch]) -> None:
    for label, below in branches:
        _grow(tree.add(escape(label)), below)


def print_line(text: str) -> None:
    """A line for people on stdout, exactly as it is."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def print_piece(text: str) -> None:
    """A piece of a line for people on stdout at once, exactly as it is."""
    out.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    out.file.flush()


def warn(sentences: list[str]) -> None:
    for sentence in sentences:
        err.print(f"[yellow]warning:[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def note(sentences: list[str]) -> None:
    """What is worth knowing and nothing to worry about."""
    for sentence in sentences:
        err.print(f"[dim]note:[/] {escape(sentence)}", highlight=False, soft_wrap=True)


def silence_libraries() -> None:
    """Keep transformers' own progress bars off stderr, where ours are shown."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """How far the work is, on stderr, with the time left, memory, and what is done now.

    A live bar on a terminal; elsewhere one plain line without escape codes for each tenth of the way, for
    logs; nothing under `quietly`.
    """
    if _quiet.get():
        yield silently
    elif err.is_terminal and not err.is_dumb_terminal:
        with _live_bar(title) as on_progress:
            yield on_progress
    else:
        yield _log_lines(title)


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Show no progress while this is open, if `quiet`; results, warnings and errors stay."""
    token = _quiet.set(quiet)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextmanager
def _live_bar(title: str) -> Iterator[OnProgress]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
        TextColumn("[dim]{task.fields[step]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=err,
        transient=True,
        speed_estimate_period=3600,  # a step may take minutes; by 30 s, which is usual, no two would be seen
    )
    task = bar.add_task(title, total=None, step="", memory="")
    last = 0.0

    def update(done: float, total: int, step: str) -> None:
        nonlocal last
        if done == 0 < last:  # the next pass over the model begins, at a pace of its own
            bar.reset(task)
        last = done
        bar.update(task, completed=done, total=total, step=escape(step), memory=_memory())

    with bar:
        yield update


def _log_lines(title: str) -> OnProgress:
    started, last_done, last_tenth = time.monotonic(), 0.0, -1

    def plain(done: float, total: int, step: str) -> None:
        nonlocal started, last_done, last_tenth
        if done == 0 < last_done:
            started, last_tenth = time.monotonic(), -1
        last_done, tenth = done, int(10 * done / total)
        if tenth != last_tenth:
            last_tenth, elapsed = tenth, time.monotonic() - started
            left = f"ETA {human_seconds(elapsed * (total - done) / done)}, " if 0 < done < total else ""
            line = f"{title}: {100 * done / total:3.0f}% {step} [{left}{_memory()}]"
            err.print(line, markup=False, highlight=False, soft_wrap=True)

    return plain


def _memory() -> str:
    """What this process holds now, and on a GPU if torch has started one."""
    n_pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    held = n_pages * resource.getpagesize() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch = sys.modules.get("torch")  # never loaded from here: showing progress must cost nothing
    if torch is None or not torch.cuda.is_initialized():
        return human_bytes(held)
    return f"{human_bytes(held)} + GPU {human_bytes(torch.cuda.memory_allocated())}"
