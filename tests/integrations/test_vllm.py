"""The vLLM plugin against a minimal fake of vLLM's interface: loading as vLLM loads, values as simulated.

The fake has the names, signatures and loading rules that the plugin uses, and nothing else; vLLM itself was
not run.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import quantize_tiny, stored_tensors
from tiny_exports import make_checkpoint
from tiny_models import save_tiny_model
from torch import nn

import atomq.hf
from atomq.config import override
from atomq.errors import CheckpointError, ConfigError
from atomq.kernels.linear import KernelLinear
from atomq.models.families import FAMILIES
from atomq.presets import DEFAULT_PRESET, find_preset

ROOT = Path(__file__).resolve().parents[2]
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# vLLM's own table: a part of a name, what it becomes, and which part of the fused linear it is.
STACKED = [
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
]
MODULES = ("vllm", "vllm.model_executor", "vllm.model_executor.layers")


@pytest.fixture
def vllm(monkeypatch):
    """The fake package; answers its table of methods."""
    registered: dict[str, type] = {}

    def register_quantization_config(name: str):
        def keep(cls: type) -> type:
            if name in registered:
                raise ValueError(f"The quantization method `{name}` is already exists.")
            registered[name] = cls
            return cls

        return keep

    class QuantizationConfig:
        def __init__(self) -> None:
            self.packed_modules_mapping: dict[str, list[str]] = {}

    linear = types.ModuleType("vllm.model_executor.layers.linear")
    linear.LinearBase = type("LinearBase", (nn.Module,), {})
    linear.LinearMethodBase = type("LinearMethodBase", (), {})
    linear.UnquantizedLinearMethod = type("UnquantizedLinearMethod", (linear.LinearMethodBase,), {})
    quantization = types.ModuleType("vllm.model_executor.layers.quantization")
    quantization.register_quantization_config = register_quantization_config
    base_config = types.ModuleType("vllm.model_executor.layers.quantization.base_config")
    base_config.QuantizationConfig = QuantizationConfig
    for module in (*map(types.ModuleType, MODULES), linear, quantization, base_config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "atomq.integrations.vllm_method", raising=False)
    yield registered
    sys.modules.pop("atomq.integrations.vllm_method", None)


def register() -> None:
    importlib.import_module("atomq.integrations.vllm").register()


def make_layer(config, prefix: str, sizes: list[int], n_in: int, head_size: int) -> nn.Module:
    """A linear of vLLM with the method that the plugin gives it, its weights not yet loaded."""
    layer = sys.modules["vllm.model_executor.layers.linear"].LinearBase()
    layer.head_size = head_size
    layer.quant_method = config.get_quant_method(layer, prefix)
    layer.quant_method.create_weights(
        layer, n_in, sizes, n_in, sum(sizes), torch.float32, weight_loader=lambda *_: None
    )
    return layer


def load_weights(layers: dict[str, nn.Module], tensors: dict[str, torch.Tensor]) -> None:
    """What vLLM's model classes do with every tensor of the checkpoint that belongs to `layers`."""
    parameters = {
        f"{prefix}.{name}": parameter
        for prefix, layer in layers.items()
        for name, parameter in layer.named_parameters()
    }
    for name, tensor in tensors.items():
        for fused, part, shard in STACKED:
            if f".{part}." in name:
                parameter = parameters.get(name.replace(part, fused))
                if parameter is not None:
                    parameter.weight_loader(parameter, tensor, shard)
                break
        else:
            if name in parameters:
                parameters[name].weight_loader(parameters[name], tensor)
    for layer in layers.values():
        layer.quant_method.process_weights_after_loading(layer)


def plugin_config(vllm, folder: Path):
    register()
    config = vllm["atomq"].from_config(
        json.loads((folder / "config.json").read_text())["quantization_config"]
    )
    config.packed_modules_mapping = PACKED
    return config


