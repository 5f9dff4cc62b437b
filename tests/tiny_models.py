"""Tiny random models of every family and a byte tokenizer, made on the spot, no network."""

from __future__ import annotations

from pathlib import Path

import torch

TINY = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

# What is particular to a family: MHA and GQA, biases, q/k norms, tied embeddings, head_dim not hidden/heads.
TINY_MODELS = {
    "llama": ("LlamaConfig", {}),
    "llama-mha-bias": (
        "LlamaConfig",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "mistral": ("MistralConfig", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
}

_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
_ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_OPT = {"ffn_dim": 80, "pad_token_id": 0, "num_key_value_heads": 4}  # it has no grouped queries
# The other families, and variants whose blocks differ; tests/test_families.py takes each all the way.
FAMILY_MODELS = TINY_MODELS | {
    "llama-3.1": ("LlamaConfig", {"rope_parameters": _ROPE_LLAMA3}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 8}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": (
        "Gemma2Config",
        _SLIDING
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", _SLIDING | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "granite": (
        "GraniteConfig",
        {"residual_multiplier": 0.5, "attention_multiplier": 0.2, "embedding_multiplier": 2.0},
    ),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0], "pad_token_id": 0}),
    "phi3": ("Phi3Config", {"pad_token_id": 0}),
    "starcoder2": ("Starcoder2Config", {"use_bias": True}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _EXPERTS | {"shared_expert_intermediate_size": 40, "moe_intermediate_size": 32, "qkv_bias": True},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS | {"head_dim": 16, "moe_intermediate_size": 32}),
    "qwen3_moe-dense-first": (
        "Qwen3MoeConfig",
        _EXPERTS | {"head_dim": 16, "moe_intermediate_size": 32, "mlp_only_layers": [0]},
    ),
    "opt": (
        "OPTConfig",
        _OPT | {"word_embed_proj_dim": 48, "tie_word_embeddings": True},
    ),
    "opt-350m": (
        "OPTConfig",
        _OPT | {"word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
}


def byte_tokenizer():
    """A tokenizer of 256 single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_tiny_model(kind: str = "llama", seed: int = 0, **overrides):
    """A two-block random model of `kind` (a key of FAMILY_MODELS) with a few outlier channels."""
    import transformers

    config_name, settings = FAMILY_MODELS[kind]
    config = getattr(transformers, config_name)(**{**TINY, **settings, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
                parameter[3] = 12.0  # an outlier channel, as real models have them
                parameter -= 1.0 if config.model_type.startswith("gemma") else 0.0  # they multiply by 1 + w
            else:
                parameter.normal_(0, 0.08)
    return model.requires_grad_(False)


def save_tiny_model(folder: Path, kind: str = "llama", seed: int = 0, **overrides) -> Path:
    """Write a tiny model and the byte tokenizer to `folder` in the Hugging Face layout."""
    make_tiny_model(kind, seed, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
