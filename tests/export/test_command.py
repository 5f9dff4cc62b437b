"""`atomq export` from the command line: what lies in the folder, what is printed, what is refused."""

from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch
from tiny_checkpoints import change_tensor, quantize_tiny, stored_tensors
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import atomq.hf
from atomq.checkpoints import open_checkpoint
from atomq.cli import main
from atomq.export.stored import read_blocks
from atomq.formats.checkpoint import check_files, read_manifest
from atomq.formats.files import Disk


@pytest.fixture(scope="module")
def checkpoint(tiny_dir, tmp_path_factory):
    """A checkpoint with outliers, orders and KV4. Do not change it."""
    out = tmp_path_factory.mktemp("made") / "OUT"
    quantize_tiny(tiny_dir, out, "atom")
    return out


@pytest.fixture(scope="module")
def plain(checkpoint):
    dest = checkpoint.parent / "PLAIN"
    assert main(["export", str(checkpoint), str(dest), "--format", "hf"]) == 0
    return dest


def test_plain_weights_are_what_the_codes_stand_for_in_bfloat16(checkpoint, plain):
    model = AutoModelForCausalLM.from_pretrained(plain)  # no atomq.hf needed, no quantization_config left
    assert model.dtype == torch.bfloat16
    for block in read_blocks(checkpoint, open_checkpoint(checkpoint, check_hashes=False)):
        for name, stored in block.linears.items():
            assert torch.equal(model.get_submodule(name).weight, stored.model_weight().bfloat16())
    assert {tensor.dtype for tensor in stored_tensors(plain).values()} == {torch.bfloat16}


def test_the_folder_is_whole_with_tokenizer_card_and_manifest(checkpoint, plain):
    assert check_files(plain, hashes=True) > 5
    manifest, original = read_manifest(plain), read_manifest(checkpoint)
    assert manifest["exported_as"] == "hf"
    assert manifest["recipe"] == original["recipe"]
    assert "activations and the KV cache will not be quantized" in manifest["warnings"][-1]
    assert "as hf" in (plain / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(plain)("abc")["input_ids"]
    assert "quantization_config" not in json.loads((plain / "config.json").read_text())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_exported_under_the_names_that_other_tools_read(tmp_path, kind, capsys):
    model = save_tiny_model(tmp_path / "model", kind)
    out = tmp_path / "OUT"
    quantize_tiny(model, out, "w4a16")
    assert main(["export", str(out), str(tmp_path / "DEST"), "--format", "hf"]) == 0
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "DEST", output_loading_info=True)
    assert not any(report.values())
    tokens = torch.arange(5, 29)[None]
    with torch.no_grad():
        found, expected = plain.float()(tokens).logits, atomq.hf.load(out)(tokens).logits
    assert (found - expected).norm() < 0.1 * expected.norm()  # bfloat16; another expert would be all wrong
    for name in ("compressed-tensors", "gptq"):
        assert main(["export", str(out), str(tmp_path / name), "--format", name]) == 2
        assert "export with --format hf" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["itself", "another checkpoint"])
def test_an_export_replaces_exports_and_no_checkpoint(checkpoint, tmp_path, capsys, place):
    out, other = tmp_path / "OUT", tmp_path / "OTHER"
    shutil.copytree(checkpoint, out)
    shutil.copytree(checkpoint, other)
    dest = out if place == "itself" else other
    assert main(["export", str(out), str(dest), "--format", "hf", "--overwrite"]) == 2
    assert f"{dest} is a checkpoint and no export, so export does not touch it" in capsys.readouterr().err
    assert check_files(out, hashes=True) == check_files(other, hashes=True)
    argv = ["export", str(out), str(tmp_path / "DEST"), "--format", "hf"]
    assert [main(argv), main(argv), main([*argv, "--overwrite"])] == [0, 2, 0]
    assert "DEST exists; name another folder or add --overwrite" in capsys.readouterr().err


