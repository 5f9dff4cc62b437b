"""Offset and scale of K's channels against loops over windows, heads, queries and tokens in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from atomq.method import key_balance
from atomq.method.key_balance import LEAST_SHARE, BalanceStatistics, ScoreWeights, weigh_scores

N_HEADS, GROUP, T, D = 2, 3, 7, 6
SCALE = 0.3
CPU = torch.device("cpu")


class Case(NamedTuple):
    """One window: queries [N_HEADS * GROUP, T, D] and K [N_HEADS, T, D]."""

    q: torch.Tensor
    k: torch.Tensor


def make_case(seed: int) -> Case:
    """Channels of very different size and mean; one of K and one of the queries are nothing."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0, 0.0])
    q = torch.randn(N_HEADS * GROUP, T, D, generator=generator) * sizes.flip(0)
    k = torch.randn(N_HEADS, T, D, generator=generator) * sizes
    return Case(q, k + torch.tensor([3.0, 0, -1, 0, 5, 0]))


def weights_by_hand(case: Case, softcap=None, sees=lambda _head, query, token: token <= query):
    """w [query heads][T queries][T tokens]."""
    weights = []
    for head in range(N_HEADS * GROUP):
        weights.append([])
        for query in range(T):
            powers = []
            for token in range(T):
                pairs = zip(case.q[head, query].tolist(), case.k[head // GROUP, token].tolist(), strict=True)
                score = math.fsum(a * b for a, b in pairs) * SCALE
                score = score if softcap is None else softcap * math.tanh(score / softcap)
                powers.append(math.exp(score) if sees(head, query, token) else 0.0)
            shares = [p / math.fsum(powers) for p in powers]
            weights[-1].append([p * (1 - p) for p in shares])
    return weights


def hides_far(head: int, query: int, token: int) -> bool:
    return query - 3 < token <= query


def hides_by_head(head: int, query: int, token: int) -> bool:
    return query - 2 - head < token <= query


MASKS = {
    "causal": (None, lambda _head, query, token: token <= query),
    "window": (hides_far, hides_far),
    "by head": (hides_by_head, hides_by_head),
}


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kind", MASKS)
def test_weights_are_those_of_loops(kind, softcap, additive, monkeypatch):
    monkeypatch.setattr(key_balance, "SCORES_AT_ONCE", 2 * N_HEADS * GROUP * T)  # two queries at once
    rule, sees = MASKS[kind]
    mask = None
    if rule is not None:
        heads = range(N_HEADS * GROUP if kind == "by head" else 1)
        mask = torch.tensor([[[rule(h, q, t) for t in range(T)] for q in range(T)] for h in heads])
        if additive:
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    case = make_case(0)
    found = weigh_scores(case.q, case.k, mask, SCALE, softcap)
    expected = torch.tensor(weights_by_hand(case, softcap, sees)).unflatten(0, (N_HEADS, GROUP))
    assert torch.allclose(found.of_tokens, expected.sum((1, 2)), atol=1e-5)
    assert torch.allclose(found.of_queries, expected.sum(3), atol=1e-5)


def added_up(cases, rows, n_rows: int) -> BalanceStatistics:
    """K counts as before RoPE, too; `rows` of the table that each window's tokens lie in."""
    statistics = BalanceStatistics(N_HEADS, D, n_rows, CPU)
    for case, of_tokens in zip(cases, rows, strict=True):
        weights = weigh_scores(case.q, case.k, None, SCALE)
        k = case.k.transpose(0, 1)
        statistics.add_keys(k, weights)
        statistics.add_turned(case.q.transpose(0, 1), k, of_tokens, weights)
    statistics.finish()
    return statistics


def test_mean_and_scale_are_those_of_loops():
    cases = [make_case(seed) for seed in range(3)]
    rows = [torch.tensor([0, 0, 1, 1, 1, 3, 3]), torch.zeros(T, dtype=torch.long), torch.arange(T) % 4]
    offsets = torch.randn(4, N_HEADS, D, generator=torch.Generator().manual_seed(9))
    statistics = added_up(cases, rows, 4)
    weights = [weights_by_hand(case) for case in cases]
    for head in range(N_HEADS):
        spread, of_queries, total, sums = [0.0] * D, [0.0] * D, 0.0, [0.0] * D
        for case, w, row in zip(cases, weights, rows, strict=True):
            for h in range(head * GROUP, (head + 1) * GROUP):
                for query in range(T):
                    for token in range(T):
                        weight = w[h][query][token]
                        total += weight
                        for i in range(D):
                            k, o = float(case.k[head, token, i]), float(offsets[row[token], head, i])
                            sums[i] += weight * k
                            spread[i] += weight * (k - o) ** 2
                            of_queries[i] += weight * float(case.q[h, query, i]) ** 2
        expected = [
            (max(a, sum(spread) / D * LEAST_SHARE) / max(b, sum(of_queries) / D * LEAST_SHARE)) ** 0.25
            for a, b in zip(spread, of_queries, strict=True)
        ]
        mean = torch.tensor([x / total for x in sums], dtype=torch.float64)
        assert torch.allclose(statistics.mean()[head], mean, atol=1e-5)
        scale = statistics.scale(offsets)[head]
        assert torch.equal(scale, scale.bfloat16().float())
        assert torch.allclose(scale.double(), torch.tensor(expected, dtype=torch.float64), rtol=2**-8, atol=0)


def test_no_other_scale_makes_the_expected_error_smaller():
    case = make_case(2)
    offsets = torch.zeros(1, N_HEADS, D)
    best = added_up([case], [torch.zeros(T, dtype=torch.long)], 1).scale(offsets)[0].double()
    w = torch.tensor(weights_by_hand(case), dtype=torch.float64)[:GROUP]
    spread = torch.einsum("hqt,td->d", w, case.k[0].double().square())
    of_queries = torch.einsum("hqt,hqd->d", w, case.q[:GROUP].double().square())

    def cost(scale: torch.Tensor) -> float:
        return float((scale**2 * of_queries).sum() * (spread / scale**2).sum())

    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        assert cost(best) < cost(best * torch.exp(0.3 * torch.randn(D, generator=generator)).double())


@pytest.mark.parametrize("n_tokens", [1, T])
def test_heads_without_queries_k_or_a_choice_keep_a_scale(n_tokens):
    """Nothing to weigh: zeros, and a single token that has all of every query."""
    value = 1.0 if n_tokens == 1 else 0.0
    q = torch.full((N_HEADS * GROUP, n_tokens, D), value)
    k = torch.full((N_HEADS, n_tokens, D), value)
    weights = weigh_scores(q, k, None, SCALE)
    statistics = BalanceStatistics(N_HEADS, D, 1, CPU)
    statistics.add_keys(k.transpose(0, 1), weights)
    rows = torch.zeros(n_tokens, dtype=torch.long)
    statistics.add_turned(q.transpose(0, 1), k.transpose(0, 1), rows, weights)
    assert torch.equal(statistics.mean(), torch.zeros(N_HEADS, D, dtype=torch.float64))
    assert torch.equal(statistics.scale(torch.zeros(1, N_HEADS, D)), torch.ones(N_HEADS, D))
    assert isinstance(weights, ScoreWeights)
