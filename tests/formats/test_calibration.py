"""The artefact of `atomq calibrate`: reused only where all that it depends on is equal."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import calibration_text, quantize_tiny
from tiny_models import save_tiny_model

from atomq import pipeline
from atomq.config import CalibrationConfig, OutlierScheme
from atomq.errors import CheckpointError
from atomq.formats.calibration import CalibrationKey, read_calibration, write_calibration
from atomq.numerics.channels import ChannelStatistics

KEY = CalibrationKey("model-hash", "data-hash", seed=3, metric="hessian", n_outliers=2)
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate_proj")
STATISTICS = {
    name: ChannelStatistics(torch.rand(6) + i, torch.rand(6) + i) for i, name in enumerate(NAMES, start=1)
}
ORDERS = {name: s.hessian.argsort().to(torch.int32) for name, s in STATISTICS.items()}
METADATA = "atomq_calibration"


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "stats.safetensors"
    write_calibration(path, KEY, STATISTICS, ORDERS, {"model": "tiny"})
    return path


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def change_content(path, change) -> None:
    content = json.loads(metadata_of(path)[METADATA])
    content = change(content) or content
    save_file(load_file(path), path, {METADATA: json.dumps(content)})


def test_statistics_come_back_bit_for_bit(path):
    found = read_calibration(path, KEY)
    assert list(found) == sorted(NAMES)
    for name, s in STATISTICS.items():
        assert torch.equal(found[name].hessian, s.hessian)
        assert torch.equal(found[name].abs_mean, s.abs_mean)


def test_the_file_holds_what_the_document_says(path):
    tensors = load_file(path)
    assert set(tensors) == {f"{name}.{part}" for name in NAMES for part in ("hessian", "abs_mean", "perm")}
    assert torch.equal(tensors[f"{NAMES[0]}.perm"], ORDERS[NAMES[0]])
    content = json.loads(metadata_of(path)[METADATA])
    assert content["version"] == 1
    assert content["key"] == {
        "model_hash": "model-hash",
        "data_hash": "data-hash",
        "seed": 3,
        "metric": "hessian",
        "n_outliers": 2,
        "transforms": [],
        "all_experts": False,
    }
    assert content["facts"] == {"model": "tiny"}


def test_the_same_statistics_give_the_same_bytes(path, tmp_path):
    write_calibration(tmp_path / "again", KEY, STATISTICS, ORDERS, {"model": "tiny"})
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


OTHER = {
    "model_hash": "another",
    "data_hash": "another",
    "seed": 4,
    "metric": "abs_mean",
    "n_outliers": 3,
    "transforms": ("rotation",),
    "all_experts": True,
}


def test_every_part_of_the_key_is_tried_below():
    assert set(OTHER) == {field.name for field in dataclasses.fields(CalibrationKey)}


@pytest.mark.parametrize("field", OTHER)
def test_each_difference_of_the_key_is_named_with_both_values(path, field):
    wanted = dataclasses.replace(KEY, **{field: OTHER[field]})
    with pytest.raises(CheckpointError) as caught:
        read_calibration(path, wanted)
    value = list(OTHER[field]) if field == "transforms" else OTHER[field]
    have = [] if field == "transforms" else getattr(KEY, field)
    assert f"settings: {field} is {have!r} but {value!r} is needed; give quantize the model" in str(
        caught.value
    )


def test_all_differences_are_named_at_once(path):
    with pytest.raises(CheckpointError) as caught:
        read_calibration(path, CalibrationKey(**OTHER))
    assert all(f"{field} is " in str(caught.value) for field in OTHER)


def test_a_key_without_a_field_differs(path):
    change_content(path, lambda content: content["key"].pop("seed") and None)
    with pytest.raises(CheckpointError, match="seed is None but 3 is needed"):
        read_calibration(path, KEY)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(version=2),
        lambda c: c.pop("key") and None,
        lambda c: c.update(key=None),
        lambda c: [c],
    ],
)
def test_another_version_or_content_is_refused(path, change):
    change_content(path, change)
    with pytest.raises(CheckpointError, match=r"stats\.safetensors is not a calibration artefact of this"):
        read_calibration(path, KEY)


@pytest.mark.parametrize("metadata", [None, {}, {METADATA: "{"}, {METADATA: "[" * 50_000}, {"other": "1"}])
def test_another_safetensors_file_is_refused(path, metadata):
    save_file(load_file(path), path, metadata)
    with pytest.raises(CheckpointError, match="is not a calibration artefact of this version"):
        read_calibration(path, KEY)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 100])
def test_a_file_of_another_kind_or_a_truncated_one_is_refused(path, content):
    whole = path.read_bytes()
    for spoiled in (content, whole[:-4]):
        path.write_bytes(spoiled)
        with pytest.raises(CheckpointError, match=r"stats\.safetensors cannot be read"):
            read_calibration(path, KEY)


def test_a_missing_artefact_is_refused(tmp_path):
    for place in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match="there is no calibration artefact"):
            read_calibration(place, KEY)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("hessian", lambda t: t.double()),
        ("abs_mean", lambda t: t.half()),
        ("hessian", lambda t: t[None]),
        ("hessian", lambda t: t / 0),
        ("abs_mean", lambda t: t * float("nan")),
    ],
)
def test_damaged_statistics_are_named(path, part, change):
    tensors = load_file(path)
    tensors[f"{NAMES[1]}.{part}"] = change(tensors[f"{NAMES[1]}.{part}"])
    save_file(tensors, path, metadata_of(path))
    with pytest.raises(CheckpointError, match=rf"the statistics of {NAMES[1]} in .* are not finite vectors"):
        read_calibration(path, KEY)


def test_a_missing_statistic_is_named(path):
    tensors = load_file(path)
    del tensors[f"{NAMES[1]}.abs_mean"]
    save_file(tensors, path, metadata_of(path))
    with pytest.raises(CheckpointError, match=rf"lacks a statistic of {NAMES[1]}"):
        read_calibration(path, KEY)


# Against the model, in `pipeline.quantize`.


@pytest.fixture
def real(tiny_dir, tmp_path):
    text = calibration_text(tmp_path)
    config = CalibrationConfig(str(text), n_samples=4, seq_len=32)
    outliers = OutlierScheme(5, reorder=True)
    pipeline.calibrate(str(tiny_dir), tmp_path / "stats.safetensors", config, outliers, "cpu")
    return tmp_path / "stats.safetensors"


@pytest.mark.parametrize("damage", ["a group is missing", "a group is too narrow", "a group is too many"])
def test_an_artefact_that_does_not_hold_every_group_of_the_model_is_refused(tiny_dir, real, tmp_path, damage):
    name = "model.layers.1.mlp.down_proj"
    tensors = load_file(real)
    if damage == "a group is missing":
        tensors = {key: t for key, t in tensors.items() if not key.startswith(name)}
    elif damage == "a group is too narrow":
        tensors |= {f"{name}.{part}": tensors[f"{name}.{part}"][:-1] for part in ("hessian", "abs_mean")}
    else:
        name = "model.layers.7.mlp.down_proj"
        tensors |= {f"{name}.{part}": torch.rand(80) for part in ("hessian", "abs_mean")}
    save_file(tensors, real, metadata_of(real))
    with pytest.raises(CheckpointError, match=rf"is damaged: the statistics of {name} are not those"):
        quantize_tiny(tiny_dir, tmp_path / "OUT", calibration_file=real)
    assert not (tmp_path / "OUT").exists()


@pytest.mark.parametrize(
    ("difference", "field"), [("model", "model_hash"), ("text", "data_hash"), ("metric", "metric")]
)
def test_an_artefact_of_other_inputs_is_refused(tiny_dir, real, tmp_path, difference, field):
    model = save_tiny_model(tmp_path / "other", seed=1) if difference == "model" else tiny_dir
    scheme = "e4m3 outliers" if difference == "metric" else "atom"  # the first goes by abs_mean
    n_samples = 3 if difference == "text" else 4
    with pytest.raises(CheckpointError, match=rf"{field} is \S+ but \S+ is needed; give quantize the model"):
        quantize_tiny(model, tmp_path / "OUT", scheme, n_samples=n_samples, calibration_file=real)
    assert not (tmp_path / "OUT").exists()
