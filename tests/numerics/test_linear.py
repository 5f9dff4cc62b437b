"""Quantized linears against an int64/float64 loop over the bytes that they store.

The oracle reads a state dict as a stranger would read the file: it unpacks bits by hand, quantizes the input
by `naive.quantize_token`, adds up products of codes in int64 group by group, and scales in float64. It calls
nothing of `atomq`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numerics import naive
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from atomq.config import ActivationScheme, OutlierScheme, QuantScheme, SolverConfig, WeightScheme
from atomq.method.gptq import rtn_quantize
from atomq.numerics.linear import GroupInput, QuantizedLinear, SharedInput, linear_specs, transform_input
from atomq.numerics.weights import QuantizedWeight

N_IN, N_OUT = 72, 11  # with 16 outliers and groups of 16, like 576 with 128: the last group has 8 channels
INT8_OUTLIERS = OutlierScheme(16, "int8", reorder=True)


def scheme_of(weights=None, activations=None, outliers=INT8_OUTLIERS, **rest) -> QuantScheme:
    return QuantScheme(
        WeightScheme(**{"group_size": 16, **(weights or {})}),
        ActivationScheme(**{"group_size": 16, **(activations or {})}),
        outliers,
        **rest,
    )


SCHEMES = {
    "atom": scheme_of({"channel_group": 2}, {"clip_ratio": 0.9}),
    **{f"w{n}a{n}": scheme_of({"n_bits": n}, {"n_bits": n}) for n in (2, 3, 8)},
    "asym": scheme_of({"symmetric": False, "channel_group": 3}, {"symmetric": False, "clip_ratio": 0.8}),
    "asym-2-3": scheme_of({"n_bits": 2, "symmetric": False}, {"n_bits": 3, "symmetric": False}),
    "asym-8": scheme_of({"n_bits": 8, "symmetric": False}, {"n_bits": 8, "symmetric": False}),
    "fp4-bnb": scheme_of({"number_format": "fp4-bnb"}, {"number_format": "fp4-bnb"}),
    "fp4-e2m1": scheme_of({"number_format": "fp4-e2m1"}, {"number_format": "fp4-e2m1"}),
    "exponential": scheme_of({"number_format": "exponential", "channel_group": 2}),
    "progressive": scheme_of({"scale_mode": "progressive"}, {"scale_mode": "progressive"}),
    "progressive-3": scheme_of(
        {"n_bits": 3, "scale_mode": "progressive"}, {"n_bits": 2, "scale_mode": "progressive"}
    ),
    **{f"outliers-{p}": scheme_of(outliers=OutlierScheme(16, p)) for p in ("fp16", "e5m2", "e4m3")},
    "outliers-odd": scheme_of({"n_bits": 3}, outliers=OutlierScheme(7, "int8", reorder=True)),
    "no-outliers": scheme_of(outliers=OutlierScheme(0)),
    "reorder-only": scheme_of(outliers=OutlierScheme(0, reorder=True)),
    "per-row": scheme_of({"group_size": None, "n_bits": 8}, {"group_size": None, "n_bits": 8}),
    "unequal-groups": scheme_of({"group_size": 24}, {"group_size": 16}),
    "hadamard": scheme_of(transform="hadamard"),
    "hadamard-progressive": scheme_of(
        {"scale_mode": "progressive"}, {"scale_mode": "progressive"}, transform="hadamard"
    ),
    "w16a4": scheme_of({"n_bits": 16}),
    "w16a4-hadamard": scheme_of({"n_bits": 16}, transform="hadamard"),
    "w4a16": scheme_of(None, {"n_bits": 16}, OutlierScheme()),
    "w4a16-outliers": scheme_of(None, {"n_bits": 16}),
    "w4a16-hadamard": scheme_of(None, {"n_bits": 16}, transform="hadamard"),
}


def make_linear(scheme: QuantScheme, *, bias: bool = True, gathered: bool = True, seed: int = 0):
    """A linear with codes of a random weight, rounded to nearest."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(N_OUT, N_IN, generator=generator) * torch.linspace(0.2, 2, N_OUT)[:, None]
    values = nn.Parameter(torch.randn(N_OUT, generator=generator), requires_grad=False) if bias else None
    shares = GroupInput(None, gathered) if scheme.outliers.reorder else None
    linear = QuantizedLinear(N_IN, N_OUT, scheme, values, shares)
    if shares is not None:
        perm = torch.randperm(N_IN, generator=generator)
        linear.set_perm(perm)
        weight = weight[:, perm]
    if scheme.transform == "hadamard":
        weight = transform_input(weight, scheme)
    if scheme.weights.n_bits == 16:
        linear.set_float_weight(weight)
    else:
        linear.set_codes(rtn_quantize(weight, scheme, SolverConfig(method="rtn", clip_ratio=0.85)))
    return linear


