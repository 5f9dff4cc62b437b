"""A checkpoint folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path

import pytest
import torch
from faulty_disk import FailingDisk, PowerLosingDisk, PowerLoss
from tiny_checkpoints import FIRST, TENSORS, change_json, stored_tensors, write_small

from atomq.errors import ConfigError, StorageError, UnsupportedModelError
from atomq.formats import files
from atomq.formats.checkpoint import read_manifest, weight_map
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
        writer.begin({}, n_shards=1)
        writer.write_shard(1, {"transposed": base.T, "column": base[:, 1]})
        writer.write_index()
        writer.publish()
    tensors = stored_tensors(tmp_path / "out")
    assert torch.equal(tensors["transposed"], base.T)
    assert torch.equal(tensors["column"], base[:, 1])


ANY_WAY_OUT = [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError]


@pytest.mark.parametrize("error", ANY_WAY_OUT)
def test_any_way_out_before_a_shard_is_finished_leaves_nothing(tmp_path, error):
    def leave() -> None:
        with CheckpointWriter(tmp_path / "a" / "b" / "OUT", overwrite=False) as writer:
            writer.begin({}, n_shards=2)
            assert writer.folder.is_dir()
            raise error

    with pytest.raises(error):
        leave()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", ANY_WAY_OUT)
def test_any_way_out_later_keeps_the_finished_shards_for_the_same_job(tmp_path, error):
    out = tmp_path / "new" / "OUT"

    def leave() -> None:
        with CheckpointWriter(out, overwrite=False) as writer:
            writer.begin({"job": 1}, n_shards=2)
            writer.write_shard(2, TENSORS[1], {"seen": [1.5]})
            raise error

    with pytest.raises(error):
        leave()
    assert [path.name for path in out.parent.iterdir()] == [".OUT.partial"]
    with CheckpointWriter(out, overwrite=False) as writer:
        writer.begin({"job": 1}, n_shards=2)
        assert writer.facts_of(2) == {"seen": [1.5]}
        assert writer.facts_of(1) is None
        assert torch.equal(writer.read_shard(2)["c"], TENSORS[1]["c"])
        assert writer.total_size == 12
        writer.write_shard(1, TENSORS[0])
        writer.write_index()
        writer.publish()
    assert [path.name for path in out.parent.iterdir()] == ["OUT"]
    assert weight_map(out) == {"a": FIRST, "b": FIRST, "c": "model-00002-of-00002.safetensors"}


def unfinished(out: Path, job: dict) -> None:
    """A run that ends after its second shard."""
    with CheckpointWriter(out, overwrite=False) as writer:
        writer.begin(job, n_shards=2)
        writer.write_shard(1, TENSORS[0])
        writer.write_shard(2, TENSORS[1])


def test_who_cannot_go_on_leaves_an_unfinished_run_alone_until_it_begins(tmp_path):
    """An export that fails at once, named the folder of a run that was interrupted."""
    out = tmp_path / "OUT"
    unfinished(out, {})

    def fail() -> None:
        with CheckpointWriter(out, overwrite=False, resumable=False):
            raise ConfigError("nothing to export")

    with pytest.raises(ConfigError):
        fail()
    with CheckpointWriter(out, overwrite=False) as writer:
        writer.begin({}, n_shards=2)
        assert writer.facts_of(1) is not None
        assert writer.facts_of(2) is not None


def test_a_model_that_is_broken_leaves_nothing(tmp_path):
    """It must change, and then nothing of this run could be used."""

    def leave() -> None:
        with CheckpointWriter(tmp_path / "OUT", overwrite=False) as writer:
            writer.begin({}, n_shards=2)
            writer.write_shard(2, TENSORS[1])
            raise UnsupportedModelError("NaN")

    with pytest.raises(UnsupportedModelError):
        leave()
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_of_another_job_is_not_gone_on_with(tmp_path):
    out = tmp_path / "OUT"
    unfinished(out, {"recipe": {"n_bits": 4, "clip": 0.9}, "gone": 1})
    other = {"recipe": {"n_bits": 3, "clip": 0.9}, "new": None}
    with (
        pytest.raises(ConfigError) as caught,
        CheckpointWriter(out, overwrite=False) as writer,
    ):
        writer.begin(other, n_shards=2)
    assert str(caught.value) == (
        f"an unfinished run for {out} had other inputs: gone was 1 and is None; "
        "recipe.n_bits was 4 and is 3; give the same ones to go on with it, or --restart to throw it away"
    )
    with CheckpointWriter(out, overwrite=False, restart=True) as writer:
        writer.begin(other, n_shards=2)
        assert writer.facts_of(1) is None
        assert list(writer.folder.iterdir()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda shard, record: shard.write_bytes(shard.read_bytes()[:-1]),
        lambda shard, record: shard.write_bytes(shard.read_bytes()[:-1] + b"x"),
        lambda shard, record: shard.unlink(),
        lambda shard, record: record.write_bytes(record.read_bytes()[:40]),
        lambda shard, record: record.write_text("[]"),
        lambda shard, record: record.write_text(record.read_text().replace(FIRST, "../" + FIRST)),
        lambda shard, record: record.write_text(record.read_text().replace('"n_bytes"', '"bytes"')),
        lambda shard, record: change_json(record, lambda r: r.update(facts=3)),
        lambda shard, record: change_json(record, lambda r: r.update(tensors=[3])),
        lambda shard, record: record.unlink(),
    ],
)
def test_a_shard_that_is_not_what_its_record_says_is_not_finished(tmp_path, spoil):
    out = tmp_path / "OUT"
    unfinished(out, {})
    place = tmp_path / ".OUT.partial"
    spoil(place / "checkpoint" / FIRST, place / "progress" / "shard-00001.json")
    with CheckpointWriter(out, overwrite=False) as writer:
        writer.begin({}, n_shards=2)
        assert writer.facts_of(1) is None


def test_a_folder_that_is_removed_while_it_is_locked_is_locked_anew(tmp_path, monkeypatch):
    """Else two processes could hold locks on two folders of one name."""
    flock, seen = fcntl.flock, []

    def remove_first(descriptor, how):
        flock(descriptor, how)
        seen.append(descriptor)
        if len(seen) == 1:
            (tmp_path / ".OUT.partial").rmdir()

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with CheckpointWriter(tmp_path / "OUT", overwrite=False) as writer:
        assert len(seen) == 2
        monkeypatch.undo()
        with (
            pytest.raises(ConfigError, match="another process"),
            CheckpointWriter(tmp_path / "OUT", overwrite=False),
        ):
            pass
        writer.begin({}, n_shards=1)


def test_a_checkpoint_that_another_process_published_meanwhile_is_not_replaced(tmp_path):
    late = CheckpointWriter(tmp_path / "OUT", overwrite=False)
    write_small(tmp_path / "OUT")
    with pytest.raises(ConfigError, match="OUT exists"), late:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


@pytest.mark.parametrize("place", ["sync", "create", "write"])
@pytest.mark.parametrize("name", [FIRST, "job.json"])
def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch, place, name):
    class Full(Disk):
        def create(self, path):
            self.failing = place if path.name == f"{name}.tmp" else ""
            return self._fail("create") or super().create(path)

        def write(self, descriptor, content):
            return self._fail("write") or super().write(descriptor, content)

        def sync(self, descriptor):
            self._fail("sync")

        def _fail(self, operation):
            if operation == self.failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(files, "disk", Full())
        with pytest.raises(StorageError, match=rf"{name}: No space left on device"):
            write_small(tmp_path / "a" / "OUT")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/OUT: .*file is no folder"):
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
            if source.name == "checkpoint":
                raise error
            super().rename(source, target)

    monkeypatch.setattr(files, "disk", Failing())
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        write_small(small, overwrite=True)
    assert (small / "old").exists()
    assert sorted(path.name for path in small.parent.iterdir()) == [".small.partial", "small"]


@pytest.mark.parametrize("content", ['{"manifest_version": 3}', "[]", "", '{"quant_method": "gptq"}'])
def test_a_folder_with_a_manifest_of_something_else_is_never_replaced(tmp_path, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text(content)
    with pytest.raises(ConfigError, match="mine exists and is not a checkpoint of atomq"):
        CheckpointWriter(tmp_path / "mine", overwrite=True)


def test_a_checkpoint_of_another_version_may_be_replaced(small):
    change_json(small / "manifest.json", lambda manifest: manifest.update(format_version=99))
    write_small(small, overwrite=True)
    assert read_manifest(small)["format_version"] == 1


def test_a_second_writer_of_the_same_folder_is_refused_while_the_first_one_lives(tmp_path):
    out = tmp_path / "out"
    with CheckpointWriter(out, overwrite=False) as first:
        first.begin({}, n_shards=2)
        first.write_shard(2, {"a": torch.zeros(2)})
        with (
            pytest.raises(ConfigError, match=r"another process is writing .*out; wait for it"),
            CheckpointWriter(out, overwrite=False),
        ):
            pass
        assert list(first.folder.iterdir())  # untouched
    with CheckpointWriter(out, overwrite=False) as next_one:
        next_one.begin({}, n_shards=2)
        assert next_one.facts_of(2) == {}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def operations(out: Path, monkeypatch) -> int:
    """Of the disk, in one undisturbed run that replaces an older checkpoint."""
    disk = FailingDisk(None)
    monkeypatch.setattr(files, "disk", disk)
    write_small(out, overwrite=True)
    return len(disk.done)


def old_and_new(small: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    new = contents(small)
    (small / "old").touch()
    return contents(small), new


def test_after_any_operation_that_fails_the_next_run_ends_as_if_nothing_had_been(small, monkeypatch):
    """Disk full, no permission, short writes, at each operation of a run that replaces a checkpoint."""
    old, new = old_and_new(small)
    n_operations = operations(small, monkeypatch)
    assert n_operations > 50
    for code in (errno.ENOSPC, errno.EACCES):
        for at in range(n_operations):
            (small / "old").touch()
            monkeypatch.setattr(files, "disk", FailingDisk(at, code))
            with contextlib.suppress(StorageError):
                write_small(small, overwrite=True)
            assert contents(small) in (old, new), at
            monkeypatch.setattr(files, "disk", FailingDisk(None))  # one that works, and waits for no flush
            write_small(small, overwrite=True)
            assert contents(small) == new
            assert [path.name for path in small.parent.iterdir()] == ["small"]


@pytest.mark.parametrize("survives", ["synced", "names", "all"])
def test_after_power_loss_at_any_moment_the_next_run_ends_as_if_nothing_had_been(
    small, monkeypatch, survives
):
    old, new = old_and_new(small)
    n_operations = operations(small, monkeypatch)
    gone_on = 0
    for at in range(n_operations + 1):
        (small / "old").touch()
        disk = PowerLosingDisk(small.parent, at, survives)
        monkeypatch.setattr(files, "disk", disk)
        with contextlib.suppress(PowerLoss):
            write_small(small, overwrite=True)
        disk.come_back()
        place = small.parent
        if small.exists():
            assert contents(small) in (old, new), at
        else:  # between the two renames
            assert contents(place / ".small.previous") == old
            assert contents(place / ".small.partial" / "checkpoint") == new
        gone_on += (place / ".small.partial" / "progress" / "shard-00002.json").exists()
        monkeypatch.setattr(files, "disk", FailingDisk(None))  # one that works, and waits for no flush
        write_small(small, overwrite=True)
        assert contents(small) == new
        assert [path.name for path in place.iterdir()] == ["small"]
    assert gone_on > n_operations / 4
