"""A run that was killed goes on, and ends with the bytes of an undisturbed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kills import Victim
from tiny_checkpoints import files_outside_reports, quantize_tiny, stored_tensors
from tiny_models import TINY_MODELS, save_tiny_model

from atomq import block_loop, pipeline
from atomq.errors import ConfigError

ENCODINGS = ("atom", "progressive hadamard", "w16a4", "asymmetric", "searched clips", "kv after rope")


@pytest.fixture(scope="module")
def victim(tmp_path_factory) -> Victim:
    return Victim(tmp_path_factory.mktemp("victim"), n_blocks=3)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_run_that_is_killed_at_some_time_goes_on(victim, tmp_path, share):
    victim.kill_one(tmp_path / "OUT", after=share * victim.seconds)
    victim.go_on(tmp_path / "OUT")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["write", "rename", "sync", "sync_folder"])
def test_a_run_that_is_killed_inside_an_operation_of_the_disk_goes_on(victim, tmp_path, name, late):
    numbers = [i for i, found in enumerate(victim.operations) if found == name]
    kept = []
    for at in (numbers[0], numbers[len(numbers) // 2], numbers[-1]):
        out = tmp_path / str(at)
        assert victim.kill_one(out, at=at, late=late) == name
        kept.append(victim.go_on(out))
        left = [path.name for path in tmp_path.iterdir() if path.name.startswith(f".{at}.")]
        assert not left or at == numbers[-1]  # killed when the folder already had its name
    assert kept[1] > 0


def test_a_run_that_is_killed_again_and_again_goes_on(victim, tmp_path):
    out = tmp_path / "OUT"
    n_kills = 0
    for at in (80, 60, 50, 40, 40):
        n_kills += victim.kill_one(out, at=at) != "ended"
    assert n_kills >= 3
    assert victim.go_on(out) >= 1


def interrupted(model: Path, out: Path, monkeypatch, after: int = 1, **options) -> None:
    """Quantize until `after` blocks are done."""
    write, done = pipeline.CheckpointWriter.write_shard, []

    def write_and_stop(self, number, *rest):
        write(self, number, *rest)
        done.append(number)
        if len(done) == after + 1:  # the first shard is of no block
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.CheckpointWriter, "write_shard", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_tiny(model, out, **options)


@pytest.mark.parametrize("kind", [*TINY_MODELS, "opt", "mixtral", "gemma2"])
@pytest.mark.parametrize("scheme", ENCODINGS)
def test_every_family_and_encoding_goes_on_bit_for_bit(kind, scheme, tmp_path, monkeypatch):
    """The finished block, read back, computes what it did when it was made."""
    model = save_tiny_model(tmp_path / "model", kind)
    quantize_tiny(model, tmp_path / "undisturbed", scheme)
    interrupted(model, tmp_path / "OUT", monkeypatch, scheme=scheme)
    quantize_tiny(model, tmp_path / "OUT", scheme)
    for name in ("manifest.json", "config.json"):
        assert (tmp_path / "OUT" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    undisturbed = stored_tensors(tmp_path / "undisturbed")
    assert all(torch.equal(t, undisturbed[n]) for n, t in stored_tensors(tmp_path / "OUT").items())


def test_a_rotated_model_goes_on_bit_for_bit(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model", "qwen2")  # tied, and with biases
    rotated = {"scheme": "rtn", "settings": {"solver.method": "gptq", "solver.rotation": "fused"}}
    quantize_tiny(model, tmp_path / "undisturbed", **rotated)
    interrupted(model, tmp_path / "OUT", monkeypatch, **rotated)
    quantize_tiny(model, tmp_path / "OUT", **rotated)
    assert files_outside_reports(tmp_path / "OUT") == files_outside_reports(tmp_path / "undisturbed")


def test_what_is_finished_is_not_done_again(tiny_dir, tmp_path, monkeypatch):
    interrupted(tiny_dir, tmp_path / "OUT", monkeypatch)

    def fail(*_args, **_options):
        raise AssertionError("the statistics are there")

    quantized = []
    prepare = block_loop.BlockQuantizer.prepare
    monkeypatch.setattr(pipeline, "calibrate_blocks", fail)
    monkeypatch.setattr(
        block_loop.BlockQuantizer,
        "prepare",
        lambda self, *rest: (quantized.append(self.prefix), prepare(self, *rest))[1],
    )
    quantize_tiny(tiny_dir, tmp_path / "OUT")
    assert quantized == ["model.layers.1"]


def test_another_model_another_text_or_another_version_is_not_gone_on_with(tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model")
    interrupted(model, tmp_path / "OUT", monkeypatch)
    with pytest.raises(ConfigError, match=r"calibration\.n_samples was 4 and is 3"):
        quantize_tiny(model, tmp_path / "OUT", n_samples=3)
    with monkeypatch.context() as patch:
        patch.setattr("atomq.__version__", "9.9")
        with pytest.raises(ConfigError, match=r"versions\.atomq was '.*' and is '9\.9'"):
            quantize_tiny(model, tmp_path / "OUT")
    save_tiny_model(model, seed=1)
    with pytest.raises(ConfigError, match=r"source\.sha256 was"):
        quantize_tiny(model, tmp_path / "OUT")
    quantize_tiny(model, tmp_path / "OUT", restart=True)
    quantize_tiny(model, tmp_path / "undisturbed")
    undisturbed = stored_tensors(tmp_path / "undisturbed")
    assert all(torch.equal(t, undisturbed[n]) for n, t in stored_tensors(tmp_path / "OUT").items())
