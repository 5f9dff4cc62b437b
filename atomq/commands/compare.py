"""`atomq compare`: two checkpoints side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import JsonOption
from atomq.errors import ConfigError

HELP = "Put two checkpoints side by side: size, bits, errors, perplexity where evaluated, settings."


def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE.html", help="Write a page, too.")] = None,
    json_output: JsonOption = False,
) -> None:
    if html is not None and (html.suffix != ".html" or html.is_dir()):
        raise ConfigError(f"--html {html} must name a file that ends in .html")
    with loading():
        from atomq.checkpoints import open_checkpoint
        from atomq.formats.files import write_file
        from atomq.report.compare import compare, comparison_page
        from atomq.report.facts import gather

    for folder in (first, second):
        open_checkpoint(folder, check_hashes=False)
    found = compare(gather(first), gather(second), (first.resolve().name, second.resolve().name))
    if html is not None:
        write_file(html, comparison_page(found).encode())
    if json_output:
        console.print_json(found.to_dict())
        return
    rows = [fact.cells() for fact in found.facts]
    console.print_table("side by side", ["", *found.names, "second / first"], rows)
    if found.settings:
        rows = [setting.cells() for setting in found.settings]
        console.print_table("settings that differ", ["setting", *found.names], rows)
    console.print_line(found.verdict())
    if html is not None:
        console.print_line(f"wrote {html}")
