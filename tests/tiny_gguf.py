"""A tiny Llama as a GGUF file."""

from __future__ import annotations

from pathlib import Path

from tiny_models import byte_tokenizer


def write_tiny_gguf(path: Path, model) -> Path:
    """A float32 GGUF file of a tiny Llama, as llama.cpp's converter lays it out."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_merges([])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and ("q_proj" in name or "k_proj" in name):
            n_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            halves = parameter.reshape(n_heads, 2, -1, parameter.shape[1])
            parameter = halves.transpose(1, 2).reshape(parameter.shape)
        writer.add_tensor(f"{names.get_name(module)}.{leaf}", parameter.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
