"""`--rotate auto` takes what the whole model would speak for, says why, and leaves no other trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_resume import interrupted
from tiny_checkpoints import calibration_text, files_outside_reports, quantize_tiny
from tiny_models import save_tiny_model

import atomq
from atomq import rotation_choice
from atomq.assist import cut_windows
from atomq.block_loop import quantize_blocks
from atomq.cli import main
from atomq.config import CalibrationConfig, Recipe
from atomq.errors import ConfigError
from atomq.estimate import estimate
from atomq.eval.windows import TokenWindows
from atomq.models.blocks import blocks_of
from atomq.models.families import find_family
from atomq.models.loading import load_tokenizer, open_float_model
from atomq.models.source import ModelSource, resolve_source
from atomq.models.streaming import StoredWeights
from atomq.presets import build_recipe
from atomq.progress import silently
from atomq.rotation_choice import settle_rotation, with_rotation

CPU = torch.device("cpu")
GROUPS = ["weights.group_size=16", "activations.group_size=16"]
OUTLIERS = build_recipe("atom", {"rotate": "auto", "n_outliers": 5}, None, GROUPS)
PLAIN_GPTQ = ["solver.descent_sweeps=0", "solver.asymmetry=0"]  # more fits these short texts, not the model
NO_OUTLIERS = build_recipe("ct-w4a4", {"rotate": "auto"}, None, GROUPS + PLAIN_GPTQ)
UNCALIBRATED = build_recipe("rtn", {"rotate": "auto"}, None, GROUPS)


def text_of(folder: Path, n_samples: int = 8) -> CalibrationConfig:
    return CalibrationConfig(str(calibration_text(folder)), n_samples, seq_len=32)


def windows_of(source: ModelSource, folder: Path, n_samples: int = 8) -> TokenWindows:
    return cut_windows(load_tokenizer(source), text_of(folder, n_samples))


def last_stream(model, token_ids: torch.Tensor) -> torch.Tensor:
    """float64 [tokens, hidden] behind the last block."""
    seen = []
    block = blocks_of(model, find_family(model.config.model_type))[-1]
    hook = block.register_forward_hook(lambda _m, _args, out: seen.append(out))
    with torch.inference_mode():
        model(token_ids, use_cache=False)
    hook.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]).double().flatten(0, 1)


def float_model(source: ModelSource, rotation):
    model, weights = open_float_model(source, rotation=rotation)
    weights.fill(model, "")
    model.tie_weights()
    return model.requires_grad_(False)


def quantized_model(source: ModelSource, recipe: Recipe, token_ids: torch.Tensor):
    model = float_model(source, recipe.solver.rotation)
    quantize_blocks(model, recipe, CPU, silently, token_ids)
    return model


@pytest.mark.parametrize("recipe", [OUTLIERS, NO_OUTLIERS, UNCALIBRATED], ids=["outliers", "none", "rtn"])
@pytest.mark.parametrize(("kind", "seed"), [("mistral", 0), ("gemma", 0), ("phi3", 1)])
def test_it_takes_what_is_better_for_the_whole_model(kind, seed, recipe, tmp_path):
    """By the logits on other text, all four blocks quantized on all windows."""
    source = resolve_source(str(save_tiny_model(tmp_path / "model", kind, seed, num_hidden_layers=4)))
    windows = windows_of(source, tmp_path)
    settled, choice = settle_rotation(source, recipe, windows, CPU)
    assert choice.chosen == settled.solver.rotation == ("none" if recipe is OUTLIERS else "fused")
    assert settled == with_rotation(recipe, choice.chosen)
    others = torch.randint(2, 256, (8, 32), generator=torch.Generator().manual_seed(1))
    expected = float_model(source, "none")(others).logits
    losses = {}
    for rotation in ("none", "fused"):
        found = quantized_model(source, with_rotation(recipe, rotation), windows.token_ids)(others).logits
        losses[rotation] = float((found - expected).norm())
    assert min(losses, key=losses.get) == choice.chosen


@pytest.mark.parametrize("recipe", [OUTLIERS, NO_OUTLIERS], ids=["outliers", "none"])
def test_the_figures_are_those_of_models_quantized_on_other_windows(recipe, tmp_path):
    source = resolve_source(str(save_tiny_model(tmp_path / "model", "qwen2")))
    windows = windows_of(source, tmp_path)
    _, choice = settle_rotation(source, recipe, windows, CPU)
    judged = windows.token_ids[-2:]
    for rotation, figure in (("none", choice.error_none), ("fused", choice.error_fused)):
        model = quantized_model(source, with_rotation(recipe, rotation), windows.token_ids[:6])
        expected = last_stream(float_model(source, rotation), judged)
        errors = (last_stream(model, judged) - expected).norm(dim=1) / expected.norm(dim=1)
        assert figure == pytest.approx(float((errors**2).clamp(max=1).mean()), rel=1e-4)
    assert (choice.n_blocks, choice.n_tokens) == (2, 64)
    assert choice.tokens_sha256 == windows.data_hash


@pytest.mark.parametrize(
    ("n_windows", "seq_len", "n_processes", "n_learned", "n_judged"),
    [
        (128, 2048, 1, 32, 4),  # a quarter; 8192 tokens
        (64, 512, 1, 24, 16),  # eight tokens a channel; a quarter
        (16, 512, 1, 12, 4),  # all others; a quarter
        (2, 512, 1, 1, 1),
        (16, 512, 6, 10, 6),  # one in every process
    ],
)
def test_some_windows_are_quantized_on_and_others_judge(
    n_windows, seq_len, n_processes, n_learned, n_judged, monkeypatch
):
    monkeypatch.setattr(rotation_choice.distributed, "n_processes", lambda: n_processes)
    token_ids = torch.arange(n_windows)[:, None].expand(n_windows, seq_len)
    windows = TokenWindows("text", "", "plain", token_ids)
    learned, judged = rotation_choice._split(windows, widest=1536, refined=False)
    assert learned[:, 0].tolist() == list(range(n_learned))
    assert judged[:, 0].tolist() == list(range(n_windows - n_judged, n_windows))


def test_later_blocks_and_the_head_are_never_read(tmp_path, monkeypatch):
    source = resolve_source(str(save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=5)))
    names = set()
    read = StoredWeights.read

    def noted(self, name, *rest):
        names.add(name)
        return read(self, name, *rest)

    monkeypatch.setattr(StoredWeights, "read", noted)
    settle_rotation(source, OUTLIERS, windows_of(source, tmp_path), CPU)
    assert {name.split(".")[2] for name in names} == {"0", "1"}


def test_a_token_that_is_lost_counts_no_more_than_one(tmp_path, monkeypatch):
    source = resolve_source(str(save_tiny_model(tmp_path / "model", "llama")))
    pass_float_blocks = rotation_choice.pass_float_blocks

    def shrunk(model, inputs, *rest):
        pass_float_blocks(model, inputs, *rest)
        inputs.hidden[0, 0] *= 1e-6  # beside which the quantized one is a million times as long

    expected = settle_rotation(source, OUTLIERS, windows_of(source, tmp_path), CPU)[1]
    monkeypatch.setattr(rotation_choice, "pass_float_blocks", shrunk)
    found = settle_rotation(source, OUTLIERS, windows_of(source, tmp_path), CPU)[1]
    for before, after in zip(
        (expected.error_none, expected.error_fused), (found.error_none, found.error_fused), strict=True
    ):
        assert before < after <= before + 1 / 64


@pytest.mark.parametrize(
    ("n_samples", "refine", "least"), [(1, None, 2), (2, 3, 3)], ids=["one window", "two, and refinement"]
)
def test_too_few_windows_are_refused(n_samples, refine, least, tiny_dir, tmp_path):
    source = resolve_source(str(tiny_dir))
    recipe = build_recipe("atom", {"rotate": "auto", "n_outliers": 5, "refine": refine}, None, [])
    with pytest.raises(ConfigError, match=f"at least {least} calibration windows, not {n_samples}"):
        settle_rotation(source, recipe, windows_of(source, tmp_path, n_samples), CPU)


@pytest.mark.parametrize(
    ("recipe", "chosen"),
    [(OUTLIERS, "none"), (NO_OUTLIERS, "fused"), (UNCALIBRATED, "fused")],
    ids=["outliers", "none", "rtn"],
)
def test_a_checkpoint_is_that_of_the_choice_given_by_hand(recipe, chosen, tiny_dir, tmp_path):
    auto = atomq.pipeline.quantize(
        str(tiny_dir), tmp_path / "AUTO", recipe, "cpu", calibration=text_of(tmp_path)
    )
    by_hand = with_rotation(recipe, chosen)
    text = text_of(tmp_path) if by_hand.needs_calibration else None
    atomq.pipeline.quantize(str(tiny_dir), tmp_path / "HAND", by_hand, "cpu", calibration=text)
    found, expected = (files_outside_reports(tmp_path / name) for name in ("AUTO", "HAND"))
    manifest, manifest_by_hand = (json.loads(files.pop("manifest.json")) for files in (found, expected))
    assert found == expected
    choice = manifest.pop("rotation_choice")
    assert manifest == manifest_by_hand
    assert manifest["recipe"]["solver"]["rotation"] == choice["chosen"] == chosen
    assert (choice["error_fused"] < choice["error_none"]) == (chosen == "fused")
    report = json.loads((tmp_path / "AUTO" / "reports" / "report.json").read_text())
    assert report["about"]["rotation_choice"] == choice
    (sentence,) = auto.summary["notes"]
    assert f"--rotate auto took {chosen}: after 2 blocks the residual stream errs by " in sentence
    assert auto.summary["seconds"]["choosing a rotation"] > 0


@pytest.mark.parametrize("kind", ["opt", "gemma2", "mixtral", "olmo2"])
def test_families_that_cannot_be_rotated_are_not(kind, tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model", kind)
    given = ["--calib-data", str(calibration_text(tmp_path)), "--seq-len", "32", "--n-samples", "4"]
    given += ["--preset", "rtn", "--check", "off", "--device", "cpu", "--rotate", "auto"]
    assert main(["quantize", str(model), str(tmp_path / "OUT"), *given]) == 0
    words = "note: --rotate auto took none: models of this family cannot be rotated"
    assert words in capsys.readouterr().err
    manifest = json.loads((tmp_path / "OUT" / "manifest.json").read_text())
    assert manifest["recipe"]["solver"]["rotation"] == manifest["rotation_choice"]["chosen"] == "none"
    assert manifest["rotation_choice"]["error_none"] is None


@pytest.mark.parametrize("after", [0, 1])
def test_a_stopped_run_goes_on_without_choosing_again(after, tmp_path, monkeypatch):
    model = save_tiny_model(tmp_path / "model", "qwen2")
    auto = {
        "scheme": "rtn",
        "n_samples": 8,
        "settings": {"solver.method": "gptq", "solver.rotation": "auto"},
    }
    quantize_tiny(model, tmp_path / "undisturbed", **auto)
    interrupted(model, tmp_path / "OUT", monkeypatch, after=after, **auto)

    def fail(*_args):
        raise AssertionError("it is chosen")

    monkeypatch.setattr(rotation_choice, "_choose", fail)
    quantize_tiny(model, tmp_path / "OUT", **auto)
    undisturbed = files_outside_reports(tmp_path / "undisturbed")
    assert files_outside_reports(tmp_path / "OUT") == undisturbed
    assert b'"rotation": "fused"' in undisturbed["manifest.json"]


def test_a_stopped_run_is_not_gone_on_with_for_other_inputs(tmp_path, monkeypatch):
    """Also where the text served the choice alone."""
    model = save_tiny_model(tmp_path / "model", "llama")
    auto = {"scheme": "rtn", "settings": {"solver.rotation": "auto"}}
    interrupted(model, tmp_path / "OUT", monkeypatch, n_samples=8, **auto)
    with pytest.raises(ConfigError, match=r"rotation_choice\.tokens_sha256 was"):
        quantize_tiny(model, tmp_path / "OUT", n_samples=7, **auto)
    with pytest.raises(ConfigError, match=r"rotation_choice\.chosen was 'fused' and is None"):
        quantize_tiny(model, tmp_path / "OUT", "rtn", settings={"solver.rotation": "fused"})
    quantize_tiny(model, tmp_path / "OUT", n_samples=7, restart=True, **auto)
    quantize_tiny(model, tmp_path / "undisturbed", n_samples=7, **auto)
    assert files_outside_reports(tmp_path / "OUT") == files_outside_reports(tmp_path / "undisturbed")


@pytest.mark.parametrize("recipe", [NO_OUTLIERS, UNCALIBRATED], ids=["calibrated", "not"])
def test_a_dry_run_chooses_too_and_leaves_nothing(recipe, tiny_dir, tmp_path):
    found = {}
    for rotation in ("auto", "fused"):
        asked = with_rotation(recipe, rotation)
        text = text_of(tmp_path) if asked.needs_calibration else None
        found[rotation] = estimate(
            str(tiny_dir), tmp_path / "OUT", asked, CPU, calibration=text, activations="disk"
        )
    assert found["auto"].out_bytes == found["fused"].out_bytes
    assert found["auto"].disk_bytes == found["fused"].disk_bytes
    assert found["auto"].seconds.keys() - found["fused"].seconds.keys() == {"choosing a rotation"}
    assert "took fused" in found["auto"].notes[0]
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.txt"]


def test_python_takes_it_and_other_commands_show_what_it_came_to(tiny_dir, tmp_path, capsys):
    out = tmp_path / "OUT"
    text = {"calib_data": str(calibration_text(tmp_path)), "seq_len": 32, "n_samples": 8}
    result = atomq.quantize(tiny_dir, out, preset="rtn", rotate="auto", settings=GROUPS, check="off", **text)
    assert result.summary["recipe"]["solver"]["rotation"] == "fused"
    assert main(["inspect", str(out), "--check", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["solver"]["rotation"] == "fused"
    plain = atomq.quantize(tiny_dir, tmp_path / "PLAIN", preset="rtn", settings=GROUPS, check="off")
    assert main(["compare", str(plain.path), str(out)]) == 0
    assert "solver.rotation" in capsys.readouterr().out


def test_statistics_of_the_model_as_it_is_are_refused(tiny_dir, tmp_path):
    with pytest.raises(ConfigError, match="this recipe may rotate it first; leave --calibration away"):
        atomq.pipeline.quantize(
            str(tiny_dir), tmp_path / "OUT", OUTLIERS, "cpu", calibration_file=tmp_path / "stats.safetensors"
        )
