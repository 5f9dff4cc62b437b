"""`atomq eval-ppl`: perplexity of a model or checkpoint, beside a baseline if one is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.options import BackendOption, DeviceOption, JsonOption, NoRecordOption
from atomq.commands.recording import keep_record

HELP = "Perplexity of a model or checkpoint (GPTQ protocol), and the KL divergence from a baseline."


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|OUT", help="A checkpoint, Hugging Face folder, hub id or GGUF file."),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="builtin, wikitext2, ptb, ptb-new, c4, c4-new, or a .txt, .jsonl or .parquet file.",
        ),
    ] = "wikitext2",
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Only the first N windows.")] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Evaluate this one too, and the KL divergence from it."),
    ] = None,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Skip the SHA-256 check of a checkpoint.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: Annotated[
        str, typer.Option(help="Arithmetic between linears: float32, float16 or bfloat16.")
    ] = "float32",
    backend: BackendOption = "simulation",
    no_record: NoRecordOption = False,
    json_output: JsonOption = False,
) -> None:
    with loading():
        from atomq import api, distributed
        from atomq.checkpoints import is_checkpoint

    console.silence_libraries()
    with console.progress("eval-ppl") as on_progress:
        found = api.evaluate_ppl(
            model,
            data=data,
            seq_len=seq_len,
            max_windows=max_windows,
            baseline=baseline,
            no_check=no_check,
            device=device,
            dtype=dtype,
            backend=backend,
            no_record=True,
            on_progress=on_progress,
        )
    console.warn(list(found.warnings))
    record, result = found.record, found.result
    if is_checkpoint(Path(model)) and not no_record and distributed.is_first():
        keep_record(Path(model), api.ppl_record_name(found), record)
    if json_output:
        console.print_json(record)
        return
    head, rows = ["model", "perplexity"], [[record["model"], f"{result.ppl:.4f}"]]
    if result.baseline_ppl is not None and result.kl is not None:
        head.append("KL from baseline (nats)")
        rows = [
            [record["baseline"], f"{result.baseline_ppl:.4f}", ""],
            [*rows[0], f"{result.kl:.5f}"],
        ]
    title = f"{record['data']}: {result.n_windows} windows of {result.seq_len} tokens"
    console.print_table(title, head, rows)
