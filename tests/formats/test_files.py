"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
from pathlib import Path

import pytest
from faulty_disk import PowerLosingDisk, PowerLoss

from atomq.errors import StorageError
from atomq.formats import files
from atomq.formats.files import Disk, file_sha256, json_bytes, remove_tree, write_file, write_json


def test_equal_values_give_equal_bytes_of_readable_json():
    assert (
        json_bytes({"b": 1, "a": "é"})
        == json_bytes({"a": "é", "b": 1})
        == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    )


def test_a_file_is_written_into_new_folders_and_replaces_an_old_one(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"one", b"two"):
        write_file(path, content)
        assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _descriptor: seen.append(path.read_bytes()))
    write_json(path, {})
    assert seen == [b"old", b"{}\n"]  # the file, then the folder
    assert path.read_bytes() == b"{}\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("place", ["make_folder", "create", "write", "sync", "rename"])
def test_trouble_anywhere_names_the_file_and_leaves_nothing(tmp_path, monkeypatch, code, place):
    def fail(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Disk, place, fail)
    with pytest.raises(StorageError, match=f"new/file: {os.strerror(code)}") as caught:
        write_file(tmp_path / "new" / "file", b"content")
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_a_few_bytes_at_a_time_gets_all_of_them(tmp_path, monkeypatch):
    write = Disk.write
    monkeypatch.setattr(Disk, "write", lambda self, descriptor, content: write(self, descriptor, content[:3]))
    write_file(tmp_path / "file", (b"some", memoryview(b""), b" pieces of content"))
    assert (tmp_path / "file").read_bytes() == b"some pieces of content"


def test_a_disk_that_takes_no_bytes_is_trouble(tmp_path, monkeypatch):
    monkeypatch.setattr(Disk, "write", lambda *_args: 0)
    with pytest.raises(StorageError, match="file: the disk takes no more bytes"):
        write_file(tmp_path / "file", b"content")


def test_a_file_system_that_cannot_flush_folders_is_good_enough(tmp_path, monkeypatch):
    sync = os.fsync

    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_file(tmp_path / "new" / "file", b"content")
    assert (tmp_path / "new" / "file").read_bytes() == b"content"


def test_a_tree_is_removed_without_following_links(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "file").touch()
    (tmp_path / "tree" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "tree" / "dangling").symlink_to(tmp_path / "nowhere")
    remove_tree(tmp_path / "tree")
    remove_tree(tmp_path / "tree")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept" / "file").exists()


def test_a_folder_in_the_way_is_trouble_too(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder: Is a directory"):
        write_file(tmp_path / "folder", b"content")
    with pytest.raises(StorageError, match=f"cannot write {os.devnull}/file"):
        write_file(Path(os.devnull) / "file", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _descriptor: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "new" / "file", b"content")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_others_use_by_now_stays(tmp_path, monkeypatch):
    def fail(_descriptor):
        (tmp_path / "new" / "other").touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError):
        write_file(tmp_path / "new" / "file", b"content")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]


def test_the_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "file").write_bytes(b"atomq" * 100_000)
    assert file_sha256(tmp_path / "file") == hashlib.sha256(b"atomq" * 100_000).hexdigest()


def test_after_power_loss_at_any_moment_the_old_file_or_the_new_one_is_there(tmp_path, monkeypatch):
    for survives in ("synced", "names", "all"):
        for at in range(8):
            folder = tmp_path / f"{survives}-{at}"
            folder.mkdir()
            (folder / "file").write_bytes(b"old")
            disk = PowerLosingDisk(folder, at, survives)
            monkeypatch.setattr(files, "disk", disk)
            with contextlib.suppress(PowerLoss):
                write_file(folder / "file", b"new content")
                write_file(folder / "inner" / "file", b"other")
            disk.come_back()
            finished = len(disk.done) >= (5 if survives == "synced" else 4)
            assert (folder / "file").read_bytes() == (b"new content" if finished else b"old"), (survives, at)
            assert not (folder / "inner" / "file").exists()


def test_the_disk_of_that_test_loses_what_was_not_flushed(tmp_path):
    disk = PowerLosingDisk(tmp_path, None)
    for name, flushed in (("kept", True), ("lost", False)):
        descriptor = disk.create(tmp_path / name)
        disk.write(descriptor, memoryview(b"content"))
        if flushed:
            disk.sync(descriptor)
            disk.sync_folder(tmp_path)
        disk.close(descriptor)
    disk.remove(tmp_path / "kept")
    disk.come_back()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"kept": b"content"}
