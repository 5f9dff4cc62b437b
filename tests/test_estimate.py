"""A dry run says what the run then takes, leaves nothing, and refuses what cannot fit."""

from __future__ import annotations

import json
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoints import calibration_text, quantize_tiny, recipe_of
from tiny_models import save_tiny_model

import atomq.estimate
import atomq.memory
from atomq.cli import main
from atomq.config import CalibrationConfig
from atomq.errors import ConfigError, StorageError
from atomq.estimate import estimate
from atomq.memory import PeakMemory, free_bytes, give_back_large_ones, held_bytes
from atomq.models.streaming import StoredWeights

CPU = torch.device("cpu")


def dry_run(model: Path, out: Path, scheme: str = "atom", **options):
    calibration = CalibrationConfig(str(calibration_text(out.parent)), 4, seq_len=32)
    return estimate(str(model), out, recipe_of(scheme), CPU, calibration=calibration, **options)


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 6}
    return save_tiny_model(tmp_path_factory.mktemp("models") / "deep", **sizes)


@pytest.mark.parametrize("scheme", ["atom", "rtn", "w16a4"])
def test_memory_and_disk_are_what_the_run_then_takes(deep, tmp_path, scheme):
    found = dry_run(deep, tmp_path / "OUT", scheme)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.txt"]
    quantize_tiny(deep, tmp_path / "OUT", scheme)
    report = json.loads((tmp_path / "OUT" / "reports" / "quantize.json").read_text())
    assert found.out_bytes == pytest.approx(size_of(tmp_path / "OUT"), rel=0.25)
    assert found.disk_bytes == found.out_bytes
    assert found.ram_bytes == pytest.approx(report["host"]["peak_memory_bytes"], rel=0.25)
    assert (found.gpu_bytes, found.free_gpu_bytes) == (None, None)
    times = report["block_seconds"]
    assert len(times["quantizing"]) == 6
    assert len(times["statistics"]) == (0 if scheme == "rtn" else 6)
    assert 0 < sum(times["quantizing"]) < report["seconds"]["total"]


def test_the_phases_are_those_of_the_run_and_grow_with_the_number_of_blocks(deep, tmp_path):
    found = dry_run(deep, tmp_path / "OUT")
    result = quantize_tiny(deep, tmp_path / "OUT")
    assert set(found.seconds) == set(result.summary["seconds"])
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert found.seconds["total"] == pytest.approx(
        sum(seconds for phase, seconds in found.seconds.items() if phase != "total")
    )


def test_time_is_that_of_one_block_times_the_number_of_blocks(deep, tmp_path, monkeypatch):
    """With a probe whose times are known."""

    class Probe(atomq.estimate._Probe):
        def run(self, token_ids, scratch, outside):
            super().run(token_ids, scratch, outside)
            self.phases = {"statistics": (2.0, 3.0), "solving": (0.0, 5.0), "writing": (0.0, 0.5)}
            self.shard_bytes, self.seconds_per_byte = 1000, 0.0

    monkeypatch.setattr(atomq.estimate, "_Probe", Probe)
    seconds = dry_run(deep, tmp_path / "OUT").seconds
    assert {name: seconds[name] for name in ("statistics", "solving", "writing")} == {
        "statistics": 2 + 6 * 3,
        "solving": 30,
        "writing": 3,
    }


def test_a_disk_slower_than_the_computing_is_waited_for(deep, tmp_path, monkeypatch):
    class Probe(atomq.estimate._Probe):
        def run(self, token_ids, scratch, outside):
            super().run(token_ids, scratch, outside)
            self.phases = {"solving": (0.0, 1.0), "writing": (0.0, 0.5)}
            self.shard_bytes, self.seconds_per_byte = 1_000_000, 1e-5

    monkeypatch.setattr(atomq.estimate, "_Probe", Probe)
    found = dry_run(deep, tmp_path / "OUT")
    stored = load_file(deep / "model.safetensors")
    outside = sum(t.numel() * t.element_size() for name, t in stored.items() if ".layers." not in name)
    assert found.seconds["total"] == pytest.approx(1e-5 * (6_000_000 + outside))


def test_memory_that_the_preparations_take_for_a_while_counts(deep, tmp_path, monkeypatch):
    before = dry_run(deep, tmp_path / "OUT").ram_bytes

    def cut(*args):
        windows = cut_windows(*args)
        room = bytearray(300_000_000)
        room[::4096] = bytes([1]) * len(room[::4096])
        time.sleep(0.1)
        return windows

    cut_windows = atomq.estimate.cut_windows
    monkeypatch.setattr(atomq.estimate, "cut_windows", cut)
    assert dry_run(deep, tmp_path / "OUT").ram_bytes > before + 150_000_000


