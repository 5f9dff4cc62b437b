"""Whatever is wrong with a checkpoint folder is refused and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import (
    FIRST,
    INDEX,
    TENSORS,
    change_json,
    change_tensor,
    quantize_tiny,
    rehash,
    stored_tensors,
    write_small,
)

import atomq.checkpoints
import atomq.hf
from atomq.errors import CheckpointError
from atomq.formats import checkpoint as module
from atomq.formats.checkpoint import (
    check_files,
    check_tensors,
    read_config,
    read_manifest,
    read_tensors,
    tensor_headers,
    weight_map,
)
from atomq.numerics.linear import TensorSpec


@pytest.fixture
def small(tmp_path) -> Path:
    write_small(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture(scope="module")
def made(tiny_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    return quantize_tiny(tiny_dir, folder / "OUT").path


@pytest.fixture
def real(made, tmp_path) -> Path:
    """A copy of a whole checkpoint that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "real"))


def test_what_was_written_is_read_back(small):
    assert weight_map(small) == {"a": FIRST, "b": FIRST, "c": "model-00002-of-00002.safetensors"}
    assert tensor_headers(small) == {
        name: TensorSpec((t.dtype,), tuple(t.shape)) for part in TENSORS for name, t in part.items()
    }
    for name, tensor in read_tensors(small, {"a", "c"}):
        assert torch.equal(tensor, (TENSORS[0] | TENSORS[1])[name])
    assert check_files(small, hashes=True) == 4
    assert read_config(small) == {"model_type": "none"}


def test_the_manifest_lists_every_file_but_itself_and_the_reports(small):
    names = {path.name for path in small.iterdir() if path.is_file()}
    assert set(read_manifest(small)["files"]) == names - {"manifest.json"}
    assert json.loads((small / INDEX).read_text())["metadata"] == {"total_size": 6 + 2 + 12}


# Manifests.


def test_all_files_that_differ_are_named(small):
    (small / FIRST).write_bytes((small / FIRST).read_bytes()[:-1])
    (small / "config.json").unlink()
    content = bytearray((small / INDEX).read_bytes())
    content[-3] ^= 1
    (small / INDEX).write_bytes(content)
    size = (small / FIRST).stat().st_size
    with pytest.raises(CheckpointError) as caught:
        check_files(small, hashes=True)
    assert str(caught.value) == (
        f"small differs from its manifest: config.json is missing; {FIRST} has {size} bytes instead of "
        f"{size + 1}; {INDEX} has been altered (SHA-256 differs); copy it again, or make it anew"
    )
    with pytest.raises(CheckpointError) as caught:
        check_files(small, hashes=False)
    assert "altered" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "chat_template.jinja"])
def test_a_file_that_a_loader_would_read_must_be_listed(small, name):
    (small / "notes.txt").touch()  # no loader reads this
    check_files(small, hashes=True)
    (small / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} is not listed"):
        check_files(small, hashes=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("quant_method"), "is not a manifest of atomq"),
        (lambda m: m.update(quant_method="gptq"), "is not a manifest of atomq"),
        (lambda m: m.update(format_version=2), "has format_version 2; this atomq reads 1"),
        (lambda m: m.pop("format_version"), "has format_version None"),
        (lambda m: m.pop("files"), "lists no files that could be checked"),
        (lambda m: m.update(files=[]), "lists no files that could be checked"),
        (lambda m: m.update(files={}), "config.json is not listed"),
        (lambda m: m["files"].update(x={}), "lists no files that could be checked"),
        (lambda m: m["files"].update(x=3), "lists no files that could be checked"),
        (lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}}), "lists no files that"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 0, "sha256": ""}}), "lists no files that"),
        (lambda m: m["files"].update({"..": {"bytes": 0, "sha256": ""}}), "lists no files that"),
        (lambda m: m["files"].update({"a\\b": {"bytes": 0, "sha256": ""}}), "lists no files that"),
        (lambda m: m["files"].update(x={"bytes": 0, "sha256": ""}), "x is missing"),
        (lambda m: m.pop("source"), "does not say source"),
        (lambda m: m.update(versions=None, warnings="none"), "does not say versions, warnings"),
        (lambda m: m.update(calibration=3), "does not say calibration"),
        (lambda m: m.pop("calibration"), "does not say calibration"),
    ],
)
def test_a_manifest_that_says_less_than_it_must_is_refused(small, change, words):
    path = small / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=words):
        check_files(small, hashes=True)


@pytest.mark.parametrize("reader", [read_config, read_manifest, weight_map])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"null", b"[1]", b'"x"', b"\xff\xfe\x00", b"[" * 50_000, b'{"a":' * 50_000, b"9" * 9000],
)
def test_garbage_is_refused_with_the_name_of_the_file(small, reader, content):
    name = {read_config: "config.json", read_manifest: "manifest.json", weight_map: INDEX}[reader]
    (small / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} of small"):
        reader(small)
    (small / name).unlink()
    with pytest.raises(CheckpointError, match=f"small has no {name}; it is not a whole checkpoint"):
        reader(small)
    (small / name).mkdir()
    with pytest.raises(CheckpointError, match=name):
        reader(small)


