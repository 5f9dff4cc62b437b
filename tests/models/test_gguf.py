"""GGUF: tiny files written on the spot with the gguf package, whole and broken."""

from __future__ import annotations

import contextlib
import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from atomq.errors import UnsupportedModelError
from atomq.models.gguf import read_gguf, read_tensor
from atomq.models.loading import companions, load_float_model, load_tokenizer
from atomq.models.source import ModelSource, resolve_source

TOKENS = torch.arange(24)[None]
ALPHABET = sorted(byte_tokenizer().get_vocab(), key=byte_tokenizer().get_vocab().get)
MERGES = ["1 2", "12 3", "Ġ t", "Ġt h", "Ġth e", "c a", "ca t", "f o", "fo x"]
# 256 tokens in all, as the tiny models have: the last bytes of the alphabet make room for the merged ones.
VOCABULARY = [*[merge.replace(" ", "") for merge in MERGES], "<|end|>", "<think>", *ALPHABET[:-11]]

TOKENIZER = {"model": "gpt2", "pre": "gpt-2", "tokens": VOCABULARY, "merges": MERGES}


def permuted(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Rows i and i + head_dim / 2 of each head become neighbours: llama.cpp's order, by a naive loop."""
    rows = []
    head_dim = weight.shape[0] // n_heads
    for head in range(n_heads):
        for i in range(head_dim // 2):
            rows += [weight[head * head_dim + i], weight[head * head_dim + head_dim // 2 + i]]
    return torch.stack(rows)


def write_gguf(path: Path, model, change=None, kind=None, metadata=None, tokenizer=None) -> Path:
    """Write `model` as llama.cpp's converter does.

    Args:
        change: called with the dict of metadata and the dict of tensors before they are written.
        kind: quantization of the matrices; None is float32.
    """
    config, architecture = model.config, model.config.model_type.replace("mistral", "llama")
    values = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": np.float32(config.rms_norm_eps),
        "attention.key_length": model.model.layers[0].self_attn.head_dim,
        "rope.freq_base": np.float32(config.rope_parameters["rope_theta"]),
        **(metadata or {}),
    }
    values = {f"{architecture}.{key}": value for key, value in values.items()}
    for key, value in (TOKENIZER | {"bos_token_id": 9, "eos_token_id": 9} | (tokenizer or {})).items():
        values[f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"] = value
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    tensors = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if architecture == "llama" and "q_proj" in name:
            parameter = permuted(parameter, config.num_attention_heads)
        if architecture == "llama" and "k_proj" in name:
            parameter = permuted(parameter, config.num_key_value_heads)
        tensors[f"{names.get_name(module)}.{leaf}"] = parameter.numpy()
    if change:
        change(values, tensors)
    writer = gguf.GGUFWriter(path, architecture)
    kinds = {int: gguf.GGUFValueType.UINT32, bool: gguf.GGUFValueType.BOOL, str: gguf.GGUFValueType.STRING}
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.FLOAT32))
    for name, tensor in tensors.items():
        if kind is not None and tensor.ndim == 2:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def written(path: Path, kind: str = "llama", **options) -> ModelSource:
    return resolve_source(str(write_gguf(path / "tiny.gguf", make_tiny_model(kind), **options)))


@pytest.fixture
def tiny_gguf(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", make_tiny_model())


@pytest.mark.parametrize("kind", ["llama", "llama-mha-bias", "mistral", "qwen2", "qwen3"])
def test_a_gguf_model_answers_as_the_original(kind, tmp_path):
    model = load_float_model(written(tmp_path, kind), torch.float32)
    assert torch.equal(model(TOKENS).logits, make_tiny_model(kind)(TOKENS).logits)
    assert model.config.model_type == ("llama" if kind == "mistral" else kind.split("-")[0])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "qwen2")


def test_a_gguf_model_is_an_ordinary_model_that_can_be_saved(tmp_path):
    model = load_float_model(written(tmp_path))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_the_metadata_become_the_config(tmp_path):
    metadata = {
        "context_length": 4096,
        "attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "rope.freq_base": np.float32(100000.0),
        "vocab_size": 99,
    }
    config = load_float_model(written(tmp_path, metadata=metadata)).config
    assert config.max_position_embeddings == 4096
    assert config.rms_norm_eps == 1e-5
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert config.vocab_size == 256  # the rows of the embeddings, not the file's number
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (9, 9, None)
    assert config.dtype == torch.float16
    assert config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(config, "quantization_config")


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1", "Q6_K"])
def test_quantized_tensors_are_dequantized(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    weights = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    data = weights.numpy() if kind.name == "Q6_K" else gguf.quantize(weights.numpy(), kind)
    if kind.name == "Q6_K":  # the package dequantizes it only
        data = np.zeros((2, 210), dtype=np.uint8)
    writer.add_tensor("w", data, raw_dtype=None if kind.name == "F16" else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = read_tensor(read_gguf(tmp_path / "one.gguf"), "w")
    assert read.shape == (2, 256)
    assert read.dtype == torch.float32
    assert torch.allclose(read, weights * (kind.name != "Q6_K"), atol=0.3)


def test_linear_and_yarn_scaling_of_rope_are_kept(tmp_path):
    metadata = {"rope.scaling.type": "yarn", "rope.scaling.factor": np.float32(4.0)}
    metadata["rope.scaling.original_context_length"] = 64
    parameters = load_float_model(written(tmp_path, "qwen2", metadata=metadata)).config.rope_parameters
    assert parameters["rope_type"] == "yarn"
    assert parameters["factor"] == 4.0
    assert parameters["original_max_position_embeddings"] == 64


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_of_rope_is_recovered_from_its_table(tmp_path, factor):
    parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = make_tiny_model("llama", head_dim=128, rope_parameters=parameters)
    plain = make_tiny_model(
        "llama", head_dim=128, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}
    )
    table = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq

    path = write_gguf(tmp_path / "a.gguf", model, lambda _, t: t.update({"rope_freqs.weight": table.numpy()}))
    loaded = load_float_model(resolve_source(str(path)), torch.float32)
    assert loaded.config.rope_parameters == parameters
    assert torch.equal(loaded(TOKENS).logits, model(TOKENS).logits)

    table[3] *= 1.5
    path = write_gguf(tmp_path / "b.gguf", model, lambda _, t: t.update({"rope_freqs.weight": table.numpy()}))
    with pytest.raises(
        UnsupportedModelError, match=r"by a table \(rope_freqs\.weight\) that no config can express"
    ):
        load_float_model(resolve_source(str(path)))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"block_count": None}, r"llama\.block_count is None; a positive integer is needed"),
        ({"embedding_length": "48"}, r"llama\.embedding_length is '48'; a positive integer is needed"),
        ({"attention.head_count": [4, 4]}, r"llama\.attention\.head_count is \[4, 4\]"),
        ({"attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is None; a number is needed"),
        (
            {"block_count": 2**31},
            r"should have 2147483648 blocks \(num_hidden_layers\), but has only 21 tensors",
        ),
        ({"block_count": 3}, r"lacks the tensor model\.layers\.2\.input_layernorm\.weight"),
        ({"rope.dimension_count": 6}, "rotates 6 of 12 dimensions per head"),
        ({"rope.scaling.type": "longrope"}, "scales RoPE by 'longrope'"),
        ({"rope.scaling.type": "linear"}, r"llama\.rope\.scaling\.factor is None; a number is needed"),
        ({"attention.head_count_kv": 3}, "num_key_value_heads|has shape"),
    ],
)
def test_metadata_that_make_no_model_are_refused(metadata, words, tmp_path):
    with pytest.raises(UnsupportedModelError, match=words):
        load_float_model(written(tmp_path, metadata=metadata))


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path):
    def refused(change, words):
        with pytest.raises(UnsupportedModelError, match=words):
            load_float_model(written(tmp_path, change=change))

    refused(
        lambda _, t: t.pop("blk.1.attn_v.weight"),
        r"lacks the tensor model\.layers\.1\.self_attn\.v_proj\.weight",
    )
    refused(lambda _, t: t.pop("token_embd.weight"), r"lacks the tensor token_embd\.weight")
    experts = np.zeros((2, 80, 48), dtype=np.float32)
    refused(
        lambda _, t: t.update({"blk.0.ffn_up_exps.weight": experts}),
        r"has the tensor blk\.0\.ffn_up_exps\.weight",
    )
    refused(
        lambda _, t: t.update({"output_norm.weight": t["output_norm.weight"][:40]}),
        r"model\.norm\.weight has shape",
    )
    refused(lambda _, t: t["output_norm.weight"].fill(np.nan), r"model\.norm\.weight holds NaN or Inf")


