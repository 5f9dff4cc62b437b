"""The peers of `bench-gemm`: torch's own products, and Humming, the strongest INT4 GEMM for Hopper."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from atomq.errors import KernelError
from atomq.eval.gemm_candidates import Candidate, Work
from atomq.eval.gemm_timing import n_copies

TorchName = Literal["fp16", "bf16", "int8", "fp8"]
_INT8_TOKENS = 32  # what `_int_mm`, which refuses 16 tokens and fewer, is given in their place
# INT4 weights and INT8 activations of normal random values lie 0.1 (groups of 128) to 0.2 (whole rows) off
# the unquantized product; a peer further off does something else than it is timed for.
_HUMMING_LIMIT = 0.3
_HUMMING_INPUTS, _HUMMING_CHANNELS = 64, 64  # of what it packs at a time
_HUMMING_ERRORS = (RuntimeError, AssertionError, ValueError, KeyError, OSError)  # it refuses by any of them


@dataclass(frozen=True)
class TorchPeer:
    """torch's products: cuBLAS float16 and bfloat16, `_int_mm`, and FP8 with one scale per row."""

    name: TorchName

    @property
    def is_peer(self) -> bool:
        return True

    def problem(self) -> str:
        """FP8 needs sm_89."""
        if self.name == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            return "FP8 products take a GPU of sm_89 or newer"
        return ""

    def prepare(self, n_channels: int, n_inputs: int, max_tokens: int) -> PreparedTorch:
        return PreparedTorch(self.name, n_channels, n_inputs)


class PreparedTorch:
    """Copies of a weight [N, K] for one of torch's products."""

    def __init__(self, name: TorchName, n_channels: int, n_inputs: int) -> None:
        self.name, self.n_channels, self.n_inputs = name, n_channels, n_inputs
        self.n_bytes = 2 if name in ("fp16", "bf16") else 1
        self.weights = [
            self._random(n_channels) for _ in range(n_copies(n_channels * n_inputs * self.n_bytes))
        ]

    def work(self, n_tokens: int) -> Work:
        x = self._random(n_tokens)
        multiply: Callable[[torch.Tensor], torch.Tensor]
        if self.name == "int8":
            x = self._random(n_tokens if n_tokens > 16 else _INT8_TOKENS)
            multiply = functools.partial(torch._int_mm, x)
        elif self.name == "fp8":
            scales = torch.rand(n_tokens, 1, device="cuda"), torch.rand(1, self.n_channels, device="cuda")

            def multiply(weight: torch.Tensor) -> torch.Tensor:
                return torch._scaled_mm(x, weight, *scales, out_dtype=torch.bfloat16)
        else:
            out = torch.empty(n_tokens, self.n_channels, device="cuda", dtype=x.dtype)
            multiply = functools.partial(torch.mm, x, out=out)
        moved = self.n_bytes * self.n_inputs * (self.n_channels + n_tokens) + 2 * n_tokens * self.n_channels
        launches = [functools.partial(multiply, weight.T) for weight in self.weights]
        with _as_kernel_error(RuntimeError):
            launches[0]()
        return Work(launches, None, moved, 8 * self.n_bytes, None)

    def _random(self, n_rows: int) -> torch.Tensor:
        if self.name == "int8":
            return torch.randint(-127, 128, (n_rows, self.n_inputs), device="cuda", dtype=torch.int8)
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
        values = torch.randn(n_rows, self.n_inputs, device="cuda", dtype=torch.bfloat16)
        return values.to(dtypes[self.name])


@dataclass(frozen=True)
class HummingPeer:
    """Humming (PyPI humming-kernels): INT4 weights, INT8 activations; on Hopper it refuses INT4 ones.

    Attributes:
        group_size: of weights and activations, like for like with exact scales; None for one scale per
            channel and token, which asks no promotion inside a row, like progressive scales.
    """

    group_size: int | None

    @property
    def name(self) -> str:
        return "humming-w4a8-channel" if self.group_size is None else f"humming-w4a8-g{self.group_size}"

    @property
    def is_peer(self) -> bool:
        return True

    def problem(self) -> str:
        """The package must be there."""
        if importlib.util.find_spec("humming") is None:
            return "the package humming-kernels is not installed here; pip install humming-kernels[cu13]"
        return ""

    def prepare(self, n_channels: int, n_inputs: int, max_tokens: int) -> PreparedHumming:
        """Refuses what Humming does not: it writes past its scales where groups do not divide K."""
        inputs = self.group_size or _HUMMING_INPUTS
        if n_inputs % inputs or n_channels % _HUMMING_CHANNELS:
            raise KernelError(
                f"it takes K in multiples of {inputs} and N in multiples of {_HUMMING_CHANNELS}"
            )
        return PreparedHumming(n_channels, n_inputs, self.group_size)


class PreparedHumming:
    """Layers of one weight, each with memory of its own."""

    def __init__(self, n_channels: int, n_inputs: int, group_size: int | None) -> None:
        from humming.layer import HummingLayer

        self.n_channels, self.n_inputs = n_channels, n_inputs
        self.weight = torch.randn(n_channels, n_inputs, device="cuda", dtype=torch.float16)
        groups = {} if group_size is None else {"group_size": group_size}
        self.layers: list[Any] = []
        with _as_kernel_error(*_HUMMING_ERRORS):
            for _ in range(n_copies(n_channels * n_inputs / 2)):
                layer: Any = HummingLayer(
                    shape_n=n_channels,
                    shape_k=n_inputs,
                    weight_config={"dtype": "int4", **groups},
                    input_config={"dtype": "int8", **groups},
                    torch_dtype=torch.float16,
                ).cuda()
                layer.load_from_unquantized(self.weight)
                layer.transform()
                self.layers.append(layer)

    def work(self, n_tokens: int) -> Work:
        from humming.layer import HummingLayerMethod

        x = torch.randn(n_tokens, self.n_inputs, device="cuda", dtype=torch.float16)
        out = torch.empty(n_tokens, self.n_channels, device="cuda", dtype=torch.float16)
        with _as_kernel_error(*_HUMMING_ERRORS):
            codes, scales = HummingLayerMethod.may_quant_input(self.layers[0], x)
            launches = [
                functools.partial(layer, codes, outputs=out, input_scale=scales) for layer in self.layers
            ]
            launches[0]()
        expected = x.float() @ self.weight.float().T
        error = float((out.float() - expected).norm() / expected.norm())
        if not error <= _HUMMING_LIMIT:
            raise KernelError(f"its result is {error:.2f} off the unquantized product")
        whole = [functools.partial(layer, x, outputs=out) for layer in self.layers]
        weight_bytes = sum(tensor.nbytes for tensor in self.layers[0].parameters())
        moved = weight_bytes + n_tokens * (self.n_inputs + 2 * self.n_channels)
        return Work(launches, whole, moved, 8, error)


@contextmanager
def _as_kernel_error(*kinds: type[Exception]) -> Iterator[None]:
    """What a peer raises where it cannot do a product, as the error that leaves it out."""
    try:
        yield
    except kinds as error:
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        raise KernelError(first_line) from error


TORCH_PEERS: tuple[Candidate, ...] = tuple(TorchPeer(name) for name in ("fp16", "bf16", "int8", "fp8"))
HUMMING_PEERS: tuple[Candidate, ...] = (HummingPeer(128), HummingPeer(None))
