"""Golden bytes: a checkpoint of two linears, written out in hex, and every other encoding of a weight.

The same bytes are the worked example of docs/format.md. A change that breaks these tests breaks every file
that was ever written: it needs a new format_version, not new literals.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from atomq.config import QuantScheme, Recipe, from_dict, override, to_dict
from atomq.formats.checkpoint import read_tensors, tensor_headers, weight_map
from atomq.formats.files import json_bytes
from atomq.formats.schema import quantization_config
from atomq.formats.writer import CheckpointWriter
from atomq.models.families import LinearGroup, ModelFamily
from atomq.numerics.linear import GroupInput, QuantizedLinear
from atomq.numerics.outliers import Outliers
from atomq.numerics.weights import QuantizedWeight

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "format.md"
SHARD = "model-00001-of-00001.safetensors"
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"

# Seven inputs, of which two are outliers: groups of 4 and 1; neighbouring rows share scales.
SETTINGS = {
    "weights.group_size": 4,
    "weights.channel_group": 2,
    "activations.group_size": 4,
    "outliers.n_outliers": 2,
    "outliers.reorder": True,
}
SCHEME = override(Recipe(), SETTINGS).scheme
FAMILY = ModelFamily("llama", (LinearGroup(("self_attn.q_proj", "self_attn.k_proj")),))

PERM = [4, 0, 6, 2, 5, 1, 3]
Q_CODES = [[-8, 7, 0, 1, -1], [3, -2, 5, -6, 4], [1, 2, 3, 4, -5]]
Q_SCALES = [[0.5, 0.25], [0.125, 1.0]]  # rows 0 and 1 share the first, row 2 has the second
Q_OUTLIERS, Q_OUTLIER_SCALES = [[127, -128], [1, -1], [0, 64]], [0.0625, 2.0, 1.5]
Q_BIAS = [1.0, -2.0, 0.5]
K_CODES = [[7, 6, 5, 4, 3], [-7, -6, -5, -4, -3]]
K_SCALES = [[2.0**-15, 0.5]]  # the first is no normal F16 number, so the tensor is F32
K_OUTLIERS, K_OUTLIER_SCALES = [[5, -5], [100, 0]], [0.5, 0.25]

Q_DENSE = [
    [-4.0, 3.5, 0.0, 0.5, -0.25, 7.9375, -8.0],
    [1.5, -1.0, 2.5, -3.0, 1.0, 2.0, -2.0],
    [0.125, 0.25, 0.375, 0.5, -5.0, 0.0, 96.0],
]
K_DENSE = [
    [7 * 2.0**-15, 6 * 2.0**-15, 5 * 2.0**-15, 4 * 2.0**-15, 1.5, 2.5, -2.5],
    [-7 * 2.0**-15, -6 * 2.0**-15, -5 * 2.0**-15, -4 * 2.0**-15, -1.5, 25.0, 0.0],
]

HEADER = (
    '{"__metadata__":{"format":"pt"},'
    '"model.layers.0.self_attn.k_proj.scales":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    '"model.layers.0.self_attn.q_proj.perm":{"dtype":"I32","shape":[7],"data_offsets":[8,36]},'
    '"model.layers.0.self_attn.k_proj.outlier_scales":{"dtype":"F16","shape":[2],"data_offsets":[36,40]},'
    '"model.layers.0.self_attn.q_proj.bias":{"dtype":"F16","shape":[3],"data_offsets":[40,46]},'
    '"model.layers.0.self_attn.q_proj.outlier_scales":{"dtype":"F16","shape":[3],"data_offsets":[46,52]},'
    '"model.layers.0.self_attn.q_proj.scales":{"dtype":"F16","shape":[2,2],"data_offsets":[52,60]},'
    '"model.layers.0.self_attn.k_proj.outlier_weight":{"dtype":"I8","shape":[2,2],"data_offsets":[60,64]},'
    '"model.layers.0.self_attn.q_proj.outlier_weight":{"dtype":"I8","shape":[3,2],"data_offsets":[64,70]},'
    '"model.layers.0.self_attn.k_proj.qweight":{"dtype":"U8","shape":[2,3],"data_offsets":[70,76]},'
    '"model.layers.0.self_attn.q_proj.qweight":{"dtype":"U8","shape":[3,3],"data_offsets":[76,85]}}'
)
# Tensor by tensor in the order of the header.
DATA = {
    "k_proj.scales": "00000038 0000003f",
    "q_proj.perm": "04000000 00000000 06000000 02000000 05000000 01000000 03000000",
    "k_proj.outlier_scales": "0038 0034",
    "q_proj.bias": "003c 00c0 0038",
    "q_proj.outlier_scales": "002c 0040 003e",
    "q_proj.scales": "0038 0034 0030 003c",
    "k_proj.outlier_weight": "05fb 6400",
    "q_proj.outlier_weight": "7f80 01ff 0040",
    "k_proj.qweight": "674503 a9cb0d",
    "q_proj.qweight": "78100f e3a504 21430b",
}


SHARD_SHA256 = "ae1de877ad1ec946374f0db10754d6ef91adfff9ef13f1272ea6631b99453ddd"


def golden_shard() -> bytes:
    header = HEADER.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes.fromhex("".join(DATA.values()))


class Attention(nn.Module):
    def __init__(self, q_proj: QuantizedLinear, k_proj: QuantizedLinear) -> None:
        super().__init__()
        self.q_proj, self.k_proj = q_proj, k_proj


def empty_linears(bias: nn.Parameter | None) -> Attention:
    q_proj = QuantizedLinear(7, 3, SCHEME, bias, GroupInput(None, gathered=True))
    k_proj = QuantizedLinear(7, 2, SCHEME, None, GroupInput(q_proj, gathered=True))
    return Attention(q_proj, k_proj)


def weight_of(codes, scales, outliers, outlier_scales) -> QuantizedWeight:
    encoded = Outliers(torch.tensor(outliers, dtype=torch.int8), torch.tensor(outlier_scales))
    return QuantizedWeight(torch.tensor(codes, dtype=torch.int16), torch.tensor(scales), None, encoded)


def write_example(out: Path) -> None:
    """The two linears through the writer."""
    attention = empty_linears(nn.Parameter(torch.tensor(Q_BIAS, dtype=torch.float16)))
    attention.q_proj.set_perm(torch.tensor(PERM))
    attention.q_proj.set_codes(weight_of(Q_CODES, Q_SCALES, Q_OUTLIERS, Q_OUTLIER_SCALES))
    attention.k_proj.set_codes(weight_of(K_CODES, K_SCALES, K_OUTLIERS, K_OUTLIER_SCALES))
    state = {f"model.layers.0.self_attn.{name}": t for name, t in attention.state_dict().items()}
    with CheckpointWriter(out, overwrite=False) as writer:
        writer.begin({}, n_shards=1)
        writer.write_shard(1, state)
        writer.write_index()
        config = {"model_type": "llama", "quantization_config": quantization_config(FAMILY, SCHEME)}
        (writer.folder / "config.json").write_bytes(json_bytes(config))
        facts = {"source": {}, "recipe": {}, "calibration": None, "versions": {}, "warnings": []}
        writer.write_manifest(facts)
        writer.publish()


@pytest.fixture
def read_back(tmp_path) -> Attention:
    """The two linears from the golden bytes, not from the writer's."""
    (tmp_path / SHARD).write_bytes(golden_shard())
    mapping = {f"model.layers.0.self_attn.{name}": SHARD for name in DATA}
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": mapping})
    )
    tensors = dict(read_tensors(tmp_path, set(mapping)))
    attention = empty_linears(nn.Parameter(tensors.pop(f"{Q}.bias")))
    for name, tensor in tensors.items():
        module, _, buffer = name.removeprefix("model.layers.0.self_attn.").partition(".")
        attention.get_submodule(module).register_buffer(buffer, tensor)
    return attention