def test_what_is_outside_of_the_blocks_is_read_beside_the_probe_as_in_a_run(tmp_path, monkeypatch):
    """Under another number of threads that compute, OpenMP's pools wait in another way: on busy cores a probe
    without that thread took up to nine times as long as the run.
    """
    model = save_tiny_model(tmp_path / "wide", vocab_size=40_000, hidden_size=128, num_hidden_layers=1)
    read = {}

    def pieces(self, name):
        read[name] = threading.current_thread().name
        return original(self, name)

    original = StoredWeights.pieces
    monkeypatch.setattr(StoredWeights, "pieces", pieces)
    dry_run(model, tmp_path / "OUT")
    assert set(read) >= {"model.embed_tokens.weight", "model.norm.weight"}
    assert all(name.startswith("atomq-background") for name in read.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what is held now")
def test_large_tensors_are_given_back_though_small_ones_behind_them_live_on():
    give_back_large_ones()
    learned_from = torch.ones(7_500_000)  # glibc would keep what is smaller
    del learned_from
    before = held_bytes()
    large, small = [], []
    for _ in range(8):
        large.append(torch.ones(2_000_000))
        small.append(torch.ones(20_000))
    del large
    assert held_bytes() - before < 16e6


def test_activations_on_the_disk_count_there(deep, tmp_path):
    here, there = (dry_run(deep, tmp_path / "OUT", activations=place) for place in ("device", "disk"))
    assert there.disk_bytes - there.out_bytes == 4 * 32 * 128 * 4
    assert here.disk_bytes == here.out_bytes


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_what_cannot_fit_is_refused(deep, tmp_path, monkeypatch, what):
    if what == "memory":
        monkeypatch.setattr(atomq.estimate, "free_bytes", lambda: 10_000_000)
        monkeypatch.setattr(atomq.estimate, "held_bytes", lambda: 0)
    else:
        usage = atomq.estimate.shutil.disk_usage(tmp_path)._replace(free=100_000)
        monkeypatch.setattr(atomq.estimate.shutil, "disk_usage", lambda _place: usage)
    with pytest.raises(
        ConfigError, match=rf"the run cannot fit: [1-9].* [kM]?B of {what} are needed, [1-9].*B are free"
    ):
        dry_run(deep, tmp_path / "OUT")


def test_a_place_that_the_run_may_not_write_is_refused(deep, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").touch()
    with pytest.raises(ConfigError, match="mine exists and is not a checkpoint of atomq"):
        dry_run(deep, tmp_path / "mine", overwrite=True)
    quantize_tiny(deep, tmp_path / "OUT", "rtn")
    with pytest.raises(ConfigError, match="OUT exists; name another folder or add --overwrite"):
        dry_run(deep, tmp_path / "OUT", "rtn")
    dry_run(deep, tmp_path / "OUT", "rtn", overwrite=True)
    with pytest.raises(StorageError, match=r"precious\.txt is no folder"):
        estimate(str(deep), tmp_path / "mine" / "precious.txt" / "new" / "OUT", recipe_of("rtn"), CPU)


def test_what_is_hopeless_is_refused_before_any_block_is_read(deep, tmp_path, monkeypatch):
    monkeypatch.setattr(atomq.estimate, "free_bytes", lambda: 500_000)
    monkeypatch.setattr(atomq.estimate, "_Probe", None)
    with pytest.raises(
        ConfigError, match=r"the run cannot fit: at least [1-9].* MB of memory are needed, 500\.0 kB are free"
    ):
        dry_run(deep, tmp_path / "OUT")


def test_the_command_prints_and_stops(tiny_dir, tmp_path, text_file, capsys):
    argv = ["quantize", tiny_dir, tmp_path / "OUT", "--n-outliers", 5, "--group-size", 16, "--dry-run"]
    argv = [str(part) for part in (*argv, "--calib-data", text_file, "--n-samples", 4, "--seq-len", 64)]
    assert main(argv) == 0
    assert "what the run would take" in capsys.readouterr().out
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ram_bytes"] > 1e8
    assert not (tmp_path / "OUT").exists()


def test_memory_that_is_held_for_a_moment_is_noticed():
    before = held_bytes()
    with PeakMemory(CPU) as memory:
        block = torch.ones(50_000_000)
        atomq.memory.threading.Event().wait(0.1)
        del block
    assert memory.peak_bytes - before == pytest.approx(200e6, rel=0.2)
    assert memory.peak_gpu_bytes is None
    assert free_bytes() is None or free_bytes() > 0


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_where_proc_says_nothing_the_system_is_asked_in_its_own_unit(monkeypatch, platform, unit):
    def unreadable(*_args, **_options):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", unreadable)
    monkeypatch.setattr(atomq.memory.sys, "platform", platform)
    usage = types.SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr(atomq.memory.resource, "getrusage", lambda _who: usage)
    assert held_bytes() == 7 * unit
