"""Quantized activations: the twin is the simulation in the GEMM's layout, the kernel is the twin."""

from __future__ import annotations

import pytest
import torch

from atomq.config import ActivationScheme
from atomq.errors import KernelError
from atomq.kernels import activations as fronts, reference
from atomq.kernels.layout import ActivationFormat, Added, ChannelOrder, NormParameters
from atomq.kernels.loader import ARCHITECTURES, compile_for
from atomq.kernels.repack import SLOT_INPUTS, PackedActivations, unpack_activations
from atomq.numerics.activations import quantize_activations
from atomq.numerics.groups import split_groups
from atomq.numerics.hadamard import transform_groups

FORMATS = {
    "plain": ActivationFormat(512),
    "outliers": ActivationFormat(640, 128, clip_ratio=0.9, hadamard=True),
    "ragged": ActivationFormat(576, 64, clip_ratio=0.9, hadamard=True),
    "odd-widths": ActivationFormat(803, 37, hadamard=True),
    "groups-of-64": ActivationFormat(1000, 200, 64, 0.85, hadamard=True),
    "lone-half-slot": ActivationFormat(320, 256, 64),
    "narrow": ActivationFormat(5, 2),
    "two-outlier-slots": ActivationFormat(1152, 256, clip_ratio=0.9, hadamard=True),
    "no-outliers": ActivationFormat(1280, clip_ratio=0.9, hadamard=True),
    "progressive": ActivationFormat(1152, 128, clip_ratio=0.9, hadamard=True, progressive=True),
    "progressive-64": ActivationFormat(700, 130, 64, progressive=True),
    "progressive-one-group": ActivationFormat(60, 7, 64, progressive=True),
    "hidden-4096": ActivationFormat(4096, 128, clip_ratio=0.9, hadamard=True),
    "wide": ActivationFormat(14336, 256, hadamard=True),
    "wide-progressive": ActivationFormat(14336, 128, progressive=True),
    "widest": ActivationFormat(28672, 256, clip_ratio=0.9, hadamard=True),
    "widest-progressive": ActivationFormat(28672, 128, clip_ratio=0.9, hadamard=True, progressive=True),
}


def make_tokens(n_tokens: int, n_channels: int, seed: int = 0, dtype: torch.dtype = torch.float16):
    """Tokens of different sizes with outlier channels, one zero token, one zero group, one that fills F16."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_tokens, n_channels + 8, generator=generator)
    x *= torch.rand(n_tokens, 1, generator=generator) * 4
    x[:, torch.randperm(n_channels, generator=generator)[: max(1, n_channels // 50)]] *= 30
    if n_tokens > 3:
        x[1], x[2, :300], x[3, 0] = 0, 0, 6e4
    return x.to(dtype)[:, :n_channels]  # rows lie apart


def make_order(activations: ActivationFormat, seed: int = 0) -> ChannelOrder:
    generator = torch.Generator().manual_seed(seed)
    return ChannelOrder.of(torch.randperm(activations.n_channels, generator=generator).int(), activations)


def make_norm(activations: ActivationFormat, order: ChannelOrder | None, has_bias: bool) -> NormParameters:
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(2, activations.n_channels, generator=generator).half()
    return NormParameters.of(weight + 1, bias if has_bias else None, 1e-5, activations, order)


def to_cuda(value):
    """A tensor or a named tuple of them on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    return type(value)(*map(to_cuda, value)) if isinstance(value, tuple) else value


def plain_codes(quantized: PackedActivations, activations: ActivationFormat) -> torch.Tensor:
    """Codes [M, n_channels] in the stored order; nothing may lie in the gaps."""
    rows = unpack_activations(quantized)
    first, n_normal = activations.n_slots * SLOT_INPUTS, activations.n_normal
    codes = torch.cat((rows[:, :n_normal], rows[:, first : first + activations.n_outliers]), dim=1)
    assert codes.count_nonzero() == rows.count_nonzero()
    return codes


