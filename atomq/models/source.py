"""Where a model lies: a local directory, a GGUF file or a hub id, and what exactly was read from it.

Nothing is loaded here. A source that cannot become a model is refused before anything heavy starts;
whether its tensors fit is `atomq.models.loading`'s matter.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of httpx or httpx2, by version

from atomq.errors import UnsupportedModelError

# What a model in the Hugging Face layout consists of. No pickle (*.bin, *.pt) and no Python file is ever
# fetched; "model*" leaves out the second copy of the weights that some repositories carry.
HUB_PATTERNS = (
    "model*.safetensors",
    "*.json",
    "*.jinja",
    "*.txt",
    "tokenizer.model",
    "LICENSE*",
    "NOTICE*",
)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INDEX = "model.safetensors.index.json"
_FILES_AT_A_TIME = 8


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        name: what may be published: the hub id, or the last part of a local path (never a path).
        path: the local directory, or the GGUF file.
        kind: which of the two `path` is.
    """

    name: str
    path: Path
    kind: Literal["directory", "gguf"]


def resolve_source(model: str) -> ModelSource:
    """Find `model`: an existing directory or .gguf file, else a hub id "org/name".

    A hub id is taken from the local Hugging Face cache where it is there, and downloaded otherwise.

    Raises:
        UnsupportedModelError: nothing is there, it cannot be fetched, it is not whole (no config.json,
            no safetensors, an index that names an absent file), or it is quantized already.
    """
    try:
        path = Path(model).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{model!r} is no usable path: {error}; give a shorter or other name"
        ) from error
    name = Path(os.path.abspath(path)).name or "model"  # not resolve(): keep the name of a link
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UnsupportedModelError(
                f"{model} is a file but not a .gguf file; give a .gguf file, a model directory "
                f"or a hub id such as org/name"
            )
        return ModelSource(name, path, "gguf")
    if path.is_dir():
        source = ModelSource(name, path, "directory")
        if not (path / "config.json").is_file() and (files := sorted(path.glob("*.gguf"))):
            raise UnsupportedModelError(
                f"{name} is a directory of GGUF files; give one, such as {files[0].name}"
            )
    elif _HUB_ID.fullmatch(model) and not model.lower().endswith(".gguf"):
        source = ModelSource(model, _fetch(model), "directory")
    else:
        raise UnsupportedModelError(
            f"{model} does not exist, and is not a hub id of the form org/name; give a model directory, "
            f"a .gguf file or a hub id"
        )
    _refuse_quantized(read_config(source), source)
    weight_files(source)
    return source


def read_config(source: ModelSource) -> dict[str, Any]:
    """The contents of a directory's config.json, which must name a `model_type`."""
    config = _read_json(source.path / "config.json", source)
    if not isinstance(config.get("model_type"), str):
        raise UnsupportedModelError(f"{source.name}: config.json names no model_type")
    return config


def weight_files(source: ModelSource) -> list[Path]:
    """The files that hold the weights, sorted by name: model.safetensors, or the shards of its index.

    Raises:
        UnsupportedModelError: there are none, or the index is broken or names a file that is absent.
    """
    if source.kind == "gguf":
        return [source.path]
    single = source.path / "model.safetensors"
    if single.is_file():
        return [single]
    if not (source.path / _INDEX).is_file():
        files = sorted(path.name for path in source.path.glob("*.safetensors"))
        advice = (
            f"{files[0]} alone does not say what else belongs to the model: fetch its index, too"
            if files
            else "atomq reads weights from safetensors only, so convert others with save_pretrained first"
        )
        raise UnsupportedModelError(f"{source.name} has neither model.safetensors nor {_INDEX}; {advice}")
    weight_map = _read_json(source.path / _INDEX, source).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnsupportedModelError(f"{source.name}: {_INDEX} has no weight_map")
    shards = {str(shard) for shard in weight_map.values()}
    for shard in sorted(shards):
        # A plain name only: an index must not lead out of its directory.
        if Path(shard).name != shard or not (source.path / shard).is_file():
            raise UnsupportedModelError(
                f"{source.name}: {_INDEX} names {shard}, which is not in the directory; fetch the model again"
            )
    return [source.path / shard for shard in sorted(shards)]


def source_hash(source: ModelSource) -> str:
    """SHA-256 (hex) of what makes the model: the GGUF file, or config.json and every weight file.

    Of a directory each file counts with its name, its size and its SHA-256, in the order of the names, so
    that several are read at a time; the hash of a GGUF file is that of its content alone, as `sha256sum`
    prints it.
    """
    files = weight_files(source)
    if source.kind == "gguf":
        return _file_hash(files[0]).hex()
    files = sorted([source.path / "config.json", *files], key=lambda file: file.name)
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_FILES_AT_A_TIME) as pool:
        for file, own in zip(files, pool.map(_file_hash, files), strict=True):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode() + own)
    return digest.hexdigest()


def _file_hash(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _fetch(hub_id: str) -> Path:
    """The local snapshot of `hub_id`: from the cache, or downloaded into it."""
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except (OSError, ValueError, HTTPError) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = (
            "HF_HUB_OFFLINE is set and the model is not in the local cache: unset it to download"
            if constants.HF_HUB_OFFLINE
            else "check the id and the network (for a gated or private model, HF_TOKEN)"
        )
        raise UnsupportedModelError(
            f"{hub_id} is no local directory and could not be fetched from the hub ({first_line}); "
            f"{remedy}, or give the path of a local copy"
        ) from error


def _read_json(path: Path, source: ModelSource) -> dict[str, Any]:
    """The object in a JSON file of `source`."""
    if not path.is_file():
        raise UnsupportedModelError(
            f"{source.name} has no {path.name}; a model directory holds config.json, "
            f"model.safetensors (or its shards and index) and the tokenizer's files"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"{source.name}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UnsupportedModelError(f"{source.name}: {path.name} does not hold a JSON object")
    return content


def _refuse_quantized(config: dict[str, Any], source: ModelSource) -> None:
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"{source.name} is already quantized (quant_method {method!r} in config.json); "
            f"give the original float model"
        )
