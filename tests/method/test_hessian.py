"""The Hessian accumulator against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from atomq.method.hessian import HessianAccumulator, asymmetric_target, output_error

CPU = torch.device("cpu")


def loop(tokens: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of 2 x x^T, float64."""
    total = torch.zeros(tokens.shape[1], tokens.shape[1], dtype=torch.float64)
    for token in tokens.double():
        for i in range(len(token)):
            for j in range(len(token)):
                total[i, j] += 2 * token[i] * token[j]
    return total


def make_tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("holdout", [False, True])
def test_the_hessian_is_the_mean_over_all_tokens_of_all_calls(holdout):
    accumulator = HessianAccumulator(6, CPU, holdout=holdout)
    batches = [make_tokens(2, 5), make_tokens(1, 7), make_tokens(3)]
    for batch in batches:
        accumulator.add(batch)
    accumulator.finish()
    tokens = torch.cat([batch.reshape(-1, 6) for batch in batches])
    assert accumulator.n_tokens == 20
    assert accumulator.hessian.dtype == torch.float32
    assert torch.allclose(accumulator.hessian.double(), loop(tokens) / 20, atol=1e-5)


def test_a_quarter_of_every_call_is_held_out():
    accumulator = HessianAccumulator(6, CPU, holdout=True)
    first, second = make_tokens(2, 5), make_tokens(1, 7)
    accumulator.add(first)
    accumulator.add(second)
    accumulator.finish()
    fit = torch.cat((first.view(-1, 6)[:8], second.view(-1, 6)[:6]))
    held_out = torch.cat((first.view(-1, 6)[8:], second.view(-1, 6)[6:]))
    assert torch.allclose(accumulator.fit.double(), loop(fit) / 17, atol=1e-5)
    assert torch.allclose(accumulator.held_out.double(), loop(held_out) / 17, atol=1e-5)


def test_without_holdout_nothing_is_held_out():
    accumulator = HessianAccumulator(6, CPU, holdout=False)
    accumulator.add(make_tokens(9))
    accumulator.finish()
    assert accumulator.held_out is None
    assert torch.allclose(accumulator.fit.double(), loop(make_tokens(9)) / 9, atol=1e-5)


def test_half_precision_inputs_are_added_up_in_float32():
    accumulator = HessianAccumulator(6, CPU, holdout=False)
    tokens = make_tokens(50).to(torch.bfloat16)
    accumulator.add(tokens)
    accumulator.finish()
    assert torch.allclose(accumulator.hessian.double(), loop(tokens) / 50, atol=1e-5)


def test_no_tokens_give_a_hessian_of_zeros():
    accumulator = HessianAccumulator(6, CPU, holdout=True)
    accumulator.add(torch.empty(0, 6))
    accumulator.finish()
    assert not accumulator.hessian.any()


def test_output_error_is_the_squared_error_of_the_outputs():
    x, difference = make_tokens(40), make_tokens(3) * 0.1
    hessian = loop(x).float()
    expected = 2 * (x @ difference.T).square().sum()
    assert output_error(difference, hessian) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("strength", "damp_frac"), [(1.0, 1e-12), (0.4, 1e-12), (1.0, 0.7), (0.5, 20.0)])
def test_the_asymmetric_target_gives_the_float_models_output_as_well_as_a_weight_can(strength, damp_frac):
    """With all of it the target is the least-squares weight V for W x~, held to W by the damping, which is
    so many tokens along each channel that want nothing changed; a share lies on the way there.
    """
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    x_float = x + 0.3 * torch.randn(40, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    hessian = 2 / 40 * x.T @ x
    shift = 2 / 40 * (x_float - x).T @ x
    size = (damp_frac * float(hessian.diagonal().mean()) / (2 / 40)) ** 0.5
    held = size * torch.eye(6, dtype=torch.float64)
    inputs, outputs = torch.cat((x, held)), torch.cat((x_float @ weight.T, held @ weight.T))
    best = torch.linalg.lstsq(inputs, outputs).solution.T
    found = asymmetric_target(weight, hessian, shift, strength, damp_frac)
    torch.testing.assert_close(found, weight + strength * (best - weight))


def test_the_shift_is_the_mean_over_all_tokens_of_all_calls():
    accumulator = HessianAccumulator(6, CPU, holdout=False, asymmetric=True)
    pairs = [(make_tokens(2, 5), make_tokens(5, 2).reshape(2, 5, 6)), (make_tokens(4), make_tokens(1, 4)[0])]
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for x, x_float in pairs:
        accumulator.add(x, x_float)
        for a, b in zip(x.reshape(-1, 6).double(), x_float.reshape(-1, 6).double(), strict=True):
            expected += 2 * torch.outer(b - a, a)
    accumulator.finish()
    torch.testing.assert_close(accumulator.shift.double(), expected / 14, rtol=1e-5, atol=1e-6)
