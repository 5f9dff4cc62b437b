"""From a checkpoint folder to a folder in another tool's format, one block in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from atomq.checkpoints import Opened, open_checkpoint
from atomq.config import QuantScheme
from atomq.errors import ConfigError
from atomq.export.compressed_tensors import CompressedTensors
from atomq.export.gptq import Gptq
from atomq.export.plain import PlainWeights
from atomq.export.stored import StoredLinear, read_blocks
from atomq.formats.card import export_card
from atomq.formats.checkpoint import (
    INDEX,
    has_manifest,
    read_config,
    read_manifest,
    read_tensors,
)
from atomq.formats.files import write_file, write_json
from atomq.formats.writer import CheckpointWriter, check_place
from atomq.models.blocks import linear_shapes
from atomq.models.families import PUBLISHED_NAMES, LinearShape, find_family
from atomq.models.loading import empty_model, load_config
from atomq.models.source import resolve_source
from atomq.progress import OnProgress, silently

Shapes = Mapping[str, LinearShape]


class ExportFormat(Protocol):
    """A format, bound to one scheme and the shapes of one model's linears.

    Attributes:
        dtype: of all tensors, or None to leave them as they are.
        config_file: a file that repeats the quantization config, or None.
    """

    @property
    def dtype(self) -> torch.dtype | None: ...

    @property
    def config_file(self) -> str | None: ...

    def notes(self) -> list[str]: ...

    def linear_tensors(self, stored: StoredLinear) -> dict[str, torch.Tensor]: ...

    def quantization_config(self, unquantized: list[str]) -> dict[str, Any] | None: ...


FORMATS: dict[str, Callable[[QuantScheme, Shapes], ExportFormat]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": lambda scheme, shapes: Gptq(scheme, shapes, "gptq"),
    "gptq_v2": lambda scheme, shapes: Gptq(scheme, shapes, "gptq_v2"),
    "hf": lambda scheme, shapes: PlainWeights(scheme, shapes, torch.bfloat16),
}


@dataclass(frozen=True)
class ExportResult:
    """What was written: bytes of all tensors, and sentences for people."""

    path: Path
    size_bytes: int
    notes: list[str]


def bind_format(name: str, scheme: QuantScheme, shapes: Shapes) -> ExportFormat:
    """The format `name` for one scheme and model.

    Raises:
        ConfigError: there is no such format, or it cannot express the scheme.
    """
    if name not in FORMATS:
        raise ConfigError(f"--format {name} is not one of {', '.join(FORMATS)}")
    return FORMATS[name](scheme, shapes)


def check_export(
    model_name: str, scheme: QuantScheme, format_name: str, dest: Path, *, overwrite: bool
) -> None:
    """Refuse, before a model is quantized, an export that would be refused afterwards.

    Raises:
        ConfigError: the format cannot express the scheme, or see `check_dest`.
        UnsupportedModelError: there is no such model.
    """
    source = resolve_source(model_name)
    model = empty_model(load_config(source), source)
    bind_format(format_name, scheme, linear_shapes(model, find_family(model.config.model_type)))
    check_dest(dest, overwrite=overwrite)


def check_dest(dest: Path, *, overwrite: bool) -> None:
    """Refuse a place where no export can be written: only an earlier export is ever replaced.

    Raises:
        ConfigError: `dest` exists and `overwrite` is not set, or it holds something else.
        StorageError: a file is where `dest` needs a folder.
    """
    if has_manifest(dest) and "exported_as" not in read_manifest(dest):
        raise ConfigError(
            f"{dest} is a checkpoint and no export, so export does not touch it; name another folder, "
            f"or remove it yourself"
        )
    check_place(dest, overwrite=overwrite)


def export(
    checkpoint: Path,
    dest: Path,
    format_name: str,
    *,
    overwrite: bool = False,
    check_hashes: bool = True,
    on_progress: OnProgress = silently,
) -> ExportResult:
    """Write `checkpoint` to the folder `dest` in another tool's format.

    Raises:
        ConfigError: the format cannot express the scheme, or see `check_dest`.
        CheckpointError: `checkpoint` is not whole.
        StorageError: something cannot be written. Nothing half-written stays behind.
    """
    check_dest(dest, overwrite=overwrite)
    opened = open_checkpoint(checkpoint, check_hashes=check_hashes)
    bound = bind_format(format_name, opened.scheme, linear_shapes(opened.model, opened.family))
    manifest = read_manifest(checkpoint)
    notes = bound.notes()
    with CheckpointWriter(dest, overwrite=overwrite, resumable=False) as writer:
        n_blocks = opened.model.config.num_hidden_layers
        writer.begin({"exported_as": format_name}, n_shards=n_blocks + 1)
        outside = {name for name in opened.headers if not name.startswith(f"{opened.family.blocks}.")}
        model_type = opened.family.model_type
        tensors = dict(read_tensors(checkpoint, outside))
        writer.write_shard(1, _published(tensors, model_type, bound.dtype))
        for index, block in enumerate(read_blocks(checkpoint, opened)):
            on_progress(index, n_blocks, f"block {index}")
            tensors = block.others
            for name, stored in block.linears.items():
                tensors |= {f"{name}.{key}": t for key, t in bound.linear_tensors(stored).items()}
            writer.write_shard(index + 2, _published(tensors, model_type, bound.dtype))
        on_progress(n_blocks, n_blocks, "done")
        writer.write_index()
        _write_config(checkpoint, writer.folder, bound, opened)
        _copy_companions(checkpoint, writer.folder, manifest)
        card = export_card(manifest["source"]["name"], opened.scheme, format_name, notes)
        write_file(writer.folder / "README.md", card.encode())
        kept = {key: value for key, value in manifest.items() if key not in ("files", "warnings")}
        warnings = [*manifest["warnings"], *notes]
        writer.write_manifest({**kept, "warnings": warnings, "exported_as": format_name})
        writer.publish()
    return ExportResult(dest, writer.total_size, notes)


def _published(
    tensors: dict[str, torch.Tensor], model_type: str, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """`tensors` in `dtype`, under the names that files of the family have."""
    published = {}
    for name, tensor in tensors.items():
        for pattern, replacement in PUBLISHED_NAMES.get(model_type, ()):
            name = re.sub(pattern, replacement, name)
        published[name] = tensor if dtype is None else tensor.to(dtype)
    return published


def _write_config(checkpoint: Path, folder: Path, bound: ExportFormat, opened: Opened) -> None:
    config = read_config(checkpoint)
    del config["quantization_config"]
    new = bound.quantization_config(_unquantized(opened))
    if new is not None:
        config["quantization_config"] = new
    if bound.dtype is not None:
        config["dtype"] = str(bound.dtype).removeprefix("torch.")
    write_json(folder / "config.json", config)
    if bound.config_file is not None:
        write_json(folder / bound.config_file, new)


def _unquantized(opened: Opened) -> list[str]:
    """Names of the model's linears that a checkpoint leaves as they are, such as the head."""
    shapes = linear_shapes(opened.model, opened.family)
    linears = (name for name, module in opened.model.named_modules() if isinstance(module, nn.Linear))
    return sorted(set(linears) - set(shapes))


def _copy_companions(checkpoint: Path, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Copy the tokenizer and what else lies beside the weights, byte for byte."""
    ours = {"config.json", "README.md", INDEX}
    for name in manifest["files"]:
        if name not in ours and not name.endswith(".safetensors"):
            write_file(folder / name, (checkpoint / name).read_bytes())
