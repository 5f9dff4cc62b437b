"""`atomq eval-ppl`: perplexity of a model or checkpoint, beside a baseline if one is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.opening import choose_backend, open_model
from atomq.commands.options import BackendOption, DeviceOption, JsonOption, NoRecordOption
from atomq.commands.recording import keep_record, record_name

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
    from atomq import distributed
    from atomq.checkpoints import is_checkpoint
    from atomq.eval.perplexity import PerplexityProgress, evaluate_perplexity
    from atomq.eval.windows import evaluation_windows
    from atomq.pipeline import choose_device

    place = choose_device(device)
    with distributed.processes(place):
        tested, tokenizer = open_model(model, str(place), dtype, check_hashes=not no_check)
        choose_backend(tested, backend)
        windows = evaluation_windows(tokenizer, data, seq_len, max_windows)
        windows.check_vocabulary(tested.config.vocab_size)
        longest = getattr(tested.config, "max_position_embeddings", seq_len)
        if seq_len > longest:
            console.warn(
                [f"windows of {seq_len} tokens are longer than the {longest} positions of the model"]
            )
        reference = None
        if baseline is not None:
            reference, _ = open_model(baseline, str(place), dtype, check_hashes=not no_check)
        with console.progress("eval-ppl") as on_progress:

            def on_window(so_far: PerplexityProgress) -> None:
                on_progress(so_far.done, so_far.total, f"PPL {so_far.ppl:.4f}")

            result = evaluate_perplexity(tested, windows, reference, on_window)
    record: dict[str, Any] = {
        "model": Path(model).name if Path(model).exists() else model,
        "data": windows.corpus,
        "layout": windows.layout,
        "seq_len": result.seq_len,
        "n_windows": result.n_windows,
        "n_tokens": result.n_tokens,
        "dtype": dtype,
        "device": place.type,
        "backend": backend,
        "ppl": result.ppl,
    }
    if baseline is not None:
        record |= {
            "baseline": Path(baseline).name if Path(baseline).exists() else baseline,
            "baseline_ppl": result.baseline_ppl,
            "kl": result.kl,
        }
    if is_checkpoint(Path(model)) and not no_record and distributed.is_first():
        name = record_name("eval-ppl", windows.corpus, f"{result.n_windows}x{result.seq_len}")
        keep_record(Path(model), name, record)
    if json_output:
        console.print_json(record)
        return
    rows = [[record["model"], f"{result.ppl:.4f}", "" if result.kl is None else f"{result.kl:.5f}"]]
    if result.baseline_ppl is not None:
        rows.insert(0, [record["baseline"], f"{result.baseline_ppl:.4f}", ""])
    title = f"{windows.corpus}: {result.n_windows} windows of {result.seq_len} tokens"
    console.print_table(title, ["model", "perplexity", "KL from baseline (nats)"], rows)
