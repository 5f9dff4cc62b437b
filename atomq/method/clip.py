"""One clip ratio for the activations that linears share: the one whose codes move the outputs least.

Of all ratios r the least sum over tokens x of |W (Q_r(x) - x)|^2, with the float weights W of all the linears
under one another. With the rows E = Q_r(x) - x that is |E W^T|^2, and tr(E G E^T) with G = W^T W. Activations
are quantized at run time, so the ratio is stored for the reader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from atomq import distributed
from atomq.config import QuantScheme
from atomq.method.hessian import output_error
from atomq.numerics.activations import fake_quantize_activations
from atomq.numerics.weights import clip_ratios


def search_clip(x: torch.Tensor, weights: Sequence[torch.Tensor], scheme: QuantScheme) -> float:
    """The clip ratio for the inputs `x`; of equally good ones, as without tokens, the largest.

    Tries those of `clip_ratios` from the scheme's own down, each a number of float32.

    Args:
        x: [T, K] this process's tokens, in stored order and transformed; sums are over all processes.
        weights: float32 [N_i, K], in the same order and basis.
    """
    activations, outliers = scheme.activations, scheme.outliers
    ratios = clip_ratios(activations.clip_ratio, torch.float32, torch.device("cpu")).flatten().tolist()
    weight = torch.cat(tuple(weights))
    gram = weight.T @ weight if len(weight) > weight.shape[1] else None  # fewer products than by outputs
    costs = torch.zeros(len(ratios), dtype=torch.float64, device=x.device)
    for index, ratio in enumerate(ratios):
        clipped = replace(activations, clip_ratio=ratio)
        values = fake_quantize_activations(x, clipped, outliers.n_outliers, outliers.precision)
        error = values - x
        if gram is None:
            costs[index] = (error @ weight.T).square().sum(dtype=torch.float64)
        else:
            costs[index] = output_error(error, gram)
    distributed.add_up(costs)
    summed = distributed.from_process(0, costs.tolist())
    return float(ratios[summed.index(min(summed))])
