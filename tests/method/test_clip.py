"""The search of an activation clip against loops over ratios, tokens and channels in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from numerics import naive

from atomq.config import ActivationScheme, OutlierScheme, QuantScheme, WeightScheme
from atomq.method.clip import search_clip

K, N_OUTLIERS = 21, 5  # groups of 8 leave a short last one
SCHEMES = {
    "4-bits": ActivationScheme(group_size=8),
    "3-bits": ActivationScheme(n_bits=3, group_size=8),
    "asymmetric": ActivationScheme(n_bits=3, group_size=8, symmetric=False),
    "progressive": ActivationScheme(n_bits=3, group_size=8, scale_mode="progressive"),
    "from-0.8": ActivationScheme(n_bits=4, group_size=None, clip_ratio=0.8),
    "8-bits": ActivationScheme(n_bits=8, group_size=8),
}
RATIOS = [1 - 0.025 * step for step in range(21)]


def scheme_of(activations: ActivationScheme) -> QuantScheme:
    return QuantScheme(WeightScheme(group_size=8), activations, OutlierScheme(N_OUTLIERS, "int8"))


def make_case(seed: int, n_rows: tuple[int, ...] = (4, 3)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Nine tokens, and linears whose channels weigh very differently."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(9, K, generator=generator)
    weights = [torch.randn(rows, K, generator=generator) for rows in n_rows]
    return x, [w * torch.linspace(0.05, 2, K) for w in weights]


def cost_of(ratio: float, x, weights, activations: ActivationScheme) -> float:
    """Squared error of all outputs over all tokens; that of the outliers is in it."""
    clipped = dataclasses.replace(activations, clip_ratio=ratio)
    total = 0.0
    for token in x.tolist():
        codes, scales, zeros = naive.quantize_token(token[:-N_OUTLIERS], clipped)
        errors = []
        for group, (start, end) in enumerate(naive.bounds(K - N_OUTLIERS, clipped.group_size)):
            zero = 0 if zeros is None else zeros[group]
            for code, value in zip(codes[start:end], token[start:end], strict=True):
                errors.append(naive.value_of(code, clipped, zero) * float(scales[group]) - value)
        outliers = token[-N_OUTLIERS:]
        scale = max(map(abs, outliers)) / 127
        errors += [round(value / scale) * scale - value for value in outliers]
        for row in [row for weight in weights for row in weight.tolist()]:
            total += sum(w * e for w, e in zip(row, errors, strict=True)) ** 2
    return total


@pytest.mark.parametrize("activations", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("n_rows", [(4, 3), (20, 9), (5,)], ids=["fewer-outputs", "more-outputs", "one"])
def test_the_ratio_is_the_one_of_least_output_error(activations, n_rows):
    x, weights = make_case(len(n_rows), n_rows)
    ratios = [activations.clip_ratio * ratio for ratio in RATIOS]
    costs = [cost_of(ratio, x, weights, activations) for ratio in ratios]
    found = search_clip(x, weights, scheme_of(activations))
    assert found == pytest.approx(ratios[costs.index(min(costs))], rel=1e-6)
    assert min(costs) < 0.999 * max(costs)


def test_the_outputs_decide_and_not_the_inputs():
    """A group that no weight reads has no say."""
    x, _ = make_case(0)
    x[:, :8] = x[:, :8].sign() * 3  # without error at any ratio that reaches 3
    x[:, 0] = 3
    reads_first, reads_second = torch.zeros(2, K), torch.zeros(2, K)
    reads_first[:, :8], reads_second[:, 8:16] = 1.0, 1.0
    scheme = scheme_of(SCHEMES["3-bits"])
    assert search_clip(x, [reads_first], scheme) == 1.0
    assert search_clip(x, [reads_second], scheme) < 1.0


def test_of_equally_good_ratios_the_largest_is_taken():
    x, weights = make_case(0)
    scheme = scheme_of(SCHEMES["from-0.8"])
    assert search_clip(x[:0], weights, scheme) == pytest.approx(0.8)
    assert search_clip(torch.zeros_like(x), weights, scheme) == pytest.approx(0.8)


def test_the_ratio_is_a_number_of_float32():
    x, weights = make_case(1)
    found = search_clip(x, weights, scheme_of(SCHEMES["3-bits"]))
    assert torch.tensor([found]).item() == found