def test_a_huge_json_file_is_refused_unread(small, monkeypatch):
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 10)
    with pytest.raises(CheckpointError, match=r"manifest\.json of small cannot be read: it has .* bytes"):
        read_manifest(small)


# Index and shards.


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "", ".", "..", "a\0b", 3, None, []],
)
def test_an_index_that_leads_out_of_its_folder_is_refused(small, name):
    change_json(small / INDEX, lambda index: index["weight_map"].update(c=name))
    with pytest.raises(CheckpointError, match="has no usable weight_map"):
        tensor_headers(small)


@pytest.mark.parametrize("change", [lambda i: i.pop("metadata"), lambda i: i.update(metadata=[3])])
def test_an_index_without_metadata_is_refused(small, change):
    change_json(small / INDEX, change)
    with pytest.raises(CheckpointError, match="has no metadata"):
        weight_map(small)


@pytest.mark.parametrize(
    "change",
    [lambda i: i.pop("weight_map"), lambda i: i.update(weight_map=[]), lambda i: i.update(weight_map=3)],
)
def test_an_index_without_a_map_is_refused(small, change):
    change_json(small / INDEX, change)
    with pytest.raises(CheckpointError, match="has no usable weight_map"):
        weight_map(small)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i["weight_map"].update(d=FIRST), "lacks tensors that its index names: d"),
        (lambda i: i["weight_map"].pop("b"), f"{FIRST} holds b, which {INDEX} does not place there"),
        (lambda i: i["weight_map"].update(c=FIRST), "lacks tensors that its index names: c"),
        (lambda i: i["weight_map"].update(b="model-00002-of-00002.safetensors"), f"{FIRST} holds b, which"),
        (lambda i: i["weight_map"].update(c="gone.safetensors"), "gone.safetensors cannot be read"),
        (lambda i: i["weight_map"].update(c="config.json"), "config.json cannot be read"),
        (lambda i: i["weight_map"].update(c="reports"), "reports cannot be read"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(small, change, words):
    change_json(small / INDEX, change)
    with pytest.raises(CheckpointError, match=words):
        tensor_headers(small)


@pytest.mark.parametrize("kept", [0, 4, 8, 60, -1])
def test_a_truncated_shard_is_refused(small, kept):
    content = (small / FIRST).read_bytes()
    (small / FIRST).write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match=f"{FIRST} cannot be read"):
        tensor_headers(small)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 8 + b"{}",
        b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"{}" * 10,
        (10).to_bytes(8, "little") + b"not json!!",
        (2).to_bytes(8, "little") + b"[]",
        (61).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9999999],"data_offsets":[0,4]}}  '
        + b"\0" * 4,
        (58).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[90,94]}}  '
        + b"\0" * 4,
    ],
)
def test_a_shard_with_a_garbage_header_is_refused(small, content):
    (small / FIRST).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{FIRST} cannot be read"):
        tensor_headers(small)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_a_dtype_that_is_not_used_is_refused(small, dtype):
    save_file(TENSORS[0] | {"b": torch.zeros(1, dtype=dtype)}, small / FIRST)
    with pytest.raises(CheckpointError, match=f"b in {FIRST} has dtype .*, which is not used here"):
        tensor_headers(small)


def test_one_file_without_an_index_is_read_as_transformers_reads_it(small):
    """What `save_pretrained` writes for a small model; it goes before an index."""
    save_file(TENSORS[1], small / "model.safetensors")
    assert weight_map(small) == {"c": "model.safetensors"}
    assert set(tensor_headers(small)) == {"c"}


# Tensors against the schema.


def spec(dtype: torch.dtype, *shape: int) -> TensorSpec:
    return TensorSpec((dtype,), shape)


def test_tensors_are_held_against_what_they_must_be():
    expected = {"a": TensorSpec((torch.float16, torch.float32), (2, 3)), "b": spec(torch.uint8, 4)}
    check_tensors({"a": spec(torch.float32, 2, 3), "b": spec(torch.uint8, 4)}, expected)
    cases = [
        ({"a": spec(torch.float16, 2, 3)}, "lacks b"),
        ({}, "lacks a, b"),
        (dict.fromkeys("abc", spec(torch.uint8, 4)), "do not belong to it: c"),
        (
            {"a": spec(torch.bfloat16, 2, 3), "b": spec(torch.uint8, 4)},
            r"a is BF16 \[2, 3\]; it must be F16 or F32",
        ),
        ({"a": spec(torch.float16, 3, 2), "b": spec(torch.uint8, 4)}, r"a is F16 \[3, 2\]; it must be"),
        ({"a": spec(torch.float16, 2, 3), "b": spec(torch.int8, 4)}, r"b is I8 \[4\]; it must be U8 \[4\]"),
    ]
    for found, words in cases:
        with pytest.raises(CheckpointError, match=words):
            check_tensors(found, expected)