def make_inputs(n_tokens: int, heavy: bool, scheme: QuantScheme, perm: np.ndarray | None, seed: int = 0):
    """Tokens [T, K]; heavy: the outlier channels, wherever they lie, are a hundred times as large."""
    generator = torch.Generator().manual_seed(1000 * seed + n_tokens)
    x = torch.randn(n_tokens, N_IN, generator=generator)
    if heavy:
        last = np.arange(N_IN - max(scheme.outliers.n_outliers, 4), N_IN)
        x[:, last if perm is None else perm[last]] *= 100
    return x


def stored_numbers(state: dict[str, torch.Tensor], precision: str) -> dict[str, np.ndarray]:
    """The tensors as bytes would give them to NumPy, F8 decoded by hand."""
    numbers = {}
    for name, tensor in state.items():
        if tensor.dtype in (torch.float8_e5m2, torch.float8_e4m3fn):
            table = np.array([naive.float8_value(byte, precision) for byte in range(256)])
            numbers[name] = table[tensor.view(torch.uint8).numpy()]
        else:
            numbers[name] = tensor.numpy()
    return numbers


class Operand(NamedTuple):
    """One row: the value of normal channel c in group g is values[c] / unit * scales[g]; int64 if coded."""

    values: np.ndarray
    unit: int
    bounds: list[tuple[int, int]]
    scales: list[float]
    outliers: np.ndarray


def coded(codes, scales, zeros, config, outliers) -> Operand:
    """Codes as integers: times 16, so that every code book becomes whole numbers."""
    groups = naive.bounds(len(codes), config.group_size)
    values = [
        int(16 * naive.value_of(code, config, 0 if zeros is None else int(zeros[index])))
        for index, (a, b) in enumerate(groups)
        for code in codes[a:b]
    ]
    return Operand(np.array(values, dtype=np.int64), 16, groups, [float(s) for s in scales], outliers)


def uncoded(row) -> Operand:
    """A row in floating point, all of it normal channels."""
    values = np.array(row, dtype=np.float64)
    return Operand(values, 1, [(0, len(values))], [1.0], np.empty(0))


def stored_row(tensors: dict[str, np.ndarray], out: int, scheme: QuantScheme) -> Operand:
    """One row of the weight as it is stored."""
    weights, outliers = scheme.weights, scheme.outliers
    if weights.n_bits == 16:
        return uncoded(tensors["weight"][out])
    signed = weights.symmetric and weights.number_format == "int"
    n_normal, row = N_IN - outliers.n_outliers, out // weights.channel_group
    codes = naive.unpack_row(bytes(tensors["qweight"][out]), weights.n_bits, n_normal, signed)
    if weights.scale_mode == "progressive":
        n_groups = len(naive.bounds(n_normal, weights.group_size))
        factors = naive.unpack_row(bytes(tensors["scale_factors"][out]), 4, n_groups, signed=False)
        scales = np.float32(tensors["scale_base"][out]) * (np.array(factors, dtype=np.float32) + 1)
    else:
        scales = tensors["scales"][row]
    last = np.empty(0)
    if outliers.n_outliers:
        last = tensors["outlier_weight"][out].astype(np.float64)
        if outliers.precision == "int8":
            last = last * float(tensors["outlier_scales"][out])
    return coded(codes, scales, None if weights.symmetric else tensors["zeros"][row], weights, last)


