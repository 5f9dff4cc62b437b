"""Block-wise refinement: codes, scales, outliers and norms of one block are learned together.

What is minimized is the error of the block's output on its quantized inputs against the float model's output
of the same tokens, each token's squared error over its squared size, so that the few tokens with massive
activations do not decide alone. Codes follow a latent u in units of the scale, rounded with a
straight-through gradient (the aim is that of BRECQ, arXiv 2102.05426, with plain rounding); scales are
learned as factors exp(d) and rounded as they are stored. A block's result is kept only if it does better on
windows that it was not trained on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from atomq import distributed
from atomq.config import QuantScheme, SolverConfig
from atomq.numerics.groups import spread_groups
from atomq.numerics.linear import QuantizedLinear
from atomq.numerics.outliers import Outliers
from atomq.numerics.scales import round_to_stored, straight_through
from atomq.numerics.weights import QuantizedWeight, spread_rows, weight_grid

WINDOWS_PER_STEP = 4
HELD_OUT_SHARE = 8  # one window in so many, at least one, judges and is not trained on
SCALE_RATE = 0.1  # learning rates of log scales and of norms, relative to that of codes
WARM_UP_SHARE = 0.05


class LatentWeight(nn.Module):
    """The weight of one linear with latent codes, as a differentiable function of its parameters.

    Attributes:
        normal: float32 [N, K-k] latents in units of the scale; the codes are their rounded values.
        log_scales: what the stored scales (the rows' bases, if progressive) are multiplied by, as logarithms.
        outlier: float32 [N, k] latents of INT8 outliers in units of their scale, or None.
    """

    def __init__(self, weight: torch.Tensor, start: QuantizedWeight, scheme: QuantScheme) -> None:
        """`weight` [N, K]: what `start` was solved from. A latent lies where the weight lies within its
        code's cell, so that it begins by giving `start` back and knows which way its code is likely to go.
        """
        super().__init__()
        self.start, self.scheme = start, scheme
        n_normal = start.codes.shape[1]
        codes = start.codes.float()
        zeros = self._per_code(start.zeros)
        wish = weight[:, :n_normal] / self._per_code(start.scales)
        wish = wish if isinstance(zeros, int) else wish + zeros
        self.normal = nn.Parameter(codes + (wish - codes).clamp(-0.49, 0.49))
        learned = start.scales if start.base is None else start.base
        self.log_scales = nn.Parameter(torch.zeros_like(learned))
        self.outlier: nn.Parameter | None = None
        if start.outliers is not None and start.outliers.scales is not None:
            codes = start.outliers.values.float()
            wish = weight[:, n_normal:] / start.outliers.scales.unsqueeze(-1)
            self.outlier = nn.Parameter(codes + (wish - codes).clamp(-0.49, 0.49))

    def forward(self) -> torch.Tensor:
        """The dense weight [N, K]."""
        grid = weight_grid(self.scheme.weights)
        latent = self.normal.clamp(grid.qmin, grid.qmax)
        values = straight_through(latent, latent.round()) - self._per_code(self.start.zeros)
        normal = values * self._per_code(self._scales())
        outliers = self.start.outliers
        if outliers is None:
            return normal
        if self.outlier is None or outliers.scales is None:
            return torch.cat((normal, outliers.decode(normal.dtype)), dim=1)
        latent = self.outlier.clamp(-128, 127)
        values = straight_through(latent, latent.round())
        return torch.cat((normal, values * outliers.scales.unsqueeze(-1)), dim=1)

    def quantized(self) -> QuantizedWeight:
        """The codes that the parameters stand for."""
        with torch.no_grad():
            grid, start = weight_grid(self.scheme.weights), self.start
            codes = self.normal.clamp(grid.qmin, grid.qmax).round().to(torch.int16)
            outliers = start.outliers
            if outliers is not None and self.outlier is not None:
                values = self.outlier.clamp(-128, 127).round().to(torch.int8)
                outliers = Outliers(values, outliers.scales)
            scales = self._scales().detach()
            base = None if start.base is None else self._base().detach()
            return replace(start, codes=codes, scales=scales, outliers=outliers, base=base)

    def _base(self) -> torch.Tensor:
        """[N], as stored."""
        assert self.start.base is not None
        base = self.start.base * self.log_scales.exp()
        return straight_through(base, round_to_stored(base))

    def _scales(self) -> torch.Tensor:
        """[ceil(N / channel_group), G], as stored."""
        if self.start.factors is not None:
            return self._base().unsqueeze(-1) * self.start.factors
        scales = self.start.scales * self.log_scales.exp()
        return straight_through(scales, round_to_stored(scales))

    def _per_code(self, per_group: torch.Tensor | None) -> torch.Tensor | int:
        """[N, K-k] of one value per channel group and group; 0 where there is none."""
        if per_group is None:
            return 0
        n_rows, n_normal = self.start.codes.shape
        rows = spread_rows(per_group.float(), n_rows, self.scheme.weights.channel_group)
        return spread_groups(rows, n_normal, self.scheme.weights.group_size)


@dataclass(frozen=True)
class Refinement:
    """What refining a block brought: its loss on held-out windows before and after; the better one stays."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after < self.before


def refine_block(
    linears: dict[str, QuantizedLinear],
    floats: dict[str, torch.Tensor],
    vectors: list[nn.Parameter],
    forward: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    solver: SolverConfig,
    on_step: Callable[[float], None],
) -> Refinement:
    """Learn codes and scales of a block's `linears`, and its `vectors`; they are changed if that is better.

    Args:
        linears: solved, by name.
        floats: the weights they were solved from, [N, K] float32 in the stored order and basis.
        vectors: weights of norms, and biases.
        forward: the block as a function of its input [n, seq_len, hidden].
        inputs, targets: [n_windows, seq_len, hidden], at least two windows.
        on_step: told the share that is done.
    """
    old_vectors = [vector.detach().clone() for vector in vectors]
    old_weights = {name: linear.quantized_weight() for name, linear in linears.items()}
    n_train = len(inputs) - max(1, len(inputs) // HELD_OUT_SHARE)
    held = range(n_train, len(inputs))

    def held_out_loss() -> float:
        with torch.no_grad():
            losses = [block_loss(forward(inputs[i : i + 1]), targets[i : i + 1]) for i in held]
        total = torch.stack(losses).double().sum()
        distributed.add_up(total)
        return float(total) / distributed.total(len(held))

    before = held_out_loss()
    latents = {
        name: LatentWeight(floats[name], old_weights[name], linear.scheme) for name, linear in linears.items()
    }
    for name, linear in linears.items():
        linear.learned_weight = latents[name]
    try:
        learned = [*latents.values()]
        _train(learned, vectors, forward, inputs[:n_train], targets[:n_train], solver, on_step)
    finally:
        for linear in linears.values():
            linear.learned_weight = None
    for name, linear in linears.items():
        linear.set_codes(latents[name].quantized())
    result = Refinement(before, held_out_loss())
    if not result.kept:
        for name, linear in linears.items():
            linear.set_codes(old_weights[name])
        for vector, old in zip(vectors, old_vectors, strict=True):
            vector.data.copy_(old)
    return result


def block_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of |output - target|^2 / |target|^2, both [..., hidden]."""
    target = target.to(output.device, torch.float32)
    error = (output.float() - target).square().sum(-1)
    return (error / target.square().sum(-1).clamp(min=1e-12)).mean()


def _train(
    latents: list[LatentWeight],
    vectors: list[nn.Parameter],
    forward: Callable[[torch.Tensor], torch.Tensor],
    inputs: torch.Tensor,
    targets: torch.Tensor,
    solver: SolverConfig,
    on_step: Callable[[float], None],
) -> None:
    """Adam on all parameters, cosine from `solver.refine_rate` to zero; windows drawn with seed 0."""
    codes = [p for latent in latents for p in (latent.normal, latent.outlier) if p is not None]
    others = [*(latent.log_scales for latent in latents), *vectors]
    rates = (solver.refine_rate, solver.refine_rate * SCALE_RATE)
    groups = [{"params": codes, "lr": rates[0]}, {"params": others, "lr": rates[1]}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    draw = torch.Generator().manual_seed(0)
    order: list[int] = []
    with _gradients_of(vectors), sdpa_kernel(SDPBackend.MATH), _tensor_cores(), torch.enable_grad():
        for step in range(solver.refine_steps):
            done = step / solver.refine_steps
            warm = min(1.0, (step + 1) / (WARM_UP_SHARE * solver.refine_steps))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * warm * (1 + math.cos(math.pi * done)) / 2
            while len(order) < WINDOWS_PER_STEP:
                order += torch.randperm(len(inputs), generator=draw).tolist()
            chosen, order = order[:WINDOWS_PER_STEP], order[WINDOWS_PER_STEP:]
            optimizer.zero_grad(set_to_none=True)
            loss = block_loss(forward(inputs[chosen]), targets[chosen]) / distributed.n_processes()
            loss.backward()  # type: ignore[no-untyped-call]
            distributed.add_up(*(p.grad for p in (*codes, *others) if p.grad is not None))
            optimizer.step()
            on_step(done)


@contextmanager
def _gradients_of(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let `parameters` take gradients for a while."""
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    yield
    for parameter, required in zip(parameters, before, strict=True):
        parameter.requires_grad_(required)
        parameter.grad = None


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Multiply float32 matrices in TF32 for a while: gradients need no more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)
