"""Writing a checkpoint folder: it appears under its name only when all of it is written.

All that is written, but for the files under reports/, depends on nothing but the model, the recipe, the data
and the versions.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save

from atomq.errors import ConfigError, StorageError
from atomq.formats.checkpoint import INDEX, MANIFEST, has_manifest
from atomq.formats.files import (
    file_sha256,
    make_folders,
    missing_folders,
    move_into_place,
    remove_empty,
    remove_tree,
    write_file,
    write_json,
)
from atomq.formats.schema import FORMAT_VERSION, QUANT_METHOD


class CheckpointWriter:
    """Writes a checkpoint beside its final place and moves it there when `publish` is called.

    Used as a context manager: leaving it without `publish` removes all that was written.

    Raises:
        ConfigError: `out` exists and `overwrite` is not set, or it holds something other than a checkpoint.
        StorageError: a file or folder cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool) -> None:
        _refuse_existing(out, overwrite)
        self.out = out.resolve() if out.is_symlink() else out
        self.folder = self.out.parent / f".{self.out.name}.partial"
        self._new_folders = missing_folders(self.out.parent)
        self.n_shards = 1  # known once the model is; part of every shard's name
        self.total_size = 0
        self._weight_map: dict[str, str] = {}

    def __enter__(self) -> CheckpointWriter:
        try:
            make_folders(self.folder)
            self._lock = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, whatever ends it
            for leftover in self.folder.iterdir():  # of a run that was killed
                remove_tree(leftover)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is writing {self.out}; wait for it, or name another folder"
            ) from error
        except BaseException as error:  # Ctrl-C too
            remove_empty([self.folder, *self._new_folders])
            if isinstance(error, OSError):
                raise StorageError(f"cannot write {self.folder}: {error.strerror or error}") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(StorageError):
            remove_tree(self.folder)
        os.close(self._lock)
        if not self.out.exists():
            remove_empty(self._new_folders)

    def write_shard(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write shard `number` (from 1) whole."""
        name = f"model-{number:05}-of-{self.n_shards:05}.safetensors"
        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        write_file(self.folder / name, save(contiguous, metadata={"format": "pt"}))
        for key, tensor in contiguous.items():
            self._weight_map[key] = name
            self.total_size += tensor.numel() * tensor.element_size()

    def write_index(self) -> None:
        index = {"metadata": {"total_size": self.total_size}, "weight_map": self._weight_map}
        write_json(self.folder / INDEX, index)

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest over all files there are, with `facts` (recipe, source, versions) beside
        them.
        """
        names = sorted(path.name for path in self.folder.iterdir() if path.is_file())
        files = {
            name: {"bytes": (self.folder / name).stat().st_size, "sha256": file_sha256(self.folder / name)}
            for name in names
        }
        manifest = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "files": files, **facts}
        write_json(self.folder / MANIFEST, manifest)

    def publish(self) -> None:
        """Give the folder its name, in place of an older checkpoint if that was allowed."""
        previous = self.out.parent / f".{self.out.name}.previous"
        try:
            if self.out.exists():
                remove_tree(previous)  # of a run that was killed
                move_into_place(self.out, previous)
            move_into_place(self.folder, self.out)
        except BaseException:  # Ctrl-C between the two renames, too
            if previous.exists() and not self.out.exists():
                move_into_place(previous, self.out)
            raise
        with contextlib.suppress(StorageError):
            remove_tree(previous)


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ConfigError(f"{out} exists; name another folder or add --overwrite")
    if not out.is_dir() or (any(out.iterdir()) and not has_manifest(out)):
        raise ConfigError(
            f"{out} is not a checkpoint of atomq, so --overwrite does not touch it; remove it yourself"
        )
