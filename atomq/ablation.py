"""Quantize a model by every rung of the ladder and evaluate each beside the float model.

Every row is kept in a file of its own with all that it depends on, so a stopped ladder goes on, inside a
quantization too, and one whose model, texts, recipe or versions changed is measured anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import atomq
from atomq import hf, pipeline
from atomq.assist import cut_windows
from atomq.block_loop import check_widths
from atomq.config import FLOAT_BITS, CalibrationConfig, to_dict
from atomq.errors import ConfigError
from atomq.eval.perplexity import PerplexityProgress, evaluate_perplexity
from atomq.eval.windows import TokenWindows, evaluation_windows
from atomq.facts import window_facts
from atomq.formats.ablation_plot import draw_ladder
from atomq.formats.files import json_bytes, remove_tree, write_json
from atomq.ladder import LADDER, Rung
from atomq.models.families import find_family
from atomq.models.loading import load_float_model, load_tokenizer, open_float_model
from atomq.models.source import resolve_source, source_hash
from atomq.progress import OnProgress, silently

FLOAT = "float"  # the row of the unquantized model, below all rungs
_OnStep = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """On what rows are evaluated.

    Attributes:
        data, second_data: names or files, see `evaluation_windows`; perplexity alone is taken on the second.
        max_windows: the first ones of each text; None: all.
        seq_len: tokens a window.
        kl: whether the KL divergence from the float model is taken, on the first text.
    """

    data: str = "wikitext2"
    second_data: str | None = None
    max_windows: int | None = None
    seq_len: int = 2048
    kl: bool = True


def ablate(
    model_name: str,
    folder: Path,
    rungs: Sequence[Rung],
    calibration: CalibrationConfig,
    evaluation: Evaluation,
    device: str | torch.device = "auto",
    on_progress: OnProgress = silently,
) -> dict[str, Any]:
    """Measure the float model and `rungs`, as far as `folder` does not hold them yet.

    Writes a record of each row to folder/rows when it is done, and at the end ablation.json and ablation.svg.
    A checkpoint is removed as soon as it is loaded for evaluation.

    Args:
        on_progress: told how many of the rows that are missing are done.

    Returns:
        what ablation.json holds: the setup, and the rows that the folder has of it, in the ladder's order.

    Raises:
        AtomqError: every kind of bad input, before anything is written; a full disk.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("ablate runs in one process; start it without torchrun")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--save {folder} is a file; name a folder")
    ladder = _Ladder(model_name, folder, calibration, evaluation, pipeline.choose_device(device))
    ladder.check(rungs)
    missing = [rung for rung in (None, *rungs) if ladder.kept(rung) is None]
    for done, rung in enumerate(missing):
        name = _name(rung)

        def on_step(step: str, done: int = done, name: str = name) -> None:
            on_progress(done, len(missing), f"{name}: {step}")

        ladder.measure(rung, on_step)
        on_progress(done + 1, len(missing), name)
    record = ladder.record()
    write_json(folder / "ablation.json", record)
    keys = {"evaluation": "ppl", "second": "second_ppl"}
    texts = {key: record[use]["data"] for use, key in keys.items() if use in record}
    draw_ladder(folder / "ablation.svg", record["rows"], record["model"], texts)
    return record


