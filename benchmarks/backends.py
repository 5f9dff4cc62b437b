"""What the GPU's kernels compute of a model, against the simulation: proofs and perplexities, in a record.

    python -m benchmarks.backends MODEL --calib-data VALID.txt --data TEST.txt --save RECORD.json

Each preset is quantized into a temporary folder, every linear is proven on the kernels, and both backends are
evaluated on the same windows.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import cupy
import torch
import transformers
import typer

import atomq
import atomq.hf
from atomq import pipeline
from atomq.commands.quantize import build_recipe
from atomq.config import CalibrationConfig
from atomq.eval.perplexity import evaluate_perplexity
from atomq.eval.windows import TokenWindows, evaluation_windows
from atomq.formats.files import write_json
from atomq.kernels.linear import use_kernels
from atomq.models.loading import load_tokenizer
from atomq.models.source import resolve_source

DEVICE = torch.device("cuda")


def main(
    model: str,
    calib_data: Annotated[str, typer.Option()],
    data: Annotated[str, typer.Option()],
    save: Annotated[Path, typer.Option()],
    preset: Annotated[list[str] | None, typer.Option()] = None,
    n_samples: int = 16,
    max_windows: int | None = None,
    commit: str = "",
) -> None:
    windows = evaluation_windows(load_tokenizer(resolve_source(model)), data, 2048, max_windows)
    calibration = CalibrationConfig(calib_data, n_samples, 2048)
    record: dict[str, Any] = {
        "model": resolve_source(model).name,
        "commit": commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cupy": cupy.__version__,
        "n_samples": n_samples,
        "n_windows": windows.n_windows,
        "dtype": "float32",
        "presets": {},
    }
    for name in preset or ["atom", "atomq"]:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "OUT"
            recipe = build_recipe(name, {}, None, [])
            pipeline.quantize(model, out, recipe, DEVICE, calibration=calibration)
            record["presets"][name] = compare(out, windows)
        write_json(save, record)
        typer.echo(f"{name}: {record['presets'][name]}")


def compare(checkpoint: Path, windows: TokenWindows) -> dict[str, Any]:
    """The proof of every linear, and the perplexity by simulation and by kernels with the seconds of each."""
    found = atomq.verify(checkpoint, check="kernels", no_record=True).summary()
    model = atomq.hf.load(checkpoint, device="cuda")
    result: dict[str, Any] = {"verification": found}
    for backend in ("simulation", "kernels"):
        if backend == "kernels":
            use_kernels(model)
        started = time.perf_counter()
        result[f"ppl_{backend}"] = evaluate_perplexity(model, windows).ppl
        result[f"seconds_{backend}"] = round(time.perf_counter() - started, 1)
    result["relative_difference"] = result["ppl_kernels"] / result["ppl_simulation"] - 1
    return result


if __name__ == "__main__":
    typer.run(main)
