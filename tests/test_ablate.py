"""The ladder of `atomq ablate`: what its rungs are, and that rows are measured once for each setup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from tiny_models import save_tiny_model

import atomq
from atomq import ablation, pipeline
from atomq.ablation import Evaluation, ablate
from atomq.cli import main
from atomq.config import CalibrationConfig, OutlierScheme, override, to_dict
from atomq.errors import ConfigError
from atomq.formats.ablation_plot import draw_ladder
from atomq.ladder import LADDER, REFINED, choose_rungs, rung
from atomq.presets import PRESETS, REFINE_STEPS, changed_settings
from atomq.report.records import ladder

BEFORE_ROPE = {"kv.key_position": "before_rope", "kv.key_balance": False}
KV16 = {"kv.n_bits": 16, "kv.rotation": "none"} | BEFORE_ROPE
NAMES = [r.name for r in LADDER]
# Rung -> the rung that it differs from, and all settings that differ.
STEPS = {
    "outliers-fp16": (
        "rtn",
        {"outliers.n_outliers": 128, "outliers.reorder": True, "outliers.precision": "fp16"},
    ),
    "outliers-int8": ("outliers-fp16", {"outliers.precision": "int8"}),
    "groups": (
        "outliers-int8",
        {"weights.group_size": 128, "weights.channel_group": 2, "activations.group_size": 128},
    ),
    "clipping": (
        "groups",
        {"activations.clip_ratio": 0.9, "solver.clip_ratio": 0.85, "solver.scale_span": "half"},
    ),
    "gptq": ("clipping", {"solver.method": "gptq"}),
    "kv4": ("gptq", {"kv.n_bits": 4}),
    "hadamard": ("gptq", {"transform": "hadamard"}),
    "clip-search": (
        "hadamard",
        {"solver.clip_search": "hessian", "solver.clip_ratio": 1.0, "solver.scale_span": "full"},
    ),
    "asymmetry": ("clip-search", {"solver.asymmetry": 0.5, "solver.asymmetry_damp": 1.0}),
    "descent": ("asymmetry", {"solver.descent_sweeps": 4}),
    "plain-kv4": ("descent", {"kv.n_bits": 4}),
    "kv-hadamard": ("plain-kv4", {"kv.rotation": "hadamard"}),
    "key-balance": ("kv-hadamard", {"kv.key_position": "after_rope", "kv.key_balance": True}),
    REFINED: ("key-balance", {"solver.refine_steps": 200}),
    "atomq-fast": (
        "key-balance",
        {
            "weights.scale_mode": "progressive",
            "weights.channel_group": 1,
            "activations.scale_mode": "progressive",
        },
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """One block, wide enough for 128 outliers beside a group. Do not change it."""
    sizes = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 1}
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", **sizes)


@pytest.fixture
def quantized(monkeypatch) -> list[str]:
    """What is quantized, one entry for each call: the recipe as JSON."""
    calls, real = [], pipeline.quantize

    def quantize(name, out, recipe, *more, **options):
        calls.append(to_dict(recipe))
        return real(name, out, recipe, *more, **options)

    monkeypatch.setattr(pipeline, "quantize", quantize)
    return calls


def recipes(*names) -> list:
    return [to_dict(rung(name).recipe) for name in names]


def climb(model, folder, text, *names, seed=0, **evaluation):
    calibration = CalibrationConfig(str(text), n_samples=2, seq_len=64, seed=seed)
    asked = Evaluation(str(text), seq_len=64, max_windows=2, **evaluation)
    return ablate(str(model), folder, choose_rungs(names, refine=False), calibration, asked, "cpu")


def argv(model, folder, text, *more) -> list[str]:
    data = ("--calib-data", text, "--n-samples", 2, "--seq-len", 64, "--data", text, "--max-windows", 1)
    return [str(part) for part in ("ablate", model, "--save", folder, *data, *more)]


def test_each_rung_changes_what_it_says_and_nothing_else():
    assert {"rtn", *STEPS} == set(NAMES)
    for name, (below, changes) in STEPS.items():
        assert rung(name).below == below
        assert changed_settings(rung(below).recipe, rung(name).recipe) == changes
        assert NAMES.index(below) < NAMES.index(name)


def test_the_first_rung_rounds_with_one_scale_per_row_and_token():
    recipe = rung("rtn").recipe
    scheme, solver = recipe.scheme, recipe.solver
    assert scheme.outliers == OutlierScheme()
    assert (scheme.weights.n_bits, scheme.weights.group_size, scheme.weights.channel_group) == (4, None, 1)
    assert (scheme.activations.n_bits, scheme.activations.group_size) == (4, None)
    assert (scheme.activations.clip_ratio, solver.clip_ratio, solver.scale_span) == (1, 1, "full")
    assert (solver.method, solver.clip_search, scheme.kv.n_bits, scheme.transform) == (
        "rtn",
        "none",
        16,
        "none",
    )
    assert not recipe.needs_calibration


@pytest.mark.parametrize(
    ("name", "preset", "settings"),
    [
        ("gptq", "atom", {"kv.n_bits": 16}),
        ("kv4", "atom", {}),
        ("descent", "atomq", KV16),
        ("key-balance", "atomq", {}),
        (REFINED, "atomq", {"solver.refine_steps": REFINE_STEPS}),
        ("atomq-fast", "atomq-fast", {}),
    ],
)
def test_the_ladder_passes_through_the_presets(name, preset, settings):
    assert rung(name).recipe == override(PRESETS[preset], settings)


def test_refinement_is_measured_where_it_is_asked_for():
    assert [r.name for r in choose_rungs([], refine=False)] == [n for n in NAMES if n != REFINED]
    assert [r.name for r in choose_rungs([], refine=True)] == NAMES
    assert [r.name for r in choose_rungs(["kv4", "rtn"], refine=False)] == ["rtn", "kv4"]
    assert [r.name for r in choose_rungs(["rtn", REFINED], refine=False)] == ["rtn", REFINED]
    with pytest.raises(ConfigError, match="there is no rung 'fast'; rungs are rtn, outliers-fp16"):
        choose_rungs(["fast"], refine=False)


def test_the_whole_ladder_leaves_a_table_json_and_a_picture(model, tmp_path, text_file, quantized, capsys):
    folder = tmp_path / "rows of tiny"
    command = argv(model, folder, text_file, "--second-data", text_file)
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "ablate: 100% atomq-fast" in shown.err
    assert "ETA" in shown.err
    record = json.loads((folder / "ablation.json").read_text())
    names = [n for n in NAMES if n != REFINED]
    rows = {row["rung"]: row for row in record["rows"]}
    assert list(rows) == ["float", *names]
    assert quantized == recipes(*names)
    for name, row in rows.items():
        assert row["ppl"] > 1
        assert row["second_ppl"] == row["ppl"]  # the same text
        assert f"{row['ppl']:.3f}" in shown.out
        assert row["seconds"] >= row.get("quantize_seconds", 0) >= 0
        if name != "float":
            assert row["kl"] > 0
            assert row["changes"] == rung(name).changes
            assert not row["resumed"]
    assert rows["float"]["kl"] is None
    assert rows["gptq"]["effective_bits"] == rows["descent"]["effective_bits"]
    assert rows["key-balance"]["effective_bits"] == rows["kv4"]["effective_bits"]
    assert [rows[n]["effective_bits"]["kv"] for n in ("float", "gptq")] == [16, 16]
    assert (
        rows["outliers-fp16"]["effective_bits"]["weight"] > rows["outliers-int8"]["effective_bits"]["weight"]
    )
    assert "+ groups of 128" in ladder(record)  # the section of a report
    drawn = ElementTree.parse(folder / "ablation.svg").getroot()
    assert len(drawn.findall(".//*[@id='axes_2']")) == 1  # the second text has a panel, too
    assert {path.name for path in folder.iterdir()} == {"rows", "ablation.json", "ablation.svg"}

    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == record
    assert len(quantized) == len(names)  # nothing was done again


@pytest.mark.parametrize("texts", [{"ppl": "wikitext2"}, {"ppl": "wikitext2", "second_ppl": "page.txt"}])
def test_the_picture_has_a_panel_for_each_text(tmp_path, texts):
    rows = [
        {"name": "float model", "ppl": 20.5, "second_ppl": 30.25},
        {"name": "RTN", "ppl": 41, "second_ppl": 87},
    ]
    draw_ladder(tmp_path / "ladder.svg", rows, "tiny", texts)
    drawn = re.findall("<!-- (.+?) -->", (tmp_path / "ladder.svg").read_text(encoding="utf-8"))
    for key, text in texts.items():
        assert drawn.count(text) == 1
        assert all(drawn.count(f"{row[key]:.2f}") == 1 for row in rows)
    assert drawn.count("float model") == drawn.count("RTN") == 1
    assert ("30.25" in drawn) == ("second_ppl" in texts)


def test_a_row_is_what_quantize_and_eval_ppl_give(model, tmp_path, text_file):
    row = climb(model, tmp_path / "rows", text_file, "gptq")["rows"][1]
    text = {"calib_data": str(text_file), "n_samples": 2, "seq_len": 64}
    atomq.quantize(model, tmp_path / "OUT", preset="atom", kv_bits=16, device="cpu", check="off", **text)
    found = atomq.evaluate_ppl(
        tmp_path / "OUT", data=str(text_file), seq_len=64, max_windows=2, baseline=model, device="cpu"
    )
    assert (row["ppl"], row["kl"]) == (found.ppl, found.kl)


def test_a_stopped_ladder_goes_on(model, tmp_path, text_file, quantized, monkeypatch):
    folder, real = tmp_path / "rows", ablation.evaluate_perplexity
    evaluated = []

    def stopped(*arguments):
        evaluated.append(1)
        if len(evaluated) == 3:  # the float model, rtn, and then in groups
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(ablation, "evaluate_perplexity", stopped)
    with pytest.raises(KeyboardInterrupt):
        climb(model, folder, text_file, "rtn", "groups", "kv4")
    assert quantized == recipes("rtn", "groups")
    assert {path.stem for path in (folder / "rows").iterdir()} == {"float", "rtn"}
    quantized.clear()
    record = climb(model, folder, text_file, "rtn", "groups", "kv4")
    assert quantized == recipes("groups", "kv4")
    assert [row["rung"] for row in record["rows"]] == ["float", "rtn", "groups", "kv4"]


def test_a_row_stopped_while_it_is_quantized_goes_on_after_its_last_block(tmp_path, text_file, monkeypatch):
    sizes = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 2}
    model, folder = save_tiny_model(tmp_path / "two-blocks", **sizes), tmp_path / "rows"
    written, real = [], pipeline.CheckpointWriter.write_shard

    def write_shard(self, number, *more):
        if len(written) == 2:
            written.append("stop")
            raise KeyboardInterrupt
        written.append(number)
        real(self, number, *more)

    monkeypatch.setattr(pipeline.CheckpointWriter, "write_shard", write_shard)
    with pytest.raises(KeyboardInterrupt):
        climb(model, folder, text_file, "gptq")
    row = climb(model, folder, text_file, "gptq")["rows"][1]
    assert written == [1, 2, "stop", 3]
    assert row["resumed"]  # its seconds are not those of the whole
    assert not (folder / "unfinished").exists()


@pytest.mark.parametrize("change", ["seed", "windows", "kl", "model", "version", "damaged"])
def test_a_changed_setup_starts_over(change, model, tmp_path, text_file, quantized, monkeypatch):
    folder, options = tmp_path / "rows", {}
    climb(model, folder, text_file, "rtn", "groups")
    quantized.clear()
    if change == "seed":
        options["seed"] = 1
    elif change == "windows":
        options["second_data"] = str(text_file)
    elif change == "kl":
        options["kl"] = False
    elif change == "model":
        sizes = {"hidden_size": 160, "intermediate_size": 192, "num_hidden_layers": 1}
        model = save_tiny_model(tmp_path / "tiny", seed=1, **sizes)
    elif change == "version":
        monkeypatch.setattr(atomq, "__version__", "9.9.9")
    else:
        (folder / "rows" / "groups.json").write_text('{"key":')
    record = climb(model, folder, text_file, "groups", **options)
    assert quantized == recipes("groups")
    # Rounding looks at no calibration text, so that row holds under another seed; elsewhere it is not shown.
    kept = ["float", "rtn", "groups"] if change in ("seed", "damaged") else ["float", "groups"]
    assert [row["rung"] for row in record["rows"]] == kept


def test_without_the_divergence_the_float_model_is_evaluated_once(model, tmp_path, text_file, monkeypatch):
    baselines, real = [], ablation.evaluate_perplexity

    def seen(tested, windows, baseline, on_window):
        baselines.append(baseline)
        return real(tested, windows, baseline, on_window)

    monkeypatch.setattr(ablation, "evaluate_perplexity", seen)
    record = climb(model, tmp_path / "rows", text_file, "rtn", kl=False)
    assert baselines == [None, None]
    assert record["rows"][1]["kl"] is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "gptq,best"], "there is no rung 'best'; rungs are rtn"),
        (["--max-windows", "0"], "max_windows 0 is too few"),
        (["--n-samples", "0"], "--n-samples 0 must be at least 1"),
        (["--device", "tpu"], "--device tpu is not one of"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(more, words, model, tmp_path, text_file, capsys):
    assert main(argv(model, tmp_path / "rows", text_file, *more)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()


def test_a_model_that_is_too_narrow_or_a_folder_that_is_a_file_is_refused(
    tiny_dir, tmp_path, text_file, capsys
):
    assert main(argv(tiny_dir, tmp_path / "rows", text_file)) == 2
    assert "128" in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()
    assert main(argv(tiny_dir, text_file, text_file)) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_several_processes_are_refused(model, tmp_path, text_file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process; start it without torchrun"):
        climb(model, tmp_path / "rows", text_file, "rtn")