def quantized_token(row: np.ndarray, scheme: QuantScheme) -> tuple[Operand, float]:
    """One token in stored order, and how near one of its turned channels lies to a tie between two codes."""
    activations, n_normal = scheme.activations, N_IN - scheme.outliers.n_outliers
    normal, last, near = row[:n_normal], row[n_normal:], 1.0
    if scheme.transform == "hadamard":
        normal = naive.transform_row(normal, activations.group_size)
    if activations.n_bits == 16:
        return uncoded([*normal, *last]), near
    normal = normal.astype(np.float32)
    codes, scales, zeros = naive.quantize_token(normal, activations)
    if scheme.transform == "hadamard":
        for (a, b), scale in zip(naive.bounds(n_normal, activations.group_size), scales, strict=True):
            near = min(near, *(naive.tie_distance(value / scale, activations) for value in normal[a:b]))
    if len(last) and scheme.outliers.precision == "int8":
        outlier_codes, scale = naive.encode_int8(last, stored=False)
        last = np.array(outlier_codes) * float(scale)
    elif scheme.outliers.precision == "fp16":
        last = np.array([naive.encode_f16(float(value)) for value in last])
    elif len(last):
        last = np.array([naive.encode_float8(float(value), scheme.outliers.precision) for value in last])
    return coded(codes, scales, zeros, activations, last), near


def product(token: Operand, weight: Operand) -> float:
    """Sums of products of codes, group by group; both rows' outliers follow their normal channels."""
    token_values, weight_values = token.values, weight.values
    total = 0.0
    if len(token.outliers) and len(weight.outliers):
        total = float(token.outliers @ weight.outliers)
    elif len(weight.outliers):  # the other operand has 16 bits, its outliers among its values
        total = float(token_values[-len(weight.outliers) :] @ weight.outliers)
    elif len(token.outliers):
        total = float(token.outliers @ weight_values[-len(token.outliers) :])
    for (a, b), token_scale in zip(token.bounds, token.scales, strict=True):
        for (c, d), weight_scale in zip(weight.bounds, weight.scales, strict=True):
            start, end = max(a, c), min(b, d)
            if start < end:
                products = token_values[start:end] * weight_values[start:end]
                total += token_scale * weight_scale * float(products.sum()) / (token.unit * weight.unit)
    return total


def oracle(
    state: dict[str, torch.Tensor], x: torch.Tensor, scheme: QuantScheme, gathered: bool
) -> tuple[np.ndarray, float]:
    """Output [T, N] in float64, and how near a turned input came to a tie between two codes."""
    tensors = stored_numbers(state, scheme.outliers.precision)
    inputs = x.numpy()
    if gathered and "perm" in tensors:
        inputs = np.stack([inputs[:, channel] for channel in tensors["perm"]], axis=1)
    tokens = [quantized_token(row, scheme) for row in inputs]
    rows = [stored_row(tensors, out, scheme) for out in range(N_OUT)]
    output = np.array([[product(token, row) for row in rows] for token, _ in tokens])
    if "bias" in tensors:
        output += tensors["bias"].astype(np.float64)
    return output, min(near for _, near in tokens)


def relative_error(actual: torch.Tensor, expected: np.ndarray) -> float:
    difference = actual.double().numpy() - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected))


def inputs_away_from_ties(linear, scheme, n_tokens: int, heavy: bool, gathered: bool):
    """Inputs and the oracle's output. A rotation is rounded differently by every matrix multiplication, so
    no turned input may lie where that could change its code.
    """
    state = linear.state_dict()
    perm = state["perm"].numpy() if gathered and "perm" in state else None
    for seed in itertools.count():
        x = make_inputs(n_tokens, heavy, scheme, perm, seed)
        expected, near = oracle(state, x, scheme, gathered)
        if scheme.transform == "none" or near > 1e-5:
            return x, expected


@pytest.mark.parametrize("heavy", [False, True], ids=["random", "heavy"])
@pytest.mark.parametrize("n_tokens", [1, 33])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_output_equals_an_integer_loop_over_the_stored_bytes(scheme, n_tokens, heavy):
    linear = make_linear(scheme)
    x, expected = inputs_away_from_ties(linear, scheme, n_tokens, heavy, gathered=True)
    assert relative_error(linear(x), expected) <= 1e-6


