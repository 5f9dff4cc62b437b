"""The command line: registers the commands and turns errors into sentences and exit codes."""

from __future__ import annotations

import functools
import inspect as inspect_module  # a command has that name, too
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from atomq import __version__
from atomq.commands import (
    ablate,
    bench_e2e,
    bench_gemm,
    calibrate,
    compare,
    doctor,
    eval_ppl,
    eval_tasks,
    export,
    generate,
    inspect,
    quantize,
    report,
    verify,
)
from atomq.commands.console import quietly
from atomq.errors import AtomqError, Interrupted

app = typer.Typer(
    name="atomq",
    help="Quantize LLMs to INT4 weights, activations and KV cache; measure it; write a file that opens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


# How often OpenMP's threads look for work before they sleep. Unless told, as many threads as cores look for
# milliseconds, which makes small operations many times slower on cores that others use too.
_SPINS = "1000"

_SHORTAGE_ADVICE = (
    "quantize --dry-run says what a run takes; --activations disk, fewer --n-samples or a shorter --seq-len "
    "take less, and so do smaller batches of other commands"
)

_WORDS_OF_SHORTAGE = ("can't allocate memory", "out of memory", "status_alloc_failed")

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def _register(name: str, command: Callable[..., None], help_text: str) -> None:
    """Add a command with `--quiet`."""

    @functools.wraps(command)
    def with_quiet(*args: object, quiet: bool = False, **kwargs: object) -> None:
        with quietly(quiet):
            command(*args, **kwargs)

    own = inspect_module.signature(command, eval_str=True)
    option = inspect_module.Parameter(
        "quiet", inspect_module.Parameter.KEYWORD_ONLY, default=False, annotation=QuietOption
    )
    wrapper: Any = with_quiet
    wrapper.__signature__ = own.replace(parameters=[*own.parameters.values(), option])
    app.command(name, help=help_text)(with_quiet)


_register("calibrate", calibrate.command, calibrate.HELP)
_register("quantize", quantize.command, quantize.HELP)
_register("eval-ppl", eval_ppl.command, eval_ppl.HELP)
_register("eval-tasks", eval_tasks.command, eval_tasks.HELP)
_register("generate", generate.command, generate.HELP)
_register("inspect", inspect.command, inspect.HELP)
_register("export", export.command, export.HELP)
_register("report", report.command, report.HELP)
_register("compare", compare.command, compare.HELP)
_register("ablate", ablate.command, ablate.HELP)
_register("doctor", doctor.command, doctor.HELP)
_register("bench-gemm", bench_gemm.command, bench_gemm.HELP)
_register("bench-e2e", bench_e2e.command, bench_e2e.HELP)
_register("verify", verify.command, verify.HELP)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"atomq {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and exit.", is_eager=True, callback=_show_version
    ),
) -> None:
    pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; answer the exit code: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C.

    ATOMQ_DEBUG=1 shows the traceback of an error.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)  # read when torch is loaded, which is later
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is: characters that its encoding lacks
    try:
        app(args=None if argv is None else list(argv), prog_name="atomq")
    except SystemExit as end:
        if end.code == Interrupted.exit_code:  # all that Typer makes of Ctrl-C
            return _fail(end, str(Interrupted()), Interrupted.exit_code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except AtomqError as error:
        return _fail(error, str(error), error.exit_code)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(error, f"{place}{error.strerror or error}", 1)
    except (MemoryError, RuntimeError) as error:
        if not _is_shortage(error):
            raise
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        amount = f", {asked[1]} more were asked for" if asked else ""
        return _fail(error, f"there is not enough memory{amount}; {_SHORTAGE_ADVICE}", 1)
    return 0


def _is_shortage(error: BaseException) -> bool:
    """Whether memory was refused, by whatever library: of torch's errors the one for GPUs has a name, and
    cannot be imported here, those for CPUs and of CUDA's libraries only their words.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in str(error).lower() for words in _WORDS_OF_SHORTAGE)


def _fail(error: BaseException, sentence: str, exit_code: int) -> int:
    """Print an error with its notes; answer the exit code."""
    sentence = "; ".join([sentence, *getattr(error, "__notes__", ())])
    if os.environ.get("ATOMQ_DEBUG") == "1":
        traceback.print_exc()
    if exit_code != 2 or os.environ.get("RANK", "0") == "0":  # all processes see the same bad input
        typer.echo(f"error: {sentence}", err=True)
    return exit_code
