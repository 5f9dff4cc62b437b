"""``import atomq.hf`` teaches transformers the format: `AutoModelForCausalLM.from_pretrained` then opens it.

Names, shapes and dtypes of all tensors are checked against the shards' headers before anything is allocated.
Scales and other floating-point tensors of quantized linears are read a second time after transformers' own
loading, which may have cast them to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from atomq.config import QuantScheme, to_dict
from atomq.errors import CheckpointError, ConfigError, UnsupportedModelError
from atomq.formats.card import scheme_name
from atomq.formats.checkpoint import (
    check_files,
    check_tensors,
    read_config,
    read_manifest,
    read_tensors,
    tensor_headers,
)
from atomq.formats.schema import (
    FLOAT_DTYPES,
    QUANT_METHOD,
    check_values,
    effective_bits,
    linear_tensors,
    parse_quantization_config,
)
from atomq.models.blocks import blocks_of, linear_shapes
from atomq.models.families import ModelFamily
from atomq.models.loading import empty_model, load_config, load_tokenizer
from atomq.models.quantized import attention_for, head_dim_of, install_kv_quantizer, install_linears
from atomq.models.source import ModelSource
from atomq.numerics.linear import QuantizedLinear, TensorSpec

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
    _open(folder, check_hashes=check_hashes)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch_dtype, local_files_only=True, trust_remote_code=False
    )
    place: Any = torch.device(device)
    result: PreTrainedModel = model.to(place).eval().requires_grad_(False)
    return result


def runtime_dtype(dtype: str) -> torch.dtype:
    """The torch dtype of a name given by a user."""
    if dtype not in _RUNTIME_DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(_RUNTIME_DTYPES)}")
    return _RUNTIME_DTYPES[dtype]


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` says of itself that it is a checkpoint of atomq."""
    if not (folder / "config.json").is_file():
        return False
    config = read_config(folder).get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD


def checkpoint_shapes(folder: Path) -> list[tuple[int, int]]:
    """The different shapes (out, in) of a checkpoint's linears, in the order of computation."""
    model, family, _, _ = _open(folder, check_hashes=False)
    return list(dict.fromkeys((shape.n_out, shape.n_in) for shape in linear_shapes(model, family).values()))


def describe(folder: Path, *, check_hashes: bool) -> dict[str, Any]:
    """Facts about a checkpoint from its headers and manifest, after checking files, names, shapes and
    dtypes.
    """
    model, family, scheme, headers = _open(folder, check_hashes=check_hashes)
    manifest = read_manifest(folder)
    shapes = linear_shapes(model, family)
    first = f"{family.blocks}.0."
    sizes = {
        name: {
            "dtype": str(spec.dtypes[0]).removeprefix("torch."),
            "shape": list(spec.shape),
            "bytes": torch.Size(spec.shape).numel() * spec.dtypes[0].itemsize,
        }
        for name, spec in sorted(headers.items())
    }
    return {
        "checkpoint": folder.name,
        "source": manifest["source"],
        "scheme_name": scheme_name(scheme),
        "scheme": to_dict(scheme),
        "recipe": manifest["recipe"],
        "calibration": manifest["calibration"],
        "versions": manifest["versions"],
        "warnings": manifest["warnings"],
        "effective_bits": effective_bits(scheme, shapes, head_dim_of(model.config)),
        "size_bytes": sum(entry["bytes"] for entry in sizes.values()),
        "n_blocks": len(blocks_of(model, family)),
        "n_linears": len(shapes),
        "n_files": len(manifest["files"]),
        "hashes_checked": check_hashes,
        "block": {name.removeprefix(first): entry for name, entry in sizes.items() if name.startswith(first)},
    }


class _Opened(NamedTuple):
    """A checkpoint that was checked as far as its headers go; `model` is its unquantized skeleton, without
    weights.
    """

    model: PreTrainedModel
    family: ModelFamily
    scheme: QuantScheme
    headers: dict[str, TensorSpec]


def _open(folder: Path, *, check_hashes: bool) -> _Opened:
    """Hold a checkpoint against its manifest, its config and the format.

    Raises:
        CheckpointError: what differs.
    """
    family, scheme = _read_scheme(folder)
    check_files(folder, hashes=check_hashes)
    headers = tensor_headers(folder)
    source = ModelSource(folder.name, folder, "directory")
    try:
        config = load_config(source)
        if config.num_hidden_layers > len(headers):  # a corrupt number could ask for a billion blocks
            raise CheckpointError(
                f"{folder.name} should have {config.num_hidden_layers} blocks (num_hidden_layers), "
                f"but has only {len(headers)} tensors"
            )
        model = empty_model(config, source)
    except UnsupportedModelError as error:
        raise CheckpointError(str(error)) from error
    check_tensors(headers, expected_tensors(model, family, scheme))
    return _Opened(model, family, scheme, headers)


