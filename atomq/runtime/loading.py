"""From a model of transformers, quantized or not, to a `Decoder` of the same arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atomq.config import FLOAT_BITS, KVScheme
from atomq.errors import KernelError
from atomq.kernels.kv_pages import HeadParameters, PageFormat
from atomq.kernels.layout import ActivationFormat
from atomq.kernels.linear import canonical_weight, envelope_problem
from atomq.models.quantized import head_dim_of
from atomq.numerics.linear import QuantizedLinear
from atomq.runtime.decoder import Block, Decoder
from atomq.runtime.stages import Before, FloatStage, Norm, Stage, W4A4Stage, W4A16Stage, stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # angles do not depend on the length of the text


def decoder_of(model: PreTrainedModel, max_positions: int, dtype: torch.dtype) -> Decoder:
    """A decoder with the weights of `model` on its device, activations in `dtype`, for `max_positions`.

    Raises:
        KernelError: the model's family, shape or scheme is not one that the runtime takes; it says why.
    """
    problem = runtime_problem(model, max_positions)
    if problem is not None:
        raise KernelError(f"the kernels' runtime cannot run this model: {problem}; use --backend simulation")
    config = model.config
    parts: Any = model
    device = parts.model.embed_tokens.weight.device
    rotary = _rotary_table(parts.model.rotary_emb, max_positions, device)
    layout = _page_format(model)
    blocks = tuple(
        _block(f"model.layers.{i}", layer, rotary, dtype) for i, layer in enumerate(parts.model.layers)
    )
    norm = parts.model.norm
    return Decoder(
        embeddings=parts.model.embed_tokens.weight.detach().to(dtype),
        blocks=blocks,
        final_norm=_norm(norm),
        head=parts.lm_head.weight.detach().to(dtype),
        n_query_heads=config.num_attention_heads,
        layout=layout,
    )


def runtime_problem(model: PreTrainedModel, max_positions: int) -> str | None:
    """Why `decoder_of` cannot run models of this kind, None if it can; the linears are not looked at."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type not in FAMILIES:
        return f"its family is {config.model_type}; the runtime takes {', '.join(FAMILIES)}"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}; the runtime takes silu"
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        return f"its RoPE is {rope['rope_type']}; the runtime takes {', '.join(_ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        return "its RoPE turns only a part of a head"
    if _window(config) < max_positions:
        return f"it attends to windows of {_window(config):.0f} tokens, fewer than {max_positions}"
    try:
        _page_format(model)
    except KernelError as error:
        return str(error)
    return None


def _page_format(model: Any) -> PageFormat:
    """The pages of the model's cache.

    Raises:
        KernelError: the decode kernel does not take its heads or its scheme.
    """
    config = model.config
    quantizer = getattr(model.model.layers[0].self_attn, "atomq_kv", None)
    scheme = KVScheme() if quantizer is None else quantizer.scheme
    return PageFormat.of(scheme, config.num_key_value_heads, head_dim_of(config))


def _window(config: Any) -> float:
    """Tokens that sliding attention sees, if any block slides."""
    types = getattr(config, "layer_types", None)
    slides = "sliding_attention" in types if types else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    return float(window) if slides and window else float("inf")


def _rotary_table(module: nn.Module, max_positions: int, device: torch.device) -> torch.Tensor:
    """float32 [max_positions, head_dim / 2, 2] by the model's own module."""
    positions = torch.arange(max_positions, device=device)[None]
    cosine, sine = module(torch.empty(0, dtype=torch.float32, device=device), positions)
    half = cosine.shape[-1] // 2
    return torch.stack((cosine[0, :, :half], sine[0, :, :half]), dim=-1).contiguous()


def _block(name: str, layer: Any, rotary: torch.Tensor, dtype: torch.dtype) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = (getattr(attention, n, None) for n in ("q_norm", "k_norm"))
    quantizer = getattr(attention, "atomq_kv", None)
    of_keys = (None, None) if quantizer is None else (quantizer.key_offset(), quantizer.key_scale())
    heads = HeadParameters.of(
        rotary,
        attention.scaling,
        None if query_norm is None else query_norm.weight.detach().float(),
        None if key_norm is None else key_norm.weight.detach().float(),
        0.0 if key_norm is None else key_norm.variance_epsilon,
        *(None if x is None else x.float() for x in of_keys),
    )
    first, second = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)

    def stage(path: str, linears: list[nn.Module], before: Before, norm: Norm | None = None) -> Stage:
        return _stage(f"{name}.{path}", linears, before, norm, dtype)

    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    return Block(
        qkv=stage("self_attn.q_proj", projections, Before.RMS_NORM, first),
        o=stage("self_attn.o_proj", [attention.o_proj], Before.NOTHING),
        gate_up=stage("mlp.gate_proj", [mlp.gate_proj, mlp.up_proj], Before.RMS_NORM, second),
        down=stage("mlp.down_proj", [mlp.down_proj], Before.SILU_MUL),
        heads=heads,
    )


def _norm(module: Any) -> Norm:
    return Norm(module.weight.detach().float(), module.variance_epsilon)


def _stage(
    name: str, linears: list[nn.Module], before: Before, norm: Norm | None, dtype: torch.dtype
) -> Stage:
    first = linears[0]
    if isinstance(first, nn.Linear):
        plain: list[Any] = linears
        weight = torch.cat([linear.weight.detach() for linear in plain]).to(dtype)
        has_bias = first.bias is not None
        bias = torch.cat([linear.bias.detach() for linear in plain]).to(dtype) if has_bias else None
        return FloatStage(weight, before, norm, bias)
    assert isinstance(first, QuantizedLinear)
    problem = envelope_problem(first)
    if problem:
        raise KernelError(f"{name} cannot run on the kernels: {problem}; use --backend simulation")
    scheme = first.scheme
    quantized = [linear for linear in linears if isinstance(linear, QuantizedLinear)]
    weight4 = stack([canonical_weight(linear) for linear in quantized])
    perm = first.input_order() if first.is_gathered else None
    if scheme.activations.n_bits == FLOAT_BITS:
        return W4A16Stage(weight4, perm, before, norm)
    activations = ActivationFormat.of(first.input_scheme(), first.in_features)
    return W4A4Stage(weight4, activations, perm, before, norm)
