"""What people see while work goes on: a live bar on a terminal, plain lines in a log, nothing when quiet."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from atomq.cli import main
from atomq.commands import console

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = """
from atomq.commands import console
console.warn(["watch out"])
with console.quietly({quiet}), console.progress("quantize") as on_progress:
    for i in range(41):
        on_progress(i / 10, 4, f"model.layers.{{i // 10}}.mlp [step]")
console.print_table("done", ["name", "value"], [["a", "1"]])
"""
COLOURS = rb"\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])[0-9;]*m"


def environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return kept | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color"} | extra


def on_a_terminal(quiet: bool = False, **extra: str) -> bytes:
    """All that a terminal of 100 columns receives."""
    process, terminal = pty.fork()
    if not process:
        os.execve(
            sys.executable,
            [sys.executable, "-c", SCRIPT.format(quiet=quiet)],
            environment(COLUMNS="100", **extra),
        )
    received = b""
    while True:
        try:
            piece = os.read(terminal, 1 << 16)
        except OSError:  # the other side has closed it
            break
        if not piece:
            break
        received += piece
    os.close(terminal)
    assert os.waitpid(process, 0)[1] == 0, received
    return received


def in_a_log(quiet: bool = False, **extra: str) -> tuple[str, str]:
    """stdout and stderr of a process without a terminal."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(quiet=quiet)],
        env=environment(**extra), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def test_a_terminal_shows_a_live_coloured_bar_with_time_left_memory_and_step():
    seen = on_a_terminal()
    assert re.search(COLOURS, seen)
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", seen).decode()
    last = [line for line in text.splitlines() if "100%" in line][-1]
    assert re.search(r"quantize ━+ 100% \d:\d\d:\d\d ETA \d:\d\d:\d\d +[\d.]+ MB ", last), last
    assert "model.layers.4.mlp [step]" in text
    assert "\n" not in text[text.index("quantize") : text.rindex("100%")].replace("\r\n", "")


def test_the_bar_knows_the_time_left_where_a_step_takes_minutes(monkeypatch):
    now, written = [0.0], io.StringIO()
    bar = Console(file=written, force_terminal=True, width=100, color_system=None, get_time=lambda: now[0])
    monkeypatch.setattr(console, "err", bar)
    with console.progress("ablate") as on_progress:
        for done in range(4):
            on_progress(done, 4, "row")
            now[0] += 100
        now[0] -= 100
    last = written.getvalue()[written.getvalue().rindex(" 75% ") :]
    assert " ETA 0:01:40 " in last, last


@pytest.mark.parametrize("extra", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_where_it_is_not_wanted(extra):
    seen = on_a_terminal(**extra)
    assert b"100%" in seen
    assert not re.search(COLOURS, seen)
    assert ("TERM" in extra) == (b"\x1b" not in seen)


def test_a_log_gets_plain_lines_one_for_each_tenth():
    out, err = in_a_log()
    assert "\x1b" not in out + err
    assert "\r" not in out + err
    lines = err.splitlines()
    assert lines[0] == "warning: watch out"
    assert len(lines) == 12
    assert re.fullmatch(r"quantize:   0% model\.layers\.0\.mlp \[step\] \[[\d.]+ MB\]", lines[1])
    assert re.fullmatch(
        r"quantize:  50% model\.layers\.2\.mlp \[step\] \[ETA \d\.\d s, [\d.]+ MB\]", lines[6]
    )
    assert "name" in out


def test_quiet_leaves_results_and_warnings():
    out, err = in_a_log(quiet=True)
    assert err == "warning: watch out\n"
    assert "name" in out
    assert b"quantize" not in on_a_terminal(quiet=True)


def test_a_second_pass_is_timed_by_itself(capsys, monkeypatch):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(console.time, "monotonic", lambda: float(next(clock)))
    with console.progress("quantize") as on_progress:
        for done in (0, 1, 2, 0, 1, 2):
            on_progress(done, 2, "step")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("%")[0].split()[-1] for line in lines] == ["0", "50", "100"] * 2
    assert "ETA 20.0 s" in lines[1]
    assert "ETA 20.0 s" in lines[4]  # 60 s by the clock of the first pass


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_every_command_has_the_option(option, capsys, tmp_path):
    assert main(["inspect", str(tmp_path / "nothing"), option]) == 2
    assert "there is no checkpoint" in capsys.readouterr().err
