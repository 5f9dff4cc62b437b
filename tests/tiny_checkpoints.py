"""Tiny checkpoints of every kind, made on the spot, and ways to look at and spoil their files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from atomq import pipeline
from atomq.block_loop import quantize_blocks
from atomq.config import CalibrationConfig, Recipe, override
from atomq.eval.windows import calibration_windows
from atomq.formats.files import write_json
from atomq.formats.writer import CheckpointWriter
from atomq.models.loading import load_float_model, load_tokenizer
from atomq.models.source import resolve_source
from atomq.presets import find_preset
from atomq.progress import silently

# Odd numbers on purpose: 43 and 75 normal channels give a short last group and a half-used last byte.
SIZES = {"outliers.n_outliers": 5, "weights.group_size": 16, "activations.group_size": 16}
PROGRESSIVE = {
    "weights.channel_group": 1,
    "weights.scale_mode": "progressive",
    "activations.scale_mode": "progressive",
}
HADAMARD = {"transform": "hadamard"}
KV_ROTATED = {
    "kv.n_bits": 4,
    "kv.key_position": "after_rope",
    "kv.rotation": "hadamard",
    "kv.clip_ratio": 0.95,
    "kv.key_balance": True,
}

# Name -> preset and what is set over it: every encoding that the format knows occurs at least once.
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "atom": ("atom", SIZES),
    "hadamard": ("atom", SIZES | HADAMARD),
    "progressive": ("atom", SIZES | PROGRESSIVE),
    "progressive hadamard": ("atom", SIZES | PROGRESSIVE | HADAMARD | KV_ROTATED),
    "asymmetric": ("atom", SIZES | {"weights.symmetric": False, "activations.symmetric": False}),
    "fp4 bnb": ("atom", SIZES | {"weights.number_format": "fp4-bnb", "activations.number_format": "fp4-bnb"}),
    "fp4 e2m1": (
        "atom",
        SIZES | {"weights.number_format": "fp4-e2m1", "activations.number_format": "fp4-e2m1"},
    ),
    "exponential": ("atom", SIZES | {"weights.number_format": "exponential"}),
    "2 bits": ("atom", SIZES | {"weights.n_bits": 2, "activations.n_bits": 2, "kv.n_bits": 2}),
    "3 bits": ("atom", SIZES | {"weights.n_bits": 3, "activations.n_bits": 3, "kv.n_bits": 3}),
    "8 bits asymmetric": (
        "atom",
        SIZES | {"weights.n_bits": 8, "weights.symmetric": False, "activations.n_bits": 8, "kv.n_bits": 8},
    ),
    "channel group of 7": ("atom", SIZES | {"weights.channel_group": 7}),
    "fp16 outliers": ("atom", SIZES | {"outliers.precision": "fp16"}),
    "e5m2 outliers": ("atom", SIZES | {"outliers.precision": "e5m2"}),
    "e4m3 outliers": ("atom", SIZES | {"outliers.precision": "e4m3", "outliers.metric": "abs_mean"}),
    "outliers not reordered": ("atom", SIZES | {"outliers.reorder": False}),
    "reordered without outliers": ("atom", SIZES | {"outliers.n_outliers": 0}),
    "searched clips": ("atom", SIZES | HADAMARD | {"activations.clip_search": "output"}),
    "searched clips, not reordered": (
        "atom",
        SIZES | {"activations.clip_search": "output", "outliers.reorder": False},
    ),
    "kv after rope": ("atom", SIZES | KV_ROTATED),
    "kv only": (
        "rtn",
        {"weights.n_bits": 16, "activations.n_bits": 16} | KV_ROTATED | {"kv.key_balance": False},
    ),
    "w16a4": ("atom", SIZES | {"weights.n_bits": 16, "solver.method": "rtn"}),
    "w16a4 hadamard": ("atom", SIZES | HADAMARD | {"weights.n_bits": 16, "solver.method": "rtn"}),
    "w4a16": ("w4a16", {"weights.group_size": 16}),
    "w8a8": ("w8a8", {}),
    "rtn": ("rtn", {"weights.group_size": 16, "activations.group_size": 16}),
}


def recipe_of(scheme: str) -> Recipe:
    preset, settings = SCHEMES[scheme]
    return override(find_preset(preset), settings)


def calibration_text(folder: Path) -> Path:
    """A text of about 2 kB."""
    path = folder / "calibration.txt"
    path.write_text(" ".join(f"{i * 7919 % 1009} words" for i in range(220)), encoding="utf-8")
    return path


def quantize_tiny(
    model: Path,
    out: Path,
    scheme: str = "atom",
    n_samples: int = 4,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> pipeline.QuantizeResult:
    """Quantize a tiny model on four windows of 32 tokens."""
    calibration = CalibrationConfig(str(calibration_text(out.parent)), n_samples, seq_len=32)
    recipe = override(recipe_of(scheme), settings or {})
    return pipeline.quantize(str(model), out, recipe, "cpu", calibration=calibration, **options)


def simulate_tiny(model: Path, folder: Path, scheme: str = "atom", n_samples: int = 4) -> PreTrainedModel:
    """The simulation of the checkpoint that `quantize_tiny` writes into `folder`, made in memory."""
    recipe = recipe_of(scheme)
    source = resolve_source(str(model))
    simulation = load_float_model(source)
    windows = calibration_windows(
        load_tokenizer(source), str(calibration_text(folder)), n_samples, seq_len=32, seed=0
    )
    tokens = windows.token_ids if recipe.needs_calibration else None
    quantize_blocks(simulation, recipe, torch.device("cpu"), silently, tokens)
    return simulation


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of all shards, as stored."""
    tensors = {}
    for path in shards(folder):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Put `change(tensor)` (or the tensor changed in place) into its shard, and correct the manifest."""
    for path in shards(folder):
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if name in tensors:
            result = change(tensors[name])
            tensors[name] = tensors[name] if result is None else result
            save_file(tensors, path, metadata)
            rehash(folder)
            return
    raise KeyError(name)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of a checkpoint in place, and correct the manifest."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    if path.name != "manifest.json" and (path.parent / "manifest.json").is_file():
        rehash(path.parent)


def rehash(folder: Path) -> None:
    """Make the manifest true again for the files that it lists."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for name in manifest["files"]:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            manifest["files"][name] = {"bytes": len(content), "sha256": digest}
    path.write_text(json.dumps(manifest), encoding="utf-8")


def files_outside_reports(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "reports"
    }


# A folder of two shards that holds no model.
FACTS = {"source": {}, "recipe": {}, "calibration": None, "versions": {}, "warnings": []}
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
TENSORS = (
    {"a": torch.arange(6, dtype=torch.uint8).reshape(2, 3), "b": torch.tensor([0.5], dtype=torch.float16)},
    {"c": torch.tensor([3, 1, 2], dtype=torch.int32)},
)


def write_small(out: Path, overwrite: bool = False) -> None:
    """Write that folder as a run would."""
    with CheckpointWriter(out, overwrite=overwrite) as writer:
        writer.begin({"job": "small"}, n_shards=2)
        for number, tensors in enumerate(TENSORS, start=1):
            writer.write_shard(number, tensors)
        writer.write_index()
        write_json(writer.folder / "config.json", {"model_type": "none"})
        writer.write_manifest(FACTS)
        write_json(writer.folder / "reports" / "run.json", {"seconds": 1.5})
        assert not out.exists() or overwrite
        writer.publish()
