"""The comparison of decode path and simulation, on a tiny checkpoint and the kernels' twins."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from tiny_checkpoints import calibration_text
from tiny_models import save_tiny_model

from atomq.cli import main
from benchmarks import decode
from benchmarks.decode import N_NUDGED, compare_greedy, nudged_logits, perplexity, run, run_noise
from benchmarks.e2e_tables import decode_table


def test_a_checkpoint_is_held_against_its_simulation(tmp_path, monkeypatch):
    profiled = []

    def profile_step(launch):  # a step without CUDA's trace
        profiled.append(launch())
        return {"attention": 30.0, "launches": 10.0}

    monkeypatch.setattr(decode, "profile_step", profile_step)
    model = save_tiny_model(tmp_path / "model", hidden_size=448, intermediate_size=320, head_dim=64)
    text = calibration_text(tmp_path)
    calibration = ["--calib-data", text, "--n-samples", 2, "--seq-len", 32, "--n-outliers", 40]
    argv = [
        "quantize",
        model,
        tmp_path / "OUT",
        "--preset",
        "atom",
        *calibration,
        "--set",
        "solver.method=rtn",
    ]
    argv += ["--check", "off"]
    assert main([*map(str, argv), "--quiet"]) == 0
    record = run(tmp_path / "OUT", ["mix", "seven"], str(text), 4, 2, 32, profiles=True)
    assert [row["n_equal"] for row in record["greedy"]["float32"]] == [4, 4]
    assert math.isclose(record["ppl"]["float32"], record["ppl"]["simulation"], rel_tol=1e-3)
    assert record["ppl"]["float16"] < 1.2 * record["ppl"]["simulation"]
    assert set(record["tokens_per_s"]) == {"float32, batch 1", "float16, batch 1"}
    assert record["simulation_tokens_per_s"] > 0
    table = decode_table(record)
    assert "OUT: 2 windows of 32 tokens, 2 prompts of 4 greedy tokens." in table
    assert "| 4 of 4 |" in table
    assert [tokens.shape for tokens in profiled] == [(1,), (1,)]
    assert "| float32 | 1 | 75 % | 25 % | 0.04 |" in table
    assert "trace" not in decode_table({k: v for k, v in record.items() if k != "shares"})
    alone = run_noise(tmp_path / "OUT", str(text), 2, 24)
    assert alone["noise"].keys() == record["noise"]["float32"].keys() == {"kernels", "simulation", "nudged"}
    for name, found in record["noise"]["float32"].items():
        assert found["differs"] < 0.1, name
        assert found["distance"] < 0.02, name


def test_perplexity_of_equal_chances_is_the_number_of_choices():
    windows = [torch.randint(0, 7, (9,)), torch.randint(0, 7, (5,))]
    assert math.isclose(perplexity(lambda w: torch.zeros(len(w), 7), windows), 7, rel_tol=1e-5)


class Echo(torch.nn.Module):
    """A model whose logits are the embeddings of its tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(5, 64)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids):
        return SimpleNamespace(logits=self.embedding(ids))


def test_a_nudge_moves_every_channel_by_one_unit_in_the_last_place():
    model, ids = Echo(), torch.tensor([3, 1])
    plain = model.embedding(ids).detach().view(torch.int32)  # neighbours among float32 are neighbours here
    moved = nudged_logits(model, ids, 2).detach().view(torch.int32) - plain
    assert moved.shape == (2, 2, 64)
    assert moved.abs().eq(1).all()
    assert (moved == 1).any()
    assert (moved == -1).any()
    assert (moved[0] != moved[1]).any()
    assert torch.equal(model.embedding(ids).detach().view(torch.int32), plain)  # the hook is gone


def test_a_first_difference_is_held_against_the_simulations_own_rounding(monkeypatch):
    model = Echo()
    with torch.no_grad():  # after 0 comes 1; after 1 comes 2, and 3 as good as that
        model.embedding.weight.fill_(-1.0)
        model.embedding.weight[0, 1] = model.embedding.weight[1, 2] = 1.0
        model.embedding.weight[1, 3] = 1.0 - 2**-24
    decoder = SimpleNamespace(
        device=torch.device("cpu"), prefill=lambda ids, *_: model(ids[0]).logits[-1:].flip(-1)
    )
    monkeypatch.setattr(decode, "Cache", lambda *_: None)
    monkeypatch.setattr(decode, "generate", lambda *_: [[1, 3, 4], [1, 4, 4]])
    near, decided = compare_greedy(model, decoder, [[0], [0]], 3)
    assert near["n_equal"] == decided["n_equal"] == 1
    assert near["simulation_gap"] == 2**-24
    assert len(near["nudged_gaps"]) == N_NUDGED
    assert min(near["nudged_gaps"]) < 0 < max(near["nudged_gaps"])
    assert decided["simulation_gap"] == 2.0
    assert min(decided["nudged_gaps"]) > 1.9
