"""Proving a checkpoint: every packed linear against exact arithmetic, through the GPU kernels where there are
any.

Integrity (hashes, shapes, value ranges) comes first and is the loader's business. Then each linear gets
random inputs and inputs with outlier channels as calibration shows them; on a GPU the activation quantizer
and the GEMM kernel are held against the oracle of `numerics.exact`, elsewhere the float32 simulation is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from atomq.config import FLOAT_BITS
from atomq.errors import ConfigError, KernelError
from atomq.kernels.linear import KernelLinear, envelope_problem
from atomq.numerics.activations import QuantizedActivations, quantize_activations
from atomq.numerics.exact import exact_outputs
from atomq.numerics.groups import spread_groups
from atomq.numerics.linear import QuantizedLinear
from atomq.progress import OnProgress

Arithmetic = Literal["auto", "kernels", "exact"]
"""Who computes what is held against the oracle: the kernels where they can, the kernels or nobody, torch."""

ARITHMETICS: tuple[Arithmetic, ...] = ("auto", "kernels", "exact")

BY_KERNEL, BY_TORCH = "gpu kernel", "torch"
N_TOKENS = (1, 33)
N_KERNEL_TOKENS = (1, 33, 300)  # on a GPU: a tile for decoding, one for a batch, one for a prompt
OUTLIER_GAIN = 30.0
# Relative Frobenius error allowed for outputs in float32: what summation in another order costs. A kernel
# adds up one number for each group; torch one for each input, and its error grows with the root of their
# number (measured for one token: 3e-7 at 1536 inputs, 6e-7 at 4096, 1.3e-6 at 28672).
TOLERANCE = 1e-6
_TORCH_INPUTS = 4096


@dataclass(frozen=True)
class LinearVerdict:
    """How far one linear's outputs lie from the oracle's.

    Attributes:
        computed_by: "gpu kernel" or "torch".
        reason: why torch, if a GPU is there but the kernels do not take this linear.
        error: largest relative Frobenius error over all inputs.
        tolerance: what `error` may be.
        n_wrong_codes: activation codes that differ from the oracle's (always 0 in torch).
    """

    name: str
    computed_by: str
    reason: str
    error: float
    tolerance: float
    n_wrong_codes: int

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance and self.n_wrong_codes == 0


@dataclass(frozen=True)
class Verification:
    """The verdicts on all linears of a checkpoint."""

    verdicts: tuple[LinearVerdict, ...]

    @property
    def failed(self) -> list[str]:
        """Names of the linears that do not pass."""
        return [v.name for v in self.verdicts if not v.passed]

    @property
    def computed_by(self) -> dict[str, int]:
        """How many linears the kernels computed, and how many torch."""
        return dict(Counter(v.computed_by for v in self.verdicts))

    def worst(self, count: int) -> list[LinearVerdict]:
        """The verdicts with the largest errors."""
        return sorted(self.verdicts, key=lambda v: (v.passed, -v.error / v.tolerance))[:count]

    def summary(self) -> dict[str, Any]:
        """For JSON, without the single linears."""
        return {
            "computed_by": self.computed_by,
            "tolerance": TOLERANCE,
            "n_linears": len(self.verdicts),
            "n_failed": len(self.failed),
            "failed": self.failed,
            "largest_error": max((v.error for v in self.verdicts), default=0.0),
            "n_wrong_codes": sum(v.n_wrong_codes for v in self.verdicts),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        linears = {
            v.name: {
                "error": v.error,
                "tolerance": v.tolerance,
                "n_wrong_codes": v.n_wrong_codes,
                "computed_by": v.computed_by,
                "why_torch": v.reason,
            }
            for v in self.verdicts
        }
        return {**self.summary(), "linears": linears}


def parse_arithmetic(name: str, device: torch.device, *others: str) -> Arithmetic:
    """The arithmetic of a name given by a user, if `device` can do it; `others` are named in the error too.

    Raises:
        ConfigError: another name.
        KernelError: kernels without a CUDA device.
    """
    for arithmetic in ARITHMETICS:
        if name == arithmetic:
            if name == "kernels" and device.type != "cuda":
                raise KernelError("--check kernels needs a CUDA device; exact proves the codes without one")
            return arithmetic
    raise ConfigError(f"--check {name} is not one of {', '.join((*ARITHMETICS, *others))}")


def verify_linears(
    modules: Iterable[tuple[str, nn.Module]],
    n_linears: int,
    device: torch.device,
    on_progress: OnProgress,
    arithmetic: Arithmetic = "auto",
) -> Verification:
    """Check every quantized linear of a checkpoint on `device`, telling `on_progress` of each.

    A linear is on the device only while it is checked, with the linear that owns its input's order.

    Args:
        modules: blocks of the model, or all of it, each with the prefix of its names.
        n_linears: in all of them.

    Raises:
        KernelError: `arithmetic` is "kernels", and they cannot compute one of the linears.
    """
    verdicts: list[LinearVerdict] = []
    for prefix, module in modules:
        linears = {name: m for name, m in module.named_modules() if isinstance(m, QuantizedLinear)}
        for name, linear in linears.items():
            on_progress(len(verdicts), n_linears, prefix + name)
            together = (linear, linear.group_owner)
            for moved in together:
                moved.to(device)
            verdicts.append(verify_linear(prefix + name, linear, len(verdicts), arithmetic))
            for moved in together:
                moved.cpu()
    if verdicts:  # KV alone may be quantized
        on_progress(n_linears, n_linears, "done")
    return Verification(tuple(verdicts))


def verify_linear(
    name: str, linear: QuantizedLinear, seed: int, arithmetic: Arithmetic = "auto"
) -> LinearVerdict:
    """Check one linear on the device that it is on.

    Raises:
        KernelError: `arithmetic` is "kernels", and they do not take it.
    """
    asks_kernels = arithmetic == "kernels" or (linear.device.type == "cuda" and arithmetic == "auto")
    problem = envelope_problem(linear) if asks_kernels else ""
    if problem and arithmetic == "kernels":
        raise KernelError(f"{name} cannot run on the kernels: {problem}; use --check auto")
    kernel = KernelLinear(linear) if asks_kernels and not problem else None
    error, n_wrong = 0.0, 0
    for inputs in _test_inputs(linear, seed, N_TOKENS if kernel is None else N_KERNEL_TOKENS):
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
    if kernel is None:
        tolerance = TOLERANCE * max(1.0, math.sqrt(linear.in_features / _TORCH_INPUTS))
        return LinearVerdict(name, BY_TORCH, problem, error, tolerance, n_wrong)
    return LinearVerdict(name, BY_KERNEL, "", error, TOLERANCE, n_wrong)


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


def _test_inputs(
    linear: QuantizedLinear, seed: int, token_counts: tuple[int, ...] = N_TOKENS
) -> list[torch.Tensor]:
    """Inputs float32 [T, in]: plain random ones, and ones with strong channels where the outliers lie."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for n_tokens in token_counts:
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
    scheme = linear.input_scheme()
    if scheme.activations.n_bits == FLOAT_BITS:
        return ordered
    return quantize_activations(
        ordered, scheme.activations, scheme.outliers.n_outliers, scheme.outliers.precision
    )
