"""The file layer: every durable write of atomq goes through here, whole or not at all.

A file is written under a temporary name, flushed to the disk and renamed, and then the folder's entry is
flushed too; so after a crash or power loss at any moment the old file, the new one or none is there, never
a part of one. `tests/test_layers.py` keeps writes out of all other modules.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from atomq.errors import ConfigError, StorageError

_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # of file systems that cannot flush a folder


class Disk:
    """The operations that durable writes are made of. Tests put a disk in its place that fails, or loses what
    was not flushed.
    """

    def make_folder(self, folder: Path) -> None:
        os.mkdir(folder)

    def create(self, path: Path) -> int:
        """A descriptor for writing `path` from its beginning."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)

    def write(self, descriptor: int, content: memoryview) -> int:
        """Write some bytes of `content`, perhaps not all; answer how many."""
        return os.write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, in place of a file of that name."""
        os.rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in `folder` durable, where the file system can."""
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
        finally:
            os.close(descriptor)

    def remove(self, path: Path) -> None:
        os.unlink(path)

    def remove_folder(self, folder: Path) -> None:
        os.rmdir(folder)


disk = Disk()


def write_file(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write `content`, bytes or pieces that follow one another, to `path`.

    Raises:
        StorageError: disk full, no permission or another I/O error; no partial file and no new folder stays
            behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    new_folders = missing_folders(path.parent)
    try:
        make_folders(path.parent)
        descriptor = disk.create(temporary)
        try:
            for piece in (content,) if isinstance(content, bytes) else content:
                _write_all(descriptor, memoryview(piece).cast("B"))
            disk.sync(descriptor)
        finally:
            disk.close(descriptor)
        disk.rename(temporary, path)
        disk.sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too
        with contextlib.suppress(OSError):
            disk.remove(temporary)
        remove_empty(new_folders)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def check_writable(path: Path) -> None:
    """Refuse a `path` that `write_file` could not even begin, before what is to be written is worked out.

    Raises:
        StorageError: as `write_file`; nothing stays behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    new_folders = missing_folders(path.parent)
    try:
        make_folders(path.parent)
        disk.close(disk.create(temporary))
        disk.remove(temporary)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        remove_empty(new_folders)


def check_name(path: Path) -> None:
    """Refuse a `path` of tensors that could be written and not be opened again.

    Raises:
        ConfigError: it is not UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise ConfigError(
            f"{shown} is a path that is not UTF-8, which safetensors cannot open; name another place"
        ) from error


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        n_written = disk.write(descriptor, content)
        if n_written <= 0:
            raise OSError(errno.EIO, "the disk takes no more bytes")
        content = content[n_written:]


def make_folders(folder: Path) -> None:
    """Make `folder` and its parents as far as they do not exist, durably.

    Raises:
        OSError: as of `os.mkdir`.
    """
    for place in reversed(missing_folders(folder)):
        with contextlib.suppress(FileExistsError):  # another process was faster
            disk.make_folder(place)
            disk.sync_folder(place.parent)


def move_into_place(source: Path, target: Path) -> None:
    """Rename durably; both must lie in one folder.

    Raises:
        StorageError: it cannot be done.
    """
    try:
        disk.rename(source, target)
        disk.sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot rename {source} to {target}: {error.strerror or error}") from error


def remove_tree(place: Path) -> None:
    """Remove a file or a folder with all that it holds; links are removed, not followed.

    Raises:
        StorageError: something cannot be removed.
    """
    try:
        if place.is_dir() and not place.is_symlink():
            for inner in sorted(place.iterdir()):
                remove_tree(inner)
            disk.remove_folder(place)
        elif place.exists() or place.is_symlink():
            disk.remove(place)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"cannot remove {place}: {error.strerror or error}") from error


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and its parents as far as they do not exist, the innermost first."""
    return [place for place in (folder, *folder.parents) if not place.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove the folders of `missing_folders` again; one that holds something by now stays."""
    for folder in folders:
        with contextlib.suppress(OSError):
            disk.remove_folder(folder)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, so that equal values give equal bytes."""
    write_file(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
