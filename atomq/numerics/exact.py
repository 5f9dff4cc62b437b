"""The product of a quantized linear without rounding: what simulation and kernels are held against.

Integers are multiplied and summed exactly (in float64, where sums stay below 2^53), one run of channels at a
time in which neither operand changes its scale; scales are applied exactly as stored, in float64.
"""

from __future__ import annotations

import itertools

import torch

from atomq.config import FLOAT_BITS, ActivationScheme
from atomq.numerics.activations import QuantizedActivations
from atomq.numerics.grid import CodeGrid
from atomq.numerics.groups import group_bounds
from atomq.numerics.linear import QuantizedLinear
from atomq.numerics.weights import spread_rows, weight_grid


def exact_outputs(linear: QuantizedLinear, activations: QuantizedActivations | torch.Tensor) -> torch.Tensor:
    """What `linear` gives on quantized inputs: float64 [T, out_features], bias included.

    Args:
        linear: with packed codes, or with a float weight.
        activations: `quantize_activations`'s result for an input in the stored order and basis, or that input
            itself [T, in_features] where the scheme leaves activations in floating point.
    """
    scheme = linear.scheme
    if isinstance(activations, torch.Tensor) or scheme.weights.n_bits == FLOAT_BITS:
        inputs = (
            activations.double()
            if isinstance(activations, torch.Tensor)
            else _input_values(activations, scheme.activations)
        )
        outputs = inputs @ linear.dense_weight(torch.float64).T
    else:
        outputs = _integer_product(linear, activations)
    return outputs if linear.bias is None else outputs + linear.bias.double()


def _integer_product(linear: QuantizedLinear, activations: QuantizedActivations) -> torch.Tensor:
    scheme, weight = linear.scheme, linear.quantized_weight()
    n_rows, n_normal = weight.codes.shape
    input_codes = activations.codes.double()
    input_grid = _activation_grid(scheme.activations)
    grid, rows = weight_grid(scheme.weights), scheme.weights.channel_group
    weight_codes = weight.codes.double()
    weight_scales = spread_rows(weight.scales.double(), n_rows, rows)  # [N, G]
    weight_zeros = None if weight.zeros is None else spread_rows(weight.zeros.double(), n_rows, rows)
    outputs = weight_codes.new_zeros(input_codes.shape[0], n_rows)
    for start, end, x_group, w_group in _runs(
        n_normal, scheme.activations.group_size, scheme.weights.group_size
    ):
        x_zeros = None if activations.zeros is None else activations.zeros[:, x_group, None].double()
        w_zeros = None if weight_zeros is None else weight_zeros[:, w_group, None]
        x = input_grid.values(input_codes[:, start:end], x_zeros)
        w = grid.values(weight_codes[:, start:end], w_zeros)
        scales = activations.scales[:, x_group, None].double() * weight_scales[None, :, w_group]
        outputs += (x @ w.T) * scales
    if activations.outliers is not None and weight.outliers is not None:
        x, w = activations.outliers.values.double(), weight.outliers.values.double()
        product = x @ w.T
        if activations.outliers.scales is not None and weight.outliers.scales is not None:
            product *= (
                activations.outliers.scales[:, None].double() * weight.outliers.scales[None, :].double()
            )
        outputs += product
    return outputs


def _input_values(activations: QuantizedActivations, scheme: ActivationScheme) -> torch.Tensor:
    """The values [T, K] that activation codes stand for, in float64."""
    grid, codes = _activation_grid(scheme), activations.codes.double()
    pieces = []
    for group, (start, end) in enumerate(group_bounds(codes.shape[1], scheme.group_size)):
        zeros = None if activations.zeros is None else activations.zeros[:, group, None].double()
        pieces.append(grid.values(codes[:, start:end], zeros) * activations.scales[:, group, None].double())
    if activations.outliers is not None:
        pieces.append(activations.outliers.decode(torch.float64))
    return torch.cat(pieces, dim=1)


def _activation_grid(scheme: ActivationScheme) -> CodeGrid:
    return CodeGrid.of(scheme.number_format, scheme.n_bits, scheme.symmetric)


def _runs(width: int, first_size: int | None, second_size: int | None) -> list[tuple[int, int, int, int]]:
    """Runs of channels within one group of both sizes: (start, end, first's group, second's group)."""
    sizes = (first_size or width, second_size or width)
    edges = sorted({0, width, *range(0, width, sizes[0]), *range(0, width, sizes[1])})
    return [(start, end, start // sizes[0], start // sizes[1]) for start, end in itertools.pairwise(edges)]