@pytest.mark.parametrize("activations", FORMATS.values(), ids=FORMATS)
def test_codes_and_scales_are_the_simulations(activations):
    x, order = make_tokens(13, activations.n_channels), make_order(activations)
    quantized = fronts.quantize_act(x, activations, order)
    codes, n_normal = plain_codes(quantized, activations).float(), activations.n_normal
    scheme = ActivationScheme(
        group_size=activations.group_size,
        clip_ratio=activations.clip_ratio,
        scale_mode="progressive" if activations.progressive else "exact",
    )
    stored = x[:, order.perm].float()
    if activations.hadamard:
        normal = torch.cat(
            [reference.butterflies(g) for g in stored[:, :n_normal].split(activations.group_size, dim=1)],
            dim=1,
        )
        turned = transform_groups(stored[:, :n_normal], activations.group_size)
        assert torch.allclose(normal, turned, rtol=1e-5, atol=1e-5 * float(x.abs().max()))
        stored = torch.cat((normal, stored[:, n_normal:]), dim=1)
    expected = quantize_activations(stored, scheme, activations.n_outliers, "int8")
    assert expected.outliers is None or torch.equal(codes[:, n_normal:], expected.outliers.values.float())
    assert expected.outliers is None or torch.equal(quantized.token_scales[-1, :13], expected.outliers.scales)
    n_groups = expected.scales.shape[1]
    if activations.progressive:
        base = quantized.token_scales[0, :13, None]
        factors = (expected.scales / base).round()
        assert torch.equal(base * factors, expected.scales)
        operands = split_groups(expected.codes, activations.group_size) * factors[..., None]
        assert torch.equal(split_groups(codes[:, :n_normal], activations.group_size), operands)
    else:
        assert torch.equal(codes[:, :n_normal], expected.codes)
        assert torch.equal(quantized.token_scales[:n_groups, :13].T, expected.scales)
    assert not quantized.token_scales[:, 13:].any()
    assert codes.abs().max() <= 128


def test_one_changed_entry_of_the_order_changes_the_codes():
    activations = FORMATS["outliers"]
    x, order = make_tokens(9, activations.n_channels), make_order(activations)
    perm = order.perm.clone()
    perm[[3, 400]] = perm[[400, 3]]
    before = plain_codes(fronts.quantize_act(x, activations, order), activations)
    after = plain_codes(fronts.quantize_act(x, activations, ChannelOrder.of(perm, activations)), activations)
    assert not torch.equal(before, after)


def test_fused_operations_equal_the_operation_and_then_the_quantization():
    activations = FORMATS["ragged"]
    x, up, order = make_tokens(5, 576).float(), make_tokens(5, 576, seed=1).float(), make_order(activations)
    norm = make_norm(activations, order, has_bias=True)
    functional = torch.nn.functional
    layer_norm = functional.layer_norm(x, (576,), norm.weight.float(), norm.bias.float(), 1e-5)
    rms_norm = functional.rms_norm(x, (576,), norm.weight.float(), 1e-5)
    for fused, alone in (
        (fronts.relu_quantize(x, activations, order), functional.relu(x)),
        (fronts.silu_mul_quantize(x, up, activations, order), functional.silu(x) * up),
        (fronts.rms_norm_quantize(x, norm, activations, order), rms_norm),
        (fronts.layer_norm_quantize(x, norm, activations, order), layer_norm),
    ):
        expected = fronts.quantize_act(alone, activations, order)
        assert torch.allclose(fused.token_scales, expected.token_scales, rtol=1e-5)
        assert (fused.codes.int() - expected.codes.int()).count_nonzero() <= 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_added_before_a_norm_is_rounded_and_kept(dtype):
    activations = FORMATS["ragged"]
    x, order = make_tokens(5, 576, dtype=dtype), make_order(activations)
    delta = make_tokens(5, 576, 1, dtype).contiguous() / 16  # no sum past F16
    norm, added = make_norm(activations, order, has_bias=False), Added.to(delta)
    found = fronts.rms_norm_quantize(x, norm, activations, order, added)
    total = (x.double() + delta.double()).to(dtype)  # exact, then rounded once
    assert torch.equal(added.total, total)
    expected = fronts.rms_norm_quantize(total, norm, activations, order)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.token_scales, expected.token_scales)


