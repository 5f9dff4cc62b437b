"""Solving a group: what is reported, and that few tokens never make it worse than rounding."""

from __future__ import annotations

import pytest
import torch

from atomq.config import ActivationScheme, OutlierScheme, QuantScheme, SolverConfig, WeightScheme
from atomq.method.gptq import factorize_hessian, gptq_quantize, rtn_quantize
from atomq.method.hessian import HessianAccumulator, output_error
from atomq.method.solve import LEAST_TOKENS, solve_group

CPU = torch.device("cpu")
WIDTH = 96
SCHEME = QuantScheme(WeightScheme(group_size=16), ActivationScheme(), OutlierScheme(8))
SOLVER = SolverConfig(clip_ratio=0.9)


def make_problem(n_tokens: int, seed: int, *, holdout: bool):
    """Two weights, the Hessian of `n_tokens` correlated tokens, and that of 4000 fresh ones."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=generator) * torch.linspace(0.05, 1, WIDTH)[:, None]
    weights = [torch.randn(rows, WIDTH, generator=generator) for rows in (24, 10)]
    accumulator = HessianAccumulator(WIDTH, CPU, holdout=holdout)
    accumulator.add(torch.randn(n_tokens, WIDTH, generator=generator) @ mixing)
    accumulator.finish()
    fresh = torch.randn(4000, WIDTH, generator=generator) @ mixing
    return weights, accumulator, fresh.T @ fresh


def total_error(weights, quantized, hessian) -> float:
    return sum(
        output_error(weight - codes.dequantize(SCHEME.weights, torch.float32), hessian)
        for weight, codes in zip(weights, quantized, strict=True)
    )


def test_without_a_hessian_weights_are_rounded():
    weights, _, _ = make_problem(4, 0, holdout=False)
    for weight, solved in zip(weights, solve_group(weights, None, SCHEME, SOLVER), strict=True):
        assert (solved.method, solved.damp_frac, solved.relative_error, solved.n_dead) == (
            "rtn",
            None,
            None,
            0,
        )
        assert torch.equal(solved.weight.codes, rtn_quantize(weight, SCHEME, SOLVER).codes)


def test_with_enough_tokens_all_linears_of_a_group_are_solved_by_gptq_with_one_factor():
    weights, accumulator, _ = make_problem(300, 0, holdout=False)
    factor = factorize_hessian(accumulator.hessian, 0.01)
    for weight, solved in zip(weights, solve_group(weights, accumulator, SCHEME, SOLVER), strict=True):
        assert (solved.method, solved.damp_frac, solved.n_dead) == ("gptq", 0.01, 0)
        assert torch.equal(solved.weight.codes, gptq_quantize(weight, factor, SCHEME, SOLVER).codes)


def test_the_reported_error_is_that_of_the_outputs_and_dead_channels_are_counted():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, WIDTH, generator=generator)
    x[:, [3, 50]] = 0
    weight = torch.randn(12, WIDTH, generator=generator)
    accumulator = HessianAccumulator(WIDTH, CPU, holdout=False)
    accumulator.add(x)
    accumulator.finish()
    (solved,) = solve_group([weight], accumulator, SCHEME, SOLVER)
    dense = solved.weight.dequantize(SCHEME.weights, torch.float32)
    expected = (x @ (weight - dense).T).square().sum() / (x @ weight.T).square().sum()
    assert solved.relative_error == pytest.approx(expected.item(), rel=1e-4)
    assert solved.n_dead == 2


def test_a_group_that_is_never_active_has_no_error():
    accumulator = HessianAccumulator(WIDTH, CPU, holdout=False)
    accumulator.add(torch.zeros(200, WIDTH))
    accumulator.finish()
    (solved,) = solve_group([torch.randn(4, WIDTH)], accumulator, SCHEME, SOLVER)
    assert solved.relative_error == 0
    assert solved.n_dead == WIDTH


@pytest.mark.parametrize("n_tokens", [1, 4, 31, 32, 40, 90])
def test_on_held_out_tokens_the_chosen_candidate_is_never_worse_than_rounding(n_tokens):
    for seed in range(4):
        weights, accumulator, _ = make_problem(n_tokens, seed, holdout=True)
        solved = solve_group(weights, accumulator, SCHEME, SOLVER)
        rounded = [rtn_quantize(weight, SCHEME, SOLVER) for weight in weights]
        rounding_error = total_error(weights, rounded, accumulator.held_out)
        errors = {None: rounding_error}
        for damp_frac in (0.01, 0.1, 1.0) if n_tokens >= LEAST_TOKENS else ():
            factor = factorize_hessian(accumulator.fit, damp_frac)
            fitted = [gptq_quantize(weight, factor, SCHEME, SOLVER) for weight in weights]
            errors[damp_frac] = total_error(weights, fitted, accumulator.held_out)
        chosen = solved[0].damp_frac
        assert errors[chosen] == min(errors.values())
        assert {s.method for s in solved} == {"rtn" if chosen is None else "gptq"}
        if chosen is None:
            assert all(torch.equal(s.weight.codes, r.codes) for s, r in zip(solved, rounded, strict=True))
        else:  # the final codes use all tokens
            factor = factorize_hessian(accumulator.hessian, chosen)
            final = gptq_quantize(weights[0], factor, SCHEME, SOLVER)
            assert torch.equal(solved[0].weight.codes, final.codes)


@pytest.mark.parametrize("n_tokens", [4, 8, 16, 32, 64, 90])
def test_on_fresh_tokens_a_group_solved_with_few_tokens_is_not_worse_than_rounded(n_tokens):
    ratios = []
    for seed in range(8):
        weights, accumulator, fresh = make_problem(n_tokens, seed, holdout=True)
        solved = [s.weight for s in solve_group(weights, accumulator, SCHEME, SOLVER)]
        rounded = [rtn_quantize(weight, SCHEME, SOLVER) for weight in weights]
        ratios.append(total_error(weights, solved, fresh) / total_error(weights, rounded, fresh))
    assert max(ratios) < 1.03
    assert sum(ratios) / len(ratios) < (0.85 if n_tokens > LEAST_TOKENS else 1.001)


def test_with_too_few_tokens_plain_gptq_would_lose_to_rounding():
    """Why there is a choice at all."""
    weights, accumulator, fresh = make_problem(8, 0, holdout=True)
    factor = factorize_hessian(accumulator.hessian, 0.01)
    fitted = [gptq_quantize(weight, factor, SCHEME, SOLVER) for weight in weights]
    rounded = [rtn_quantize(weight, SCHEME, SOLVER) for weight in weights]
    assert total_error(weights, fitted, fresh) > total_error(weights, rounded, fresh)


@pytest.mark.parametrize("damp_frac", [5.0, 10.0])
def test_few_tokens_and_a_large_damping_work_together(damp_frac):
    weights, accumulator, _ = make_problem(40, 0, holdout=True)
    solved = solve_group(weights, accumulator, SCHEME, SolverConfig(damp_frac=damp_frac))
    assert {s.method for s in solved} == {"gptq"}
    assert all(s.damp_frac >= damp_frac for s in solved)
