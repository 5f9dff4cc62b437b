"""Writing a checkpoint folder: it appears under its name only when all of it is written.

Until then it grows in a hidden folder beside it, shard by shard. What is finished there survives the process
and the machine: the same job, started again, goes on after it. All that is written, but for the files under
reports/, depends on nothing but the model, the recipe, the data and the versions.
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

from atomq.errors import AtomqError, ConfigError, StorageError, UnsupportedModelError
from atomq.formats import journal
from atomq.formats.checkpoint import INDEX, MANIFEST, has_manifest, open_shard
from atomq.formats.files import (
    check_name,
    file_sha256,
    make_folders,
    missing_folders,
    move_into_place,
    remove_empty,
    remove_tree,
    write_file,
    write_json,
)
from atomq.formats.journal import Hashed, ShardRecord, shard_name
from atomq.formats.schema import FORMAT_VERSION, QUANT_METHOD
from atomq.formats.shards import ShardTensor, shard_bytes, whole

KEPT = "what is finished is kept: the same command{change} goes on after it"


class CheckpointWriter:
    """Writes a checkpoint beside its final place and moves it there when `publish` is called.

    Used as a context manager: leaving it without `publish` keeps what `begin` could go on with, and leaves
    nothing if that is nothing. A writer that is not `resumable` neither keeps anything nor goes on.

    Attributes:
        folder: where the files of the checkpoint are written.
        progress: where the records of the run are kept.

    Raises:
        ConfigError: `out` exists and `overwrite` is not set, or it holds something other than a checkpoint.
        StorageError: a file or folder cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool, restart: bool = False, resumable: bool = True) -> None:
        self.out = out.resolve() if out.is_symlink() else out
        self._overwrite, self._restart, self._resumable = overwrite, restart or not resumable, resumable
        self._place = self.out.parent / f".{self.out.name}.partial"
        self._previous = self.out.parent / f".{self.out.name}.previous"
        self.folder = self._place / "checkpoint"
        self.progress = self._place / "progress"
        check_place(out, overwrite=overwrite)
        self._new_folders = missing_folders(self.out.parent)
        self._begun = False
        self.n_shards = 0
        self._records: dict[int, ShardRecord] = {}

    def __enter__(self) -> CheckpointWriter:
        self._lock = -1
        try:
            make_folders(self._place)
            self._lock = _lock_folder(self._place)
            if self._previous.exists() and not self.out.exists():  # killed between the renames of `publish`
                move_into_place(self._previous, self.out)
            # Again: another process may have published it meanwhile.
            check_place(self.out, overwrite=self._overwrite)
        except BlockingIOError as error:
            raise ConfigError(
                f"another process is writing {self.out}; wait for it, or name another folder"
            ) from error
        except BaseException as error:  # Ctrl-C too
            self._leave()
            if isinstance(error, OSError) and not isinstance(error, StorageError):
                raise StorageError(f"cannot write {self._place}: {error.strerror or error}") from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A model that breaks a run must change; one that never became a run says nothing of what is here.
        kept = self._leave(useless=self._begun and isinstance(error, UnsupportedModelError))
        is_bad_input = isinstance(error, AtomqError) and error.exit_code == 2  # and would be again
        if error is not None and kept and self._begun and not is_bad_input:
            error.add_note(KEPT.format(change=" without --restart" if self._restart else ""))

    def earlier_job(self) -> dict[str, Any] | None:
        """The job of the unfinished run that `begin` would go on with, if it is the same one."""
        return None if self._restart else journal.read_job(self.progress)

    def begin(self, job: Mapping[str, Any], n_shards: int) -> None:
        """Start the job, or go on with it where an earlier process ended.

        Args:
            job: all that the bytes depend on, as JSON.

        Raises:
            ConfigError: an unfinished run for `out` had another job, and no restart was asked for.
        """
        self.n_shards = n_shards
        found = self.earlier_job()
        if found is not None:
            journal.check_job(found, job, self.out)
            self._records = journal.finished_shards(self.progress, self.folder, n_shards)
        self._make(self.folder)
        finished = {record.name for record in self._records.values()}
        for leftover in (*self.folder.iterdir(), *(() if found is not None else self._place.iterdir())):
            if leftover.name not in finished and leftover != self.folder:
                remove_tree(leftover)
        if found is None:
            write_json(self.progress / journal.JOB, dict(job))
        self._begun = True

    @property
    def statistics(self) -> Path:
        """Where the channel statistics of this run are kept."""
        return self.progress / journal.STATISTICS

    def has_statistics(self) -> bool:
        """Whether an earlier process has kept them, and they are as it wrote them."""
        return journal.has_statistics(self.progress)

    def keep_statistics(self) -> None:
        """Make a later process find them, after they were written."""
        journal.write_statistics_record(self.progress)

    @property
    def total_size(self) -> int:
        """Bytes of all tensors that are written."""
        return sum(sum(record.tensors.values()) for record in self._records.values())

    def facts_of(self, number: int) -> dict[str, Any] | None:
        """What `write_shard` was told of shard `number`, or None if that is not finished."""
        record = self._records.get(number)
        return None if record is None else record.facts

    def read_shard(self, number: int) -> dict[str, torch.Tensor]:
        """The tensors of a finished shard."""
        with open_shard(self.folder / shard_name(number, self.n_shards)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict

    def write_shard(
        self,
        number: int,
        tensors: Mapping[str, torch.Tensor | ShardTensor],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write shard `number` (from 1) whole, and then its record with `facts` for a later process."""
        name = shard_name(number, self.n_shards)
        parts = {
            key: whole(tensor) if isinstance(tensor, torch.Tensor) else tensor
            for key, tensor in tensors.items()
        }
        content = Hashed(shard_bytes(parts))
        write_file(self.folder / name, content)
        sizes = {key: part.n_bytes for key, part in parts.items()}
        record = ShardRecord(name, content.n_bytes, content.sha256, sizes, dict(facts or {}))
        journal.write_record(self.progress, number, record)
        self._records[number] = record

    def write_index(self) -> None:
        mapping = {key: record.name for record in self._records.values() for key in record.tensors}
        write_json(self.folder / INDEX, {"metadata": {"total_size": self.total_size}, "weight_map": mapping})

    def write_manifest(self, facts: Mapping[str, Any]) -> None:
        """Write the manifest over all files there are, with `facts` (recipe, source, versions) beside
        them.
        """
        known = {record.name: record.sha256 for record in self._records.values()}
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": known.get(path.name) or file_sha256(path)}
            for path in sorted(self.folder.iterdir())
            if path.is_file() and path.name != MANIFEST
        }
        manifest = {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, "files": files, **facts}
        write_json(self.folder / MANIFEST, manifest)

    def publish(self) -> None:
        """Give the folder its name, in place of an older checkpoint if that was allowed."""
        try:
            if self.out.exists():
                remove_tree(self._previous)  # of a run that was killed
                move_into_place(self.out, self._previous)
            move_into_place(self.folder, self.out)
        except BaseException:  # Ctrl-C between the two renames, too
            if self._previous.exists() and not self.out.exists():
                move_into_place(self._previous, self.out)
            raise
        with contextlib.suppress(StorageError):
            remove_tree(self._previous)

    def _make(self, folder: Path) -> None:
        try:
            make_folders(folder)
        except OSError as error:
            raise StorageError(f"cannot write {folder}: {error.strerror or error}") from error

    def _leave(self, *, useless: bool = False) -> bool:
        """Remove what no later process could use, or all if it is `useless`, and let go of the lock. Answer
        whether something is kept.

        What is outside the blocks is written so fast that it alone is not worth keeping.
        """
        chosen = journal.CHOICE in (journal.read_job(self.progress) or ())
        records, first = self.progress.glob("shard-*"), journal.record_name(1)
        worthy = chosen or any(path.name != first for path in records)
        is_others = not self._begun  # what lies here is an earlier command's, and this one has not touched it
        kept = (self._resumable or is_others) and not useless and self.folder.exists() and worthy
        try:
            if self._lock >= 0 and not kept:
                with contextlib.suppress(StorageError):
                    remove_tree(self._place)
        finally:
            if self._lock >= 0:
                os.close(self._lock)
        if not self.out.exists():
            remove_empty([] if kept else [self._place, *self._new_folders])
        return kept


def check_place(out: Path, *, overwrite: bool) -> None:
    """Refuse a place where no checkpoint can be written, before any work; nothing is written here.

    Raises:
        ConfigError: `out` exists and `overwrite` is not set, or it holds something other than a checkpoint,
            or its path is not UTF-8.
        StorageError: a file is where `out` needs a folder.
    """
    check_name(out)
    if not out.exists():
        place = next(place for place in out.absolute().parents if place.exists())
        if not place.is_dir():
            raise StorageError(f"cannot write {out}: {place} is no folder; name another place")
        return
    if not out.is_dir() or (any(out.iterdir()) and not has_manifest(out)):
        raise ConfigError(
            f"{out} exists and is not a checkpoint of atomq, so --overwrite does not touch it; "
            f"name another folder, or remove it yourself"
        )
    if not overwrite:
        raise ConfigError(f"{out} exists; name another folder or add --overwrite")


def _lock_folder(folder: Path) -> int:
    """A descriptor that holds the lock of `folder`; the lock ends with the process, whatever ends it.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                return descriptor
        except FileNotFoundError:
            make_folders(folder)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the folder was removed, and perhaps made anew, before it was locked