def test_no_tokens_give_empty_operands():
    quantized = fronts.quantize_act(torch.empty(0, 576), FORMATS["ragged"], make_order(FORMATS["ragged"]))
    assert quantized.codes.shape == (5, 0, 128)
    assert quantized.token_scales.shape == (5, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationFormat(576, 300), "300 outliers of 576 channels; .* 0 to 256"),
        (lambda: ActivationFormat(64, 64), "at least one other channel"),
        (lambda: ActivationFormat(64, 0, 32), "group_size 32; the kernels take 64 and 128"),
        (lambda: ActivationFormat(64, clip_ratio=0.0), "clip_ratio 0.0; the kernels take 0.01 to 1"),
        (lambda: ChannelOrder.of(torch.zeros(64), ActivationFormat(64)), "no permutation of 64 channels"),
        (lambda: ChannelOrder.of(torch.arange(63), ActivationFormat(64)), "no permutation of 64 channels"),
        (lambda: ChannelOrder.of(torch.arange(70000), ActivationFormat(70000)), "gather 65535 at most"),
    ],
)
def test_formats_outside_the_envelope_are_refused(make, message):
    with pytest.raises(KernelError, match=message):
        make()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(512), "tokens x 512"),
        (torch.zeros(2, 500), r"x of \(2, 500\).*must be \(2, 512\)"),
        (torch.zeros(2, 512, dtype=torch.float64), "float16 or .*bfloat16 or .*float32"),
        (torch.zeros(512, 2).T, "strides"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x, message):
    activations = FORMATS["plain"]
    with pytest.raises(KernelError, match=message):
        fronts.quantize_act(x, activations)
    with pytest.raises(KernelError, match=r"order\.slots"):
        fronts.quantize_act(torch.zeros(2, 512), activations, make_order(FORMATS["wide"]))
    norm = make_norm(activations, None, has_bias=False)
    with pytest.raises(KernelError, match="needs a bias"):
        fronts.layer_norm_quantize(torch.zeros(2, 512), norm, activations)
    tokens = torch.zeros(2, 512)
    for added, name in ((Added.to(tokens[:1]), "delta"), (Added(tokens, tokens.half()), "total")):
        with pytest.raises(KernelError, match=f"added.{name}"):
            fronts.rms_norm_quantize(tokens, norm, activations, added=added)
    with pytest.raises(KernelError, match="up of"):
        fronts.silu_mul_quantize(torch.zeros(2, 512), torch.zeros(3, 512), activations)


VARIANTS = [
    {},
    {"GATHER": 1},
    {"GATHER": 1, "HADAMARD": 1},
    {"GATHER": 1, "HADAMARD": 1, "GROUP_SIZE": 64, "LOAD_WIDTH": 1},
    {"GATHER": 1, "HADAMARD": 1, "PROGRESSIVE": 1},
    {"GATHER": 1, "HADAMARD": 1, "PROLOGUE": 1},
    {"GATHER": 1, "HADAMARD": 1, "PROLOGUE": 1, "ADDS": 1},
    {"GATHER": 1, "HADAMARD": 1, "PROLOGUE": 1, "ADDS": 1, "SLOT_LANES": 16},
    {
        "GATHER": 1,
        "HADAMARD": 1,
        "PROLOGUE": 1,
        "ADDS": 1,
        "SLOT_LANES": 16,
        "ELEMENT": "float",
        "LOAD_WIDTH": 4,
    },
    {"HADAMARD": 1, "PROLOGUE": 3, "SLOT_LANES": 16, "GROUP_SIZE": 64},
    {"HADAMARD": 1, "PROLOGUE": 3, "SLOT_LANES": 16, "PROGRESSIVE": 1, "PARTS": 4},
    {"GATHER": 1, "HADAMARD": 1, "PROLOGUE": 2, "ELEMENT": "__nv_bfloat16"},
    {"HADAMARD": 1, "PROLOGUE": 3},
    {"GATHER": 1, "HADAMARD": 1, "PROLOGUE": 3},
    {"HADAMARD": 1, "PROLOGUE": 4, "PROGRESSIVE": 1},
    {"HADAMARD": 1, "ELEMENT": "float", "LOAD_WIDTH": 4},
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda v: "-".join(f"{k}={w}" for k, w in v.items()) or "plain"
)
def test_kernel_compiles_without_spilling(arch, variant):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    defaults = {"ELEMENT": "__half", "PROLOGUE": 0, "GATHER": 0, "HADAMARD": 0, "GROUP_SIZE": 128}
    if arch.startswith("sm_8"):
        variant = variant | {"PARTS": 1}  # no clusters there
    defaults |= {"PROGRESSIVE": 0, "LOAD_WIDTH": 8, "ADDS": 0, "PARTS": 1, "SLOT_LANES": 4}
    report = compile_for("quantize_act", arch, **(defaults | variant))
    assert report.spill_bytes == 0, report


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("element", ["__half", "__nv_bfloat16", "float"])
def test_kernel_for_gathered_groups_compiles_without_spilling(arch, element):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    report = compile_for("quantize_gathered", arch, ELEMENT=element)
    assert report.spill_bytes == 0, report


