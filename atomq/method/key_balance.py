"""Offset and scale of each channel of K after RoPE: what a static table can do for its codes.

K of a head is coded as x = (k - o) / c, and the query multiplied by c. The score of a token is then off by
the sum over channels of c_i q_i e_i, where e is the error of x: under the Hadamard it is spread evenly, and
as large as x is. What softmax makes of it goes with w = p (1 - p) for a token of weight p. With means over
queries and tokens, weighted by w,

    c_i = (E[(k_i - o_i)^2] / E[q_i^2])^(1/4)

makes sum c_i^2 E[q_i^2] times sum E[(k_i - o_i)^2] / c_i^2 as small as it can be (Cauchy and Schwarz). o is
the weighted mean of K before RoPE, turned; positions of one row of the table share it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from atomq import distributed

LEAST_SHARE = 2.0**-20  # of a head's mean square: channels without any keep a scale
SCORES_AT_ONCE = 2**22


class ScoreWeights(NamedTuple):
    """Sums of w = p (1 - p), float32: over queries for each token of each head of K, `of_tokens` [n_heads,
    T]; and over tokens for each query, `of_queries` [n_heads, group, T].
    """

    of_tokens: torch.Tensor
    of_queries: torch.Tensor


def weigh_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    mask: torch.Tensor | None,
    softmax_scale: float,
    softcap: float | None = None,
) -> ScoreWeights:
    """The weights of one window: queries [n_heads * group, T, head_dim] and K [n_heads, T, head_dim] after
    RoPE.

    Args:
        mask: [1 or query heads, T, T]: True or 0 where a token is seen, False or very negative elsewhere;
            None sees a token and those before it.
        softcap: scores s are softcap * tanh(s / softcap).
    """
    n_heads, n_tokens = keys.shape[:2]
    k = keys.float()
    q = queries.float().reshape(n_heads, -1, *queries.shape[1:])
    of_tokens, of_queries = k.new_zeros(n_heads, n_tokens), k.new_zeros(q.shape[:3])
    step = max(1, SCORES_AT_ONCE // (queries.shape[0] * n_tokens))
    for start in range(0, n_tokens, step):
        rows = slice(start, start + step)
        scores = q[:, :, rows] @ k.mT[:, None] * softmax_scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        weights = _hide(scores, mask, start).softmax(-1)
        weights *= 1 - weights
        of_tokens += weights.sum((1, 2))
        of_queries[:, :, rows] = weights.sum(-1)
    return ScoreWeights(of_tokens, of_queries)


class BalanceStatistics:
    """Adds up queries and K of a block's attention, weighted by what their scores do."""

    def __init__(self, n_heads: int, head_dim: int, n_rows: int, device: torch.device) -> None:
        """`n_heads` of K; `n_rows` of the table that the tokens can lie in."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, n_heads, head_dim, dtype=torch.float64, device=device)

        self._before, self._squares, self._of_queries = zeros(), zeros(), zeros()
        self._turned = zeros(n_rows)
        self._weight = torch.zeros(n_heads, dtype=torch.float64, device=device)
        self._of_rows = torch.zeros(n_rows, n_heads, dtype=torch.float64, device=device)

    def add_keys(self, keys: torch.Tensor, weights: ScoreWeights) -> None:
        """Add K [T, n_heads, head_dim] before RoPE to what becomes the mean."""
        w = weights.of_tokens.double()
        self._weight += w.sum(-1)
        self._before += torch.einsum("ht,thd->hd", w, keys.double())

    def add_turned(
        self, queries: torch.Tensor, keys: torch.Tensor, rows: torch.Tensor, weights: ScoreWeights
    ) -> None:
        """Add queries [T, n_heads * group, head_dim] and K [T, n_heads, head_dim] after RoPE at positions of
        the table's rows `rows` int64 [T] to what becomes the scale.
        """
        n_rows, n_heads = self._of_rows.shape
        w, k = weights.of_tokens.double(), keys.double()
        q = queries.double().reshape(len(queries), n_heads, -1, queries.shape[-1])
        in_row = torch.nn.functional.one_hot(rows, n_rows).double()
        self._of_rows += torch.einsum("ht,tr->rh", w, in_row)
        self._turned += torch.einsum("ht,tr,thd->rhd", w, in_row, k)
        self._squares += torch.einsum("ht,thd->hd", w, k.square())
        self._of_queries += torch.einsum("hgt,thgd->hd", weights.of_queries.double(), q.square())

    def finish(self) -> None:
        """Add up over all processes."""
        distributed.add_up(
            self._before, self._squares, self._of_queries, self._turned, self._weight, self._of_rows
        )

    def mean(self) -> torch.Tensor:
        """K's weighted mean before RoPE, float64 [n_heads, head_dim]; zeros without any weight."""
        return self._before / self._weight.clamp(min=1e-30)[:, None]

    def scale(self, offsets: torch.Tensor) -> torch.Tensor:
        """The scale float32 [n_heads, head_dim] for `offsets` [n_rows, n_heads, head_dim].

        Rounded to bfloat16, so that it is the same number in whatever dtype a model is loaded.
        """
        o = offsets.double()
        spread = self._squares - 2 * (o * self._turned).sum(0)
        spread += (o.square() * self._of_rows[..., None]).sum(0)
        return (_at_least(spread) / _at_least(self._of_queries)).pow(0.25).bfloat16().float()


def _hide(scores: torch.Tensor, mask: torch.Tensor | None, first: int) -> torch.Tensor:
    """Scores [n_heads, group, rows, T] of queries from place `first` on, lowest where `mask` hides tokens."""
    n_heads, group, n_rows, n_tokens = scores.shape
    lowest = torch.finfo(scores.dtype).min
    if mask is None:
        places = torch.arange(n_tokens, device=scores.device)
        return scores.masked_fill(places > places[first : first + n_rows, None], lowest)
    rows = mask[:, first : first + n_rows]
    rows = rows[:, None] if len(rows) == 1 else rows.reshape(n_heads, group, n_rows, n_tokens)
    return scores.masked_fill(~rows, lowest) if rows.dtype == torch.bool else scores + rows


def _at_least(squares: torch.Tensor) -> torch.Tensor:
    """Sums of squares [n_heads, head_dim], none below a share of its head's mean; ones if all are zeros."""
    squares = torch.where(squares.sum(-1, keepdim=True) > 0, squares, torch.ones_like(squares))
    return squares.maximum(squares.mean(-1, keepdim=True) * LEAST_SHARE)
