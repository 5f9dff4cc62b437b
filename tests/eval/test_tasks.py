"""Zero-shot tasks: files and refusals; scores and prompts by the real lm-eval where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import quantize_tiny
from tiny_models import byte_tokenizer, make_tiny_model
from two_processes import in_two_processes

from atomq.cli import main
from atomq.commands import eval_tasks
from atomq.errors import CalibrationDataError, ConfigError
from atomq.eval import tasks
from atomq.eval.tasks import PAPER_TASKS, TASKS, TaskScore, evaluate_tasks, find_files, paper_average

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)
CHOICES = ["it rains", "the moon", "a very long answer indeed", "no"]
QUERIES = {
    "piqa": "Question: How {i} to dry a shoe?\n",
    "arc_easy": "Question: What {i} falls?",
    "arc_challenge": "Question: What {i} turns?",
    "boolq": "Passage: Tax {i} is paid.\nQuestion: is it paid?",
    "hellaswag": "Dogs: A dog {i} runs. it",
    "openbookqa": "When {i} water boils there is",
}
N_ITEMS = 6


def items_of(task: str) -> list[dict]:
    """Made items of the task's form, all unlike one another."""
    items = []
    for i in range(N_ITEMS):
        if task == "winogrande":
            options = [f"Sarah {i} helped Maria so Sarah", f"Sarah {i} helped Maria so Maria"]
            items.append({"context_options": options, "continuation": "slept well.", "gold": i % 2})
        elif task == "lambada_openai":
            items.append({"context": f"She {i} looked at the", "continuation": CHOICES[i % 4]})
        else:
            choices = ["no", "yes"] if task == "boolq" else CHOICES[i % 3 :] + CHOICES[: i % 3]
            query = QUERIES[task].replace("{i}", str(i))
            items.append({"query": query, "choices": choices, "gold": i % len(choices)})
    return items


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with one file for every task, ARC-Easy among them."""
    folder = tmp_path_factory.mktemp("data")
    for task in TASKS:
        lines = "".join(json.dumps(item) + "\n" for item in items_of(task))
        (folder / f"{task}.test.jsonl").write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model():
    return make_tiny_model()


def tokenizer_with_end():
    """lm-eval wants a token that ends a text."""
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(1)
    return tokenizer


def log_likelihood(model, prompt: str, continuation: str) -> tuple[float, bool]:
    """Of the bytes of `continuation` after `prompt`, and whether each is the likeliest; one forward pass."""
    ids = byte_tokenizer()(prompt + continuation)["input_ids"]
    n_prompt = len(byte_tokenizer()(prompt)["input_ids"])
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    places = range(n_prompt - 1, len(ids) - 1)
    total = math.fsum(float(log_probabilities[i, ids[i + 1]]) for i in places)
    return total, all(int(log_probabilities[i].argmax()) == ids[i + 1] for i in places)


def naive_accuracies(model, task: str, prompt_of) -> tuple[float, float | None]:
    """acc and acc_norm of the made items."""
    right, right_by_length = [], []
    for item in items_of(task):
        if task == "lambada_openai":
            right.append(log_likelihood(model, item["context"], " " + item["continuation"])[1])
            continue
        if task == "winogrande":
            pairs = [(context, item["continuation"]) for context in item["context_options"]]
        else:
            pairs = [(prompt_of(item["query"]), choice) for choice in item["choices"]]
        scores = [log_likelihood(model, prompt, " " + text)[0] for prompt, text in pairs]
        by_length = [score / len(text) for score, (_, text) in zip(scores, pairs, strict=True)]
        right.append(scores.index(max(scores)) == item["gold"])
        right_by_length.append(by_length.index(max(by_length)) == item["gold"])
    mean = sum(right) / len(right)
    return mean, sum(right_by_length) / len(right_by_length) if right_by_length else None


PROMPTS = {
    "piqa": lambda query: query + "Answer:",
    "arc_easy": lambda query: query + "\nAnswer:",
    "arc_challenge": lambda query: query + "\nAnswer:",
    "boolq": lambda query: query.removeprefix("Passage: ") + "\nAnswer:",
}


@needs_lm_eval
@pytest.mark.parametrize("task", TASKS)
def test_scores_are_those_of_one_forward_pass_per_answer(model, data, task):
    files = find_files([task], [str(data)])
    (score,) = evaluate_tasks(model, tokenizer_with_end(), [task], files).values()
    acc, acc_norm = naive_accuracies(model, task, PROMPTS.get(task, str))
    assert (score.n_items, score.acc) == (N_ITEMS, pytest.approx(acc))
    assert score.metric == (
        "acc_norm" if task in ("piqa", "hellaswag", "openbookqa") or "arc" in task else "acc"
    )
    if score.metric == "acc_norm":
        assert score.value == score.acc_norm == pytest.approx(acc_norm)
    else:
        assert (score.value, score.acc_norm) == (score.acc, None)
    assert score.stderr == pytest.approx(math.sqrt(score.value * (1 - score.value) / (N_ITEMS - 1)))


@needs_lm_eval
def test_prompts_are_those_of_lm_evals_own_tasks():
    import lm_eval
    import yaml
    from lm_eval.utils import apply_template

    places = {
        "piqa": ("piqa/piqa.yaml", {"goal": "Why?"}, {"query": "Question: Why?\n"}),
        "arc_easy": ("arc/arc_easy.yaml", {"question": "Why?"}, {"query": "Question: Why?"}),
        "boolq": (
            "super_glue/boolq/default.yaml",
            {"passage": "So.", "question": "is it so"},
            {"query": "Passage: So.\nQuestion: is it so?"},
        ),
        "hellaswag": ("hellaswag/hellaswag.yaml", {"query": "A: it"}, {"query": "A: it"}),
        "lambada_openai": ("lambada/lambada_openai.yaml", {"text": "it is so"}, {"context": "it is"}),
    }
    folder = Path(lm_eval.__file__).parent / "tasks"
    for task, (place, original, ours) in places.items():
        theirs = yaml.load((folder / place).read_text(), _LoaderWithFunctions)
        expected = apply_template(theirs["doc_to_text"], original)
        assert apply_template(TASKS[task].config["doc_to_text"], ours) == expected, task


class _LoaderWithFunctions:
    """yaml's safe loader that takes lm-eval's !function for text."""

    def __new__(cls, stream):
        import yaml

        class Loader(yaml.SafeLoader):
            pass

        Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
        return Loader(stream)


@needs_lm_eval
def test_limit_and_few_shots_reach_lm_eval(model, data):
    files = find_files(["boolq"], [str(data)])
    zero = evaluate_tasks(model, tokenizer_with_end(), ["boolq"], files, limit=3)["boolq"]
    assert zero.n_items == 3
    seen = []
    original = model.forward

    def watch(input_ids, **rest):
        seen.append(input_ids.shape[1])
        return original(input_ids, **rest)

    model.forward = watch
    try:
        evaluate_tasks(model, tokenizer_with_end(), ["boolq"], files, limit=3, batch_size=1)
        longest = max(seen)
        seen.clear()
        evaluate_tasks(model, tokenizer_with_end(), ["boolq"], files, limit=3, n_shots=2, batch_size=1)
    finally:
        del model.forward
    assert max(seen) > 2 * longest


@needs_lm_eval
def test_two_processes_share_the_items_and_both_have_the_scores(model, data, tmp_path):
    files = find_files(["piqa", "lambada_openai"], [str(data)])
    alone = evaluate_tasks(model, tokenizer_with_end(), list(files), files, limit=5)
    first, second = in_two_processes(
        tmp_path, lambda: evaluate_tasks(model, tokenizer_with_end(), list(files), files, limit=5)
    )
    assert first == second == alone


@needs_lm_eval
def test_the_command_puts_both_models_side_by_side_and_keeps_a_record(tiny_dir, data, tmp_path, capsys):
    model, out = tmp_path / "model", tmp_path / "OUT"
    shutil.copytree(tiny_dir, model)
    tokenizer_with_end().save_pretrained(model)
    quantize_tiny(model, out, "w8a8")
    argv = ["eval-tasks", str(out), "--data", str(data), "--baseline", str(model)]
    assert main([*argv, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record["tasks"]) == set(record["baseline_tasks"]) == set(PAPER_TASKS)
    values = [record["tasks"][task]["value"] for task in PAPER_TASKS]
    assert record["average"] == pytest.approx(sum(values) / 6)
    kept = [path for path in (out / "reports").iterdir() if path.name.startswith("eval-tasks")]
    assert json.loads(kept[0].read_text()) == record
    assert main([*argv, "--tasks", "arc_easy,piqa", "--limit", "4"]) == 0
    shown = capsys.readouterr().out
    assert "arc_easy" in shown
    assert "acc_norm" in shown
    assert "boolq" not in shown


def test_without_lm_eval_the_command_says_what_to_install(model, data, monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'atomq\[eval\]'"):
        evaluate_tasks(model, tokenizer_with_end(), ["piqa"], {})


@pytest.mark.parametrize("options", [{"n_shots": -1}, {"limit": 1}, {"batch_size": 0}])
def test_numbers_out_of_range_are_refused(model, options):
    with pytest.raises(ConfigError, match="--limit of at least 2"):
        evaluate_tasks(model, tokenizer_with_end(), ["piqa"], {}, **options)


def test_files_are_found_in_a_folder_or_by_name(data, tmp_path):
    found = find_files(["arc_easy", "piqa"], [str(data)])
    assert found == {task: data / f"{task}.test.jsonl" for task in ("arc_easy", "piqa")}
    other = tmp_path / "mine.jsonl"
    other.write_text(json.dumps(items_of("arc_easy")[0]) + "\n")
    assert find_files(["arc_easy", "piqa"], [f"arc_easy={other}", str(data)])["arc_easy"] == other
    assert find_files(["arc_easy"], []) == {}


@pytest.mark.parametrize(
    ("names", "entries", "words"),
    [
        (["mmlu"], [], "--tasks mmlu is not one of piqa"),
        (["piqa"], ["EMPTY"], r"holds 0 files named piqa\.\*\.jsonl; give one by --data piqa=FILE"),
        (["piqa"], ["mmlu=x"], "mmlu is not one of"),
        (["piqa"], ["piqa=x", "piqa=y"], "piqa is given twice"),
    ],
)
def test_wrong_names_are_refused(tmp_path, names, entries, words):
    entries = [str(tmp_path) if entry == "EMPTY" else entry for entry in entries]
    with pytest.raises(ConfigError, match=words):
        find_files(names, entries)


@pytest.mark.parametrize("line", ["[]", '{"query": "?"}', "no json", ""])
def test_a_file_of_another_form_is_refused(tmp_path, line):
    path = tmp_path / "piqa.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(CalibrationDataError, match="piqa"):
        find_files(["piqa"], [str(tmp_path)])


def test_the_papers_six_are_the_default():
    assert tuple(eval_tasks.DEFAULT_TASKS.split(",")) == PAPER_TASKS


def test_the_average_is_over_the_papers_six_or_not_at_all():
    scores = {task: TaskScore("acc", i / 10, 0.1, i / 10, None, 9) for i, task in enumerate(PAPER_TASKS)}
    assert paper_average(scores) == pytest.approx(0.25)
    assert paper_average({**scores, "openbookqa": scores["piqa"]}) == pytest.approx(0.25)
    scores.pop("boolq")
    assert paper_average(scores) is None