N_TOKENS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 127, 128, 129, 255, 256, 1000, 4096)


@pytest.mark.gpu
@pytest.mark.parametrize("activations", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "in-place"])
def test_kernel_equals_twin_bit_for_bit(activations, gathers):
    order = make_order(activations) if gathers else None
    on_gpu = None if order is None else to_cuda(order)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        counts = N_TOKENS if activations.n_channels < 2000 else (3, 300)
        x = make_tokens(max(counts), activations.n_channels, dtype=dtype)
        expected = reference.quantize_act(x, activations, order)
        for n_tokens in counts:  # the first tokens, and nothing where padding ends the last eight
            actual = fronts.quantize_act(x[:n_tokens].cuda(), activations, on_gpu)
            for found, wanted in (
                (actual.token_scales.cpu(), expected.token_scales),
                (actual.codes.cpu(), expected.codes),
            ):
                assert torch.equal(found[:, :n_tokens], wanted[:, :n_tokens]), (dtype, n_tokens)
                assert not found[:, n_tokens:].any(), (dtype, n_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ragged", "odd-widths", "progressive", "hidden-4096"])
@pytest.mark.parametrize("gathers", [True, False], ids=["gather", "in-place"])
def test_fused_kernels_equal_their_twins_but_for_ties(name, gathers):
    activations = FORMATS[name]
    order = make_order(activations) if gathers else None
    norm = make_norm(activations, order, has_bias=True)
    for n_tokens in (1, 9, 1200):
        x = make_tokens(n_tokens, activations.n_channels, seed=n_tokens)
        up = make_tokens(n_tokens, activations.n_channels, seed=n_tokens + 1)
        added = Added.to(up.contiguous() / 16)
        there = to_cuda(added)
        for function, operands in (
            (fronts.relu_quantize, (x,)),
            (fronts.silu_mul_quantize, (x, up)),
            (fronts.rms_norm_quantize, (x, norm)),
            (fronts.layer_norm_quantize, (x, norm)),
        ):
            expected = getattr(reference, function.__name__)(*operands, activations, order)
            actual = to_cuda_and_run(function, operands, activations, order)
            case = (function.__name__, n_tokens)
            assert torch.allclose(actual.token_scales.cpu(), expected.token_scales, rtol=2e-6, atol=0), case
            difference = (actual.codes.cpu().int() - expected.codes.int()).abs()
            allowed = 16 * 8 if activations.progressive else 1  # a factor next to an integer may differ, too
            assert difference.max() <= allowed, case
            assert difference.count_nonzero() <= max(2, 2e-4 * difference.numel()), case
        expected = reference.rms_norm_quantize(x, norm, activations, order, added)
        on_gpu = None if order is None else to_cuda(order)
        actual = fronts.rms_norm_quantize(x.cuda(), to_cuda(norm), activations, on_gpu, there)
        assert torch.equal(there.total.cpu(), added.total), n_tokens
        difference = (actual.codes.cpu().int() - expected.codes.int()).abs()
        assert difference.count_nonzero() <= max(2, 2e-4 * difference.numel()), n_tokens


def to_cuda_and_run(function, operands, activations, order):
    return function(*map(to_cuda, operands), activations, None if order is None else to_cuda(order))


@pytest.mark.gpu
def test_kernel_is_captured_by_a_graph_and_gives_the_same_bits_every_time():
    activations = FORMATS["hidden-4096"]
    x, order = make_tokens(64, 4096).cuda(), to_cuda(make_order(activations))
    first = fronts.quantize_act(x, activations, order)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fronts.quantize_act(x, activations, order)
    captured.codes.fill_(99)
    graph.replay()
    assert torch.equal(captured.codes, first.codes)
    assert torch.equal(captured.token_scales, first.token_scales)
