"""Exports opened by the real tools on the CPU: compressed-tensors by its perplexity, GPTQ by its weights.

    python benchmarks/exports.py OUT [OUT ...] --data TEST.txt --save RECORD.json

Needs the packages compressed-tensors and gptqmodel. For each checkpoint and each format that can express it:
atomq's own perplexity, and that of the export in transformers, on the same windows. gptqmodel must dequantize
every linear to the checkpoint's weights, rounded to float16.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from pathlib import Path
from typing import Annotated, Any

import gptqmodel
import torch
import typer
from transformers import AutoModelForCausalLM

import atomq
from atomq import hf
from atomq.checkpoints import load_checkpoint_tokenizer, open_checkpoint
from atomq.commands import console
from atomq.errors import ConfigError
from atomq.eval.perplexity import evaluate_perplexity
from atomq.eval.windows import TokenWindows, evaluation_windows
from atomq.export.folder import export
from atomq.export.stored import read_blocks
from atomq.formats.files import write_json


def main(
    checkpoints: list[Path],
    data: Annotated[str, typer.Option()],
    seq_len: int = 512,
    max_windows: int | None = 16,
    save: Path | None = None,
    commit: str = "",
) -> None:
    console.silence_libraries()
    rows = []
    for checkpoint in checkpoints:
        windows = evaluation_windows(load_checkpoint_tokenizer(checkpoint), data, seq_len, max_windows)
        for name in ("compressed-tensors", "gptq", "gptq_v2"):
            with tempfile.TemporaryDirectory() as folder:
                try:
                    dest = export(checkpoint, Path(folder) / "DEST", name).path
                except ConfigError as error:
                    rows.append({"checkpoint": checkpoint.name, "format": name, "refused": str(error)})
                    continue
                check = perplexities if name == "compressed-tensors" else equal_weights
                rows.append(
                    {"checkpoint": checkpoint.name, "format": name, **check(checkpoint, dest, windows)}
                )
            console.print_json(rows[-1])
    if save is not None:
        packages = ("torch", "transformers", "compressed-tensors", "gptqmodel")
        versions = {name: importlib.metadata.version(name) for name in packages}
        record = {"commit": commit, "versions": {"atomq": atomq.__version__, **versions}, "rows": rows}
        facts = {"data": windows.corpus, "seq_len": seq_len, "n_windows": windows.n_windows, "device": "cpu"}
        write_json(save, {**record, **facts})


def perplexities(checkpoint: Path, dest: Path, windows: TokenWindows) -> dict[str, Any]:
    native: Any = hf.load(checkpoint)
    found = {"ppl_atomq": evaluate_perplexity(native, windows).ppl}
    del native
    loaded = AutoModelForCausalLM.from_pretrained(dest, dtype=torch.float32).eval()
    found["ppl_transformers"] = evaluate_perplexity(loaded, windows).ppl
    return found


def equal_weights(checkpoint: Path, dest: Path, _windows: TokenWindows) -> dict[str, Any]:
    loaded = gptqmodel.GPTQModel.load(
        str(dest), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16
    ).model
    n_equal = n_linears = 0
    for block in read_blocks(checkpoint, open_checkpoint(checkpoint, check_hashes=False)):
        for name, stored in block.linears.items():
            found = loaded.get_submodule(name).dequantize_weight().T
            n_equal += torch.equal(found, stored.model_weight().half())
            n_linears += 1
    return {"n_linears": n_linears, "n_equal_in_gptqmodel": n_equal}


if __name__ == "__main__":
    typer.run(main)
