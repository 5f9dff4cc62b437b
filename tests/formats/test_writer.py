"""A checkpoint folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pytest
import torch
from faulty_disk import FailingDisk
from tiny_checkpoints import FIRST, TENSORS, change_json, stored_tensors, write_small

from atomq.errors import ConfigError, StorageError
from atomq.formats import files
from atomq.formats.checkpoint import read_manifest
from atomq.formats.files import Disk
from atomq.formats.writer import CheckpointWriter


@pytest.fixture
def small(tmp_path) -> Path:
    write_small(tmp_path / "small")
    return tmp_path / "small"


def test_writing_the_same_twice_gives_the_same_bytes(small, tmp_path):
    write_small(tmp_path / "again")
    for path in small.iterdir():
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_tensors_that_are_views_are_written_whole(tmp_path):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    with CheckpointWriter(tmp_path / "out", overwrite=False) as writer:
        writer.write_shard(1, {"transposed": base.T, "column": base[:, 1]})
        writer.write_index()
        writer.publish()
    tensors = stored_tensors(tmp_path / "out")
    assert torch.equal(tensors["transposed"], base.T)
    assert torch.equal(tensors["column"], base[:, 1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
def test_any_way_out_before_publish_leaves_nothing(tmp_path, error):
    def leave() -> None:
        with CheckpointWriter(tmp_path / "a" / "b" / "OUT", overwrite=False) as writer:
            writer.write_shard(1, TENSORS[0])
            assert writer.folder.is_dir()
            raise error

    with pytest.raises(error):
        leave()
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_publish_leaves_nothing(tmp_path):
    with CheckpointWriter(tmp_path / "OUT", overwrite=False) as writer:
        writer.write_shard(1, TENSORS[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["sync", "create", "write"])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch, place):
    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Disk, place, fail)
        with pytest.raises(StorageError, match=rf"{FIRST}: No space left on device"):
            write_small(tmp_path / "a" / "OUT")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/\.OUT\.partial: Not a directory"):
        write_small(tmp_path / "file" / "OUT")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_existing_folder_is_replaced_only_when_asked(small):
    (small / "old").touch()
    with pytest.raises(ConfigError, match="small exists; name another folder or add --overwrite"):
        write_small(small)
    assert (small / "old").exists()
    write_small(small, overwrite=True)
    assert not (small / "old").exists()
    assert [path.name for path in small.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failing_rename_brings_the_old_checkpoint_back(small, monkeypatch, error):
    (small / "old").touch()

    class Failing(Disk):
        def rename(self, source, target):
            if source.name.endswith(".partial"):
                raise error
            super().rename(source, target)

    monkeypatch.setattr(files, "disk", Failing())
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        write_small(small, overwrite=True)
    assert (small / "old").exists()
    assert [path.name for path in small.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("content", ['{"manifest_version": 3}', "[]", "", '{"quant_method": "gptq"}'])
def test_a_folder_with_a_manifest_of_something_else_is_never_replaced(tmp_path, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match="mine is not a checkpoint of atomq"):
        CheckpointWriter(tmp_path / "mine", overwrite=True)


def test_a_checkpoint_of_another_version_may_be_replaced(small):
    change_json(small / "manifest.json", lambda manifest: manifest.update(format_version=99))
    write_small(small, overwrite=True)
    assert read_manifest(small)["format_version"] == 1


def test_a_second_writer_of_the_same_folder_is_refused_while_the_first_one_lives(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, overwrite=False) as first:
        first.write_shard(1, {"a": torch.zeros(2)})
        with (
            pytest.raises(ConfigError, match=r"another process is writing .*out; wait for it"),
            CheckpointWriter(out, overwrite=False),
        ):
            pass
        assert list(first.folder.iterdir())  # untouched
    with CheckpointWriter(out, overwrite=False) as next_one:
        assert not list(next_one.folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def operations(tmp_path, monkeypatch, overwrite: bool) -> int:
    """Of the disk, in one undisturbed run."""
    disk = FailingDisk(None)
    monkeypatch.setattr(files, "disk", disk)
    write_small(tmp_path / "small", overwrite)
    return len(disk.done)


def test_any_operation_that_fails_leaves_nothing_new(small, tmp_path, monkeypatch):
    """Disk full and short writes, at each operation of a run that replaces an older checkpoint."""
    (small / "old").touch()
    before = contents(small)
    n_operations = operations(tmp_path, monkeypatch, overwrite=True)
    assert n_operations > 40
    for code in (errno.ENOSPC, errno.EACCES):
        for at in range(n_operations):
            (small / "old").touch()
            monkeypatch.setattr(files, "disk", FailingDisk(at, code))
            with contextlib.suppress(StorageError):
                write_small(small, overwrite=True)
            after = contents(small)
            assert after in (before, {name: content for name, content in before.items() if name != "old"})
            monkeypatch.setattr(files, "disk", Disk())
            write_small(small, overwrite=True)
            assert [path.name for path in tmp_path.iterdir()] == ["small"]
