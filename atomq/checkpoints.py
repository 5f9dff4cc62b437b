"""Opening a checkpoint as far as its files, headers and config go; its weights are loaded by `atomq.hf`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from atomq.config import QuantScheme, to_dict
from atomq.errors import CheckpointError, UnsupportedModelError, VerificationError
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
    wrong_values,
)
from atomq.models.blocks import block_groups, blocks_of, linear_shapes
from atomq.models.families import LinearShape, ModelFamily
from atomq.models.loading import empty_model, load_config, load_tokenizer
from atomq.models.quantized import attention_name, head_dim_of, key_buffers, restore_block
from atomq.models.source import ModelSource
from atomq.numerics.linear import TensorSpec


def is_checkpoint(folder: Path) -> bool:
    """Whether `folder` says of itself that it is a checkpoint of atomq."""
    if not (folder / "config.json").is_file():
        return False
    config = read_config(folder).get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == QUANT_METHOD


def checkpoint_shapes(folder: Path) -> list[tuple[int, int]]:
    """The different shapes (out, in) of a checkpoint's linears, in the order of computation."""
    model, family, _, _ = open_checkpoint(folder, check_hashes=False)
    return list(dict.fromkeys((shape.n_out, shape.n_in) for shape in linear_shapes(model, family).values()))


def describe(folder: Path, *, check: bool) -> dict[str, Any]:
    """Facts about a checkpoint from its headers and manifest, after checking files, names, shapes and
    dtypes; with `check` the files are read, too, for their hashes and for values that no writer makes.

    Raises:
        CheckpointError: what differs from the manifest, the config or the format.
        VerificationError: the tensors with such values, each with the first row that has one.
    """
    model, family, scheme, headers = open_checkpoint(folder, check_hashes=check)
    if check:
        _refuse_wrong_values(folder, scheme, set(headers))
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
        "hashes_checked": check,
        "block": {name.removeprefix(first): entry for name, entry in sizes.items() if name.startswith(first)},
        "linears": {
            name.removeprefix(first): _linear_entry(name, shape, sizes)
            for name, shape in shapes.items()
            if name.startswith(first)
        },
        "outside": {name: entry for name, entry in sizes.items() if not name.startswith(f"{family.blocks}.")},
    }


def _refuse_wrong_values(folder: Path, scheme: QuantScheme, names: set[str]) -> None:
    """One tensor at a time is in memory."""
    wrong: list[str] = []
    for name, tensor in read_tensors(folder, names):
        module, _, suffix = name.rpartition(".")
        wrong += wrong_values(module, {suffix: tensor}, scheme)
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise VerificationError(
            f"{folder.name} is as its manifest says, but {'; '.join(wrong[:5])}{more}; quantize again"
        )


def _linear_entry(name: str, shape: LinearShape, sizes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What one linear takes, all its tensors together."""
    n_bytes = sum(entry["bytes"] for tensor, entry in sizes.items() if tensor.startswith(f"{name}."))
    return {
        "shape": [shape.n_out, shape.n_in],
        "bytes": n_bytes,
        "bits_per_weight": 8 * n_bytes / (shape.n_out * shape.n_in),
    }


class Opened(NamedTuple):
    """A checkpoint that was checked as far as its headers go; `model` is its unquantized skeleton, without
    weights.
    """

    model: PreTrainedModel
    family: ModelFamily
    scheme: QuantScheme
    headers: dict[str, TensorSpec]

    @property
    def n_linears(self) -> int:
        """Quantized linears."""
        return len(linear_shapes(self.model, self.family)) if self.scheme.quantizes_linears else 0


def open_checkpoint(folder: Path, *, check_hashes: bool) -> Opened:
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
    return Opened(model, family, scheme, headers)


def _check_family(model: PreTrainedModel, family: ModelFamily) -> None:
    """Refuse a table of linear groups that does not fit the unquantized (meta) `model`."""
    try:
        blocks = model.get_submodule(family.blocks)
        fits = family.model_type == model.config.model_type and isinstance(blocks, nn.ModuleList)
        for block in blocks.children() if fits else ():
            groups = block_groups(block, family)
            names = [name for group in groups for name in group.linears]
            absorbing = [name for group in groups for name in group.absorbed_by]
            fits &= 0 < len(names) == len(set(names)) and set(absorbing) <= set(names)
            linears: dict[str, Any] = {name: block.get_submodule(name) for name in names}
            fits &= all(isinstance(linear, nn.Linear) for linear in linears.values())
            for group in groups if fits else ():
                width = linears[group.owner].in_features
                fits &= all(linears[name].in_features == width for name in group.linears)
                fits &= all(linears[name].out_features % width == 0 for name in group.absorbed_by)
            for name in (family.key, family.value):
                block.get_submodule(name)
    except (AttributeError, ZeroDivisionError):  # no such module, or a config that makes linears of no width
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
        raise CheckpointError(
            f"{folder.name} is not quantized (its config.json has no quantization_config); "
            f"make a checkpoint of it with atomq quantize {folder} OUT"
        )
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
    return others | replaced | _key_tensors(model, family, scheme)


def stored_blocks(folder: Path, opened: Opened) -> Iterator[tuple[str, nn.Module]]:
    """Every decoder block of an opened checkpoint with what is stored for it, and the prefix of its names.

    One block at a time is in memory: a block loses its values when the next one is asked for.

    Raises:
        CheckpointError: a value that no writer makes.
    """
    model, family, scheme, headers = opened
    head_dim = head_dim_of(model.config)
    for index, block in enumerate(blocks_of(model, family)):
        prefix = f"{family.blocks}.{index}."
        own = {name for name in headers if name.startswith(prefix)}
        tensors = {name.removeprefix(prefix): tensor for name, tensor in read_tensors(folder, own)}
        restore_block(block, family, scheme, head_dim, tensors)
        del tensors
        for name, module in block.named_modules():
            own_tensors = {**dict(module.named_parameters(recurse=False)), **module._buffers}
            check_values(prefix + name, {n: t for n, t in own_tensors.items() if t is not None}, scheme)
        yield prefix, block
        block.to("meta")


def _key_tensors(model: PreTrainedModel, family: ModelFamily, scheme: QuantScheme) -> dict[str, TensorSpec]:
    """What the attention of every block stores for K, by full name."""
    width = head_dim_of(model.config)
    tensors = {}
    for index, block in enumerate(blocks_of(model, family)):
        attention = block.get_submodule(attention_name(family))
        for name, shape in key_buffers(attention, scheme.kv, width).items():
            full = f"{family.blocks}.{index}.{attention_name(family)}.{name}"
            tensors[full] = TensorSpec((torch.float32,), shape)
    return tensors
