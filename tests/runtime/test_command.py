"""`atomq generate --backend kernels` on a CPU: the kernels' twins continue prompts as the simulation does."""

from __future__ import annotations

import json

import pytest
from tiny_checkpoints import calibration_text
from tiny_models import save_tiny_model

from atomq.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    sizes = {"hidden_size": 448, "intermediate_size": 320, "head_dim": 64}
    model = save_tiny_model(folder / "model", **sizes)
    calibration = ["--calib-data", calibration_text(folder), "--n-samples", 2, "--seq-len", 32]
    settings = ["--n-outliers", 40, "--set", "solver.method=rtn", "--set", "kv.rotation=hadamard"]
    argv = ["quantize", model, folder / "OUT", "--preset", "atom", *calibration, *settings]
    argv += ["--check", "off", "--quiet"]
    assert main([str(part) for part in argv]) == 0
    return folder / "OUT"


def test_the_decoder_continues_as_the_simulation_does(checkpoint, capsys):
    def made(backend, *more):
        capsys.readouterr()
        argv = ["generate", str(checkpoint), "seven wizards", "mix", "--max-new-tokens", "6", "--json"]
        assert main([*argv, "--backend", backend, *more]) == 0
        return [one["text"] for one in json.loads(capsys.readouterr().out)["generations"]]

    assert made("kernels") == made("simulation")
    sampled = ("--temperature", "0.9", "--top-k", "20", "--seed", "5")
    assert made("kernels", *sampled) == made("simulation", *sampled)


def test_a_model_that_the_decoder_does_not_take_runs_by_its_linears(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    out = str(tmp_path / "OUT")
    assert main(["quantize", str(model), out, "--preset", "rtn", "--check", "off", "--quiet"]) == 0
    assert main(["generate", out, "mix", "--backend", "kernels", "--device", "cpu"]) == 1
    told = capsys.readouterr().err
    assert "only the linears run on the kernels" in told
    assert "head_dim 12; the decode kernel takes" in told
    assert main(["generate", out, "mix", "--backend", "decoder"]) == 2
    assert "is not one of simulation, kernels" in capsys.readouterr().err