def _check_family(model: PreTrainedModel, family: ModelFamily) -> None:
    """Refuse a table of linear groups that does not fit the unquantized (meta) `model`."""
    names = [name for group in family.groups for name in group.linears]
    absorbing = [name for group in family.groups for name in group.absorbed_by]
    try:
        blocks = model.get_submodule(family.blocks)
        fits = (
            family.model_type == model.config.model_type
            and isinstance(blocks, nn.ModuleList)
            and len(names) == len(set(names))
            and set(absorbing) <= set(names)
        )
        for block in blocks.children() if fits else ():
            linears: dict[str, Any] = {name: block.get_submodule(name) for name in names}
            fits &= all(isinstance(linear, nn.Linear) for linear in linears.values())
            for group in family.groups:
                widths = {linears[name].in_features for name in group.linears}
                widths |= {linears[name].out_features for name in group.absorbed_by}
                fits &= len(widths) == 1
            for name in (family.key, family.value):
                block.get_submodule(name)
    except AttributeError:
        fits = False
    if not fits:
        raise CheckpointError("config.json: the table of linear groups does not fit the model")


def _read_scheme(folder: Path) -> tuple[ModelFamily, QuantScheme]:
    """Family and scheme from config.json of a checkpoint.

    Raises:
        CheckpointError: `folder` is not a checkpoint, or not one that this version reads.
    """
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}; make one with atomq quantize MODEL {folder}")
    config = read_config(folder).get("quantization_config")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder.name} is not quantized: its config.json has no quantization_config")
    return parse_quantization_config(config)


def load_checkpoint_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in a checkpoint."""
    return load_tokenizer(ModelSource(Path(folder).name, Path(folder), "directory"))


def expected_tensors(
    model: PreTrainedModel, family: ModelFamily, scheme: QuantScheme
) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of the unquantized (meta) `model` must hold.

    Raises:
        CheckpointError: `family` is not the table of such a model.
    """
    _check_family(model, family)
    shapes = linear_shapes(model, family)
    replaced = linear_tensors(family, scheme, shapes)
    linears = tuple(f"{name}." for name in shapes) if replaced else ()
    tied = set(model.all_tied_weights_keys)
    others = {
        name: TensorSpec(FLOAT_DTYPES, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
        if name not in tied and not name.startswith(linears)
    }
    return others | replaced


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
        self._folder = Path(checkpoint_files[0]).parent
        headers = tensor_headers(self._folder)
        check_tensors(headers, expected_tensors(model, family, scheme))
        self._exact: set[str] = set()
        for index, block in enumerate(blocks_of(model, family)):
            for name, linear in install_linears(block, family, scheme).items():
                full = f"{family.blocks}.{index}.{name}"
                stored = {
                    suffix: headers[f"{full}.{suffix}"]
                    for suffix in (*linear.code_names, "perm", "weight")
                    if f"{full}.{suffix}" in headers
                }
                linear.allocate(stored)
                self._exact |= {
                    f"{full}.{suffix}"
                    for suffix in linear.code_names
                    if stored[suffix].dtypes[0].is_floating_point
                }
            install_kv_quantizer(block, family, scheme.kv, head_dim_of(model.config))
        if attention_for(scheme.kv) != "sdpa":
            model.set_attn_implementation(attention_for(scheme.kv))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_kwargs: Any) -> PreTrainedModel:
        for name, tensor in read_tensors(self._folder, self._exact):
            owner, _, buffer = name.rpartition(".")
            module: nn.Module = model.get_submodule(owner)
            current = module._buffers[buffer]
            assert current is not None
            module._buffers[buffer] = tensor.to(current.device)
        for name, linear in model.named_modules():
            if isinstance(linear, QuantizedLinear):
                check_values(name, dict(linear.named_buffers(recurse=False)), linear.scheme)
        for cast in ("half", "float"):  # transformers forbids them; here they leave codes and scales alone
            setattr(model, cast, MethodType(getattr(nn.Module, cast), model))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:  # a second import or a reload finds it there
    register_quantization_config(QUANT_METHOD)(AtomqConfig)
    register_quantizer(QUANT_METHOD)(AtomqQuantizer)
