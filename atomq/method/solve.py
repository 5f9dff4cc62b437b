"""Solving one linear group: GPTQ or rounding, and what to do when there are too few calibration tokens.

A Hessian of fewer tokens than channels has no full rank: GPTQ then fits the tokens it saw and may lose to
plain rounding on all others. In that case a quarter of the tokens is held out, GPTQ at several dampings and
rounding are compared on them by the error of the whole group, and the best is taken; GPTQ is then solved once
more with all tokens. Below LEAST_TOKENS there is nothing to judge by, and weights are rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from atomq.config import QuantScheme, SolverConfig
from atomq.method.descent import descend
from atomq.method.gptq import factorize_hessian, gptq_quantize, rtn_quantize
from atomq.method.hessian import HessianAccumulator, asymmetric_target, damp, output_error
from atomq.numerics.weights import QuantizedWeight

SHORT_DAMPINGS = (1.0, 10.0, 100.0)  # multiples of damp_frac that compete when tokens are few
LEAST_TOKENS = 32  # below this the held-out quarter is too small to judge by, and rounding is taken


@dataclass(frozen=True)
class SolvedLinear:
    """One linear's codes and how they came about.

    Attributes:
        method: "gptq" or "rtn", after the choice described above.
        damp_frac: the damping used, None for rtn.
        damping_raised: whether the factorization needed more than was asked for.
        relative_error: squared output error over squared output on the calibration tokens, None without
        Hessian. n_dead: input channels that were never active.
    """

    weight: QuantizedWeight
    method: str
    damp_frac: float | None
    damping_raised: bool
    relative_error: float | None
    n_dead: int


def solve_group(
    weights: list[torch.Tensor], hessian: HessianAccumulator | None, scheme: QuantScheme, solver: SolverConfig
) -> list[SolvedLinear]:
    """Quantize the float weights [N_i, K] of linears that share an input. Without a Hessian: rounding."""
    if hessian is None:
        return [SolvedLinear(rtn_quantize(w, scheme, solver), "rtn", None, False, None, 0) for w in weights]
    damp_frac: float | None = solver.damp_frac
    if hessian.held_out is not None:
        damp_frac = _choose_damping(weights, hessian, scheme, solver)
    total = hessian.hessian
    n_dead = int((total.diagonal() == 0).sum())
    if damp_frac is None:
        solved = [rtn_quantize(w, scheme, solver) for w in weights]
        used, raised = None, False
    else:
        solved, used = _solve_by_gptq(weights, total, damp_frac, scheme, solver, hessian.shift)
        raised = used > damp_frac
    method = "rtn" if damp_frac is None else "gptq"
    return [
        SolvedLinear(
            quantized, method, used, raised, _relative_error(weight, quantized, total, scheme), n_dead
        )
        for weight, quantized in zip(weights, solved, strict=True)
    ]


def _solve_by_gptq(
    weights: list[torch.Tensor],
    hessian: torch.Tensor,
    damp_frac: float,
    scheme: QuantScheme,
    solver: SolverConfig,
    shift: torch.Tensor | None = None,
) -> tuple[list[QuantizedWeight], float]:
    """Codes by GPTQ and coordinate descent under `hessian`, and the damping that was needed.

    Rows do not know of each other, so the linears are solved as one, if their channel groups allow it.
    """
    n_rows = [len(weight) for weight in weights]
    whole = all(n % scheme.weights.channel_group == 0 for n in n_rows[:-1])
    targets = [torch.cat(weights)] if whole else weights
    if shift is not None:
        targets = [
            asymmetric_target(target, hessian, shift, solver.asymmetry, solver.asymmetry_damp)
            for target in targets
        ]
    factor = factorize_hessian(hessian, damp_frac)
    solved: list[QuantizedWeight] = []
    for target in targets:
        quantized = gptq_quantize(target, factor, scheme, solver)
        if solver.descent_sweeps:
            target = target.masked_fill(factor.dead, 0.0)
            damped = damp(hessian, factor.damp_frac)
            quantized = descend(target, damped, quantized, scheme, solver.descent_sweeps)
        solved += quantized.split(n_rows, scheme.weights) if whole else [quantized]
    return solved, factor.damp_frac


def _choose_damping(
    weights: list[torch.Tensor], hessian: HessianAccumulator, scheme: QuantScheme, solver: SolverConfig
) -> float | None:
    """The damping whose codes do best on the held-out tokens; None if rounding does better than all."""
    assert hessian.held_out is not None
    if hessian.n_tokens < LEAST_TOKENS:
        return None
    held_out = hessian.held_out

    def loss(candidates: list[QuantizedWeight]) -> float:
        return sum(
            output_error(w - q.dequantize(scheme.weights, w.dtype), held_out)
            for w, q in zip(weights, candidates, strict=True)
        )

    best, best_loss = None, loss([rtn_quantize(w, scheme, solver) for w in weights])
    for multiple in SHORT_DAMPINGS:
        solved, used = _solve_by_gptq(weights, hessian.fit, solver.damp_frac * multiple, scheme, solver)
        candidate = loss(solved)
        if candidate < best_loss:
            best, best_loss = used, candidate
    return best


def _relative_error(
    weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor, scheme: QuantScheme
) -> float:
    """Squared output error of the codes over the squared output, on the tokens of `hessian`."""
    difference = weight - quantized.dequantize(scheme.weights, weight.dtype)
    output = output_error(weight, hessian)
    return output_error(difference, hessian) / output if output > 0 else 0.0