class _Ladder:
    """A model and its texts, cut and hashed once, and the folder of the rows.

    Attributes:
        facts: what rows of one setup share.
    """

    def __init__(
        self,
        model_name: str,
        folder: Path,
        calibration: CalibrationConfig,
        evaluation: Evaluation,
        device: torch.device,
    ) -> None:
        self._source = resolve_source(model_name)
        self._model_name, self._folder, self._device = model_name, folder, device
        self._calibration, self._kl = calibration, evaluation.kl
        tokenizer = load_tokenizer(self._source)
        self._texts = {
            use: evaluation_windows(tokenizer, data, evaluation.seq_len, evaluation.max_windows)
            for use, data in (("evaluation", evaluation.data), ("second", evaluation.second_data))
            if data is not None
        }
        self.facts: dict[str, Any] = {
            "model": self._source.name,
            "model_sha256": source_hash(self._source),
            "calibration": window_facts(cut_windows(tokenizer, calibration), calibration),
            **{use: _text_facts(windows) for use, windows in self._texts.items()},
            "with_kl": evaluation.kl,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "versions": {"atomq": atomq.__version__, "torch": torch.__version__},
        }

    def check(self, rungs: Sequence[Rung]) -> None:
        """Refuse texts and recipes that do not fit the model."""
        model, _ = open_float_model(self._source)
        for windows in self._texts.values():
            windows.check_vocabulary(model.config.vocab_size)
        for rung in rungs:
            check_widths(model, find_family(model.config.model_type), rung.recipe.scheme)

    @cached_property
    def float_model(self) -> PreTrainedModel:
        model: Any = load_float_model(self._source)
        placed: PreTrainedModel = model.to(self._device)
        return placed

    def key(self, rung: Rung | None) -> dict[str, Any]:
        """All that a row depends on."""
        looks = rung is not None and rung.recipe.needs_calibration
        calibration = self.facts["calibration"] if looks else None
        recipe = None if rung is None else to_dict(rung.recipe)
        return {**self.facts, "calibration": calibration, "recipe": recipe}

    def kept(self, rung: Rung | None) -> dict[str, Any] | None:
        """The row as an earlier run measured it; None if there is none, or of another setup."""
        try:
            found = json.loads(self._path(rung).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        same = isinstance(found, dict) and found.get("key") == self.key(rung)
        row: dict[str, Any] | None = found["row"] if same else None
        return row

    def measure(self, rung: Rung | None, on_step: _OnStep) -> None:
        """Make the row and keep it."""
        started = time.perf_counter()
        if rung is None:
            tested = self.float_model
            bits = dict.fromkeys(("weight", "activation", "kv"), float(FLOAT_BITS))
            row: dict[str, Any] = {"name": "float model", "rung": FLOAT, "effective_bits": bits}
        else:
            tested, row = self._quantize(rung, on_step)
        baseline = self.float_model if rung is not None and self._kl else None
        row |= self._evaluate(tested, baseline, on_step)
        row["seconds"] = time.perf_counter() - started
        write_json(self._path(rung), {"key": self.key(rung), "row": row})

    def record(self) -> dict[str, Any]:
        rows = [self.kept(rung) for rung in (None, *LADDER)]
        return {**self.facts, "rows": [row for row in rows if row is not None]}

    def _quantize(self, rung: Rung, on_step: _OnStep) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The simulation of the rung's checkpoint, which is removed again, and what quantizing it told."""
        started = time.perf_counter()
        # Named by all that it depends on: one that was stopped goes on, one of another setup is not met.
        digest = hashlib.sha256(json_bytes(self.key(rung))).hexdigest()[:16]
        unfinished = self._folder / "unfinished"
        resumed = any(unfinished.glob(f"*{digest}*"))  # then seconds are those of the last part
        calibration = self._calibration if rung.recipe.needs_calibration else CalibrationConfig()
        result = pipeline.quantize(
            self._model_name,
            unfinished / digest,
            rung.recipe,
            self._device,
            lambda _done, _total, step: on_step(step),
            calibration,
            overwrite=True,
        )
        seconds = time.perf_counter() - started
        simulation = hf.load(result.path, device=str(self._device))
        remove_tree(unfinished)
        summary = {key: result.summary[key] for key in ("effective_bits", "size_bytes", "warnings")}
        about = {"name": rung.text, "rung": rung.name, "below": rung.below, "changes": rung.changes}
        return simulation, {**about, **summary, "resumed": resumed, "quantize_seconds": seconds}

    def _evaluate(
        self, tested: PreTrainedModel, baseline: PreTrainedModel | None, on_step: _OnStep
    ) -> dict[str, Any]:
        def on_window(so_far: PerplexityProgress) -> None:
            on_step(f"window {so_far.done} of {so_far.total}, PPL {so_far.ppl:.4f}")

        found = evaluate_perplexity(tested, self._texts["evaluation"], baseline, on_window)
        figures = {"ppl": found.ppl, "kl": found.kl}
        if "second" in self._texts:
            figures["second_ppl"] = evaluate_perplexity(tested, self._texts["second"], None, on_window).ppl
        return figures

    def _path(self, rung: Rung | None) -> Path:
        return self._folder / "rows" / f"{_name(rung)}.json"


def _name(rung: Rung | None) -> str:
    return FLOAT if rung is None else rung.name


def _text_facts(windows: TokenWindows) -> dict[str, Any]:
    return {
        "data": windows.corpus,
        "layout": windows.layout,
        "tokens_sha256": windows.data_hash,
        "n_windows": windows.n_windows,
        "seq_len": windows.seq_len,
    }
