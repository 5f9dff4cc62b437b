"""``import atomq.hf`` teaches transformers the format: `AutoModelForCausalLM.from_pretrained` then opens it.

Names, shapes and dtypes of all tensors are checked against the shards' headers before anything is allocated.
Scales and other floating-point tensors of quantized linears are read a second time after transformers' own
loading, which may have cast them to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from atomq.checkpoints import expected_tensors, open_checkpoint
from atomq.errors import AtomqError, CheckpointError, ConfigError
from atomq.formats.checkpoint import check_tensors, read_tensors, tensor_headers
from atomq.formats.schema import QUANT_METHOD, check_values, parse_quantization_config
from atomq.models.attention import attention_for
from atomq.models.blocks import blocks_of
from atomq.models.experts import unfuse_experts
from atomq.models.loading import CONFIG_ERRORS
from atomq.models.quantized import head_dim_of, install_stored
from atomq.numerics.linear import QuantizedLinear

_RUNTIME_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load(
    folder: str | Path, *, device: str = "cpu", dtype: str = "float32", check_hashes: bool = False
) -> PreTrainedModel:
    """Load a checkpoint for simulation on `device`, ready for `generate` and evaluation.

    Sizes, names, shapes and dtypes are always checked, SHA-256 if `check_hashes`. `dtype` (float32, float16
    or bfloat16) is that of embeddings, norms and activations between linears; codes and scales stay as
    stored.

    Raises:
        CheckpointError: what differs from the manifest or the format.
        ConfigError: an unknown dtype.
    """
    folder, torch_dtype = Path(folder), runtime_dtype(dtype)
    open_checkpoint(folder, check_hashes=check_hashes)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, local_files_only=True, trust_remote_code=False
        )
    except AtomqError:
        raise
    except CONFIG_ERRORS as error:  # config.json and the like say something that only transformers minds
        raise CheckpointError(f"{folder.name} cannot be loaded: {error!r:.500}") from error
    place: Any = torch.device(device)
    result: PreTrainedModel = model.to(place).eval().requires_grad_(False)
    return result


def runtime_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name given by a user."""
    if dtype not in _RUNTIME_DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(_RUNTIME_DTYPES)}")
    return _RUNTIME_DTYPES[dtype]


class AtomqConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint, handed through unchanged."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.values = {key: value for key, value in values.items() if key != "quant_method"}

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": QUANT_METHOD, **self.values}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class AtomqQuantizer(HfQuantizer):
    """Puts empty quantized linears into the skeleton before transformers fills in the checkpoint's
    tensors.
    """

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_kwargs: Any
    ) -> None:
        family, scheme = parse_quantization_config(self.quantization_config.to_dict())
        if not checkpoint_files:
            raise CheckpointError("an atomq checkpoint is loaded from its files, not from a state dict")
        self._folder, self._scheme = Path(checkpoint_files[0]).parent, scheme
        try:
            unfuse_experts(model, family)
        except AttributeError as error:
            raise CheckpointError(
                f"config.json: the table of linear groups does not fit the model ({error})"
            ) from error
        headers = tensor_headers(self._folder)
        check_tensors(headers, expected_tensors(model, family, scheme))
        self._exact: set[str] = set()
        self._tables: set[str] = set()  # of K
        head_dim = head_dim_of(model.config)
        for index, block in enumerate(blocks_of(model, family)):
            prefix = f"{family.blocks}.{index}."
            own = {
                name.removeprefix(prefix): spec for name, spec in headers.items() if name.startswith(prefix)
            }
            self._tables |= {prefix + n for n in own if n.endswith((".key_offset", ".key_scale"))}
            self._exact |= {prefix + n for n in own if n.endswith(".clip_ratio")}
            for name, linear in install_stored(block, family, scheme, head_dim, own).items():
                self._exact |= {
                    f"{prefix}{name}.{suffix}"
                    for suffix in linear.code_names
                    if own[f"{name}.{suffix}"].dtypes[0].is_floating_point
                }
        model.set_attn_implementation(attention_for(model.config))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        for name, tensor in read_tensors(self._folder, self._exact | self._tables):
            owner, _, buffer = name.rpartition(".")
            module: nn.Module = model.get_submodule(owner)
            current = module._buffers[buffer]
            assert current is not None
            module._buffers[buffer] = tensor.to(current.device)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                check_values(name, dict(module.named_buffers(recurse=False)), module.scheme)
            elif "key_offset" in module._buffers:
                check_values(name, dict(module.named_buffers(recurse=False)), self._scheme)
        for cast in ("half", "float"):  # transformers forbids them; here they leave codes and scales alone
            setattr(model, cast, MethodType(getattr(nn.Module, cast), model))
        return model

    def update_weight_conversions(self, _conversions: list[Any], _model: Any = None) -> list[Any]:
        """None: a checkpoint's tensors have the names of its modules, also where transformers fuses them."""
        return []

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes: K's tables in float32, also after a cast that took them along."""
        state: dict[str, torch.Tensor] = model.state_dict()
        return state | {name: state[name].float() for name in self._tables}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second import or a reload finds it there
    register_quantization_config(QUANT_METHOD)(AtomqConfig)
    register_quantizer(QUANT_METHOD)(AtomqQuantizer)