def test_an_architecture_that_is_not_known_is_refused_with_those_that_are(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        UnsupportedModelError,
        match=r"'gemma2', which atomq does not know; from GGUF it reads llama, qwen2, qwen3",
    ):
        load_float_model(resolve_source(str(tmp_path / "a.gguf")))


def test_one_part_of_several_is_refused(tmp_path):
    with pytest.raises(
        UnsupportedModelError, match="is one of 3 parts; join them with llama-gguf-split --merge"
    ):
        load_float_model(written(tmp_path, change=lambda values, _: values.update({"split.count": 3})))


def test_a_file_cut_anywhere_is_refused(tiny_gguf):
    whole = tiny_gguf.read_bytes()
    for kept in [*range(0, 200), *range(200, len(whole), 1999), len(whole) - 40]:
        tiny_gguf.write_bytes(whole[:kept])
        with pytest.raises(
            UnsupportedModelError, match=r"tiny\.gguf is (truncated or corrupt|not a GGUF file)"
        ):
            read_gguf(tiny_gguf)


def test_a_header_with_any_flipped_byte_is_read_or_refused_at_once(tiny_gguf):
    """No hang, no huge allocation and no other exception, whatever a byte of the header says."""
    whole = tiny_gguf.read_bytes()
    generator = np.random.default_rng(0)
    begin = time.perf_counter()
    for position in [*range(4, 200), *generator.integers(200, 8000, 100)]:
        broken = bytearray(whole)
        broken[position] ^= int(generator.integers(1, 256))
        tiny_gguf.write_bytes(broken)
        with contextlib.suppress(UnsupportedModelError):
            read_gguf(tiny_gguf)
    assert time.perf_counter() - begin < 10


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"", "less than 24 bytes"),
        (b"PK\3\4" + bytes(40), "begins with b'PK"),
        (struct.pack("<4sIQQ", b"GGUF", 1, 0, 0), "GGUF version 1; atomq reads versions 2 and 3"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "GGUF version 50331648; .*little-endian"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 0), "truncated or corrupt"),
        (struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**63), "truncated or corrupt"),
        (struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**62), "4611686018427387904 bytes wanted"),
    ],
)
def test_a_bad_beginning_is_refused(head, words, tmp_path):
    (tmp_path / "a.gguf").write_bytes(head)
    with pytest.raises(UnsupportedModelError, match=words):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (struct.pack("<I", 13), "metadata value type 13"),
        (struct.pack("<IIQ", 9, 4, 2**62), "bytes wanted"),
        (struct.pack("<IIQ", 9, 8, 2**62), "bytes wanted"),
        (struct.pack("<IIQ", 9, 9, 1), "an array of value type 9"),
        (struct.pack("<IQ2s", 8, 2, b"\xff\xff"), "is not UTF-8"),
    ],
)
def test_a_bad_metadata_value_is_refused_without_believing_its_size(value, words, tmp_path):
    head = struct.pack("<4sIQQQ1s", b"GGUF", 3, 0, 1, 1, b"k")
    (tmp_path / "a.gguf").write_bytes(head + value)
    with pytest.raises(UnsupportedModelError, match=words):
        read_gguf(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("dims", "kind", "offset", "words"),
    [
        ([], 0, 0, "w has 0 dimensions"),
        ([1] * 5, 0, 0, "w has 5 dimensions"),
        ([8], 999, 0, "w has the unknown tensor type 999"),
        ([33], 8, 0, "w has rows of 33, not a multiple of Q8_0's 32"),
        ([8], 0, 2**60, "w ends at byte"),
        ([2**62, 2**62], 0, 0, "w ends at byte"),
    ],
)
def test_a_bad_tensor_entry_is_named(dims, kind, offset, words, tmp_path):
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
    entry = struct.pack(f"<Q1sI{len(dims)}QIQ", 1, b"w", len(dims), *dims, kind, offset)
    (tmp_path / "a.gguf").write_bytes(head + entry + bytes(64))
    with pytest.raises(UnsupportedModelError, match=words):
        read_gguf(tmp_path / "a.gguf")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    entry = struct.pack("<Q1sIQIQ", 1, b"w", 1, 8, 0, 0)
    (tmp_path / "a.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 2, 0) + 2 * entry + bytes(64))
    with pytest.raises(UnsupportedModelError, match="w is there twice"):
        read_gguf(tmp_path / "a.gguf")


def pieces(source: ModelSource, text: str) -> list[str]:
    tokenizer = load_tokenizer(source)
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


@pytest.mark.parametrize(
    ("pre", "numbers"),
    [
        ("gpt-2", ["123", "123"]),
        ("smollm", ["1", "2", "3", "1", "2", "3"]),
        ("qwen2", ["1", "2", "3", "1", "2", "3"]),
        ("llama-bpe", ["123", "123"]),
        ("tekken", ["1", "2", "3", "1", "2", "3"]),
    ],
)
def test_the_pre_tokenizer_of_the_file_decides_whether_digits_are_split(pre, numbers, tmp_path):
    source = written(tmp_path, tokenizer={"pre": pre, "add_bos_token": False})
    assert pieces(source, "the cat") == ["t", "h", "e", "Ġ", "cat"]
    assert pieces(source, "123123") == numbers


@pytest.mark.parametrize("pre", ["mystery", None])
def test_a_pre_tokenizer_that_is_not_known_is_refused_with_those_that_are(pre, tmp_path):
    source = written(tmp_path, tokenizer={"pre": pre})
    with pytest.raises(UnsupportedModelError, match=rf"splits text by {pre!r} .* knows .*llama-bpe.*smollm"):
        load_tokenizer(source)


def test_text_comes_back_and_special_tokens_stay_whole(tmp_path):
    kinds = [3 if token == "<|end|>" else 4 if token == "<think>" else 1 for token in VOCABULARY]
    source = written(tmp_path, tokenizer={"token_type": kinds})
    assert pieces(source, "fox<|end|><think>the") == ["fox", "<|end|>", "<think>", "t", "h", "e"]
    tokenizer = load_tokenizer(source)
    assert tokenizer.all_special_tokens == ["<|end|>"]
    text = "  the fox,\n\n the cat 12 Köln é!"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("pre", "add_bos", "added"),
    [("gpt-2", None, False), ("gpt-2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_where_the_file_or_its_kind_says_so(pre, add_bos, added, tmp_path):
    source = written(tmp_path, tokenizer={"pre": pre, "add_bos_token": add_bos})
    assert pieces(source, "fox") == (["<|end|>", "fox"] if added else ["fox"])


def test_a_token_id_outside_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="eos_token_id 256 exceeds the 256 tokens"):
        load_tokenizer(written(tmp_path, tokenizer={"eos_token_id": 256}))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"tokens": None}, "has no tokenizer"),
        ({"model": "bert"}, "has a tokenizer of kind 'bert'"),
        ({"merges": ["nothing like"]}, "the merge of 'nothing' and 'like' does not fit the vocabulary"),
        ({"model": "llama", "merges": None}, "has 256 tokens but 0 scores and no merges"),
    ],
)
def test_a_vocabulary_that_makes_no_tokenizer_is_refused(tokenizer, words, tmp_path):
    with pytest.raises(UnsupportedModelError, match=words):
        load_tokenizer(written(tmp_path, tokenizer=tokenizer))


