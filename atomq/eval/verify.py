"""Proving a checkpoint: every packed linear against exact arithmetic, through the GPU kernels where there are
any.

Integrity (hashes, shapes, value ranges) comes first. Then each linear gets random inputs and inputs with
outlier channels as calibration shows them; on a GPU the activation quantizer and the GEMM kernel are held
against the oracle of `numerics.exact`, elsewhere the float32 simulation is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from atomq.config import FLOAT_BITS
from atomq.kernels.linear import KernelLinear, envelope_problem
from atomq.numerics.activations import QuantizedActivations, quantize_activations
from atomq.numerics.exact import exact_outputs
from atomq.numerics.groups import spread_groups
from atomq.numerics.linear import QuantizedLinear
from atomq.progress import OnProgress

N_TOKENS = (1, 33)
OUTLIER_GAIN = 30.0
# Relative Frobenius error allowed for outputs in float32: what summation in another order costs.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class LinearVerdict:
    """How far one linear's outputs lie from the oracle's.

    Attributes:
        computed_by: "gpu kernel" or "torch".
        reason: why torch, if a GPU is there but the kernels do not take this linear.
        error: largest relative Frobenius error over all inputs.
        n_wrong_codes: activation codes that differ from the oracle's (always 0 in torch).
    """

    name: str
    computed_by: str
    reason: str
    error: float
    n_wrong_codes: int

    @property
    def passed(self) -> bool:
        return self.error <= TOLERANCE and self.n_wrong_codes == 0


def verify_linears(model: nn.Module, device: torch.device, on_progress: OnProgress) -> list[LinearVerdict]:
    """Check every quantized linear of a loaded checkpoint on `device`; telling `on_progress` of each."""
    linears = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    verdicts = []
    for index, (name, linear) in enumerate(linears.items()):
        on_progress(index, len(linears), name)
        verdicts.append(verify_linear(name, linear.to(device), seed=index))
        linear.cpu()
    on_progress(len(linears), len(linears), "done")
    return verdicts


def verify_linear(name: str, linear: QuantizedLinear, seed: int) -> LinearVerdict:
    """Check one linear on the device that it is on."""
    on_gpu = linear.device.type == "cuda"
    problem = envelope_problem(linear) if on_gpu else ""
    kernel = KernelLinear(linear) if on_gpu and not problem else None
    error, n_wrong = 0.0, 0
    for inputs in _test_inputs(linear, seed):
        wanted = _quantize(linear, linear.order_input(inputs))
        if kernel is None:
            outputs = linear.forward(inputs)  # not its hooks, which quantize K and V
        else:
            inputs = inputs if kernel.quantizes else inputs.half()
            outputs, seen = kernel.multiply(inputs, torch.float32)
            n_wrong += _count_wrong_codes(linear, seen, wanted)
            wanted = seen
        expected = exact_outputs(linear, wanted)
        distance = (outputs.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        error = max(error, float(distance)) if bool(torch.isfinite(outputs).all()) else float("inf")
    return LinearVerdict(name, "torch" if kernel is None else "gpu kernel", problem, error, n_wrong)


def _count_wrong_codes(
    linear: QuantizedLinear,
    seen: QuantizedActivations | torch.Tensor,
    wanted: QuantizedActivations | torch.Tensor,
) -> int:
    """Activation codes of the kernel that are not those of the float32 arithmetic in torch.

    After a Hadamard transform, summed in another order, a value on the edge between two codes may fall on
    either side: there a neighbouring code counts as right.
    """
    if isinstance(seen, torch.Tensor) or isinstance(wanted, torch.Tensor):
        return 0
    slack = 0.01 + int(linear.scheme.transform == "hadamard")
    size = linear.scheme.activations.group_size
    width = wanted.codes.shape[1]
    steps = spread_groups(wanted.scales.double(), width, size)
    values = seen.codes.double() * spread_groups(seen.scales.double(), width, size)
    wrong = int(((values - wanted.codes.double() * steps).abs() > slack * steps).sum())
    if seen.outliers is not None and wanted.outliers is not None:
        wrong += int((seen.outliers.values != wanted.outliers.values).sum())
    return wrong


def _test_inputs(linear: QuantizedLinear, seed: int) -> list[torch.Tensor]:
    """Inputs float32 [T, in]: plain random ones, and ones with strong channels where the outliers lie."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for n_tokens in N_TOKENS:
        plain = torch.randn(n_tokens, linear.in_features, generator=generator)
        spread = torch.randn(linear.in_features, generator=generator).exp()
        n_outliers = max(1, linear.scheme.outliers.n_outliers)
        strong = torch.arange(linear.in_features)[-n_outliers:]
        if linear.is_gathered:
            strong = linear.input_order().cpu()[strong].long()
        spread[strong] *= OUTLIER_GAIN
        inputs += [plain, torch.randn(n_tokens, linear.in_features, generator=generator) * spread]
    return [x.to(linear.device) for x in inputs]


def _quantize(linear: QuantizedLinear, ordered: torch.Tensor) -> QuantizedActivations | torch.Tensor:
    scheme = linear.scheme
    if scheme.activations.n_bits == FLOAT_BITS:
        return ordered
    return quantize_activations(
        ordered, scheme.activations, scheme.outliers.n_outliers, scheme.outliers.precision
    )
