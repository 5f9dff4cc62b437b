"""What of an unfinished run is done: its job, and one record for each finished shard.

A record is written after its shard, and counts only if the shard is there with the size and the SHA-256 that
the record gives. A record that cannot be read is as good as none: its shard is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from atomq.errors import ConfigError
from atomq.formats.files import file_sha256, write_json

JOB = "job.json"
STATISTICS = "statistics.safetensors"
CHOICE = "rotation_choice"  # of a job: what `--rotate auto` took, and by which figures
_STATISTICS_NUMBER = 0  # of their record; shards are numbered from 1
_OWN_HASH = "sha256_of_this_record"


class ShardRecord(NamedTuple):
    """A finished shard: its file, the bytes of each of its tensors, and facts of the run that made it."""

    name: str
    n_bytes: int
    sha256: str
    tensors: dict[str, int]
    facts: dict[str, Any]


def read_job(folder: Path) -> dict[str, Any] | None:
    """The job that the run in `folder` was started for, or None if no run got so far."""
    return _read_object(folder / JOB)


def check_job(found: Mapping[str, Any], wanted: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with a run that was started for another job.

    Raises:
        ConfigError: naming what differs.
    """
    before, now = dict(_leaves(found)), dict(_leaves(json.loads(json.dumps(wanted))))
    differing = [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise ConfigError(
            f"an unfinished run for {out} had other inputs: {'; '.join(differing[:5])}{more}; "
            f"give the same ones to go on with it, or --restart to throw it away"
        )


def write_record(folder: Path, number: int, record: ShardRecord) -> None:
    """Write a record, and the hash of itself, without which none is believed."""
    value = record._asdict()
    write_json(folder / record_name(number), {**value, _OWN_HASH: _hash_of(value)})


def write_statistics_record(folder: Path) -> None:
    """Write the record of the channel statistics, which lie in `folder` itself."""
    path = folder / STATISTICS
    record = ShardRecord(path.name, path.stat().st_size, file_sha256(path), {}, {})
    write_record(folder, _STATISTICS_NUMBER, record)


def has_statistics(folder: Path) -> bool:
    """Whether the channel statistics are there, as they were written."""
    return _read_record(folder, _STATISTICS_NUMBER, folder / STATISTICS) is not None


def finished_shards(folder: Path, shards: Path, n_shards: int) -> dict[int, ShardRecord]:
    """The records that are true, by shard number; every shard in the folder `shards` is read and hashed."""
    numbers = range(1, n_shards + 1)
    found = {n: _read_record(folder, n, shards / shard_name(n, n_shards)) for n in numbers}
    return {number: record for number, record in found.items() if record is not None}


def _read_record(folder: Path, number: int, path: Path) -> ShardRecord | None:
    """The record of the file `path`, if it and the file are as they were written."""
    value = _read_object(folder / record_name(number)) or {}
    if value.pop(_OWN_HASH, None) != _hash_of(value):
        return None
    record = ShardRecord(**value)
    same = (
        record.name == path.name
        and path.is_file()
        and path.stat().st_size == record.n_bytes
        and file_sha256(path) == record.sha256
    )
    return record if same else None


def _hash_of(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def shard_name(number: int, n_shards: int) -> str:
    return f"model-{number:05}-of-{n_shards:05}.safetensors"


class Hashed:
    """Pieces of a file on their way to the disk, counted and hashed."""

    def __init__(self, pieces: Iterable[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._digest = hashlib.sha256()
        self.n_bytes = 0

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for piece in self._pieces:
            self._digest.update(piece)
            self.n_bytes += len(piece)
            yield piece

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def record_name(number: int) -> str:
    """The file of a shard's record."""
    return f"shard-{number:05}.json"


def _read_object(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects, by dotted names."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