@pytest.mark.parametrize("kind", ["llama", "llama-mha-bias"])
@pytest.mark.parametrize(
    "scheme",
    [
        "atom",
        "hadamard",
        "progressive",
        "w4a16",
        "reordered without outliers",
        "searched clips",
        "searched clips, not reordered",
    ],
)
def test_fused_linears_compute_what_the_simulation_does(vllm, tmp_path, kind, scheme):
    out = tmp_path / "OUT"
    quantize_tiny(save_tiny_model(tmp_path / "model", kind), out, scheme)
    config = plugin_config(vllm, out)
    native = atomq.hf.load(out)
    block, prefix = native.model.layers[1], "model.layers.1"
    head_size = native.config.head_dim
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    for fused, parts in (
        ("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("self_attn.o_proj", ("self_attn.o_proj",)),
        ("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.down_proj", ("mlp.down_proj",)),
    ):
        linears = [block.get_submodule(part) for part in parts]
        inputs = x.repeat(1, 1, 2)[..., : linears[0].in_features]
        expected = torch.cat([linear(inputs) for linear in linears], dim=-1)  # hooks quantize K and V
        layer = make_layer(
            config,
            f"{prefix}.{fused}",
            [linear.out_features for linear in linears],
            linears[0].in_features,
            head_size,
        )
        load_weights({f"{prefix}.{fused}": layer}, stored_tensors(out))
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat(biases)
        torch.testing.assert_close(layer.quant_method.apply(layer, inputs, bias), expected)


def test_the_entry_point_names_the_function_and_it_may_be_called_again(vllm):
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = entries["vllm.general_plugins"]["atomq"].partition(":")
    for _ in range(2):
        getattr(importlib.import_module(module), function)()
    assert list(vllm) == ["atomq"]
    assert vllm["atomq"].get_min_capability() == 80


def test_what_is_no_linear_of_a_block_is_left_to_vllm(vllm, tiny_dir, tmp_path):
    quantize_tiny(tiny_dir, tmp_path / "OUT", "atom")
    config = plugin_config(vllm, tmp_path / "OUT")
    linear = sys.modules["vllm.model_executor.layers.linear"]
    assert isinstance(config.get_quant_method(linear.LinearBase(), "lm_head"), linear.UnquantizedLinearMethod)
    assert config.get_quant_method(nn.Embedding(2, 2), "model.embed_tokens") is None


def test_several_gpus_for_one_model_are_refused(vllm, tiny_dir, tmp_path):
    quantize_tiny(tiny_dir, tmp_path / "OUT", "atom")
    method = plugin_config(vllm, tmp_path / "OUT").get_quant_method(
        sys.modules["vllm.model_executor.layers.linear"].LinearBase(), "model.layers.0.self_attn.o_proj"
    )
    with pytest.raises(ConfigError, match="--tensor-parallel-size 1"):
        method.create_weights(nn.Module(), 24, [48], 48, 48, torch.float32)


@pytest.mark.parametrize(
    ("scheme", "kind", "words"),
    [
        ("kv after rope", "llama", "--kv-bits 16"),
        ("atom", "qwen3", "--kv-bits 16"),
        ("w16a4", "llama", "weights in codes"),
    ],
)
def test_what_would_compute_something_else_is_refused(vllm, tmp_path, scheme, kind, words):
    quantize_tiny(save_tiny_model(tmp_path / "model", kind), tmp_path / "OUT", scheme)
    with pytest.raises(ConfigError, match=words):
        plugin_config(vllm, tmp_path / "OUT")


@pytest.mark.parametrize(
    "settings", [{}, {"kv.key_balance": False}, {"weights.n_bits": 16, "kv.key_balance": False}]
)
def test_what_a_refusal_says_is_served_as_it_stands(vllm, settings):
    """Beside the default preset, as a user types it, with everything it names."""
    served = importlib.import_module("atomq.integrations.served")
    family, scheme = FAMILIES["llama"], override(find_preset(DEFAULT_PRESET), settings).scheme
    with pytest.raises(ConfigError) as refusal:
        served.check_servable(scheme, family)
    words = str(refusal.value).replace(",", "")
    assert "--kv-bits 16" in words
    proposed = [{"kv.n_bits": "16"}, dict(re.findall(r"--set (\S+)=(\S+)", words))]
    for changes in filter(None, proposed):
        served.check_servable(override(find_preset(DEFAULT_PRESET), changes).scheme, family)


def test_a_part_that_was_not_loaded_is_noticed(vllm, tiny_dir, tmp_path):
    quantize_tiny(tiny_dir, tmp_path / "OUT", "atom")
    config = plugin_config(vllm, tmp_path / "OUT")
    layer = make_layer(config, "model.layers.0.mlp.gate_up_proj", [80, 80], 48, 12)
    tensors = {name: t for name, t in stored_tensors(tmp_path / "OUT").items() if "up_proj" not in name}
    with pytest.raises(CheckpointError, match="not all 160 rows"):
        load_weights({"model.layers.0.mlp.gate_up_proj": layer}, tensors)


def test_families_with_experts_are_refused(vllm):
    register()
    served = importlib.import_module("atomq.integrations.served")
    scheme = find_preset("rtn").scheme
    assert any(family.has_experts for family in FAMILIES.values())
    for family in FAMILIES.values():
        if family.has_experts:
            with pytest.raises(ConfigError, match="experts"):
                served.check_servable(scheme, family)
        else:
            served.check_servable(scheme, family)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["atom", "hadamard"])
