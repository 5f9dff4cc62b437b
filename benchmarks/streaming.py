"""Peak memory of quantizing a checkpoint that is larger than what the run may hold.

Makes a random Llama checkpoint shard by shard (never more than a piece of it in memory), quantizes it on the
CPU in a process of its own, and samples that process's anonymous and shared memory from outside:

    python benchmarks/streaming.py --gigabytes 3.1 --save benchmarks/results/DATE-cpu-streaming.json

Pages of files that are mapped for reading are not counted: the system takes them back when it needs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import atomq
from atomq.commands import console
from atomq.formats.files import write_file, write_json
from atomq.formats.shards import ShardTensor, shard_bytes

HIDDEN, INTERMEDIATE, HEADS, KV_HEADS = 1536, 4096, 12, 4
SECONDS_BETWEEN_SAMPLES = 0.02
PIECE_ROWS = 2048
# What the measured process runs: it says when its imports are done, and then does what a command does.
CHILD = """
import sys
from pathlib import Path
from atomq import pipeline
from atomq.commands.quantize import build_recipe
from atomq.config import CalibrationConfig
from atomq.memory import give_back_large_ones
import json, torch
give_back_large_ones()
torch.set_num_threads(int(sys.argv[6]))
settings = json.loads(sys.argv[5])
recipe = build_recipe("atom", {}, None, settings)
print("imported", flush=True)
sys.stdin.readline()
calibration = CalibrationConfig("builtin", int(sys.argv[3]), int(sys.argv[4]))
result = pipeline.quantize(sys.argv[1], Path(sys.argv[2]), recipe, "cpu", calibration=calibration)
print(json.dumps(result.summary), flush=True)
"""


def make_checkpoint(folder: Path, n_bytes: int, vocabulary: int) -> int:
    """Write a random bfloat16 model of at least `n_bytes`, one shard per block; answer its size in bytes."""
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
        "self_attn.v_proj": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTERMEDIATE),
        "input_layernorm": (HIDDEN,),
        "post_attention_layernorm": (HIDDEN,),
    }
    outer = {
        "model.embed_tokens": (vocabulary, HIDDEN),
        "lm_head": (vocabulary, HIDDEN),
        "model.norm": (HIDDEN,),
    }
    block_bytes = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    n_blocks = -(-(n_bytes - 4 * vocabulary * HIDDEN) // block_bytes)
    parts = [outer, *({f"model.layers.{i}.{name}": s for name, s in shapes.items()} for i in range(n_blocks))]
    weight_map, total = {}, 0
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        tensors = {
            f"{key}.weight": ShardTensor(torch.bfloat16, shape, partial(_random_rows, key, shape))
            for key, shape in part.items()
        }
        write_file(folder / name, shard_bytes(tensors))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.n_bytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=n_blocks,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    write_json(folder / "config.json", config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    _write_byte_tokenizer(folder)
    return total


def _random_rows(name: str, shape: tuple[int, ...]) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(name.encode()))
    for begin in range(0, shape[0], PIECE_ROWS):
        rows = (min(PIECE_ROWS, shape[0] - begin), *shape[1:])
        values = torch.randn(rows, generator=generator) * 0.02
        yield (values if len(shape) > 1 else values + 1).bfloat16()


def _write_byte_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def held_bytes(pid: int) -> int:
    """Anonymous and shared memory that the process holds now."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


class Sampler(threading.Thread):
    """Samples `held_bytes` until `stop`; `peak` and the time of each new peak."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid, self.peak, self.n_samples = pid, 0, 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_SAMPLES):
            try:
                self.peak = max(self.peak, held_bytes(self.pid))
            except (OSError, KeyError):  # it ended
                return
            self.n_samples += 1

    def stop(self) -> None:
        self._ended.set()
        self.join()


def measure(
    model: Path, out: Path, n_samples: int, seq_len: int, settings: list[str], threads: int
) -> dict[str, Any]:
    """Quantize `model` in a process of its own."""
    argv = [str(model), str(out), str(n_samples), str(seq_len), json.dumps(settings), str(threads)]
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        if child.stdout.readline().strip() != "imported":
            raise SystemExit("the process ended before its imports did")
        time.sleep(0.5)
        imports = held_bytes(child.pid)
        sampler = Sampler(child.pid)
        sampler.start()
        began = time.perf_counter()
        child.stdin.write("go\n")
        child.stdin.flush()
        line = child.stdout.readline()
        seconds = time.perf_counter() - began
        sampler.stop()
    if child.returncode != 0 or not line:
        raise SystemExit(f"the run failed with exit code {child.returncode}")
    summary = json.loads(line)
    return {
        "import_bytes": imports,
        "peak_bytes": sampler.peak,
        "peak_above_imports_bytes": sampler.peak - imports,
        "n_samples_of_memory": sampler.n_samples,
        "seconds": round(seconds, 1),
        "seconds_by_phase": {name: round(value, 1) for name, value in summary["seconds"].items()},
        "out_bytes": summary["size_bytes"],
        "recipe": summary["recipe"],
        "calibration": summary["calibration"],
    }


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint, in 10^9 bytes.")] = 3.1,
    vocabulary: Annotated[int, typer.Option(help="Rows of the embeddings and of the head.")] = 256_000,
    n_samples: Annotated[int, typer.Option(help="Calibration windows.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens per window.")] = 128,
    settings: Annotated[list[str] | None, typer.Option("--set", help="As of atomq quantize.")] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    limit_gigabytes: Annotated[float, typer.Option(help="Fail beyond this peak above the imports.")] = 1.5,
    place: Annotated[Path | None, typer.Option(help="Folder for the two checkpoints.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write the record here.")] = None,
) -> None:
    """Make the checkpoint, quantize it, print and record the peak of memory."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        model = Path(folder) / "model"
        n_bytes = make_checkpoint(model, int(gigabytes * 1e9), vocabulary)
        result = measure(model, Path(folder) / "out", n_samples, seq_len, settings or [], threads)
    record = {
        "what": "peak of anonymous and shared memory while a random Llama checkpoint is quantized on the CPU",
        "model_bytes": n_bytes,
        "shape": {
            "vocabulary": vocabulary,
            "hidden": HIDDEN,
            "intermediate": INTERMEDIATE,
            "heads": HEADS,
            "kv_heads": KV_HEADS,
        },
        **result,
        "versions": {
            "atomq": atomq.__version__,
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
    }
    if save is not None:
        write_json(save, record)
    above = result["peak_above_imports_bytes"]
    console.print_table(
        "memory",
        ["", "bytes"],
        [
            ["model on disk", console.human_bytes(n_bytes)],
            ["held after imports", console.human_bytes(result["import_bytes"])],
            ["peak", console.human_bytes(result["peak_bytes"])],
            ["peak above imports", console.human_bytes(above)],
            ["seconds", f"{result['seconds']:.0f}"],
        ],
    )
    if above > limit_gigabytes * 1e9:
        raise SystemExit(f"{above} bytes above the imports are more than {limit_gigabytes} GB")


if __name__ == "__main__":
    typer.run(main)
