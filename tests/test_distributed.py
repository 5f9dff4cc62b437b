"""Two processes find what one finds, but for the order of additions."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_checkpoints import calibration_text, files_outside_reports, stored_tensors
from tiny_models import make_tiny_model, save_tiny_model
from two_processes import in_two_processes

import atomq
from atomq import distributed
from atomq.assist import assist
from atomq.block_loop import calibrate_blocks, quantize_blocks
from atomq.cli import main
from atomq.config import (
    ActivationScheme,
    CalibrationConfig,
    KVScheme,
    OutlierScheme,
    QuantScheme,
    Recipe,
    SolverConfig,
    WeightScheme,
    override,
)
from atomq.errors import ConfigError, StorageError
from atomq.eval.perplexity import evaluate_perplexity
from atomq.eval.windows import TokenWindows
from atomq.formats.writer import CheckpointWriter
from atomq.models.experts import ExpertRouting, unfuse_experts
from atomq.models.families import find_family
from atomq.models.loading import load_float_model
from atomq.models.source import resolve_source
from atomq.presets import DEFAULT_PRESET, find_preset

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 256, (5, 40), generator=torch.Generator().manual_seed(0))
ATOM = Recipe(
    QuantScheme(
        WeightScheme(group_size=16, channel_group=2),
        ActivationScheme(group_size=16, clip_ratio=0.9),
        OutlierScheme(8, reorder=True),
        KVScheme(n_bits=4),
    ),
    SolverConfig(),
)
SEQUENTIAL = dataclasses.replace(ATOM, solver=SolverConfig(calibration="sequential"))
ROTATED = dataclasses.replace(ATOM, solver=SolverConfig(rotation="fused"))
AUTO = dataclasses.replace(ATOM, solver=SolverConfig(rotation="auto"))
LEVERS = dataclasses.replace(
    ATOM,
    scheme=dataclasses.replace(
        ATOM.scheme, kv=KVScheme(4, key_position="after_rope", rotation="hadamard", key_balance=True)
    ),
    solver=SolverConfig(clip_search="hessian", descent_sweeps=2, asymmetry=0.5),
)
BEFORE_ROPE = {"kv.key_position": "before_rope", "kv.key_balance": False, "kv.key_offset": True}
CLIPS = override(LEVERS, {"activations.clip_search": "output"} | BEFORE_ROPE)


def quiet(_done: float, _total: int, _step: str) -> None:
    pass


def model_of(kind: str):
    model = make_tiny_model(kind)
    unfuse_experts(model, find_family(model.config.model_type))
    return model


def statistics(kind: str):
    return calibrate_blocks(model_of(kind), TOKENS, CPU, quiet)


def quantized(kind: str, recipe: Recipe, tokens=TOKENS, all_experts: bool = False):
    """State, reports and logits of a quantized model."""
    model = model_of(kind)
    report = quantize_blocks(model, recipe, CPU, quiet, tokens, routing=ExpertRouting(all_experts))
    return model.state_dict(), report, model(TOKENS).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2_moe"])
def test_statistics_are_those_of_one_process(kind, tmp_path):
    expected = statistics(kind)
    for found in in_two_processes(tmp_path, statistics, kind):
        assert found.keys() == expected.keys()
        for name, own in expected.items():
            assert torch.allclose(found[name].hessian, own.hessian, rtol=1e-5)
            assert torch.allclose(found[name].abs_mean, own.abs_mean, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "recipe", "n_windows"),
    [
        ("llama-mha-bias", ATOM, 5),
        ("qwen3", SEQUENTIAL, 5),
        ("llama", ATOM, 2),
        ("llama", LEVERS, 5),
        ("llama", CLIPS, 5),
        ("mixtral", ATOM, 5),
    ],
)
def test_codes_are_those_of_one_process_but_for_ties(kind, recipe, n_windows, tmp_path):
    tokens = TOKENS[:n_windows, : 40 if n_windows == 5 else 12]  # the short ones hold tokens out
    state, report, logits = quantized(kind, recipe, tokens)
    results = in_two_processes(tmp_path, quantized, kind, recipe, tokens)
    first, second = results
    assert first[1].linears == second[1].linears
    assert torch.equal(first[2], second[2])
    for name, tensor in first[0].items():
        assert torch.equal(tensor.view(torch.uint8), second[0][name].view(torch.uint8)), name
    assert [(r.name, r.method) for r in first[1].linears] == [(r.name, r.method) for r in report.linears]
    assert first[1].starved_experts == report.starved_experts
    codes = [name for name in state if name.endswith("qweight")]
    differing = sum(int((state[name] != first[0][name]).sum()) for name in codes)
    assert differing <= 0.01 * sum(state[name].numel() for name in codes)
    assert (first[2] - logits).norm() < 0.05 * logits.norm()


def test_processes_that_refine_together_hold_the_same_bytes(tmp_path):
    recipe = dataclasses.replace(LEVERS, solver=dataclasses.replace(LEVERS.solver, refine_steps=3))
    first, second = in_two_processes(tmp_path, quantized, "llama", recipe)
    for name, tensor in first[0].items():
        assert torch.equal(tensor.view(torch.uint8), second[0][name].view(torch.uint8)), name


def test_each_group_is_solved_by_one_process_only(tmp_path, monkeypatch):
    import atomq.block_quantizer as module

    original = module.solve_group

    def solve(weights, hessian, scheme, solver):
        solved.append((tuple(weights[0].shape), hessian.n_tokens))
        return original(weights, hessian, scheme, solver)

    solved: list[tuple[tuple[int, ...], int]] = []
    monkeypatch.setattr(module, "solve_group", solve)

    def count():
        quantized("llama", ATOM)
        return solved

    first, second = in_two_processes(tmp_path, count)
    assert len(first) + len(second) == 2 * 4
    assert not {shape for shape, _ in first} & {shape for shape, _ in second}
    assert {n_tokens for _, n_tokens in first + second} == {TOKENS.numel()}


def perplexity(n_windows: int):
    windows = TokenWindows("text", "0" * 64, "joined", TOKENS[:n_windows])
    told = []
    baseline = make_tiny_model("llama", seed=1)
    return evaluate_perplexity(make_tiny_model(), windows, baseline, told.append), told


def test_perplexity_is_that_of_one_process(tmp_path):
    expected, _ = perplexity(5)
    for rank, (found, told) in enumerate(in_two_processes(tmp_path, perplexity, 5)):
        assert found == expected
        assert (told[-1].done, told[-1].total) == (3 - rank, 3 - rank)


def test_fewer_windows_than_processes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="1 windows cannot be shared by 2 processes; give more text"):
        in_two_processes(tmp_path, perplexity, 1)


def test_work_is_shared_so_that_all_are_done_at_about_the_same_time(monkeypatch):
    assert distributed.share_work([3.0, 9.0, 1.0]) == [0, 0, 0]
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    assert distributed.share_work([3.0, 9.0, 4.0, 1.0, 1.0]) == [0, 1, 0, 0, 0]
    monkeypatch.setattr(distributed, "n_processes", lambda: 3)
    assert distributed.share_work([5.0, 5.0, 5.0, 1.0]) == [2, 1, 0, 2]


def messages():
    own = distributed.rank()
    tensors = {
        "codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3) + own,
        "scales": torch.tensor([1.5, float("inf"), -0.0], dtype=torch.float16) + own,
        "fp8": torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn),
        "none": torch.empty(0, 4),
    }
    return {
        "sent": distributed.tensors_from(1, tensors if own == 1 else {}, CPU),
        "value": distributed.from_process(1, f"of {own}"),
        "gathered": distributed.gather(own * 10),
        "total": distributed.total(own + 5),
        "share": distributed.own_share(torch.arange(5)).tolist(),
        "first": distributed.is_first(),
    }


def test_messages_arrive_as_they_were_sent(tmp_path):
    alone = messages()
    assert (alone["value"], alone["gathered"], alone["total"]) == ("of 0", [0], 5)
    assert alone["share"] == [0, 1, 2, 3, 4]
    for rank, found in enumerate(in_two_processes(tmp_path, messages)):
        assert (found["value"], found["gathered"], found["total"]) == ("of 1", [0, 10], 11)
        assert found["share"] == [[0, 1, 2], [3, 4]][rank]
        assert found["first"] == (rank == 0)
        sent = found["sent"]
        assert sent["codes"].tolist() == [[1, 2, 3], [4, 5, 6]]
        assert sent["scales"].tolist() == [2.5, float("inf"), 1.0]
        assert sent["fp8"].dtype == torch.float8_e4m3fn
        assert sent["fp8"].float().tolist() == [[1.0, 2.0]]
        assert sent["none"].shape == (0, 4)


def source_of(kind, folder):
    """A tiny model, and in its folder a text."""
    source = save_tiny_model(folder / "model", kind)
    calibration_text(source)
    return source


def checkpoint_of(source, out, n_shards: int | None = None, recipe: Recipe = ATOM):
    """Quantize as the command does; the disk is full after `n_shards`."""
    calibration = CalibrationConfig(str(source / "calibration.txt"), 5, seq_len=32)
    if not distributed.is_first():
        assist(str(source), recipe, CPU, calibration)
        return None
    write_shard = CheckpointWriter.write_shard

    def until_full(writer, number, *rest):
        if number == n_shards:
            raise StorageError("the disk is full")
        write_shard(writer, number, *rest)

    CheckpointWriter.write_shard = until_full
    try:
        return atomq.pipeline.quantize(str(source), out, recipe, "cpu", calibration=calibration).report
    finally:
        CheckpointWriter.write_shard = write_shard


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("llama", ATOM), ("qwen3_moe-dense-first", ATOM), ("qwen2", ROTATED), ("phi3", AUTO)],
)
def test_two_processes_write_the_checkpoint_of_one(kind, recipe, tmp_path):
    source = source_of(kind, tmp_path)
    expected = checkpoint_of(source, tmp_path / "ONE", recipe=recipe)
    found, nothing = in_two_processes(tmp_path, checkpoint_of, source, tmp_path / "TWO", None, recipe)
    assert nothing is None
    assert [(r.name, r.method) for r in found.linears] == [(r.name, r.method) for r in expected.linears]
    one, two = stored_tensors(tmp_path / "ONE"), stored_tensors(tmp_path / "TWO")
    assert one.keys() == two.keys()
    first = [n for n in one if n.startswith("model.layers.0.") and n.endswith("qweight")]
    assert sum(int((one[n] != two[n]).sum()) for n in first) <= 0.001 * sum(one[n].numel() for n in first)
    # A code of an activation at a tie moves what comes after it, in either direction: it costs no accuracy.
    float_logits = load_float_model(resolve_source(str(source)))(TOKENS).logits
    errors = [(atomq.load(tmp_path / name)(TOKENS).logits - float_logits).norm() for name in ("ONE", "TWO")]
    assert abs(errors[0] - errors[1]) < 0.1 * errors[0]


def test_two_processes_go_on_after_a_crash_and_write_the_same_bytes(tmp_path):
    source = source_of("mixtral", tmp_path)
    in_two_processes(tmp_path, checkpoint_of, source, tmp_path / "WHOLE")
    with pytest.raises(StorageError, match="the disk is full"):
        in_two_processes(tmp_path, checkpoint_of, source, tmp_path / "OUT", 3)
    with pytest.raises(ConfigError, match="processes"):
        checkpoint_of(source, tmp_path / "OUT")
    in_two_processes(tmp_path, checkpoint_of, source, tmp_path / "OUT")
    assert files_outside_reports(tmp_path / "OUT") == files_outside_reports(tmp_path / "WHOLE")


def test_quantize_assists_where_it_is_not_the_first_process(tiny_dir, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("atomq.assist.assist", lambda *args: calls.append(args))
    assert main(["quantize", str(tiny_dir), str(tmp_path / "OUT"), "--seq-len", "64", "--device", "cpu"]) == 0
    assert calls == [(str(tiny_dir), find_preset(DEFAULT_PRESET), CPU, CalibrationConfig(seq_len=64))]
    assert not (tmp_path / "OUT").exists()


def test_torchrun_and_a_command_give_one_answer_and_one_progress(tiny_dir, text_file, capfd):
    argv = ["eval-ppl", str(tiny_dir), "--data", str(text_file), "--seq-len", "64", "--max-windows", "5"]
    assert main([*argv, "--json", "--no-record"]) == 0
    expected, progress = capfd.readouterr()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "atomq"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *argv, "--json", "--no-record"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(expected)
    lines = [line for line in done.stderr.splitlines() if line.startswith("eval-ppl:")]
    assert len([line for line in lines if "100%" in line]) == 1
    assert len([line for line in progress.splitlines() if "100%" in line]) == 1
