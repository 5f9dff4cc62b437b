"""Disks that fail, or lose power, at any one of their operations."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from atomq.formats.files import Disk


class PowerLoss(BaseException):
    """The machine is off: nothing catches this, and the disk does nothing more."""


class FailingDisk(Disk):
    """Fails at its operation number `at` (from 0), once, with `code`; a write is cut short first.

    Attributes:
        done: the names of the operations so far.
    """

    def __init__(self, at: int | None, code: int = errno.ENOSPC) -> None:
        self.at, self.code = at, code
        self.done: list[str] = []

    def _step(self, name: str) -> None:
        self.done.append(name)
        if len(self.done) - 1 == self.at:
            raise OSError(self.code, os.strerror(self.code))

    def make_folder(self, folder: Path) -> None:
        self._step("make_folder")
        super().make_folder(folder)

    def create(self, path: Path) -> int:
        self._step("create")
        return super().create(path)

    def write(self, descriptor: int, content: memoryview) -> int:
        if len(self.done) == self.at:  # some bytes reach the disk before it fails
            super().write(descriptor, content[: len(content) // 2])
        self._step("write")
        return super().write(descriptor, content)

    def sync(self, descriptor: int) -> None:
        self._step("sync")

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder")

    def remove(self, path: Path) -> None:
        self._step("remove")
        super().remove(path)

    def remove_folder(self, folder: Path) -> None:
        self._step("remove_folder")
        super().remove_folder(folder)


class PowerLosingDisk(FailingDisk):
    """Loses power just before its operation number `at`, or after the last one. `come_back` is the next
    start.

    What is left under `root` then, by `survives`:
        "synced": a file's content as of its last `sync`, a folder's names as of its last `sync_folder`;
        "names": all names, but contents as of the last `sync`, as a file system may do that reorders writes;
        "all": everything, as when only the process was killed.
    Contents and names are kept by inode, as file systems do.
    """

    def __init__(self, root: Path, at: int | None, survives: str = "synced") -> None:
        super().__init__(at)
        self.root, self.survives = root, survives
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, tuple[int, bool]]] = {}
        self._held: list[int] = []  # descriptors, so that no inode number is used again
        for folder, _, files in os.walk(root):
            self._note_names(Path(folder))
            for name in files:
                path = Path(folder) / name
                self.contents[path.stat().st_ino] = path.read_bytes()

    def _step(self, name: str) -> None:
        if self.at is not None and len(self.done) >= self.at:
            raise PowerLoss
        self.done.append(name)

    def _note_names(self, folder: Path) -> None:
        self._held.append(os.open(folder, os.O_RDONLY))
        self.names[folder.stat().st_ino] = {
            entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(folder)
        }

    def make_folder(self, folder: Path) -> None:
        super().make_folder(folder)
        self._held.append(os.open(folder, os.O_RDONLY))

    def create(self, path: Path) -> int:
        descriptor = super().create(path)
        self._held.append(os.dup(descriptor))
        self.contents.pop(os.fstat(descriptor).st_ino, None)  # truncated: nothing of it is sure
        return descriptor

    def sync(self, descriptor: int) -> None:
        super().sync(descriptor)
        path = f"/proc/self/fd/{descriptor}"
        self.contents[os.fstat(descriptor).st_ino] = Path(path).read_bytes()

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self._note_names(folder)

    def come_back(self) -> None:
        """Make `root` what is left of it."""
        if self.survives == "names":
            for folder, _, _ in os.walk(self.root):
                self._note_names(Path(folder))
        if self.survives != "all":
            inode = self.root.stat().st_ino
            for place in self.root.iterdir():
                shutil.rmtree(place) if place.is_dir() else place.unlink()
            self._restore(self.root, inode)
        for descriptor in self._held:
            os.close(descriptor)

    def _restore(self, folder: Path, inode: int) -> None:
        for name, (inner, is_folder) in self.names.get(inode, {}).items():
            if is_folder:
                (folder / name).mkdir()
                self._restore(folder / name, inner)
            else:
                (folder / name).write_bytes(self.contents.get(inner, b""))