@pytest.mark.parametrize("scheme", [SCHEMES["atom"], SCHEMES["hadamard"]], ids=["atom", "hadamard"])
def test_an_absorbed_order_is_stored_but_not_gathered(scheme):
    linear = make_linear(scheme, bias=False, gathered=False)
    x, expected = inputs_away_from_ties(linear, scheme, 5, True, gathered=False)
    assert relative_error(linear(x), expected) <= 1e-6
    gathered, _ = oracle(linear.state_dict(), x, scheme, gathered=True)
    assert relative_error(linear(x), gathered) > 1e-2


def test_a_follower_gathers_by_the_order_of_its_groups_first_linear():
    scheme = SCHEMES["atom"]
    owner = make_linear(scheme)
    follower = QuantizedLinear(N_IN, N_OUT, scheme, owner.bias, GroupInput(owner, gathered=True))
    follower.set_codes(owner.quantized_weight())
    assert "perm" not in follower.state_dict()
    assert not list(follower.children())
    x = make_inputs(3, False, scheme, None)
    assert torch.equal(follower(x), owner(x))


def altered(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """A copy with two entries of the order exchanged, one bit of another tensor flipped, or one float32
    (whose last bit lies below the tolerance) made larger by a hundredth.
    """
    changed = tensor.clone().contiguous()
    if name == "perm":
        changed[[0, -1]] = changed[[-1, 0]]
        return changed
    index = 0 if name == "qweight" else int(changed.float().abs().argmax())
    if changed.dtype == torch.float32:
        changed.view(-1)[index] *= 1.01
    else:
        integers = {1: torch.uint8, 2: torch.int16}[changed.element_size()]
        changed.view(integers).view(-1)[index] ^= 1
    return changed


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_the_comparison_fails_if_one_stored_value_is_altered(scheme):
    """One code, scale, zero point, factor, outlier, weight or bias, or two entries of the order."""
    linear = make_linear(scheme)
    x, _ = inputs_away_from_ties(linear, scheme, 33, False, gathered=True)
    output, state = linear(x), linear.state_dict()
    for name, tensor in state.items():
        spoiled, _ = oracle({**state, name: altered(tensor, name)}, x, scheme, gathered=True)
        assert relative_error(output, spoiled) > 1e-6, name


@pytest.mark.parametrize("name", ["qweight", "scales", "perm", "outlier_weight", "outlier_scales"])
def test_the_linear_itself_answers_to_every_stored_value(name):
    scheme = SCHEMES["atom"]
    linear = make_linear(scheme)
    x, expected = inputs_away_from_ties(linear, scheme, 33, True, gathered=True)
    spoiled = make_linear(scheme)
    spoiled._buffers[name] = altered(spoiled._buffers[name], name)
    assert relative_error(linear(x), expected) <= 1e-6 < relative_error(spoiled(x), expected)


@pytest.mark.parametrize(
    ("scheme", "tolerance"),
    [
        (scheme_of({"n_bits": 8}, {"n_bits": 8}), 0.02),
        (scheme_of({"n_bits": 8}, {"n_bits": 8}, transform="hadamard"), 0.02),
        (scheme_of({"n_bits": 8, "symmetric": False}, {"n_bits": 8, "symmetric": False}), 0.02),
        (SCHEMES["w16a4-hadamard"], 0.12),
        (SCHEMES["w4a16-hadamard"], 0.25),
        (SCHEMES["atom"], 0.3),
    ],
)
def test_a_quantized_linear_stays_near_the_float_linear_in_the_original_order(scheme, tolerance):
    generator = torch.Generator().manual_seed(7)
    weight, perm = torch.randn(N_OUT, N_IN, generator=generator), torch.randperm(N_IN, generator=generator)
    bias = nn.Parameter(torch.randn(N_OUT, generator=generator), requires_grad=False)
    linear = QuantizedLinear(N_IN, N_OUT, scheme, bias, GroupInput(None, gathered=True))
    linear.set_perm(perm)
    stored = weight[:, perm]
    if scheme.transform == "hadamard":
        stored = transform_input(stored, scheme)
    linear.set_float_weight(stored)
    if scheme.weights.n_bits < 16:
        linear.set_codes(rtn_quantize(stored, scheme, SolverConfig(method="rtn")))
    x = make_inputs(33, True, scheme, perm.numpy())
    expected = nn.functional.linear(x, weight, bias)
    assert relative_error(linear(x), expected.double().numpy()) < tolerance


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_stored_names_shapes_and_dtypes_are_those_of_the_specification(scheme):
    linear = make_linear(scheme)
    specs = linear_specs(N_OUT, N_IN, scheme)
    state = linear.state_dict()
    expected = {*specs, "bias"} | ({"perm"} if scheme.outliers.reorder else set())
    expected |= {"weight"} if scheme.weights.n_bits == 16 else set()
    assert set(state) == expected
    for name, spec in specs.items():
        assert state[name].dtype in spec.dtypes, name
        assert state[name].shape == spec.shape, name
        assert state[name].is_contiguous(), name
    assert "bias" not in make_linear(scheme, bias=False).state_dict()


def test_scales_that_f16_cannot_hold_are_stored_in_f32_and_used_exactly():
    scheme = SCHEMES["atom"]
    linear = make_linear(scheme)
    weight = torch.randn(N_OUT, N_IN) * 1e-6
    linear.set_codes(rtn_quantize(weight, scheme, SolverConfig(method="rtn")))
    state = linear.state_dict()
    assert state["scales"].dtype == state["outlier_scales"].dtype == torch.float32
    x, expected = inputs_away_from_ties(linear, scheme, 3, False, gathered=True)
    expected -= linear.bias.double().numpy()
    linear.bias = None
    assert relative_error(linear(x), expected) <= 1e-6


def test_a_small_linear_is_stored_in_the_bytes_written_out_by_hand():
    scheme = QuantScheme(
        WeightScheme(group_size=4), ActivationScheme(group_size=4), OutlierScheme(1, "int8", reorder=True)
    )
    weight = torch.tensor(
        [
            [3.5, -0.5, 0.0, 1.0, -7.0, 2.0, 127.0],  # scales 0.5 and 1
            [0.0, 0.0, 0.0, 0.0, 0.25, -1.75, -63.5],  # a zero group: scale 1; then 0.25
        ]
    )
    linear = QuantizedLinear(7, 2, scheme, None, GroupInput(None, gathered=True))
    linear.set_perm(torch.tensor([6, 5, 4, 3, 2, 1, 0]))
    linear.set_codes(rtn_quantize(weight, scheme, SolverConfig(method="rtn")))
    stored = {name: tensor.numpy().tobytes().hex(" ") for name, tensor in linear.state_dict().items()}
    assert stored == {
        # 7 -1 0 2 | -7 2 and 0 0 0 0 | 1 -7, the even channel in the low nibble
        "qweight": "f7 20 29 00 00 91",
        "scales": "00 38 00 3c 00 3c 00 34",  # F16 0.5, 1, 1, 0.25
        "outlier_weight": "7f 81",  # 127, -127
        "outlier_scales": "00 3c 00 38",  # F16 1, 0.5
        "perm": "06 00 00 00 05 00 00 00 04 00 00 00 03 00 00 00 02 00 00 00 01 00 00 00 00 00 00 00",
    }


def test_a_small_progressive_linear_is_stored_in_the_bytes_written_out_by_hand():
    scheme = QuantScheme(
        WeightScheme(n_bits=3, group_size=2, scale_mode="progressive"), ActivationScheme(n_bits=16)
    )
    # Scales 16, 3.1 and 1 x the base 1: factors 16, 4 and 1; codes are value / (base x factor).
    weight = torch.tensor([[48.0, -32.0, 9.3, -4.0, 3.0]])
    linear = QuantizedLinear(5, 1, scheme, None, None)
    linear.set_codes(rtn_quantize(weight, scheme, SolverConfig(method="rtn")))
    stored = {name: tensor.numpy().tobytes().hex(" ") for name, tensor in linear.state_dict().items()}
    # codes 3 -2 2 -1 3 = 011 110 010 111 011
    assert stored == {"qweight": "b3 3e", "scale_base": "00 3c", "scale_factors": "3f 00"}


@pytest.mark.parametrize(
    "cast",
    [
        lambda module: module.half(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.double(),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.float(),
    ],
    ids=["half", "bfloat16", "double", "to", "float"],
)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_casts_leave_codes_scales_and_orders_bit_equal(scheme, cast):
    linear = make_linear(scheme)
    x = make_inputs(3, False, scheme, None)
    linear(x)  # a kept dense weight must not survive the cast
    before = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    model = cast(nn.Sequential(linear))
    after = linear.state_dict()
    assert set(after) == set(before)
    dtype = linear.bias.dtype
    for name in set(before) - {"bias", "weight"}:
        assert after[name].dtype == before[name].dtype, name
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)), name
    output = model(x.to(dtype))
    assert output.dtype == dtype
    if scheme.weights.n_bits < 16 and dtype in (torch.float16, torch.bfloat16):
        exact = make_linear(scheme)
        exact.bias.data = exact.bias.to(dtype).float()
        assert torch.equal(output, exact(x.to(dtype).float()).to(dtype))


