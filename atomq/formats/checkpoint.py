"""Reading a checkpoint folder: shards, index, manifest; nothing that a file says is believed unchecked.

Every file but those under reports/ is listed in the manifest with its size and SHA-256. Folders are written
by `atomq.formats.writer`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from atomq.errors import CheckpointError
from atomq.formats.files import file_sha256
from atomq.formats.schema import DTYPE_NAMES, DTYPES, FORMAT_VERSION, QUANT_METHOD
from atomq.numerics.linear import TensorSpec

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
SINGLE_SHARD = "model.safetensors"
REPORTS = "reports"
MAX_JSON_BYTES = 1 << 26  # far more than any checkpoint's; nothing longer is read
LOADED_ENDINGS = (".safetensors", ".json", ".jinja")  # files that change what a loader makes

_MANIFEST_FACTS: dict[str, tuple[type, ...]] = {
    "source": (dict,),
    "recipe": (dict,),
    "calibration": (dict, type(None)),
    "versions": (dict,),
    "warnings": (list,),
}


def has_manifest(folder: Path) -> bool:
    """Whether `folder` has a manifest of atomq, whatever its version."""
    with contextlib.suppress(CheckpointError):
        return _read_json(folder / MANIFEST).get("quant_method") == QUANT_METHOD
    return False


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    return _read_json(folder / "config.json")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder, checked as far as its form goes.

    Raises:
        CheckpointError: it is missing, not a manifest of atomq, or of another version.
    """
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{MANIFEST} of {folder.name} is not a manifest of atomq")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{MANIFEST} of {folder.name} has format_version {manifest.get('format_version')!r}; "
            f"this atomq reads {FORMAT_VERSION}: update atomq, or quantize the model again"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) and _is_plain(name)
        for name, entry in files.items()
    ):
        raise CheckpointError(f"{MANIFEST} of {folder.name} lists no files that could be checked")
    absent = [
        name
        for name, kinds in _MANIFEST_FACTS.items()
        if not isinstance(manifest.get(name), kinds) or name not in manifest
    ]
    if absent:
        raise CheckpointError(f"{MANIFEST} of {folder.name} does not say {', '.join(absent)}")
    return manifest


def check_files(folder: Path, *, hashes: bool) -> int:
    """Compare every listed file with the manifest: size always, SHA-256 if `hashes`. Answer their number.

    Raises:
        CheckpointError: naming every file that is missing, of another size, or altered, and every file that
            a loader would read although it is not listed.
    """
    files = read_manifest(folder)["files"]
    wrong = [
        f"{path.name} is not listed"
        for path in sorted(folder.iterdir())
        if path.suffix in LOADED_ENDINGS and path.name not in files and path.name != MANIFEST
    ]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        elif hashes and file_sha256(path) != entry["sha256"]:
            wrong.append(f"{name} has been altered (SHA-256 differs)")
    if wrong:
        raise CheckpointError(
            f"{folder.name} differs from its manifest: {'; '.join(wrong)}; copy it again, or make it anew"
        )
    return len(files)


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> shard file name, from the index, or of the one file that `save_pretrained` may write.

    As in transformers, model.safetensors goes before an index.

    Raises:
        CheckpointError: the index is missing or names a file outside the folder.
    """
    if (folder / SINGLE_SHARD).is_file():
        with open_shard(folder / SINGLE_SHARD) as file:
            return dict.fromkeys(file.keys(), SINGLE_SHARD)
    index = _read_json(folder / INDEX)
    mapping = index.get("weight_map")
    if not isinstance(index.get("metadata"), dict):  # transformers would not say so
        raise CheckpointError(f"{INDEX} of {folder.name} has no metadata")
    if not isinstance(mapping, dict) or not all(_is_plain(name) for name in mapping.values()):
        raise CheckpointError(f"{INDEX} of {folder.name} has no usable weight_map")
    return mapping


def tensor_headers(folder: Path) -> dict[str, TensorSpec]:
    """Dtype and shape of every tensor as the shards' headers state them; no data is read.

    Raises:
        CheckpointError: a shard is missing, truncated, or holds other tensors than the index says.
    """
    mapping = weight_map(folder)
    headers: dict[str, TensorSpec] = {}
    for shard in sorted(set(mapping.values())):
        with open_shard(folder / shard) as file:
            for name in file.keys():  # noqa: SIM118 -- not a dict
                piece = file.get_slice(name)
                dtype = DTYPES.get(piece.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{name} in {shard} has dtype {piece.get_dtype()}, which is not used here"
                    )
                if mapping.get(name) != shard:
                    raise CheckpointError(f"{shard} holds {name}, which {INDEX} does not place there")
                headers[name] = TensorSpec((dtype,), tuple(piece.get_shape()))
    absent = sorted(set(mapping) - set(headers))
    if absent:
        raise CheckpointError(f"{folder.name} lacks tensors that its index names: {_some(absent)}")
    return headers


def check_tensors(headers: Mapping[str, TensorSpec], expected: Mapping[str, TensorSpec]) -> None:
    """Refuse missing, unexpected and misshapen tensors.

    Raises:
        CheckpointError: naming the tensors, what they are and what they must be.
    """
    absent, strange = sorted(set(expected) - set(headers)), sorted(set(headers) - set(expected))
    if absent:
        raise CheckpointError(f"the checkpoint lacks {_some(absent)}")
    if strange:
        raise CheckpointError(f"the checkpoint has tensors that do not belong to it: {_some(strange)}")
    for name, spec in expected.items():
        found = headers[name]
        if found.shape != spec.shape or found.dtypes[0] not in spec.dtypes:
            allowed = " or ".join(DTYPE_NAMES[dtype] for dtype in spec.dtypes)
            raise CheckpointError(
                f"{name} is {DTYPE_NAMES[found.dtypes[0]]} {list(found.shape)}; "
                f"it must be {allowed} {list(spec.shape)}"
            )


def read_tensors(folder: Path, names: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read the named tensors exactly as stored."""
    mapping = weight_map(folder)
    for shard in sorted({mapping[name] for name in names}):
        with open_shard(folder / shard) as file:
            for name in sorted(names):
                if mapping[name] == shard:
                    yield name, file.get_tensor(name)


def open_shard(path: Path) -> Any:
    """`safe_open` with errors that name the file."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it has {path.stat().st_size} bytes, more than any checkpoint needs")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent.name} has no {path.name}; it is not a whole checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} of {path.parent.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} of {path.parent.name} must hold a JSON object")
    return value


def _is_plain(name: object) -> bool:
    """Whether a file name from a file stays inside the folder."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
