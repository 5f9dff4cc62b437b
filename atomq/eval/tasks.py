"""Tasks by lm-eval: the six of Atom (arXiv 2310.19102, section 5.1), OpenBookQA and LAMBADA.

Prompts are those of lm-eval's own tasks, whether a task comes from the hub or from a local file; a file is
read by lm-eval's own mechanism for local data. Scores by the paper's rule: the answer with the largest
log-likelihood per character (acc_norm) for PIQA, ARC and HellaSwag, with the largest log-likelihood (acc)
for BoolQ and WinoGrande; no special tokens are added. Models are handed in.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atomq import distributed
from atomq.errors import CalibrationDataError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnTask = Callable[[int, int, str], None]


@dataclass(frozen=True)
class TaskForm:
    """How a task is asked and scored.

    Attributes:
        metric: the figure that stands for the task: acc_norm or acc.
        fields: what every line of a local file has.
        config: lm-eval's settings for a local file, beside where it lies and what is measured.
    """

    metric: str
    fields: tuple[str, ...]
    config: Mapping[str, Any]


def _choices(metric: str, prompt: str) -> TaskForm:
    """Each of `choices` after a prompt made of `query`; `gold` is the index of the right one."""
    config = {
        "output_type": "multiple_choice",
        "doc_to_text": prompt,
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
    }
    return TaskForm(metric, ("query", "choices", "gold"), config)


TASKS: dict[str, TaskForm] = {
    "piqa": _choices("acc_norm", "{{query}}Answer:"),  # the query ends with a line break
    "arc_easy": _choices("acc_norm", "{{query}}\nAnswer:"),
    "arc_challenge": _choices("acc_norm", "{{query}}\nAnswer:"),
    "boolq": _choices("acc", "{{query.removeprefix('Passage: ')}}\nAnswer:"),
    "hellaswag": _choices("acc_norm", "{{query}}"),
    "winogrande": TaskForm(  # the same continuation after each context
        "acc",
        ("context_options", "continuation", "gold"),
        {
            "output_type": "multiple_choice",
            "doc_to_text": "gold",
            "doc_to_choice": "context_options",
            "doc_to_target": "continuation",
        },
    ),
    "openbookqa": _choices("acc_norm", "{{query}}"),
    "lambada_openai": TaskForm(
        "acc",
        ("context", "continuation"),
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": " {{continuation}}",
        },
    ),
}
PAPER_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande")


@dataclass(frozen=True)
class TaskScore:
    """One task's result.

    Attributes:
        metric, value: the figure by the paper's rule.
        stderr: of `value`, sqrt(value * (1 - value) / (n_items - 1)).
        acc, acc_norm: both accuracies; acc_norm is None where there is none.
        n_items: how many were asked.
    """

    metric: str
    value: float
    stderr: float
    acc: float
    acc_norm: float | None
    n_items: int


def find_files(tasks: Sequence[str], data: Sequence[str]) -> dict[str, Path]:
    """The local file of every task from options such as "FOLDER" or "piqa=FILE"; nothing for the hub's data.

    In a folder the file of a task is the one named TASK.*.jsonl or TASK.jsonl (LAMBADA: lambada_openai).

    Raises:
        ConfigError: an unknown task, a folder without exactly one file for a task, or a name given twice.
        CalibrationDataError: a file that is missing, or whose first line is not of the task's form.
    """
    for task in tasks:
        if task not in TASKS:
            raise ConfigError(f"--tasks {task} is not one of {', '.join(TASKS)}")
    files: dict[str, Path] = {}
    folders = []
    for entry in data:
        task, separator, place = entry.partition("=")
        if not separator:
            folders.append(Path(entry))
        elif task not in TASKS or task in files:
            problem = "is given twice" if task in files else f"is not one of {', '.join(TASKS)}"
            raise ConfigError(f"--data {entry}: {task} {problem}")
        else:
            files[task] = Path(place)
    for folder in folders:
        for task in tasks:
            if task not in files:
                files[task] = _file_in(folder, task)
    used = {task: files[task] for task in tasks if task in files}
    for task, path in used.items():
        _check_form(task, path)
    return used


def _file_in(folder: Path, task: str) -> Path:
    found = sorted({*folder.glob(f"{task}.jsonl"), *folder.glob(f"{task}.*.jsonl")})
    if len(found) != 1:
        raise ConfigError(
            f"{folder} holds {len(found)} files named {task}.*.jsonl; give one by --data {task}=FILE, "
            f"or leave the task out by --tasks"
        )
    return found[0]


def _check_form(task: str, path: Path) -> None:
    try:
        with path.open(encoding="utf-8") as file:
            first = json.loads(file.readline())
    except (OSError, ValueError) as error:
        raise CalibrationDataError(f"{path} cannot be read as JSON lines: {error}") from error
    absent = [name for name in TASKS[task].fields if not isinstance(first, dict) or name not in first]
    if absent:
        raise CalibrationDataError(
            f"{path} is no file of {task}: its first line lacks {', '.join(absent)}; "
            f"each line must hold {', '.join(TASKS[task].fields)}"
        )


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    files: Mapping[str, Path],
    *,
    n_shots: int = 0,
    limit: int | None = None,
    batch_size: int = 8,
    on_task: OnTask = lambda *_: None,
) -> dict[str, TaskScore]:
    """Ask `model` the first `limit` items of every task, each after `n_shots` others with their answers.

    With torchrun, the processes share the items. A task that `files` does not name is lm-eval's own, from
    the hub.

    Raises:
        ConfigError: lm-eval is not installed, a number is out of range, or the hub's data cannot be had.
    """
    if n_shots < 0 or batch_size < 1 or (limit is not None and limit < 2):
        raise ConfigError(
            "give --num-fewshot of at least 0, --limit of at least 2, --batch-size of at least 1"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("eval-tasks needs lm-eval; install it with pip install 'atomq[eval]'")
    harness = _harness_model(model, tokenizer, batch_size)
    scores = {}
    for index, task in enumerate(tasks):
        on_task(index, len(tasks), task)
        results = _ask(harness, task, files.get(task), n_shots, limit)
        if results is not None:  # the first process has it
            scores[task] = _score(task, results)
    on_task(len(tasks), len(tasks), "done")
    return distributed.from_process(0, scores)


def paper_average(scores: Mapping[str, TaskScore]) -> float | None:
    """The mean over the paper's six tasks; None if one is missing."""
    values = [scores[task].value for task in PAPER_TASKS if task in scores]
    return math.fsum(values) / len(values) if len(values) == len(PAPER_TASKS) else None


