"""GPTQ and rounding against column-by-column loops.

The oracle of GPTQ is Optimal Brain Surgeon without blocks and without Cholesky: after each column the column
is eliminated from the inverse Hessian by Gauss's formula.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numerics import naive

from atomq.config import ActivationScheme, OutlierScheme, QuantScheme, SolverConfig, WeightScheme
from atomq.errors import AtomqError
from atomq.method.gptq import MAX_DAMP_FRAC, factorize_hessian, gptq_quantize, rtn_quantize
from atomq.method.hessian import output_error

ATOM_SOLVER = SolverConfig(clip_ratio=0.85, scale_span="half")


def scheme_of(n_outliers: int = 0, precision: str = "int8", **weights) -> QuantScheme:
    return QuantScheme(
        WeightScheme(**{"group_size": 16, **weights}),
        ActivationScheme(),
        OutlierScheme(n_outliers, precision),
    )


# Scheme and width. A block has at most 128 columns, so groups of 300 and None take several blocks.
CASES = {
    "groups-of-16": (scheme_of(), 64),
    "groups-of-64": (scheme_of(group_size=64), 192),
    "groups-of-128": (scheme_of(group_size=128), 256),
    "one-group": (scheme_of(group_size=None), 300),
    "groups-wider-than-a-block": (scheme_of(24, group_size=150), 340),
    "ragged": (scheme_of(16), 72),
    "ragged-128": (scheme_of(24, group_size=128), 224),
    "narrower-than-a-group": (scheme_of(4), 12),
    "pairs-of-rows": (scheme_of(16, channel_group=2), 72),
    "triples-of-rows": (scheme_of(16, channel_group=3, group_size=24), 72),
    "2-bits": (scheme_of(8, n_bits=2), 72),
    "3-bits": (scheme_of(8, n_bits=3), 72),
    "8-bits": (scheme_of(8, n_bits=8), 72),
    "asymmetric": (scheme_of(8, symmetric=False), 72),
    "asymmetric-2-bits-pairs": (scheme_of(8, symmetric=False, n_bits=2, channel_group=2), 72),
    "fp4-bnb": (scheme_of(8, number_format="fp4-bnb"), 72),
    "fp4-e2m1": (scheme_of(8, number_format="fp4-e2m1", channel_group=2), 72),
    "exponential": (scheme_of(8, number_format="exponential"), 72),
    "progressive": (scheme_of(16, scale_mode="progressive"), 72),
    "progressive-3-bits": (scheme_of(7, scale_mode="progressive", n_bits=3, group_size=9), 72),
    "f16-outliers": (scheme_of(16, "fp16"), 72),
    "e5m2-outliers": (scheme_of(16, "e5m2"), 72),
    "e4m3-outliers": (scheme_of(16, "e4m3"), 72),
    "nearly-all-outliers": (scheme_of(71), 72),
}
N_ROWS = 7


def make_problem(width: int, seed: int = 0, n_dead: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs of very different sizes, float64; some channels dead."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    x = (x + x.roll(1, 1) + 0.5 * x[:, :1]) * torch.logspace(-1, 1, width, dtype=torch.float64)
    x[:, torch.randperm(width, generator=generator)[:n_dead]] = 0
    weight = torch.randn(N_ROWS, width, generator=generator, dtype=torch.float64)
    weight *= torch.linspace(0.3, 2, N_ROWS, dtype=torch.float64)[:, None]
    return weight, 2 * x.T @ x / len(x)


def naive_gptq(weight: np.ndarray, hessian: np.ndarray, scheme: QuantScheme, solver: SolverConfig):
    """Codes, scales [.., G], zeros, factors, base and compensated outlier columns."""
    config = scheme.weights
    W, H = weight.copy(), hessian.copy()
    n_rows, width = W.shape
    n_normal = width - scheme.outliers.n_outliers
    for channel in range(width):
        if H[channel, channel] == 0:
            H[channel, channel] = 1
            W[:, channel] = 0
    H += solver.damp_frac * np.mean(np.diag(H)) * np.eye(width)
    inverse = np.linalg.inv(H)
    base = None
    if config.scale_mode == "progressive":
        base = naive.base_scales(W[:, :n_normal], config, solver.clip_ratio, solver.scale_span)
    codes = np.empty((n_rows, n_normal), dtype=int)
    groups = []
    starts = {a: b for a, b in naive.bounds(n_normal, config.group_size)}
    for column in range(n_normal):
        if column in starts:
            group = W[:, column : starts[column]]
            groups.append(naive.group_scales(group, config, solver.clip_ratio, solver.scale_span, base))
        scales, zeros, _ = groups[-1]
        rounded = np.empty(n_rows)
        for row in range(n_rows):
            scale = scales[row // config.channel_group]
            zero = zeros[row // config.channel_group] if zeros else 0
            codes[row, column] = naive.code_of(W[row, column] / scale, config, zero)
            rounded[row] = naive.value_of(codes[row, column], config, zero) * scale
        error = (W[:, column] - rounded) / inverse[column, column]
        W[:, column + 1 :] -= np.outer(error, inverse[column, column + 1 :])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, groups, base, W[:, n_normal:]


def assert_same(quantized, codes, groups, base, outlier_columns, scheme) -> None:
    assert quantized.codes.dtype == torch.int16
    assert np.array_equal(quantized.codes.numpy(), codes)
    scales, zeros, factors = (np.array(part).T for part in zip(*groups, strict=True))
    assert np.array_equal(quantized.scales.numpy(), scales)
    assert (quantized.zeros is None) == scheme.weights.symmetric
    if quantized.zeros is not None:
        assert np.array_equal(quantized.zeros.numpy(), zeros)
    if scheme.weights.scale_mode == "progressive":
        assert np.array_equal(quantized.base.numpy(), np.array(base, dtype=np.float64))
        assert np.array_equal(quantized.factors.numpy(), factors)
    else:
        assert quantized.base is quantized.factors is None
    precision = scheme.outliers.precision
    if not scheme.outliers.n_outliers:
        assert quantized.outliers is None
        return
    decoded = quantized.outliers.decode(torch.float64)
    for row, values in enumerate(outlier_columns):
        if precision == "int8":
            expected, scale = naive.encode_int8(values, stored=True, real=np.float64)
            assert quantized.outliers.values[row].tolist() == expected
            assert quantized.outliers.scales[row].item() == scale
        elif precision == "fp16":
            assert decoded[row].tolist() == [naive.encode_f16(value) for value in values]
        else:
            assert decoded[row].tolist() == [naive.encode_float8(value, precision) for value in values]


@pytest.mark.parametrize("solver", [ATOM_SOLVER, SolverConfig(damp_frac=0.1)], ids=["atom", "full-span"])
@pytest.mark.parametrize(("scheme", "width"), CASES.values(), ids=CASES)
def test_gptq_equals_elimination_column_by_column(scheme, width, solver):
    weight, hessian = make_problem(width)
    before = weight.clone()
    quantized = gptq_quantize(weight, factorize_hessian(hessian, solver.damp_frac), scheme, solver)
    assert_same(quantized, *naive_gptq(weight.numpy(), hessian.numpy(), scheme, solver), scheme)
    assert torch.equal(weight, before), "the weight must not change"


def test_the_comparison_notices_one_altered_entry_of_the_hessian():
    scheme, width = CASES["ragged"]
    weight, hessian = make_problem(width)
    expected = naive_gptq(weight.numpy(), hessian.numpy(), scheme, ATOM_SOLVER)
    hessian[5, 40] = hessian[40, 5] = 0.9 * hessian[5, 40]
    quantized = gptq_quantize(weight, factorize_hessian(hessian, 0.01), scheme, ATOM_SOLVER)
    with pytest.raises(AssertionError):
        assert_same(quantized, *expected, scheme)


@pytest.mark.parametrize("solver", [ATOM_SOLVER, SolverConfig(method="rtn")], ids=["atom", "full-span"])
@pytest.mark.parametrize(("scheme", "width"), CASES.values(), ids=CASES)
def test_rounding_equals_a_loop_over_groups(scheme, width, solver):
    weight, _ = make_problem(width)
    weight[1, :16] = 0
    config, n_normal = scheme.weights, width - scheme.outliers.n_outliers
    base = None
    if config.scale_mode == "progressive":
        rows = weight[:, :n_normal].numpy()
        base = naive.base_scales(rows, config, solver.clip_ratio, solver.scale_span)
    groups, codes = [], np.empty((N_ROWS, n_normal), dtype=int)
    for a, b in naive.bounds(n_normal, config.group_size):
        columns = weight[:, a:b].numpy()
        groups.append(naive.group_scales(columns, config, solver.clip_ratio, solver.scale_span, base))
        scales, zeros, _ = groups[-1]
        for row in range(N_ROWS):
            group_row = row // config.channel_group
            zero = zeros[group_row] if zeros else 0
            codes[row, a:b] = [naive.code_of(v / scales[group_row], config, zero) for v in columns[row]]
    quantized = rtn_quantize(weight, scheme, solver)
    assert_same(quantized, codes, groups, base, weight[:, n_normal:].numpy(), scheme)


@pytest.mark.parametrize("name", sorted(set(CASES) - {"nearly-all-outliers"}))
def test_gptq_has_a_smaller_output_error_than_rounding(name):
    scheme, width = CASES[name]
    weight, hessian = make_problem(width, seed=1)
    solved = gptq_quantize(weight, factorize_hessian(hessian, 0.01), scheme, ATOM_SOLVER)
    rounded = rtn_quantize(weight, scheme, ATOM_SOLVER)
    errors = [
        output_error(weight - quantized.dequantize(scheme.weights, torch.float64), hessian)
        for quantized in (solved, rounded)
    ]
    assert errors[0] < errors[1]


def test_float32_gives_nearly_the_codes_of_float64():
    scheme, width = CASES["ragged-128"]
    weight, hessian = make_problem(width)
    exact = gptq_quantize(weight, factorize_hessian(hessian, 0.01), scheme, ATOM_SOLVER)
    single = gptq_quantize(weight.float(), factorize_hessian(hessian.float(), 0.01), scheme, ATOM_SOLVER)
    assert (single.codes == exact.codes).double().mean() > 0.99
    assert single.scales.dtype == torch.float32


def test_outlier_columns_take_up_the_compensation_of_all_others():
    scheme = scheme_of(16, "fp16")
    weight, hessian = make_problem(72)
    factor = factorize_hessian(hessian, 0.01)
    alone = hessian.clone()
    alone[:56, 56:] = alone[56:, :56] = 0
    compensated = gptq_quantize(weight, factor, scheme, ATOM_SOLVER).outliers.decode(torch.float64)
    untouched = gptq_quantize(weight, factorize_hessian(alone, 0.01), scheme, ATOM_SOLVER)
    live = hessian.diagonal()[56:] != 0
    expected = weight[:, 56:].half().double() * live
    assert torch.equal(untouched.outliers.decode(torch.float64), expected)
    assert not torch.equal(compensated, expected)


@pytest.mark.parametrize("symmetric", [True, False])
def test_dead_channels_get_zero_weights(symmetric):
    scheme = scheme_of(8, symmetric=symmetric)
    weight, hessian = make_problem(72, n_dead=0)
    for dead in (0, 17, *range(32, 48), 70):  # a whole group, and an outlier channel
        hessian[dead] = hessian[:, dead] = 0
    factor = factorize_hessian(hessian, 0.01)
    assert factor.dead.nonzero().flatten().tolist() == [0, 17, *range(32, 48), 70]
    quantized = gptq_quantize(weight, factor, scheme, ATOM_SOLVER)
    dense = quantized.dequantize(scheme.weights, torch.float64)
    assert not dense[:, factor.dead].any()
    assert dense[:, ~factor.dead].any(0).all()
    assert quantized.scales[:, 2].eq(1).all()
    assert not quantized.codes[:, 32:48].any()


def test_a_hessian_of_no_activity_at_all_gives_zeros():
    scheme = scheme_of(8)
    weight, _ = make_problem(72)
    quantized = gptq_quantize(
        weight, factorize_hessian(torch.zeros(72, 72, dtype=torch.float64), 0.01), scheme, ATOM_SOLVER
    )
    assert not quantized.dequantize(scheme.weights, torch.float64).any()


def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse():
    _, hessian = make_problem(40)
    before = hessian.clone()
    factor = factorize_hessian(hessian, 0.05)
    U = factor.hinv_chol
    assert torch.equal(U, U.triu())
    damped = before.clone()
    damped.diagonal()[before.diagonal() == 0] = 1
    damped += 0.05 * damped.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    assert torch.allclose(U.T @ U @ damped, torch.eye(40, dtype=torch.float64), atol=1e-10)
    assert factor.damp_frac == 0.05
    assert torch.equal(hessian, before), "the Hessian must not change"
    assert factorize_hessian(hessian.float(), 0.05).hinv_chol.dtype == torch.float32


def test_a_singular_hessian_is_solved_at_the_configured_damping():
    x = torch.randn(3, 72, generator=torch.Generator().manual_seed(0))
    factor = factorize_hessian(2 * x.T @ x, 0.01)
    assert factor.damp_frac == 0.01
    weight, _ = make_problem(72)
    quantized = gptq_quantize(weight.float(), factor, scheme_of(8), ATOM_SOLVER)
    assert torch.isfinite(quantized.dequantize(scheme_of(8).weights, torch.float32)).all()


@pytest.mark.parametrize(("eigenvalue", "needed"), [(-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0), (-50.0, 100.0)])
def test_damping_is_raised_tenfold_until_the_factorization_succeeds_and_recorded(eigenvalue, needed):
    basis, _ = torch.linalg.qr(
        torch.randn(20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    eigenvalues = torch.full((20,), (20 - eigenvalue) / 19, dtype=torch.float64)  # mean diagonal 1
    eigenvalues[3] = eigenvalue
    hessian = basis @ eigenvalues.diag() @ basis.T
    factor = factorize_hessian(hessian, 0.01)
    assert factor.damp_frac == pytest.approx(needed)
    assert torch.equal(factor.hinv_chol, factorize_hessian(hessian, factor.damp_frac).hinv_chol)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_hessian_that_is_not_finite_is_refused(value):
    _, hessian = make_problem(20)
    hessian[4, 7] = hessian[7, 4] = value
    with pytest.raises(AtomqError, match="no Cholesky factor even with damp_frac 100; the activations are"):
        factorize_hessian(hessian, 0.01)
    hessian[4, 7] = hessian[7, 4] = 0
    hessian[3, 3] = value
    with pytest.raises(AtomqError, match="not finite"):
        factorize_hessian(hessian, 0.01)


def test_a_damping_above_the_limit_of_raising_is_tried_as_it_is():
    _, hessian = make_problem(20)
    assert factorize_hessian(hessian, 5 * MAX_DAMP_FRAC).damp_frac == 5 * MAX_DAMP_FRAC


def test_neighbouring_rows_share_a_scale_and_the_last_row_may_stand_alone():
    weight, hessian = make_problem(64)
    scheme = scheme_of(channel_group=2)
    quantized = gptq_quantize(weight, factorize_hessian(hessian, 0.01), scheme, ATOM_SOLVER)
    assert quantized.scales.shape == (4, 4)
    rounded = rtn_quantize(weight, scheme, ATOM_SOLVER)
    largest = [weight[i : i + 2, :16].abs().max().item() for i in range(0, N_ROWS, 2)]
    assert rounded.scales[:, 0].tolist() == [float(np.float16(v * 0.85 / 7.5)) for v in largest]


def test_no_rows_give_no_codes():
    scheme = dataclasses.replace(scheme_of(8), weights=WeightScheme(group_size=16, channel_group=2))
    _, hessian = make_problem(72)
    empty = torch.empty(0, 72, dtype=torch.float64)
    for quantized in (
        rtn_quantize(empty, scheme, ATOM_SOLVER),
        gptq_quantize(empty, factorize_hessian(hessian, 0.01), scheme, ATOM_SOLVER),
    ):
        assert quantized.codes.shape == (0, 64)
        assert quantized.scales.shape == (0, 4)
