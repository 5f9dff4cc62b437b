"""Loading directories: the same model comes back, and each way a file can be wrong is said by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, make_tiny_model, save_tiny_model
from transformers import AutoModelForCausalLM

from atomq.errors import ConfigError, UnsupportedModelError
from atomq.models.loading import companions, load_float_model, load_tokenizer
from atomq.models.source import ModelSource, resolve_source

TOKENS = torch.arange(24)[None]


@pytest.fixture
def folder(tiny_dir, tmp_path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "my-model"))


def source_of(folder: Path) -> ModelSource:
    return resolve_source(str(folder))


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_every_family_comes_back_bit_for_bit(kind, tmp_path):
    model = load_float_model(source_of(save_tiny_model(tmp_path / kind, kind)))
    assert torch.equal(model(TOKENS).logits, make_tiny_model(kind)(TOKENS).logits)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.eos_token_id == 1


def test_a_tied_head_stays_tied(tmp_path):
    model = load_float_model(source_of(save_tiny_model(tmp_path / "tied", "qwen2")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")


def test_a_tied_model_may_bring_the_same_head_but_not_another(tmp_path):
    folder = save_tiny_model(tmp_path / "tied", "qwen2")
    change_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    load_float_model(source_of(folder))
    change_weights(folder, lambda w: w["lm_head.weight"].mul_(2))
    with pytest.raises(UnsupportedModelError, match=r"lm_head\.weight differs from the embeddings"):
        load_float_model(source_of(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_to_the_storage_dtype_and_kept_as_float32(folder, dtype):
    model = load_float_model(source_of(folder), dtype)
    assert model.config.dtype == dtype
    for name, original in make_tiny_model().named_parameters():
        assert torch.equal(model.get_parameter(name), original.to(dtype).float())
        assert model.get_parameter(name).dtype == torch.float32
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_without_a_storage_dtype_it_is_the_one_of_the_files(folder):
    assert load_float_model(source_of(folder)).config.dtype == torch.float32
    change_weights(folder, lambda w: w.update({name: t.bfloat16() for name, t in w.items()}))
    model = load_float_model(source_of(folder))  # although config.json still says float32
    assert model.config.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, make_tiny_model().lm_head.weight.bfloat16().float())


def test_a_storage_dtype_that_is_none_of_the_three_is_refused(folder):
    with pytest.raises(ConfigError, match=r"storage dtype torch\.float64"):
        load_float_model(source_of(folder), torch.float64)


def test_shards_are_put_together(tmp_path):
    folder = save_tiny_model(tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    model = load_float_model(source_of(tmp_path / "parts"))
    assert torch.equal(model(TOKENS).logits, make_tiny_model()(TOKENS).logits)


def test_a_tensor_in_two_shards_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedModelError, match=r"has \S+ in two files"):
        load_float_model(source_of(folder))


def test_the_config_says_nothing_of_the_place_it_came_from(folder):
    model = load_float_model(source_of(folder))
    assert str(folder.parent) not in model.config.to_json_string()
    assert model.config.name_or_path == "my-model"
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(model.config, "quantization_config")


def test_the_generation_config_is_kept(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.3}')
    generation_config = load_float_model(source_of(folder)).generation_config
    assert generation_config.eos_token_id == [1, 7]
    assert generation_config.temperature == 0.3


def test_a_broken_generation_config_is_refused(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match=r"generation_config\.json is unusable"):
        load_float_model(source_of(folder))


def test_a_family_that_is_not_known_is_refused_before_anything_else(folder):
    change_config(folder, model_type="gpt_oss", hidden_size="many")
    with pytest.raises(
        UnsupportedModelError, match="'gpt_oss' is not a family that atomq knows; it knows gemma"
    ):
        load_float_model(source_of(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": "many"}, "the config is unusable"),
        ({"num_key_value_heads": 0}, "the config"),
        ({"hidden_act": "sine"}, "the config makes no model"),
        ({"pad_token_id": 999}, "the config makes no model"),
        (
            {"num_hidden_layers": 10**9},
            r"should have 1000000000 blocks \(num_hidden_layers\), but has only 21",
        ),
        ({"num_hidden_layers": 3}, r"lacks the tensor model\.layers\.2\.input_layernorm\.weight and 8 more"),
        ({"num_hidden_layers": 1}, r"has the tensor model\.layers\.1\.input_layernorm\.weight and 8 more"),
        ({"vocab_size": 10**15}, r"embed_tokens\.weight has shape \[256, 48\], but its config asks for"),
        ({"intermediate_size": 96}, r"model\.layers\.0\.mlp\.gate_proj\.weight has shape \[80, 48\]"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, words):
    change_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=words) as refusal:
        load_float_model(source_of(folder))
    assert "\n" not in str(refusal.value)


def test_a_missing_and_an_unknown_tensor_are_named(folder):
    change_weights(folder, lambda w: w.pop("model.norm.weight"))
    with pytest.raises(UnsupportedModelError, match=r"my-model lacks the tensor model\.norm\.weight, which"):
        load_float_model(source_of(folder))
    change_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(48), "extra": torch.ones(1)}))
    with pytest.raises(UnsupportedModelError, match="my-model has the tensor extra, which"):
        load_float_model(source_of(folder))


def test_old_files_may_carry_the_frequencies_of_rope(folder):
    change_weights(
        folder, lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)})
    )
    load_float_model(source_of(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(folder, value):
    change_weights(folder, lambda w: w["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(value))
    with pytest.raises(
        UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"
    ):
        load_float_model(source_of(folder))


def test_a_weight_beyond_the_range_of_float16_is_named(folder):
    change_weights(folder, lambda w: w["model.norm.weight"][0].fill_(7e4))
    with pytest.raises(
        UnsupportedModelError, match=r"model\.norm\.weight reaches 7e\+04, beyond the range of"
    ):
        load_float_model(source_of(folder), torch.float16)
    load_float_model(source_of(folder), torch.bfloat16)


def test_an_integer_tensor_is_refused(folder):
    change_weights(folder, lambda w: w.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(
        UnsupportedModelError, match=r"stores model\.norm\.weight as I8; atomq quantizes float"
    ):
        load_float_model(source_of(folder))


@pytest.mark.parametrize("kept", [0, 5, 300, -1])
def test_a_truncated_safetensors_file_is_refused(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors is truncated.*fetch it again"):
        load_float_model(source_of(folder))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]},
        {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        "F32",
    ],
)
def test_a_safetensors_header_that_contradicts_itself_is_refused(folder, entry):
    header = json.dumps({"w": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.safetensors (has a corrupt header|is truncated or no safetensors)",
    ):
        load_float_model(source_of(folder))


@pytest.mark.parametrize("header", [b"{", b"[1]", b"\xff\xff", b"[" * 100_000])
def test_a_safetensors_header_that_is_no_object_is_refused(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(
        UnsupportedModelError,
        match=r"model\.safetensors (has a corrupt header|is truncated or no safetensors)",
    ):
        load_float_model(source_of(folder))


def test_the_tokenizer_comes_back(folder):
    tokenizer = load_tokenizer(source_of(folder))
    text = "Zwölf Boxkämpfer 42!"
    assert len(tokenizer(text).input_ids) == len(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_json_counts_as_it_stands_whatever_class_the_config_names(folder):
    """transformers' GPT2Tokenizer would rebuild it with GPT-2's own pre-tokenizer."""
    content = json.loads((folder / "tokenizer.json").read_text())
    tokens = content["model"]["vocab"]
    tokens["12"] = tokens.pop("Ā")
    content["model"]["merges"] = [["1", "2"]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    assert len(load_tokenizer(source_of(folder))("12").input_ids) == 2


def test_a_directory_without_tokenizer_says_which_files_were_looked_for(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        UnsupportedModelError, match=r"none of tokenizer\.json, tokenizer\.model, vocab\.json is"
    ):
        load_tokenizer(source_of(folder))


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UnsupportedModelError, match="the tokenizer cannot be read"):
        load_tokenizer(source_of(folder))


def test_companions_are_copied_byte_for_byte_and_nothing_else(folder, tmp_path):
    (folder / "LICENSE").write_text("free")
    (folder / "LICENSE.apache.txt").write_text("free too")
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (folder / "README.md").write_text("not ours")
    found = companions(source_of(folder))
    assert sorted(found) == [
        "LICENSE",
        "LICENSE.apache.txt",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name, content in found.items():
        assert content == (folder / name).read_bytes()


@pytest.mark.parametrize("path", ["/home/me/models/tiny", "C:\\models\\tiny", "../tiny", "~/tiny"])
def test_a_local_path_in_the_tokenizer_config_is_left_out(folder, tmp_path, path):
    content = {"name_or_path": path, "tokenizer_file": path, "unk_token": "/", "model_max_length": 5}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    assert json.loads(companions(source_of(folder))["tokenizer_config.json"]) == {
        "unk_token": "/",
        "model_max_length": 5,
    }


def test_a_hub_id_in_the_tokenizer_config_stays(folder, tmp_path):
    (folder / "tokenizer_config.json").write_text('{"name_or_path":"org/tiny"}')
    assert companions(source_of(folder))["tokenizer_config.json"] == b'{"name_or_path":"org/tiny"}'


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000])
def test_a_tokenizer_config_that_is_no_object_is_refused(folder, content):
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json"):
        companions(source_of(folder))
