"""Time and memory of `atomq quantize` at the size of real models, with weights made on the spot.

    python benchmarks/scale.py make DIR --shape llama-3-8b --n-blocks 8
    python benchmarks/scale.py run DIR --n-gpus 1 -o result.json

`make` writes a checkpoint of random weights, a byte tokenizer and a text, and is not timed. `run` quantizes
it by the command that users type, in a process of its own, and adds the median block's time for each block
that the whole depth has more. Wall seconds are those of the command, total ones start after its imports.
Random weights cost what real ones cost, since no step depends on their values; the codes mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from atomq.formats.shards import shard_bytes, whole
from atomq.models.loading import empty_model
from atomq.models.source import ModelSource

_COMMON = {"bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "dtype": "bfloat16"}
_TINY: dict[str, Any] = {  # to try the script itself
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
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
    "tiny": _TINY | {"model_type": "llama"},
    "tiny-mixtral": _TINY | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
}
N_TEXT_BYTES = 600_000
FILES_AT_A_TIME = 4
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
    shards: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        shards.setdefault(name.split(".")[2] if ".layers." in name else "outside", []).append(name)
    index, writing = {}, []
    with ThreadPoolExecutor(FILES_AT_A_TIME) as pool:
        for number, names in enumerate(shards.values(), start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            index |= dict.fromkeys(names, file)
            tensors = {name: _weight(name, model.get_parameter(name).shape, device) for name in names}
            writing.append(pool.submit(_write, folder / file, tensors))
            if number >= FILES_AT_A_TIME:  # no more of them in memory
                writing[number - FILES_AT_A_TIME].result()
        for file_written in writing:
            file_written.result()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _byte_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (N_TEXT_BYTES,), generator=generator, dtype=torch.uint8)
    letters[::6] = 32
    (folder / "text.txt").write_bytes(letters.numpy().tobytes())
    (folder / SHAPE_FILE).write_text(json.dumps({"shape": shape, "full_depth": full_depth}))


def _weight(name: str, shape: torch.Size, device: str) -> torch.Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return (torch.nn.init.ones_(weight) if "norm" in name else weight.normal_(0, 0.02)).cpu()


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Not flushed to the disk, which would take as long again: nothing depends on these files."""
    with path.open("wb") as file:
        file.writelines(shard_bytes({name: whole(tensor) for name, tensor in tensors.items()}))
    sys.stderr.write(f"{path.name}\n")


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
    environment = dict(os.environ)
    if n_gpus > 1:
        launcher += ["torch.distributed.run", f"--nproc-per-node={n_gpus}", "-m"]
        # torchrun would give each process one thread, where a single process has all cores.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_gpus)))
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        out = Path(scratch) / "OUT"
        command = [
            *launcher, "atomq", "quantize", str(folder), str(out), "--calib-data", str(folder / "text.txt"),
            "--n-samples", str(n_samples), "--seq-len", str(seq_len), "--check", "off", *options,
        ]  # fmt: skip
        started = time.perf_counter()
        subprocess.run(command, check=True, env=environment)
        wall = time.perf_counter() - started
        report = json.loads((out / "reports" / "quantize.json").read_text())
        shutil.rmtree(out)
    n_blocks = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    seconds = report["seconds"]
    # The first block also starts libraries up, and so it does not stand for the others.
    per_block = sum(statistics.median(times) for times in report["block_seconds"].values() if times)
    deeper = (made["full_depth"] - n_blocks) * per_block
    return {
        **made,
        "n_blocks": n_blocks,
        "n_gpus": n_gpus,
        "n_tokens": n_samples * seq_len,
        "options": options,
        "wall_seconds": wall,
        "seconds": seconds,
        "block_seconds": report["block_seconds"],
        "seconds_per_block": per_block,
        "total_at_full_depth": seconds["total"] + deeper,
        "wall_at_full_depth": wall + deeper,
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
        "total, full depth": result["total_at_full_depth"],
        "wall, full depth": result["wall_at_full_depth"],
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
