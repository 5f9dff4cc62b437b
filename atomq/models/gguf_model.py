"""What a GGUF file's metadata and tensor names mean for a model: its config and its weights.

transformers' own GGUF loader is not used: it needs accelerate, differs from version to version, loses
RoPE scaling, and hands back models that cannot be saved, being marked as quantized.

Not read: models split over several files, mixtures of experts, RoPE on a part of a head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from atomq.errors import UnsupportedModelError
from atomq.models.gguf import GgufFile, read_rows, read_tensor
from atomq.models.weights import StoredTensor

_ARCHITECTURES = ("llama", "qwen2", "qwen3")  # a Mistral file says "llama"

# GGUF's names of the modules; those of a block follow "blk.N.".
_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"  # Llama 3.1's scaling of RoPE: a divisor for each frequency


def gguf_config(file: GgufFile) -> PreTrainedConfig:
    """The transformers config that the metadata describes.

    Raises:
        UnsupportedModelError: the architecture is not known, or something in the metadata is missing or
            cannot be expressed in a config.
    """
    architecture = file.architecture
    if architecture not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path.name} is of the architecture {architecture!r}, which atomq does not know; "
            f"from GGUF it reads {', '.join(_ARCHITECTURES)} (Mistral's files say llama)"
        )
    n_parts = file.metadata.get("split.count", 1)
    if n_parts > 1:
        raise UnsupportedModelError(
            f"{file.path.name} is one of {n_parts} parts; join them with llama-gguf-split --merge first"
        )
    hidden_size, n_heads = file.require("embedding_length"), file.require("attention.head_count")
    head_dim = file.get("attention.key_length") or file.get("rope.dimension_count") or hidden_size // n_heads
    embeddings = file.tensors.get("token_embd.weight")
    if embeddings is None:
        raise UnsupportedModelError(f"{file.path.name} lacks the tensor token_embd.weight")
    settings: dict[str, Any] = {
        "hidden_size": hidden_size,
        "intermediate_size": file.require("feed_forward_length"),
        "num_hidden_layers": file.require("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": file.get("attention.head_count_kv") or n_heads,
        "head_dim": head_dim,
        "max_position_embeddings": file.require("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope_parameters(file, head_dim),
        "vocab_size": embeddings.shape[0],  # not the metadata's count, which may lack padding rows
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **gguf_token_ids(file),
    }
    if architecture != "qwen2":  # whose q, k and v always have biases, and nothing else does
        settings["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "llama":
        settings["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    return AutoConfig.for_model(architecture, **settings)


def gguf_token_ids(file: GgufFile) -> dict[str, int | None]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, None where the file has none."""
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}


def gguf_tensors(file: GgufFile, config: PreTrainedConfig) -> dict[str, StoredTensor]:
    """The file's tensors under transformers' names; one that has no such name keeps the file's."""
    # transformers pairs row i of a head with i + head_dim / 2 for RoPE, llama.cpp 2i with 2i + 1. For the
    # llama architecture the files are in llama.cpp's order, for the others in that of transformers.
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    stored = {}
    for name, tensor in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue  # it went into the config
        module, _, leaf = name.rpartition(".")
        block, _, block_module = module.removeprefix("blk.").partition(".")
        if module in _MODULES:
            our_name = f"{_MODULES[module]}.{leaf}"
        elif module.startswith("blk.") and block_module in _BLOCK_MODULES:
            our_name = f"model.layers.{block}.{_BLOCK_MODULES[block_module]}.{leaf}"
        else:
            our_name = name
        n_heads = heads.get(block_module) if file.architecture == "llama" else None
        stored[our_name] = StoredTensor(tensor.shape, None, partial(_read, file, name, n_heads))
    return stored


def _read(file: GgufFile, name: str, n_heads: int | None, begin: int, end: int) -> torch.Tensor:
    """Read rows of a tensor; if `n_heads` is given, those of the tensor in transformers' order of heads."""
    if n_heads is None:
        return read_rows(file, name, begin, end)
    tensor = read_tensor(file, name)
    pairs = tensor.reshape(n_heads, -1, 2, *tensor.shape[1:])  # (heads, head_dim / 2, 2, ...)
    return pairs.transpose(1, 2).reshape(tensor.shape)[begin:end]


def _rope_parameters(file: GgufFile, head_dim: int) -> dict[str, Any]:
    """`rope_parameters` of the config: theta, and the scaling if there is one."""
    n_rotated = file.get("rope.dimension_count", head_dim)
    if n_rotated != head_dim:
        raise UnsupportedModelError(
            f"{file.path.name} rotates {n_rotated} of {head_dim} dimensions per head; "
            f"atomq knows models that rotate all"
        )
    theta = file.number("rope.freq_base", 10000.0)
    scaling = file.get("rope.scaling.type", "none")
    if _ROPE_FACTORS in file.tensors:
        return {"rope_theta": theta, **_llama3_scaling(file, theta, head_dim)}
    if scaling == "none":
        return {"rope_theta": theta, "rope_type": "default"}
    if scaling not in ("linear", "yarn"):
        raise UnsupportedModelError(
            f"{file.path.name} scales RoPE by {scaling!r}; atomq reads none, linear and yarn from GGUF"
        )
    parameters = {
        "rope_theta": theta,
        "rope_type": scaling,
        "factor": file.number("rope.scaling.factor"),
    }
    if scaling == "yarn":
        parameters["original_max_position_embeddings"] = file.require("rope.scaling.original_context_length")
    return parameters


def _llama3_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling, recovered from the divisors that the file stores in its place.

    A file holds what the formula gives and not its parameters. All published models share three of them
    and the fourth is the largest divisor, so they are put to the test: the formula must give the file's
    divisors back.
    """
    divisors = read_tensor(file, _ROPE_FACTORS).double()
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    turns = original / (2 * torch.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim))
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise UnsupportedModelError(
            f"{file.path.name} scales RoPE by a table ({_ROPE_FACTORS}) that no config can express; "
            f"give the original model's directory"
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
