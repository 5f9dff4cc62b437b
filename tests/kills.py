"""kill -9 at any moment of a small run: the same call goes on and ends with the bytes of an undisturbed run.

`python tests/kills.py 200 --save RECORD` kills 200 runs, most of them spread evenly over the run's time, the
others inside an operation of the disk: when half of a file is written, just before or just after a rename.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import calibration_text, files_outside_reports, recipe_of
from tiny_models import save_tiny_model

import atomq
from atomq import pipeline
from atomq.config import CalibrationConfig, Recipe
from atomq.formats import files
from atomq.formats.files import Disk, remove_tree

N_BLOCKS = 6


class WatchedDisk(Disk):
    """Says in `state`, which the parent process shares, how many operations there were and which one is in
    progress; dies by SIGKILL inside operation number `at`.
    """

    OPERATIONS = (
        "",
        "make_folder",
        "create",
        "write",
        "sync",
        "rename",
        "sync_folder",
        "remove",
        "remove_folder",
    )

    def __init__(self, state: mmap.mmap, at: int | None = None, *, late: bool = False) -> None:
        self.state, self.at, self.late = state, at, late
        self.done = 0

    def _within(self, name: str, operation: Any, *args: Any) -> Any:
        self.state[0] = self.OPERATIONS.index(name)
        dies = self.done == self.at
        if dies and name == "write":
            super().write(args[0], args[1][: len(args[1]) // 2])
        if dies and not (self.late and name != "write"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = operation(*args)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        self.done += 1
        self.state[0] = 0
        self.state[1:5] = self.done.to_bytes(4, "little")
        return result

    def make_folder(self, folder: Path) -> None:
        self._within("make_folder", super().make_folder, folder)

    def create(self, path: Path) -> int:
        descriptor: int = self._within("create", super().create, path)
        return descriptor

    def write(self, descriptor: int, content: memoryview) -> int:
        n_written: int = self._within("write", super().write, descriptor, content)
        return n_written

    def sync(self, descriptor: int) -> None:
        self._within("sync", super().sync, descriptor)

    def rename(self, source: Path, target: Path) -> None:
        self._within("rename", super().rename, source, target)

    def sync_folder(self, folder: Path) -> None:
        self._within("sync_folder", super().sync_folder, folder)

    def remove(self, path: Path) -> None:
        self._within("remove", super().remove, path)

    def remove_folder(self, folder: Path) -> None:
        self._within("remove_folder", super().remove_folder, folder)


class Victim:
    """A job that is run in forked processes, with its undisturbed result and duration.

    Attributes:
        operations: the disk's in an undisturbed run, by name.
    """

    def __init__(self, folder: Path, scheme: str = "atom", n_blocks: int = N_BLOCKS) -> None:
        self.folder = folder
        self.model = save_tiny_model(folder / "model", num_hidden_layers=n_blocks)
        self.text = calibration_text(folder)
        self.recipe: Recipe = recipe_of(scheme)
        self.state = mmap.mmap(-1, 16)
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            self.run(folder / "undisturbed", overwrite=True)
            self.seconds = time.perf_counter() - began
        self.expected = files_outside_reports(folder / "undisturbed")
        self.operations = self._names_of_operations()

    def run(self, out: Path, *, overwrite: bool = False) -> None:
        calibration = CalibrationConfig(str(self.text), 4, seq_len=32)
        pipeline.quantize(
            str(self.model), out, self.recipe, "cpu", calibration=calibration, overwrite=overwrite
        )

    def _names_of_operations(self) -> list[str]:
        names: list[str] = []

        class Noting(WatchedDisk):
            def _within(self, name: str, operation: Any, *args: Any) -> Any:
                names.append(name)
                return operation(*args)

        files.disk = Noting(self.state)
        try:
            self.run(self.folder / "noted")
        finally:
            files.disk = Disk()
        return names

    def kill_one(
        self, out: Path, *, after: float | None = None, at: int | None = None, late: bool = False
    ) -> str:
        """Run in a process of its own and kill it after `after` seconds, or inside operation `at`.

        Answers the operation in which it was killed, "" between operations, "ended" if it was too late.
        """
        self.state[:] = bytes(16)
        pid = os.fork()
        if pid == 0:
            try:
                files.disk = WatchedDisk(self.state, at, late=late)
                self.run(out)
                os._exit(0)
            except BaseException:  # noqa: BLE001 -- a fork must never return
                traceback.print_exc()
                os._exit(7)
        if after is not None:
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status) != 0:
                raise AssertionError(f"the run failed by itself, with exit code {os.WEXITSTATUS(status)}")
            return "ended"
        return WatchedDisk.OPERATIONS[self.state[0]]

    def go_on(self, out: Path) -> int:
        """Run again to the end and hold the bytes against the undisturbed ones; answer the shards kept.

        Raises:
            AssertionError: the result differs, or something lies beside it.
        """
        records = out.parent.glob(f".{out.name}.partial/progress/shard-*.json")
        kept = sum(path.name != "shard-00000.json" for path in records)  # that one is of the statistics
        if not out.exists():
            self.run(out)
        if files_outside_reports(out) != self.expected:
            raise AssertionError(f"{out} differs from the undisturbed run")
        return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int)
    parser.add_argument("--save", type=Path, help="write the record here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    inside, kept, n_whole = Counter[str](), Counter[int](), 0
    with tempfile.TemporaryDirectory() as folder:
        victim = Victim(Path(folder))
        writes = [i for i, name in enumerate(victim.operations) if name == "write"]
        renames = [i for i, name in enumerate(victim.operations) if name == "rename"]
        n_inside = options.n // 5
        for number in range(options.n):
            out = Path(folder) / f"out-{number}"
            if number < n_inside:
                kind = (writes, renames)[number % 2]
                at = kind[number * len(kind) // n_inside]
                inside[victim.kill_one(out, at=at, late=number % 4 == 3)] += 1
            else:
                share = (number - n_inside + 0.5) / (options.n - n_inside)
                after, killed = share * victim.seconds, "ended"
                while killed == "ended":  # it was faster than the undisturbed run: a little earlier, please
                    remove_tree(out)
                    killed = victim.kill_one(out, after=after)
                    after *= 0.95
                inside[killed] += 1
            n_whole += out.exists()
            kept[victim.go_on(out)] += 1
    record = {
        "what": f"kill -9 of a run over {N_BLOCKS} blocks, then the same call again; bytes compared",
        "n_killed": options.n,
        "n_equal_bytes": options.n,
        "n_killed_after_the_folder_got_its_name": n_whole,
        "killed_inside_operation": {name or "between": count for name, count in sorted(inside.items())},
        "shards_kept_of": {f"{n} of {N_BLOCKS + 1}": count for n, count in sorted(kept.items())},
        "seconds_of_undisturbed_run": round(victim.seconds, 2),
        "disk_operations_of_undisturbed_run": dict(Counter(victim.operations)),
        "versions": {"atomq": atomq.__version__, "torch": torch.__version__},
    }
    sys.stdout.write(json.dumps(record, indent=2) + "\n")
    if options.save:
        files.write_json(options.save, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
