"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from pathlib import Path

import pytest

from atomq.errors import StorageError
from atomq.formats.files import file_sha256, json_bytes, write_file, write_json


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
    assert seen == [b"old"]
    assert path.read_bytes() == b"{}\n"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("place", ["fsync", "open", "replace", "mkdir"])
def test_trouble_anywhere_names_the_file_and_leaves_nothing(tmp_path, monkeypatch, code, place):
    def fail(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os if place == "fsync" else Path, place, fail)
    with pytest.raises(StorageError, match=f"new/file: {os.strerror(code)}") as caught:
        write_file(tmp_path / "new" / "file", b"content")
    assert caught.value.exit_code == 1
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


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