def test_what_a_killed_export_left_behind_is_not_taken_over(checkpoint, tmp_path):
    leftover = tmp_path / ".DEST.partial" / "checkpoint" / "model-00002-of-00003.safetensors"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    assert main(["export", str(checkpoint), str(tmp_path / "DEST"), "--format", "hf"]) == 0
    assert check_files(tmp_path / "DEST", hashes=True)
    assert [path.name for path in tmp_path.iterdir()] == ["DEST"]


@pytest.mark.parametrize("trouble", ["a scale of zero", "a full disk"])
def test_an_export_that_fails_half_way_leaves_nothing_and_promises_nothing(
    checkpoint, tmp_path, capsys, monkeypatch, trouble
):
    folder, dest = tmp_path / "OUT", tmp_path / "DEST"
    shutil.copytree(checkpoint, folder)
    if trouble == "a scale of zero":
        change_tensor(folder, "model.layers.1.mlp.up_proj.scales", torch.zeros_like)
    else:
        create = Disk.create

        def refuse(disk, path):
            if path.name == "model-00003-of-00003.safetensors.tmp":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return create(disk, path)

        monkeypatch.setattr(Disk, "create", refuse)
    code = main(["export", str(folder), str(dest), "--format", "hf"])
    sentence = capsys.readouterr().err.strip().splitlines()[-1]
    if trouble == "a scale of zero":
        assert (code, sentence.endswith("row 0 of 40; the file is broken")) == (2, True), sentence
    else:
        assert (code, sentence.endswith("No space left on device")) == (1, True), sentence
    assert [path.name for path in tmp_path.iterdir()] == ["OUT"]


def test_an_export_replaces_an_export_only_if_told_to(checkpoint, tmp_path, capsys):
    argv = ["export", str(checkpoint), str(tmp_path / "DEST"), "--format", "hf", "--json"]
    assert main(argv) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["format"], record["checkpoint"]) == ("hf", "OUT")
    size = sum(t.numel() * t.element_size() for t in stored_tensors(tmp_path / "DEST").values())
    assert record["size_bytes"] == size
    assert main(argv) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("awq", "--format awq is not one of compressed-tensors, gptq, gptq_v2, hf"),
        ("gptq", "quantize with --preset w4a16, or export with --format hf"),
        ("compressed-tensors", "quantize with --preset ct-w4a4, or export with --format hf"),
    ],
)
def test_refusals_end_with_exit_code_2_and_leave_nothing(checkpoint, tmp_path, capsys, name, words):
    assert main(["export", str(checkpoint), str(tmp_path / "DEST"), "--format", name]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_checkpoint_is_refused(tiny_dir, tmp_path, capsys):
    assert main(["export", str(tiny_dir), str(tmp_path / "DEST"), "--format", "hf"]) == 2
    assert "is not quantized" in capsys.readouterr().err


def quantize_argv(model, out, *options):
    return ["quantize", str(model), str(out), "--preset", "w8a8", "--check", "off", *options]


def test_quantize_exports_beside_the_checkpoint(tiny_dir, tmp_path, capsys):
    out, dest = tmp_path / "OUT", tmp_path / "OUT-compressed-tensors"
    assert main([*quantize_argv(tiny_dir, out, "--format", "compressed-tensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exported"] == str(dest)
    assert read_manifest(dest)["exported_as"] == "compressed-tensors"
    assert check_files(out, hashes=True)
    assert main(["export", str(out), str(tmp_path / "AGAIN"), "--format", "compressed-tensors"]) == 0
    assert read_manifest(tmp_path / "AGAIN")["files"] == read_manifest(dest)["files"]


def test_quantize_refuses_an_export_before_it_starts(tiny_dir, tmp_path, capsys):
    assert main(quantize_argv(tiny_dir, tmp_path / "OUT", "--format", "gptq")) == 2
    assert "no activations of 8 bits" in capsys.readouterr().err
    (tmp_path / "OUT-hf").mkdir()
    assert main(quantize_argv(tiny_dir, tmp_path / "OUT", "--format", "hf")) == 2
    assert "OUT-hf exists" in capsys.readouterr().err
    assert not (tmp_path / "OUT").exists()