def test_a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes(tmp_path):
    words = ["▁", "a", "b", "c", "ab", "bc", "▁abc", "abc", "▁ab"]
    tokens = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(238)], *words]
    scores = [*[0.0] * 241, *[float(-i) for i in range(len(words))]]
    tokenizer = {"model": "llama", "pre": "default", "tokens": tokens, "merges": None, "scores": scores}
    tokenizer |= {"token_type": [2, 3, 3, *[6] * 238, *[1] * 9], "bos_token_id": 1, "eos_token_id": 2}
    source = written(tmp_path, tokenizer=tokenizer | {"unknown_token_id": 0})
    assert pieces(source, "abc bc") == ["<s>", "▁abc", "▁", "bc"]
    assert pieces(source, "é") == ["<s>", "▁", "<0xC3>", "<0xA9>"]
    loaded = load_tokenizer(source)
    assert loaded.decode(loaded("abc é").input_ids, skip_special_tokens=True) == "abc é"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_companions_of_a_gguf_file_load_as_an_ordinary_tokenizer(kind, tmp_path):
    source = written(
        tmp_path, kind, tokenizer={"pre": "smollm", "chat_template": "{{ messages[0].content }}"}
    )
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        for name, content in companions(source).items():
            (folder / name).write_bytes(content)
        load_float_model(source).config.save_pretrained(folder)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer("12 the 12").input_ids == load_tokenizer(source)("12 the 12").input_ids
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert tokenizer.eos_token == "<|end|>"
    assert (tmp_path / "one" / "generation_config.json").is_file()
