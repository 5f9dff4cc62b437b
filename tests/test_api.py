"""The Python API is the command line: the same names, the same defaults, the same results; its pages run."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import files_outside_reports
from tiny_models import save_tiny_model

import atomq
from atomq import api, memory
from atomq.cli import main
from atomq.commands import calibrate, eval_ppl, generate, quantize, verify
from atomq.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
SHOWN_ONLY = {"json_output", "show_recipe", "dry_run", "worst"}  # what a command prints, and nothing else
TINY = {"n_outliers": 5, "group_size": 16, "n_samples": 4, "seq_len": 64}


def parameters(function) -> dict[str, object]:
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.name not in SHOWN_ONLY | {"on_progress"}}


def same(first: object, second: object) -> bool:
    return str(first) == str(second) if isinstance(second, Path) else first == second


@pytest.mark.parametrize(
    ("function", "command"),
    [
        (atomq.calibrate, calibrate.command),
        (atomq.quantize, quantize.command),
        (atomq.evaluate_ppl, eval_ppl.command),
        (atomq.verify, verify.command),
    ],
)
def test_names_and_defaults_are_those_of_the_command(function, command):
    ours, theirs = parameters(function), parameters(command)
    assert set(ours) == set(theirs)
    assert {name: value for name, value in ours.items() if not same(value, theirs[name])} == {}


def test_load_takes_what_generate_takes():
    theirs = parameters(generate.command)
    ours = parameters(atomq.load)
    assert set(ours) <= set(theirs)
    assert all(same(value, theirs[name]) for name, value in ours.items())


def test_commands_tell_the_allocator_to_give_large_tensors_back_and_functions_leave_the_process_alone(
    tiny_dir, tmp_path, monkeypatch
):
    told = []
    allocator = types.SimpleNamespace(mallopt=lambda *setting: told.append(setting), malloc_trim=lambda _: 0)
    monkeypatch.setattr(memory, "_C", allocator)
    environment = dict(os.environ)
    atomq.quantize(tiny_dir, tmp_path / "OUT", preset="rtn", check="off")
    assert told == []
    assert dict(os.environ) == environment
    argv = ["quantize", str(tiny_dir), str(tmp_path / "OUT-2"), "--preset", "rtn", "--check", "off"]
    assert main(argv) == 0
    assert told == [(-3, 4 << 20)]


def test_importing_atomq_loads_nothing_and_everything_is_there_when_asked_for():
    script = (
        "import sys, atomq; print('torch' in sys.modules, [getattr(atomq, n) and n for n in atomq.__all__])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"False {atomq.__all__}\n"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = atomq.quantise


def test_the_same_bytes_as_the_command(tiny_dir, tmp_path, text_file):
    atomq.quantize(tiny_dir, tmp_path / "one", calib_data=text_file, **TINY)
    argv = ["quantize", tiny_dir, tmp_path / "two", "--calib-data", text_file]
    for name, value in TINY.items():
        argv += [f"--{name.replace('_', '-')}", value]
    assert main([str(part) for part in argv]) == 0
    assert files_outside_reports(tmp_path / "one") == files_outside_reports(tmp_path / "two")
    records = [json.loads((tmp_path / o / "reports" / "verify.json").read_text()) for o in ("one", "two")]
    assert records[0] | {"checkpoint": "two"} == records[1]


def test_settings_are_a_list_or_a_mapping(tiny_dir, tmp_path):
    for index, settings in enumerate((["weights.n_bits=3"], {"weights.n_bits": 3})):
        result = atomq.quantize(
            tiny_dir, tmp_path / str(index), preset="rtn", group_size="none", settings=settings, check="off"
        )
        assert (
            result.summary["recipe"]["scheme"]["weights"] | {"n_bits": 3, "group_size": None}
            == (result.summary["recipe"]["scheme"]["weights"])
        )
        assert not (tmp_path / str(index) / "reports" / "verify.json").exists()


def test_an_export_comes_with_it(tiny_dir, tmp_path):
    atomq.quantize(tiny_dir, tmp_path / "OUT", preset="rtn", format_name="hf")
    assert (tmp_path / "OUT-hf" / "config.json").is_file()


def test_verify_and_evaluate_keep_their_records(tiny_dir, tmp_path, text_file):
    out = tmp_path / "OUT"
    atomq.quantize(tiny_dir, out, preset="rtn", check="off")
    assert atomq.verify(out).failed == []
    found = atomq.evaluate_ppl(out, data=str(text_file), seq_len=512, max_windows=2, baseline=tiny_dir)
    assert found.warnings == ("windows of 512 tokens are longer than the 256 positions of the model",)
    assert found.kl is not None
    assert found.kl > 0
    assert found.baseline_ppl == found.record["baseline_ppl"] != found.ppl
    names = {path.name for path in (out / "reports").glob("*.json")}
    assert names == {"quantize.json", "report.json", "verify.json", "eval-ppl-text.txt-2x512.json"}


def test_a_checkpoint_with_a_wrong_linear_is_refused(tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("atomq.eval.verify.TOLERANCE", -1.0)
    with pytest.raises(atomq.api.VerificationError, match="14 linears differ from exact arithmetic"):
        atomq.quantize(tiny_dir, tmp_path / "OUT", preset="rtn")


def test_bad_input_is_refused_before_anything_is_written(tiny_dir, tmp_path):
    with pytest.raises(ConfigError, match="unknown preset 'best'"):
        atomq.quantize(tiny_dir, tmp_path / "OUT", preset="best")
    with pytest.raises(ConfigError, match=r"must end in \.png or \.svg"):
        atomq.calibrate(tiny_dir, tmp_path / "s.safetensors", plot=tmp_path / "s.txt")
    with pytest.raises(ConfigError, match="--device tpu is not one of"):
        atomq.load(tmp_path / "OUT", device="tpu")
    assert list(tmp_path.iterdir()) == []


def test_loading_checks_hashes_by_default(tiny_dir, tmp_path):
    atomq.quantize(tiny_dir, tmp_path / "OUT", preset="rtn", check="off")
    path = tmp_path / "OUT" / "README.md"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(atomq.errors.CheckpointError, match=r"README\.md has been altered"):
        atomq.load(tmp_path / "OUT")
    logits = atomq.load(tmp_path / "OUT", no_check=True)(torch.arange(8)[None]).logits
    assert bool(logits.isfinite().all())


def test_the_examples_of_the_api_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_model(Path("MODEL"))
    Path("text.txt").write_text("seven wizards mix 42 potions. " * 60)
    failed, tried = doctest.testfile(
        str(ROOT / "docs" / "api.md"), module_relative=False, optionflags=doctest.ELLIPSIS
    )
    assert tried > 10
    assert failed == 0


def test_every_function_of_the_api_is_on_its_page():
    page = (ROOT / "docs" / "api.md").read_text()
    for name in atomq.__all__[1:]:
        assert f"## `atomq.{name}`" in page
        assert inspect.getdoc(getattr(api, name))
