"""`atomq eval-tasks`: the paper's zero-shot tasks, on a checkpoint and its baseline side by side."""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atomq.commands import console
from atomq.commands.loading import loading
from atomq.commands.opening import choose_backend, open_model
from atomq.commands.options import BackendOption, DeviceOption, JsonOption, NoRecordOption
from atomq.commands.recording import keep_record, record_name

if TYPE_CHECKING:
    from atomq.eval.tasks import TaskScore

HELP = "Accuracy on the paper's six zero-shot tasks, OpenBookQA and LAMBADA, by lm-eval (atomq\\[eval])."
DEFAULT_TASKS = "piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande"


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL|OUT", help="A checkpoint, Hugging Face folder, hub id or GGUF file."),
    ],
    tasks: Annotated[
        str, typer.Option(help="Comma-separated; openbookqa and lambada_openai are the others.")
    ] = DEFAULT_TASKS,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER|TASK=FILE", help="Local JSON lines (docs/tasks.md); else from the hub."),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Ask this one too, such as the unquantized model.")
    ] = None,
    num_fewshot: Annotated[int, typer.Option(help="Answered items before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Only the first N items of each task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences computed at once.")] = 8,
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
        from atomq import distributed
        from atomq.checkpoints import is_checkpoint
        from atomq.eval.tasks import evaluate_tasks, find_files, paper_average
        from atomq.opening import published_name
        from atomq.pipeline import choose_device

    place = choose_device(device)
    names = [name.strip() for name in tasks.split(",")]
    files = find_files(names, data or [])

    def ask(name: str, chosen_backend: str) -> dict[str, TaskScore]:
        opened, tokenizer = open_model(name, str(place), dtype, check_hashes=not no_check)
        choose_backend(opened, chosen_backend)
        with console.progress(f"eval-tasks {published_name(name)}") as on_progress:
            return evaluate_tasks(
                opened,
                tokenizer,
                names,
                files,
                n_shots=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                on_task=on_progress,
            )

    with distributed.processes(place):
        tested = ask(model, backend)
        gc.collect()  # before the other model is opened
        reference = None if baseline is None else ask(baseline, "simulation")
    record: dict[str, Any] = {
        "model": published_name(model),
        "num_fewshot": num_fewshot,
        "limit": limit,
        "dtype": dtype,
        "device": place.type,
        "backend": backend,
        "data": {name: files[name].name if name in files else "hub" for name in names},
        "tasks": {name: asdict(score) for name, score in tested.items()},
        "average": paper_average(tested),
    }
    if baseline is not None and reference is not None:
        record |= {
            "baseline": published_name(baseline),
            "baseline_tasks": {name: asdict(score) for name, score in reference.items()},
            "baseline_average": paper_average(reference),
        }
    if is_checkpoint(Path(model)) and not no_record and distributed.is_first():
        asked = f"{num_fewshot}-shot-{'all' if limit is None else limit}"
        keep_record(Path(model), record_name("eval-tasks", *names, asked), record)
    if json_output:
        console.print_json(record)
        return
    columns = ["task", "metric", "items", record["model"]]
    columns += [record["baseline"]] if reference is not None else []
    rows = []
    for name, score in tested.items():
        row = [name, score.metric, str(score.n_items), _percent(score)]
        rows.append(row if reference is None else [*row, _percent(reference[name])])
    if record["average"] is not None:
        averages = [record["average"], *([record["baseline_average"]] if reference is not None else [])]
        rows.append(["average of the six", "", "", *(f"{100 * average:.2f}" for average in averages)])
    console.print_table(f"accuracy in percent, {num_fewshot}-shot", columns, rows)


def _percent(score: TaskScore) -> str:
    return f"{100 * score.value:.2f} ± {100 * score.stderr:.2f}"
