"""Time and memory of `atomq quantize` at the size of real models, with weights made on the spot.

    python benchmarks/scale.py make DIR --shape llama-3-8b --n-blocks 8
    python benchmarks/scale.py run DIR --n-gpus 1 -o result.json

`make` writes a checkpoint of random weights, a byte tokenizer and a text, and is not timed. `run` quantizes
it by the command that users type, in a process of its own, and scales the time per block to the whole depth.
Random weights cost what real ones cost, since no step depends on their values; the codes mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from atomq.models.loading import empty_model
from atomq.models.source import ModelSource

_COMMON = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "smollm2-135m": {  # for machines without a GPU
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "tiny": {  # to try the script itself
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    },
}
N_TEXT_BYTES = 600_000
SHAPE_FILE = "scale.json"


def make(folder: Path, shape: str, n_blocks: int | None, device: str) -> None:
    """Write a model of `shape` with `n_blocks` blocks: random bfloat16 weights, tokenizer, text."""
    values = SHAPES[shape] | _COMMON
    full_depth = values["num_hidden_layers"]
    values |= {"num_hidden_layers": n_blocks or full_depth}
    config = transformers.AutoConfig.for_model(**values)
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    model = empty_model(config, ModelSource(shape, folder, "directory"))
    torch.manual_seed(0)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        block = name.split(".")[2] if ".layers." in name else "outside"
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
        weight = torch.nn.init.ones_(weight) if "norm" in name else weight.normal_(0, 0.02)
        shards.setdefault(block, {})[name] = weight.cpu()
    index = {}
    for number, (block, tensors) in enumerate(shards.items(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        sys.stderr.write(f"{file}: block {block}\n")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (N_TEXT_BYTES,), generator=generator, dtype=torch.uint8)
    letters[::6] = 32
    (folder / "text.txt").write_bytes(letters.numpy().tobytes())
    (folder / SHAPE_FILE).write_text(json.dumps({"shape": shape, "full_depth": full_depth}))


def _byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def run(folder: Path, n_gpus: int, n_samples: int, seq_len: int, options: list[str]) -> dict[str, Any]:
    """Quantize `folder` by the command and answer what it reports."""
    made = json.loads((folder / SHAPE_FILE).read_text())
    launcher = [sys.executable, "-m"]
    if n_gpus > 1:
        launcher += ["torch.distributed.run", f"--nproc-per-node={n_gpus}", "-m"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        out = Path(scratch) / "OUT"
        command = [
            *launcher, "atomq", "quantize", str(folder), str(out), "--calib-data", str(folder / "text.txt"),
            "--n-samples", str(n_samples), "--seq-len", str(seq_len), "--check", "off", *options,
        ]  # fmt: skip
        started = time.perf_counter()
        subprocess.run(command, check=True)
        wall = time.perf_counter() - started
        report = json.loads((out / "reports" / "quantize.json").read_text())
        shutil.rmtree(out)
    n_blocks = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    seconds = report["seconds"]
    per_block = sum(v for k, v in seconds.items() if k not in ("loading", "total")) / n_blocks
    outside = wall - per_block * n_blocks  # imports, tokenizer, embeddings: once for a model of any depth
    return {
        **made,
        "n_blocks": n_blocks,
        "n_gpus": n_gpus,
        "n_tokens": n_samples * seq_len,
        "options": options,
        "wall_seconds": wall,
        "seconds": seconds,
        "seconds_per_block": per_block,
        "seconds_outside_blocks": outside,
        "seconds_at_full_depth": outside + per_block * made["full_depth"],
        "peak_gpu_bytes": report["host"]["peak_gpu_bytes"],
        "peak_memory_bytes": report["host"]["peak_memory_bytes"],
        "gpu": report["host"]["gpu"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _table(result: dict[str, Any]) -> str:
    blocks = f"{result['n_blocks']} of {result['full_depth']} blocks"
    rows = [f"{result['shape']}, {blocks}, {result['n_gpus']} GPU(s), {result['n_tokens']} tokens"]
    times = result["seconds"] | {
        "per block": result["seconds_per_block"],
        "wall": result["wall_seconds"],
        "at full depth": result["seconds_at_full_depth"],
    }
    rows += [f"  {phase:<20}{seconds:9.2f} s" for phase, seconds in times.items()]
    for name in ("peak_gpu_bytes", "peak_memory_bytes"):
        rows.append(f"  {name:<20}{(result[name] or 0) / 1e9:9.2f} GB")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    making.add_argument("--n-blocks", type=int)
    making.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    running = commands.add_parser("run")
    running.add_argument("folder", type=Path)
    running.add_argument("--n-gpus", type=int, default=1)
    running.add_argument("--n-samples", type=int, default=128)
    running.add_argument("--seq-len", type=int, default=2048)
    running.add_argument("-o", "--output", type=Path, help="append the result to this JSON list")
    running.add_argument("options", nargs="*", help="further options of atomq quantize, after --")
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder, given.shape, given.n_blocks, given.device)
        return
    result = run(given.folder, given.n_gpus, given.n_samples, given.seq_len, given.options)
    sys.stdout.write(_table(result))
    if given.output is not None:
        before = json.loads(given.output.read_text()) if given.output.exists() else []
        given.output.write_text(json.dumps([*before, result], indent=1) + "\n")


if __name__ == "__main__":
    main()