def test_on_a_gpu_the_kernels_compute_the_fused_linears_and_a_graph_holds_them(vllm, tmp_path, scheme):
    settings = {"outliers.n_outliers": 64, "weights.group_size": 64, "activations.group_size": 64}
    settings |= {"transform": "hadamard"} if scheme == "hadamard" else {}
    model = save_tiny_model(
        tmp_path / "model", "llama", hidden_size=256, intermediate_size=384, num_attention_heads=4
    )
    out = make_checkpoint(model, tmp_path / "OUT", "atom", settings)
    config = plugin_config(vllm, out)
    native = atomq.hf.load(out, device="cuda")
    block = native.model.layers[1]
    linears = [block.get_submodule(f"self_attn.{name}_proj") for name in "qkv"]
    torch.set_default_device("cuda")
    try:
        prefix = "model.layers.1.self_attn.qkv_proj"
        layer = make_layer(config, prefix, [linear.out_features for linear in linears], 256, 64)
        load_weights({prefix: layer}, stored_tensors(out))
    finally:
        torch.set_default_device("cpu")
    assert isinstance(layer.atomq_linear, KernelLinear)
    x = torch.randn(17, 256, generator=torch.Generator().manual_seed(0)).half().cuda()
    expected = torch.cat([linear(x.float()) for linear in linears], dim=-1)
    found = layer.quant_method.apply(layer, x)
    assert found.dtype == torch.float16
    # A value between two codes of the KV cache may go either way: one step of 15 in few places.
    assert (found.float() - expected).norm() < 0.05 * expected.norm()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer.quant_method.apply(layer, x)
    x.copy_(x.flip(0))
    graph.replay()
    torch.testing.assert_close(captured, found.flip(0), rtol=0, atol=0)


@pytest.mark.parametrize(("lost", "found"), [("perm", "[48]"), ("clip_ratio", "[1]"), ("scales", "[80, 3]")])
def test_a_tensor_that_was_not_loaded_is_named(vllm, tiny_dir, tmp_path, lost, found):
    quantize_tiny(tiny_dir, tmp_path / "OUT", "searched clips")
    config = plugin_config(vllm, tmp_path / "OUT")
    prefix = "model.layers.0.mlp.gate_up_proj"
    layer = make_layer(config, prefix, [80, 80], 48, 12)
    kept = {name: t for name, t in stored_tensors(tmp_path / "OUT").items() if not name.endswith(f".{lost}")}
    with pytest.raises(CheckpointError) as caught:
        load_weights({prefix: layer}, kept)
    assert f"gate_proj.{lost} is missing; it must be {found}" in str(caught.value)