def test_many_missing_tensors_are_summed_up():
    with pytest.raises(CheckpointError, match=r"lacks t0, t1, t2, t3, t4 and 3 more$"):
        check_tensors({}, {f"t{i}": spec(torch.uint8, 1) for i in range(8)})


NAME = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        ("qweight", lambda t: t[:, 1:], r"qweight is U8 \[48, 21\]; it must be U8 \[48, 22\]"),
        ("qweight", lambda t: t[1:], r"qweight is U8 \[47, 22\]"),
        ("qweight", lambda t: t.to(torch.int8), r"qweight is I8 \[48, 22\]; it must be U8"),
        ("scales", lambda t: t.T, r"scales is F16 \[3, 24\]; it must be F16 or F32 \[24, 3\]"),
        ("scales", lambda t: t.to(torch.bfloat16), r"scales is BF16 .*; it must be F16 or F32"),
        ("perm", lambda t: t[:-1], r"perm is I32 \[47\]; it must be I32 \[48\]"),
        ("perm", lambda t: t.to(torch.int64), "perm in .* has dtype I64, which is not used here"),
        ("outlier_weight", lambda t: t.to(torch.uint8), r"outlier_weight is U8 .*; it must be I8"),
        ("outlier_scales", lambda t: t[:, None], r"outlier_scales is F16 \[48, 1\]"),
    ],
)
def test_a_tensor_of_another_dtype_or_shape_is_refused_although_the_manifest_agrees(
    real, suffix, change, words
):
    change_tensor(real, f"{NAME}.{suffix}", lambda t: change(t).contiguous())
    check_files(real, hashes=True)
    for open_it in (atomq.hf.load, lambda folder: atomq.checkpoints.describe(folder, check=True)):
        with pytest.raises(CheckpointError, match=words):
            open_it(real)


def test_missing_and_unexpected_tensors_are_refused_although_index_and_manifest_agree(real):
    shard = real / "model-00002-of-00003.safetensors"
    tensors = {name: t for name, t in stored_tensors(real).items() if name.startswith("model.layers.0.")}

    def store(changed) -> None:
        save_file(changed, shard, {"format": "pt"})
        mapping = {name: s for name, s in weight_map(real).items() if s != shard.name}
        mapping |= dict.fromkeys(changed, shard.name)
        change_json(real / INDEX, lambda index: index.update(weight_map=mapping))

    store({name: t for name, t in tensors.items() if name != f"{NAME}.perm"})
    with pytest.raises(CheckpointError, match=rf"lacks {NAME}.perm"):
        atomq.hf.load(real)
    store(tensors | {"model.layers.0.self_attn.k_proj.perm": tensors[f"{NAME}.perm"].clone()})
    with pytest.raises(
        CheckpointError, match=r"do not belong to it: model\.layers\.0\.self_attn\.k_proj\.perm"
    ):
        atomq.hf.load(real)
    store(tensors | {f"{NAME}.weight": torch.zeros(48, 48)})
    with pytest.raises(CheckpointError, match=rf"do not belong to it: {NAME}.weight"):
        atomq.hf.load(real)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("format_version",), 2, "has format_version 2"),
        (("quant_method",), "atom", "quant_method is 'atom'"),
        (("scheme", "transform"), "fourier", "transform='fourier' does not exist"),
        (("scheme", "weights", "scale_mode"), "log", "scale_mode='log' does not exist"),
        (("scheme", "outliers", "n_outliers"), 6, r"qweight is U8 \[48, 22\]; it must be U8 \[48, 21\]"),
        (("scheme", "outliers", "n_outliers"), 400, "it must be"),
        (("scheme", "weights", "group_size"), 32, r"scales is F16 \[24, 3\]; it must be .* \[24, 2\]"),
        (("scheme", "outliers", "reorder"), False, "do not belong to it: .*perm"),
        (("scheme", "weights", "symmetric"), False, "lacks .*zeros"),
    ],
)
def test_a_scheme_that_the_tensors_do_not_fit_is_refused(real, path, value, words):
    def change(config) -> None:
        place = config["quantization_config"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    change_json(real / "config.json", change)
    with pytest.raises(CheckpointError, match=words):
        atomq.hf.load(real)
    with pytest.raises(CheckpointError, match=words):
        atomq.checkpoints.describe(real, check=True)


def test_a_whole_checkpoint_passes_every_check(real):
    rehash(real)
    assert check_files(real, hashes=True) == len(read_manifest(real)["files"])
    atomq.hf.load(real, check_hashes=True)
