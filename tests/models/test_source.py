"""Finding a model: local directories, GGUF files and hub ids; and what the hash of a source covers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_models import save_tiny_model

from atomq.errors import UnsupportedModelError
from atomq.models import source as source_module
from atomq.models.source import ModelSource, read_config, resolve_source, source_hash, weight_files


@pytest.fixture
def folder(tiny_dir, tmp_path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "my-model"))


@pytest.fixture
def offline_cache(monkeypatch, tmp_path) -> Path:
    """An empty Hugging Face cache, as a process sees it that was started with HF_HUB_OFFLINE=1."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_directory_is_named_by_its_last_part_only(folder, monkeypatch):
    assert resolve_source(str(folder)) == ModelSource("my-model", folder, "directory")
    assert resolve_source(f"{folder}/").name == "my-model"
    monkeypatch.chdir(folder)
    assert resolve_source(".").name == "my-model"


def test_a_gguf_file_is_found_by_its_ending(tmp_path):
    path = tmp_path / "tiny.Q4_1.gguf"
    path.write_bytes(b"GGUF")
    assert resolve_source(str(path)) == ModelSource("tiny.Q4_1.gguf", path, "gguf")


@pytest.mark.parametrize(
    "model", ["./nothing", "/no/such/model", "no\\such", "tiny", "a/b/c", "x/y.gguf", "~/no"]
)
def test_what_is_neither_a_path_nor_a_hub_id_is_refused_without_asking_the_hub(model, monkeypatch):
    monkeypatch.setattr(source_module, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(
        UnsupportedModelError, match="does not exist, and is not a hub id of the form org/name"
    ):
        resolve_source(model)


def test_a_file_of_another_kind_is_refused(text_file):
    with pytest.raises(UnsupportedModelError, match=r"is a file but not a \.gguf file"):
        resolve_source(str(text_file))


def test_a_hub_id_is_fetched_without_pickles_or_code_and_keeps_its_name(folder, monkeypatch):
    asked = {}

    def snapshot_download(repo_id, allow_patterns):
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(folder)

    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    assert resolve_source("org/tiny-1.5") == ModelSource("org/tiny-1.5", folder, "directory")
    assert asked["repo_id"] == "org/tiny-1.5"
    unwanted = ["pytorch_model.bin", "model.pt", "modeling.py", "consolidated.safetensors", "a.gguf"]
    wanted = ["config.json", "model-00001-of-00002.safetensors", "merges.txt", "tokenizer.model", "LICENSE"]
    filtered = huggingface_hub.utils.filter_repo_objects(unwanted + wanted, allow_patterns=asked["patterns"])
    assert list(filtered) == wanted


def test_a_hub_id_comes_from_the_local_cache_when_offline(offline_cache, folder):
    repository, revision = offline_cache / "models--org--tiny", "0" * 40
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    source = resolve_source("org/tiny")
    assert (source.name, source.path.name) == ("org/tiny", revision)
    assert source_hash(source) == source_hash(resolve_source(str(folder)))


def test_a_hub_id_that_is_not_in_the_cache_says_that_the_hub_is_switched_off(offline_cache):
    with pytest.raises(UnsupportedModelError, match="org/tiny is no local directory") as refusal:
        resolve_source("org/tiny")
    assert "HF_HUB_OFFLINE is set" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_hub_that_does_not_answer_says_to_check_the_network(monkeypatch):
    def snapshot_download(repo_id, allow_patterns):
        raise LocalEntryNotFoundError("cannot find the appropriate snapshot folder\nmore")

    monkeypatch.setattr(source_module, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UnsupportedModelError, match="check the id and the network") as refusal:
        resolve_source("org/tiny")
    assert "appropriate snapshot folder)" in str(refusal.value)


def test_a_directory_without_config_says_what_belongs_there(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UnsupportedModelError, match=r"my-model has no config\.json; a model directory holds"):
        resolve_source(str(folder))


def test_a_directory_of_gguf_files_points_to_one(tmp_path):
    (tmp_path / "b.gguf").touch()
    (tmp_path / "a.gguf").touch()
    with pytest.raises(UnsupportedModelError, match=r"give one, such as a\.gguf"):
        resolve_source(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "cannot be read"), ("[]", "does not hold a JSON object"), ("{}", "names no model_type")],
)
def test_a_broken_config_is_refused(folder, content, words):
    (folder / "config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=rf"config\.json {words}"):
        resolve_source(str(folder))


def test_shards_without_their_index_are_told_what_is_missing(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(
        UnsupportedModelError, match=r"model-00001-of-00002\.safetensors alone .* fetch its index"
    ):
        resolve_source(str(folder))


def test_pickled_weights_are_no_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"has neither model\.safetensors nor .*save_pretrained"):
        resolve_source(str(folder))


@pytest.mark.parametrize("method", ["gptq", "atomq"])
def test_a_quantized_model_is_refused_with_its_method(folder, method):
    change_config(folder, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=rf"already quantized \(quant_method '{method}'"):
        resolve_source(str(folder))


@pytest.mark.parametrize("shard", ["model-00002-of-00002.safetensors", "../my-model/model.safetensors"])
def test_an_index_that_names_an_absent_or_outside_shard_is_refused(folder, shard):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        UnsupportedModelError, match=rf"index\.json names {shard}, which is not in the directory"
    ):
        resolve_source(str(folder))


def test_an_index_without_map_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="has no weight_map"):
        resolve_source(str(folder))


def test_the_hash_is_over_names_sizes_and_contents_in_order(folder):
    source = resolve_source(str(folder))
    expected = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        content = (folder / name).read_bytes()
        expected.update(f"{name}\0{len(content)}\0".encode() + hashlib.sha256(content).digest())
    assert source_hash(source) == expected.hexdigest()


def test_the_hash_of_a_gguf_file_is_that_of_its_content(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(3 << 20))
    assert source_hash(resolve_source(str(path))) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_one_changed_byte_changes_the_hash(folder, name):
    source = resolve_source(str(folder))
    before = source_hash(source)
    (folder / "tokenizer_config.json").write_text("{}")
    assert source_hash(source) == before  # of weights and config, not of the tokenizer
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    assert source_hash(source) != before


def test_shards_count_as_weight_files_in_order(tmp_path):
    folder = tmp_path / "sharded"
    save_tiny_model(folder)
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    shutil.copy(folder / "model-00002-of-00002.safetensors", folder / "model-00001-of-00002.safetensors")
    weight_map = {"b": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    source = resolve_source(str(folder))
    assert [file.name for file in weight_files(source)] == sorted(weight_map.values())
    assert read_config(source)["model_type"] == "llama"