def _harness_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """lm-eval's view of `model`; the processes of torchrun share its requests."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=False)
    harness.loglikelihood = functools.partial(harness.loglikelihood, disable_tqdm=True)
    harness._rank, harness._world_size = distributed.rank(), distributed.n_processes()
    harness.all_gather = lambda tensor: torch.stack([t.cpu() for t in distributed.gather(tensor)])
    harness.gather_object = lambda value, dst: distributed.gather(value)
    harness.barrier = lambda: distributed.gather(None)
    return harness


def _ask(
    harness: Any, task: str, path: Path | None, n_shots: int, limit: int | None
) -> dict[str, Any] | None:
    """lm-eval's results of one task; None in all processes but the first."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    asked: Any = task
    if path is not None:
        metrics = ["acc"] if TASKS[task].metric == "acc" else ["acc", "acc_norm"]
        asked = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"validation": str(path)}},
            "validation_split": "validation",
            "metric_list": [
                {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics
            ],
            **TASKS[task].config,
        }
    try:
        answer: dict[str, Any] | None = simple_evaluate(
            harness,
            tasks=[asked],
            num_fewshot=n_shots,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            task_manager=TaskManager(include_defaults=path is None),  # thousands of files else
        )
    except (OSError, ValueError) as error:
        where = "on the hub" if path is None else f"in {path}"
        raise ConfigError(
            f"lm-eval cannot read {task} {where}: {' '.join(str(error).split())}; "
            f"give a file by --data {task}=FILE"
        ) from error
    return answer


def _score(task: str, answer: dict[str, Any]) -> TaskScore:
    found, n_items = answer["results"][task], int(answer["n-samples"][task]["effective"])
    metric = TASKS[task].metric
    value = float(found[f"{metric},none"])
    acc_norm = found.get("acc_norm,none")
    stderr = math.sqrt(value * (1 - value) / (n_items - 1))
    return TaskScore(
        metric,
        value,
        stderr,
        float(found["acc,none"]),
        None if acc_norm is None else float(acc_norm),
        n_items,
    )
