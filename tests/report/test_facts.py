"""What a report says is what the checkpoint and its records hold."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from tiny_checkpoints import change_tensor, quantize_tiny, stored_tensors

from atomq.cli import main
from atomq.errors import CheckpointError, StorageError
from atomq.report import facts
from atomq.report.files import save_record, write_report


@pytest.fixture(scope="module", params=["atom", "progressive", "rtn", "kv only", "w16a4", "w8a8"])
def made(request, tiny_dir, tmp_path_factory):
    """A scheme's name and a checkpoint of it. Do not change it."""
    out = tmp_path_factory.mktemp("made") / "OUT"
    quantize_tiny(tiny_dir, out, request.param)
    return request.param, out


@pytest.fixture
def out(tiny_dir, tmp_path):
    """A checkpoint that a test may spoil."""
    return quantize_tiny(tiny_dir, tmp_path / "OUT").path


def test_a_run_leaves_its_report(made):
    _, out = made
    stored = json.loads((out / "reports" / "report.json").read_text())
    assert stored["report_version"] == 1
    assert stored == json.loads(json.dumps(facts.gather(out).to_dict()))
    assert (out / "reports" / "report.html").read_text().startswith("<!doctype html>")


def test_every_linear_is_there_with_its_bytes_and_error(made):
    scheme, out = made
    report, tensors = facts.gather(out), stored_tensors(out)
    names = {name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")}
    assert len(names) == (0 if scheme in ("kv only", "w16a4") else 14)
    assert {linear.name for linear in report.linears} == names
    run = {r["name"]: r for r in json.loads((out / "reports" / "quantize.json").read_text())["linears"]}
    for linear in report.linears:
        own = [t for name, t in tensors.items() if name.rpartition(".")[0] == linear.name]
        assert linear.size_bytes == sum(t.numel() * t.element_size() for t in own)
        assert linear.relative_error == run[linear.name]["relative_error"]
        assert f"model.layers.{linear.block}.{linear.kind}" == linear.name


def test_linears_come_in_the_order_of_computation(out):
    kinds = [linear.kind.partition(".")[2] for linear in facts.gather(out).linears]
    one_block = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert kinds == 2 * one_block


def test_sizes_are_those_of_the_tensors_and_of_the_float_model(made, tiny_dir):
    _, out = made
    summary = facts.gather(out).summary
    assert summary.size_bytes == sum(t.numel() * t.element_size() for t in stored_tensors(out).values())
    linears = [t for name, t in stored_tensors(tiny_dir).items() if "_proj.weight" in name]
    n_weights = sum(t.numel() for t in linears)
    unchanged = summary.size_bytes - sum(
        t.numel() * t.element_size()
        for name, t in stored_tensors(out).items()
        if "_proj." in name and not name.endswith(".perm")
    )
    if made[0] not in ("w16a4", "kv only"):  # there linears stay in the float32 of the tiny model
        assert summary.float_bytes == unchanged + 2 * n_weights


def test_outlier_maps_hold_the_ends_of_the_permutations(out):
    maps = {found.kind: found for found in facts.gather(out).outliers}
    perms = {name: t for name, t in stored_tensors(out).items() if name.endswith(".perm")}
    assert len(perms) == 8
    assert sum(len(found.channels) for found in maps.values()) == 8
    for name, perm in perms.items():
        block, kind = facts.block_and_kind(name.removesuffix(".perm"))
        assert maps[kind].channels[block] == sorted(perm[-5:].tolist())
        assert maps[kind].n_channels == len(perm)


def test_histograms_count_every_scale_in_its_bin(made):
    scheme, out = made
    tensors = stored_tensors(out)
    bins: dict[str, dict[int, int]] = {}
    for name, tensor in tensors.items():
        owner, _, suffix = name.rpartition(".")
        if suffix == "scale_factors":
            n_groups = {22: 3, 38: 5}[tensors[f"{owner}.qweight"].shape[1]]  # 43 and 75 channels by 16
            codes = torch.stack((tensor & 15, tensor >> 4), dim=-1).flatten(1)[:, :n_groups]
            tensor = tensors[f"{owner}.scale_base"][:, None].double() * (codes + 1)
        elif suffix != "scales":
            continue
        of_kind = bins.setdefault(facts.block_and_kind(owner)[1], {})
        for value in tensor.double().flatten().tolist():
            position = math.floor(math.log2(value) * 4)
            of_kind[position] = of_kind.get(position, 0) + 1
    found = {h.kind: {h.start + i: n for i, n in enumerate(h.counts) if n} for h in facts.gather(out).scales}
    assert found == bins
    assert bool(bins) == (scheme not in ("kv only", "w16a4"))


def test_a_row_of_codes_with_room_for_one_group_more_makes_no_scale_of_it(tiny_dir, tmp_path):
    """44 channels at 3 bits fill 17 bytes, which could hold 45: two groups of 22, or three."""
    changes = {"weights.group_size": 22, "outliers.n_outliers": 4, "weights.n_bits": 3}
    out = quantize_tiny(tiny_dir, tmp_path / "OUT", "progressive", settings=changes).path
    found = {scales.kind: sum(scales.counts) for scales in facts.gather(out).scales}
    assert found["self_attn.o_proj"] == 2 * 48 * 2


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("model.layers.12.mlp.experts.7.up_proj", (12, "mlp.experts.*.up_proj")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_a_name_is_a_block_and_a_kind(name, expected):
    assert facts.block_and_kind(name) == expected


def test_records_of_other_commands_are_taken_in(out):
    save_record(out, "eval-ppl-builtin", {"ppl": 12.5, "data": "builtin"})
    stored = json.loads((out / "reports" / "report.json").read_text())
    assert stored["records"] == {"eval-ppl-builtin": {"ppl": 12.5, "data": "builtin"}}


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_record_that_cannot_be_read_is_named_and_left_out(out, content):
    (out / "reports" / "broken.json").write_bytes(content)
    report = write_report(out)
    assert "broken" not in report.records
    (sentence,) = [w for w in report.warnings if "broken.json" in w]
    assert sentence.startswith("reports/broken.json was left out: ")


def test_starved_experts_are_taken_from_the_run(out):
    path = out / "reports" / "quantize.json"
    record = json.loads(path.read_text()) | {"starved_experts": {"model.layers.0.mlp.experts.3": 5}}
    path.write_text(json.dumps(record))
    assert facts.gather(out).starved == {"model.layers.0.mlp.experts.3": 5}


def test_without_the_run_s_own_record_the_rest_stays(out):
    before = facts.gather(out)
    shutil.rmtree(out / "reports")
    after = facts.gather(out)
    assert after.summary.float_bytes is None
    assert after.summary.bits == {}
    assert after.outliers == before.outliers
    assert after.scales == before.scales
    assert [linear.name for linear in after.linears] == [linear.name for linear in before.linears]


@pytest.mark.parametrize(
    "spoilt",
    [
        {"seconds": {"total": "x"}},
        {"seconds": 3},
        {"linears": 4},
        {"linears": [3]},
        {"linears": [{"name": "lm_head", "relative_error": "small"}]},
        {"host": [1]},
        {"host": {"peak_memory_bytes": "much"}},
        {"notes": 5},
        {"effective_bits": {"weight": []}},
    ],
)
def test_a_run_s_record_of_another_form_is_named_and_left_out(out, spoilt):
    path = out / "reports" / "quantize.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | spoilt))
    report = write_report(out)
    assert "reports/quantize.json was left out: it is not what quantize writes" in report.warnings
    assert report.summary.seconds == {}


def test_what_is_no_checkpoint_is_refused(tiny_dir, tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        facts.gather(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is not quantized"):
        facts.gather(tiny_dir)


@pytest.mark.parametrize(
    ("scheme", "n_maps"),
    [("asymmetric", 4), ("fp4 bnb", 4), ("outliers not reordered", 0), ("reordered without outliers", 0)],
)
def test_odd_schemes_have_a_report_too(tiny_dir, tmp_path, scheme, n_maps):
    quantize_tiny(tiny_dir, tmp_path / "OUT", scheme)
    report = facts.gather(tmp_path / "OUT")
    assert (len(report.linears), len(report.outliers), len(report.scales)) == (14, n_maps, 7)
    assert report.summary.recipe_name.startswith("atom, ")


def test_an_evaluation_stays_in_the_reports(out, tmp_path, capsys):
    text = tmp_path / "some text.txt"
    text.write_text("seven wizards mix 42 potions. " * 20)
    argv = ["eval-ppl", str(out), "--data", str(text), "--seq-len", "64", "--max-windows", "2"]
    assert main([*argv, "--no-record"]) == 0
    assert facts.gather(out).records == {}
    capsys.readouterr()
    assert main([*argv, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (name,) = facts.gather(out).records
    assert name == "eval-ppl-some_text.txt-2x64"
    assert facts.gather(out).records[name] == printed
    assert f"{printed['ppl']:.4f}" in (out / "reports" / "report.html").read_text()


def test_a_checkpoint_that_cannot_be_written_to_only_costs_the_record(out, capsys, monkeypatch):
    def full(*_arguments):
        raise StorageError("no space left")

    monkeypatch.setattr("atomq.report.files.write_json", full)
    assert main(["verify", str(out)]) == 0
    assert "the result is not kept in the checkpoint's reports: no space left" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), -1.0])
def test_scales_that_no_writer_makes_do_not_stop_a_report(out, value):
    def spoil(scales):
        scales[0, 0] = value

    change_tensor(out, "model.layers.0.mlp.up_proj.scales", spoil)
    before = sum(stored_tensors(out)[f"model.layers.{i}.mlp.up_proj.scales"].numel() for i in (0, 1))
    (histogram,) = [h for h in facts.gather(out).scales if h.kind == "mlp.up_proj"]
    assert sum(histogram.counts) == before


def test_the_command_builds_the_report_again_and_refuses_what_is_not_whole(out, capsys):
    page = out / "reports" / "report.html"
    made = page.read_bytes()
    page.unlink()
    assert main(["report", str(out)]) == 0
    assert page.read_bytes() == made
    assert f"wrote {page}" in capsys.readouterr().out
    assert main(["report", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "reports" / "report.json").read_text())
    change_tensor(out, "model.layers.0.mlp.up_proj.scales", lambda scales: scales.double().float()[:-1])
    assert main(["report", str(out)]) == 2
    assert "model.layers.0.mlp.up_proj.scales is F32" in capsys.readouterr().err
