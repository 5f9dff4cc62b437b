"""vLLM's interface to a quantization method, for checkpoints of atomq; importing this registers it.

One GPU a model: outlier channels are the last of the whole input, so linears cannot be cut into parts for
several. K and V are rounded as the quantized cache would give them back, but vLLM's cache keeps them in 16
bits. Experimental: docs/serving.md.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from atomq.config import FLOAT_BITS, QuantScheme
from atomq.errors import ConfigError
from atomq.formats.schema import QUANT_METHOD, parse_quantization_config
from atomq.integrations.served import (
    check_servable,
    find_group,
    fuse,
    quantize_cached,
    served_linear,
    stored_names,
)
from atomq.models.families import LinearGroup, ModelFamily

_QKV_PLACES = {"q": 0, "k": 1, "v": 2}


@register_quantization_config(QUANT_METHOD)
class AtomqVllmConfig(QuantizationConfig):
    """The `quantization_config` of a checkpoint, as vLLM wants it."""

    def __init__(self, family: ModelFamily, scheme: QuantScheme) -> None:
        super().__init__()
        check_servable(scheme, family)
        self.family, self.scheme = family, scheme

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> AtomqVllmConfig:
        return cls(*parse_quantization_config(config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """The method of one linear of vLLM, which may stand for several of the checkpoint."""
        if not isinstance(layer, LinearBase):
            return None
        relative = re.sub(rf"^{re.escape(self.family.blocks)}\.\d+\.", "", prefix)
        parent, _, last = relative.rpartition(".")
        lasts = self.packed_modules_mapping.get(last, [last])
        parts = [f"{parent}.{name}" if parent else name for name in lasts]
        group = find_group(self.family, parts)
        if group is None:
            return UnquantizedLinearMethod()
        holds_cached = self.family.key in parts and self.scheme.kv.n_bits < FLOAT_BITS
        return AtomqLinearMethod(group, self.scheme, quantizes_cached=holds_cached)


class AtomqLinearMethod(LinearMethodBase):
    """Loads and computes one linear of vLLM."""

    def __init__(self, group: LinearGroup, scheme: QuantScheme, *, quantizes_cached: bool) -> None:
        self.group, self.scheme, self.quantizes_cached = group, scheme, quantizes_cached

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Put empty parameters with the checkpoint's names into `layer`; what is loaded is kept by parts."""
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ConfigError("checkpoints of atomq are served by one GPU each; set --tensor-parallel-size 1")
        parts: list[dict[str, torch.Tensor]] = [{} for _ in output_partition_sizes]
        device = torch.get_default_device()

        def loader_of(name: str) -> Any:
            def load(_parameter: nn.Parameter, loaded: torch.Tensor, shard: str | int | None = None) -> None:
                place = _QKV_PLACES[shard] if isinstance(shard, str) else shard or 0
                parts[place][name] = loaded.to(device)

            return load

        for name in stored_names(output_size, input_size, self.scheme):
            parameter: Any = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = loader_of(name)
            layer.register_parameter(name, parameter)
        state: Any = layer
        state.atomq_parts, state.atomq_shape = parts, (output_size, input_size)
        state.atomq_n_queries = output_partition_sizes[0]

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the loaded tensors by what computes; called once all weights are there."""
        state: Any = layer
        n_out, n_in = state.atomq_shape
        tensors = fuse(state.atomq_parts, n_out, self.scheme)
        del state.atomq_parts
        for name in stored_names(n_out, n_in, self.scheme):
            delattr(layer, name)
        state.atomq_linear = served_linear(tensors, self.group, self.scheme, n_in)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """[..., in] to [..., out] in the dtype of `x`."""
        state: Any = layer
        outputs: torch.Tensor = state.atomq_linear(x)
        if bias is not None:
            outputs = outputs + bias
        if self.quantizes_cached:
            outputs = quantize_cached(outputs, state.atomq_n_queries, state.head_size, self.scheme.kv)
        return outputs