def test_a_move_drops_the_kept_dense_weight():
    linear = make_linear(SCHEMES["outliers-e4m3"])
    assert linear.dense_weight(torch.float32) is linear.dense_weight(torch.float32)
    assert linear.to("meta").dense_weight(torch.float32).device.type == "meta"


@pytest.mark.parametrize("scheme", [SCHEMES["atom"], SCHEMES["hadamard"]], ids=["atom", "hadamard"])
def test_what_was_kept_in_inference_mode_serves_outside_of_it(scheme):
    linear = make_linear(scheme)
    x = make_inputs(3, False, scheme, None)
    with torch.inference_mode():
        linear(x)
    turned = x.clone().requires_grad_()
    linear(turned).sum().backward()
    assert turned.grad is not None


def test_codes_survive_a_cast_there_and_back():
    linear = make_linear(SCHEMES["outliers-e4m3"])
    x = make_inputs(3, False, SCHEMES["outliers-e4m3"], None)
    before = linear(x) - linear.bias
    linear.half().float()
    assert torch.allclose(linear(x) - linear.bias, before, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_deep_copy_computes_the_same_and_stands_alone(scheme):
    linear = make_linear(scheme)
    x = make_inputs(5, False, scheme, None)
    twin = copy.deepcopy(linear)
    output = linear(x)
    assert torch.equal(twin(x), output)
    for name, tensor in linear.state_dict().items():
        if name != "bias":
            tensor.view(torch.uint8).zero_()
    assert torch.equal(twin(x), output)


def test_linears_of_a_group_quantize_the_input_that_they_share_once(monkeypatch):
    scheme, made = SCHEMES["atom"], []
    owner = make_linear(scheme)
    followers = [QuantizedLinear(N_IN, N_OUT, scheme, None, GroupInput(owner, gathered=True)) for _ in "ab"]
    for follower in followers:
        follower.set_codes(owner.quantized_weight())
    group = [owner, *followers]
    x, other = make_inputs(3, False, scheme, None), make_inputs(3, True, scheme, None, seed=1)
    expected = [[linear(t) for linear in group] for t in (x, other)]
    quantize = QuantizedLinear.quantize_input
    monkeypatch.setattr(
        QuantizedLinear, "quantize_input", lambda self, t: made.append(t) or quantize(self, t)
    )
    shared = SharedInput(len(group))
    for linear in group:
        linear.shared = shared
    with torch.no_grad():
        for own, right in zip((x, other), expected, strict=True):
            assert all(torch.equal(linear(own), y) for linear, y in zip(group, right, strict=True))
        assert [t is own for t, own in zip(made, (x, other), strict=True)] == [True, True]
        x.copy_(other)  # all have read it: what is in it now counts
        assert torch.equal(owner(x), expected[1][0])
        assert torch.equal(followers[0](other), expected[1][1])
        assert len(made) == 4
    made.clear()
    for linear in group:  # where gradients are taken each makes its own
        linear(x)
    assert len(made) == 3


def test_a_deep_copied_group_follows_its_own_copy_of_the_order():
    scheme = SCHEMES["atom"]
    owner = make_linear(scheme)
    follower = QuantizedLinear(N_IN, N_OUT, scheme, None, GroupInput(owner, gathered=True))
    follower.set_codes(owner.quantized_weight())
    twins = copy.deepcopy(nn.ModuleList([owner, follower]))
    twins[0].set_perm(torch.arange(N_IN))
    assert torch.equal(twins[1].input_order(), torch.arange(N_IN))
    assert not torch.equal(follower.input_order(), torch.arange(N_IN))


class ReadNumbers(TorchDispatchMode):
    """Counts how often a tensor's number is asked for, which a GPU would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_clip_ratio_of_its_own_is_read_once_and_again_when_it_changes():
    activations = dataclasses.replace(SCHEMES["atom"].activations, clip_search="output")
    scheme = dataclasses.replace(SCHEMES["atom"], activations=activations)
    owner = make_linear(scheme)
    follower = QuantizedLinear(N_IN, N_OUT, scheme, None, GroupInput(owner, gathered=True))
    follower.set_codes(owner.quantized_weight())
    owner.set_clip_ratio(0.5)
    x = make_inputs(4, False, scheme, None)
    group = nn.ModuleList([owner, follower])
    for linear in group:
        linear(x)
    with ReadNumbers() as read:
        half = [linear(x) for linear in group]
    assert read.count == 0
    moved = copy.deepcopy(group).double()
    assert [linear.input_scheme().activations.clip_ratio for linear in moved] == [0.5, 0.5]
    owner.clip_ratio.fill_(0.625)
    assert [linear.input_scheme().activations.clip_ratio for linear in group] == [0.625, 0.625]
    owner.set_clip_ratio(0.75)
    assert [linear.input_scheme().activations.clip_ratio for linear in (*group, *moved)] == [
        0.75,
        0.75,
        0.5,
        0.5,
    ]
    assert not any(torch.equal(linear(x), before) for linear, before in zip(group, half, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_stored_codes_come_back_as_they_were_set(scheme):
    if scheme.weights.n_bits == 16:
        return
    linear = make_linear(scheme)
    weight = linear.quantized_weight()
    assert isinstance(weight, QuantizedWeight)
    again = QuantizedLinear(N_IN, N_OUT, scheme, linear.bias, None)
    again.set_codes(weight)
    state = linear.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name
    assert torch.equal(linear.dense_weight(torch.float32), weight.dequantize(scheme.weights, torch.float32))


def test_codes_replace_the_float_weight_and_the_kept_dense_weight():
    scheme = SCHEMES["no-outliers"]
    generator = torch.Generator().manual_seed(3)
    linear = QuantizedLinear(N_IN, N_OUT, scheme, None, None)
    x = make_inputs(4, False, scheme, None)
    for _ in range(2):
        weight = torch.randn(N_OUT, N_IN, generator=generator)
        linear.set_float_weight(weight)
        assert torch.equal(linear(x), nn.functional.linear(linear.quantize_input(x), weight))
        quantized = rtn_quantize(weight, scheme, SolverConfig(method="rtn"))
        linear.set_codes(quantized)
        dense = quantized.dequantize(scheme.weights, torch.float32)
        assert torch.equal(linear(x), nn.functional.linear(linear.quantize_input(x), dense))
        assert "weight" not in linear.state_dict()


def test_the_observer_sees_the_quantized_input():
    linear = make_linear(SCHEMES["hadamard"])
    x = make_inputs(4, False, SCHEMES["hadamard"], None)
    seen = []
    linear.observer = seen.append
    linear(x)
    assert torch.equal(seen[0], linear.quantize_input(x))


def test_any_number_of_leading_axes_and_no_tokens_work():
    linear = make_linear(SCHEMES["atom"])
    x = make_inputs(6, False, SCHEMES["atom"], None)
    assert torch.allclose(linear(x.view(2, 3, N_IN)).view(6, N_OUT), linear(x), atol=1e-5)
    assert linear(x[:0]).shape == (0, N_OUT)
    assert linear(x[0]).shape == (N_OUT,)