def test_the_writer_gives_exactly_the_golden_bytes(tmp_path):
    write_example(tmp_path / "OUT")
    assert (tmp_path / "OUT" / SHARD).read_bytes() == golden_shard()


def test_index_config_and_manifest_have_their_golden_text(tmp_path):
    write_example(tmp_path / "OUT")
    index = json.loads((tmp_path / "OUT" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 85}
    assert index["weight_map"] == {f"model.layers.0.self_attn.{name}": SHARD for name in DATA}
    assert weight_map(tmp_path / "OUT") == index["weight_map"]
    manifest = json.loads((tmp_path / "OUT" / "manifest.json").read_text())
    assert (manifest["quant_method"], manifest["format_version"]) == ("atomq", 1)
    assert list(manifest["files"]) == ["config.json", SHARD, "model.safetensors.index.json"]
    assert manifest["files"][SHARD] == {
        "bytes": len(golden_shard()),
        "sha256": SHARD_SHA256,
    }
    assert json.loads((tmp_path / "OUT" / "config.json").read_text())["quantization_config"] == {
        "quant_method": "atomq",
        "format_version": 1,
        "scheme": {
            "weights": {
                "n_bits": 4,
                "number_format": "int",
                "symmetric": True,
                "group_size": 4,
                "channel_group": 2,
                "scale_mode": "exact",
            },
            "activations": {
                "n_bits": 4,
                "number_format": "int",
                "symmetric": True,
                "group_size": 4,
                "clip_ratio": 1.0,
                "scale_mode": "exact",
                "scale_span": "full",
                "clip_search": "none",
            },
            "outliers": {"n_outliers": 2, "precision": "int8", "metric": "hessian", "reorder": True},
            "kv": {
                "n_bits": 16,
                "clip_ratio": 1.0,
                "key_position": "before_rope",
                "rotation": "none",
                "key_offset": False,
                "key_balance": False,
            },
            "transform": "none",
        },
        "family": {
            "model_type": "llama",
            "groups": [
                {"linears": ["self_attn.q_proj", "self_attn.k_proj"], "absorbed_by": [], "transformed": True}
            ],
            "key": "self_attn.k_proj",
            "value": "self_attn.v_proj",
            "blocks": "model.layers",
            "final_norm": "model.norm",
            "embeddings": "model.embed_tokens",
            "lm_head": "lm_head",
        },
    }


def test_the_reader_understands_the_golden_bytes(read_back):
    assert torch.equal(read_back.q_proj.dense_weight(torch.float32), torch.tensor(Q_DENSE))
    assert torch.equal(read_back.k_proj.dense_weight(torch.float32), torch.tensor(K_DENSE))
    assert read_back.k_proj.input_order().tolist() == PERM


def naive_reader(content: bytes) -> dict[str, list]:
    """Tensors of a safetensors file as nested lists of numbers, by nothing but `struct`."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            letter = {"F32": "f", "F16": "e", "I32": "i", "I8": "b", "U8": "B"}[entry["dtype"]]
            size = struct.calcsize(letter)
            numbers = list(struct.unpack(f"<{(end - start) // size}{letter}", data[start:end]))
            if len(entry["shape"]) == 2:
                width = entry["shape"][1]
                numbers = [numbers[i : i + width] for i in range(0, len(numbers), width)]
            tensors[name] = numbers
    return tensors


def naive_linear(tensors: dict[str, list], name: str, x: list[float]) -> list[float]:
    """One output vector by docs/format.md: loops over codes, Python floats, 4 bits, groups of 4."""
    x = [x[channel] for channel in tensors[f"{Q}.perm"]]
    values = []
    for start, end in ((0, 4), (4, 5)):
        group = x[start:end]
        scale = max(map(abs, group)) / 7
        values += [max(-8, min(7, round(v / scale))) * scale for v in group]  # Python rounds half to even
    scale = max(map(abs, x[5:])) / 127
    values += [round(v / scale) * scale for v in x[5:]]
    result = []
    for row, octets in enumerate(tensors[f"{name}.qweight"]):
        total = 0.0
        for j in range(5):
            nibble = (octets[j // 2] >> 4 * (j % 2)) & 15
            code = nibble - 16 if nibble >= 8 else nibble
            total += code * tensors[f"{name}.scales"][row // 2][j // 4] * values[j]
        for j in range(2):
            outlier = tensors[f"{name}.outlier_weight"][row][j] * tensors[f"{name}.outlier_scales"][row]
            total += outlier * values[5 + j]
        result.append(total + tensors.get(f"{name}.bias", [0.0] * 9)[row])
    return result


X = [[0.5, -20.0, 3.0, 11.5, -1.25, 0.75, 2.0], [0.1, 9.0, -0.3, 30.0, 0.7, -0.2, 0.4]]


def test_a_reader_made_of_loops_gives_the_outputs_of_the_linears(read_back):
    tensors = naive_reader(golden_shard())
    for name, linear in ((Q, read_back.q_proj), (K, read_back.k_proj)):
        expected = torch.tensor([naive_linear(tensors, name, x) for x in X])
        assert torch.allclose(linear(torch.tensor(X)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DATA)
def test_any_altered_byte_of_the_data_alters_what_is_read(read_back, name):
    position = len(golden_shard()) - 85 + len(bytes.fromhex("".join(DATA.values()).partition(DATA[name])[0]))
    content = bytearray(golden_shard())
    content[position] ^= 0x02
    before, after = naive_reader(golden_shard()), naive_reader(bytes(content))
    full = f"model.layers.0.self_attn.{name}"
    assert [key for key in before if before[key] != after[key]] == [full]
    altered = Q if "q_proj" in name else K
    assert naive_linear(before, altered, X[0]) != naive_linear(after, altered, X[0])


def test_the_headers_state_what_the_schema_expects(tmp_path):
    write_example(tmp_path / "OUT")
    headers = tensor_headers(tmp_path / "OUT")
    assert headers[f"{Q}.scales"].dtypes == (torch.float16,)
    assert headers[f"{K}.scales"].dtypes == (torch.float32,)
    assert headers[f"{Q}.qweight"].shape == (3, 3)


def test_the_document_shows_the_same_bytes():
    """The hex dump in docs/format.md, without its offsets and text, is the golden data."""
    text = DOCUMENT.read_text(encoding="utf-8")
    (block,) = re.findall(r"```golden\n(.*?)```", text, re.DOTALL)
    shown = {}
    for line in block.strip().splitlines():
        name, _, octets = re.split(r"  +", line)[:3]
        shown[name] = octets
    assert shown == DATA
    assert f"{len(golden_shard())} bytes" in text
    assert SHARD_SHA256 in text
    (scheme,) = re.findall(
        r"```json\n(.*?)```", text.partition("scheme of the worked example:")[2], re.DOTALL
    )
    assert from_dict(QuantScheme, json.loads(scheme), "scheme.") == SCHEME


# The other encodings: what `QuantizedLinear.set_codes` stores for given numbers.

ROW = [-2, 1, 0, -1, 1]  # fits into 2 bits, five codes: the last byte is not full
ENCODINGS = {
    "2 bits": ({"weights.n_bits": 2}, ROW, "qweight", "c6 01"),
    "3 bits": ({"weights.n_bits": 3}, [-4, 3, 0, -1, 2], "qweight", "1c 2e"),
    "4 bits": ({}, [-8, 7, 0, -1, 5], "qweight", "78 f0 05"),
    "8 bits": ({"weights.n_bits": 8}, [-128, 127, 0, -1, 5], "qweight", "80 7f 00 ff 05"),
    "2 bits asymmetric": (
        {"weights.n_bits": 2, "weights.symmetric": False},
        [3, 0, 1, 2, 3],
        "qweight",
        "93 03",
    ),
    "3 bits asymmetric": (
        {"weights.n_bits": 3, "weights.symmetric": False},
        [7, 0, 1, 2, 6],
        "qweight",
        "47 64",
    ),
    "4 bits asymmetric": ({"weights.symmetric": False}, [15, 0, 1, 8, 9], "qweight", "0f 81 09"),
    "8 bits asymmetric": (
        {"weights.n_bits": 8, "weights.symmetric": False},
        [255, 0, 1, 128, 9],
        "qweight",
        "ff 00 01 80 09",
    ),
    "fp4-bnb": ({"weights.number_format": "fp4-bnb"}, [0, 7, 9, 15, 1], "qweight", "70 f9 01"),
    "fp4-e2m1": ({"weights.number_format": "fp4-e2m1"}, [0, 7, 9, 15, 1], "qweight", "70 f9 01"),
    "exponential": ({"weights.number_format": "exponential"}, [0, 8, 9, 15, 1], "qweight", "80 f9 01"),
}


def encode(settings, codes, scales=(1.0,), zeros=None, outliers=None, base=None, factors=None):
    """What is stored of a linear with one row."""
    values = {"weights.group_size": 8, "activations.group_size": 8, **settings}
    if outliers is not None:
        values["outliers.n_outliers"] = outliers.values.shape[1]
    scheme = override(Recipe(), values).scheme
    n_in = len(codes) + scheme.outliers.n_outliers
    linear = QuantizedLinear(n_in, 1, scheme, None, None)

    def row(numbers):
        return None if numbers is None else torch.tensor([numbers], dtype=torch.float32)

    weight = QuantizedWeight(
        torch.tensor([codes], dtype=torch.int16),
        row(scales),
        row(zeros),
        outliers,
        None if base is None else torch.tensor([base]),
        row(factors),
    )
    linear.set_codes(weight)
    return linear


def stored_hex(linear: QuantizedLinear, name: str) -> str:
    return linear._buffers[name].flatten().view(torch.uint8).numpy().tobytes().hex()


@pytest.mark.parametrize("name", ENCODINGS)
def test_codes_of_every_width_have_their_golden_bytes(name):
    settings, codes, tensor, expected = ENCODINGS[name]
    zeros = [2.0] if settings.get("weights.symmetric") is False else None
    linear = encode(settings, codes, zeros=zeros)
    assert stored_hex(linear, tensor) == expected.replace(" ", "")
    assert linear.quantized_weight().codes.tolist() == [codes]
    if zeros:
        assert stored_hex(linear, "zeros") == "02"


@pytest.mark.parametrize(
    ("number_format", "values"),
    [
        ("fp4-bnb", [0, 0.0625, 2, 3, 4, 6, 8, 12, -0.0, -0.0625, -2, -3, -4, -6, -8, -12]),
        ("fp4-e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]),
        ("exponential", [0, 1, 2, 4, 8, 16, 32, 64, 128, -2, -4, -8, -16, -32, -64, -128]),
    ],
)
def test_code_books_have_their_golden_values(number_format, values):
    linear = encode(
        {"weights.number_format": number_format, "weights.group_size": 16}, list(range(16)), (0.5,)
    )
    assert linear.dense_weight(torch.float64).tolist() == [[v * 0.5 for v in values]]
    text = DOCUMENT.read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| `{number_format}` \| (.*) \|$", text, re.MULTILINE)
    assert [float(value.replace("−", "-")) for value in line.split(" | ")] == values


def test_an_asymmetric_code_means_code_minus_zero_times_scale():
    linear = encode({"weights.symmetric": False}, [15, 0, 8], (0.5,), (8.0,))
    assert linear.dense_weight(torch.float32).tolist() == [[3.5, -4.0, 0.0]]


def test_progressive_scales_are_a_base_and_factors():
    settings = {"weights.scale_mode": "progressive", "weights.group_size": 2}
    linear = encode(settings, [7, -8, 3, 1, 5], (0.75, 4.0, 0.25), base=0.25, factors=[3.0, 16.0, 1.0])
    assert (stored_hex(linear, "scale_base"), stored_hex(linear, "scale_factors")) == ("0034", "f200")
    assert "scales" not in linear._buffers
    assert linear.dense_weight(torch.float32).tolist() == [[5.25, -6.0, 12.0, 4.0, 1.25]]


@pytest.mark.parametrize(
    ("precision", "dtype", "numbers", "expected"),
    [
        ("fp16", torch.float16, [1.0, -0.5, 65504.0], "003c00b8ff7b"),
        ("e5m2", torch.float8_e5m2, [1.0, -0.5, 57344.0], "3cb87b"),
        ("e4m3", torch.float8_e4m3fn, [1.0, -0.5, 448.0], "38b07e"),
    ],
)
def test_outliers_in_floating_point_have_their_golden_bytes(precision, dtype, numbers, expected):
    outliers = Outliers(torch.tensor([numbers]).to(dtype), None)
    linear = encode({"outliers.precision": precision}, [1, 2], outliers=outliers)
    assert stored_hex(linear, "outlier_weight") == expected
    assert "outlier_scales" not in linear._buffers
    assert linear.dense_weight(torch.float32).tolist() == [[1.0, 2.0, *numbers]]


@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        (1.0, torch.float16),
        (2.0**-14, torch.float16),
        (65504.0, torch.float16),
        (2.0**-15, torch.float32),
        (65536.0, torch.float32),
        (0.1, torch.float32),  # not rounded before: kept as it is
    ],
)
def test_scales_are_f16_where_f16_holds_them_as_normal_numbers(scale, dtype):
    linear = encode({}, [1, 2, 3], (scale,))
    stored = linear._buffers["scales"]
    assert stored.dtype == dtype
    assert stored.double().item() == pytest.approx(scale, rel=1e-7)


def test_every_setting_is_in_the_document():
    text = DOCUMENT.read_text(encoding="utf-8")
    for part, fields in to_dict(SCHEME).items():
        assert f"`{part}" in text
        for name in fields if isinstance(fields, dict) else ():
            assert f"`{part}.{name}`" in text, name
