"""Benchmark of the GEMM kernels against each other and against their peers, correctness first.

Every case is checked against the float64 oracle before it is timed. Two timings are made of each: a graph of
back-to-back launches over enough copies of the weight that none is still in the L2 cache when its turn comes,
and single launches after the cache was overwritten. Activations are already quantized; they stay in the
cache, as in real use. Peers run in the same process.

It measures; printing, files and exit codes are the command's business.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch

from atomq.errors import KernelError
from atomq.kernels import gemm, gemm_reference
from atomq.kernels.repack import (
    CanonicalWeight,
    PackedActivations,
    PackedWeight,
    pack_activations,
    repack_weight,
)

Mode = Literal["w4a4", "w4a4-mixed", "w4a4-progressive", "w4a16"]
"""W4A4 with exact scales; with progressive activations only; with progressive scales on both sides; W4A16."""

MODEL_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "smollm2-135m": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
"""(N, K) = (output channels, inputs) of the linears of a block."""

FROBENIUS_LIMIT = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
_CACHE_BYTES = 160e6  # copies of a weight together exceed three times the largest L2 cache
_WARM_UP_US = 50e3  # of replays before the first sample: clocks and caches settle
_REPLAYS, _COLD_SAMPLES = 30, 30
_GRAPH_US = 4000.0  # a graph holds launches of about this long, at least one for each copy


@dataclass(frozen=True)
class Timing:
    """Microseconds for one launch: in a graph (10th, 50th and 90th percentile) and cold."""

    graph_us: float
    graph_p10_us: float
    graph_p90_us: float
    cold_us: float


@dataclass(frozen=True)
class Result:
    """One case: kernel or peer `name` on an [M, K] x [N, K] product; `error` is Frobenius, None for peers."""

    name: str
    n_channels: int
    n_inputs: int
    n_tokens: int
    error: float | None
    timing: Timing
    floor_us: float
    moved_bytes: float

    @property
    def gigabytes_per_s(self) -> float:
        """Bytes that have to move at least (operands once, outputs once) over the graph's median."""
        return 1e-3 * self.moved_bytes / self.timing.graph_us

    @property
    def tops(self) -> float:
        """Useful operations, in 1e12 per second, from the graph's median."""
        return 2e-6 * self.n_tokens * self.n_channels * self.n_inputs / self.timing.graph_us

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "tops": self.tops,
            "gb_per_s": self.gigabytes_per_s,
            "floor_fraction": self.floor_us / self.timing.graph_us,
        }


class Peer(Protocol):
    """Somebody else's GEMM: `prepare` returns a launch for each copy of the weight, or None if it cannot."""

    @property
    def name(self) -> str:
        """As in the table."""

    def prepare(self, n_channels: int, n_inputs: int, n_tokens: int) -> list[Callable[[], object]] | None:
        """Operands made and everything compiled."""


@dataclass(frozen=True)
class TorchPeer:
    """torch's own products: cuBLAS float16 and bfloat16, `_int_mm`, and FP8 with one scale per row."""

    name: Literal["fp16", "bf16", "int8", "fp8"]

    def prepare(self, n_channels: int, n_inputs: int, n_tokens: int) -> list[Callable[[], object]] | None:
        """None for INT8 below 17 tokens, which `_int_mm` refuses; for FP8 before sm_89."""
        bytes_each = n_channels * n_inputs * (2 if self.name in ("fp16", "bf16") else 1)
        n_copies = max(1, math.ceil(_CACHE_BYTES / bytes_each))
        if self.name in ("fp16", "bf16"):
            dtype = torch.float16 if self.name == "fp16" else torch.bfloat16
            x = torch.randn(n_tokens, n_inputs, device="cuda", dtype=dtype)
            weights = [torch.randn(n_channels, n_inputs, device="cuda", dtype=dtype) for _ in range(n_copies)]
            out = torch.empty(n_tokens, n_channels, device="cuda", dtype=dtype)
            return [functools.partial(torch.mm, x, w.T, out=out) for w in weights]
        if self.name == "int8":
            if n_tokens < 17:
                return None
            codes = torch.randint(-127, 128, (n_tokens, n_inputs), device="cuda", dtype=torch.int8)
            weights = [
                torch.randint(-127, 128, (n_channels, n_inputs), device="cuda", dtype=torch.int8)
                for _ in range(n_copies)
            ]
            return [functools.partial(torch._int_mm, codes, w.T) for w in weights]
        if torch.cuda.get_device_capability() < (8, 9):
            return None
        float8 = torch.float8_e4m3fn
        x8 = torch.randn(n_tokens, n_inputs, device="cuda").to(float8)
        weights = [torch.randn(n_channels, n_inputs, device="cuda").to(float8) for _ in range(n_copies)]
        row_scales = torch.rand(n_tokens, 1, device="cuda")
        column_scales = torch.rand(1, n_channels, device="cuda")
        scaled_mm = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16)
        return [functools.partial(scaled_mm, x8, w.T, row_scales, column_scales) for w in weights]


TORCH_PEERS: tuple[Peer, ...] = tuple(TorchPeer(name) for name in ("fp16", "bf16", "int8", "fp8"))


def bench(
    shapes: list[tuple[int, int]],
    tokens: list[int],
    modes: list[Mode],
    *,
    group_size: int = 128,
    n_outliers: int = 128,
    peers: tuple[Peer, ...] = TORCH_PEERS,
    bandwidth: float = 3.0e12,
    operations: float = 1979e12,
) -> Iterator[Result]:
    """Check and time every mode and peer on every (N, K) and number of tokens, in float16 out.

    Args:
        shapes: (N, K); K includes the outliers.
        modes: of our kernels. "w4a16" has no outliers.
        bandwidth, operations: bytes and INT8 operations per second of the device, for the floor.

    Raises:
        KernelError: a result that differs from the oracle, or no CUDA device.
    """
    if not torch.cuda.is_available():
        raise KernelError("bench-gemm: no CUDA device here; use --compile-only")
    for n_channels, n_inputs in shapes:
        for mode in modes:
            k = 0 if mode == "w4a16" else n_outliers
            copies = _copies(n_channels, n_inputs, k, group_size, mode)
            for n_tokens in tokens:
                launches, error = _launches(copies, n_tokens, n_inputs, k, group_size, mode)
                weight_bytes = copies[0].records.numel()
                moved = weight_bytes + n_tokens * (n_inputs * (2 if mode == "w4a16" else 1) + 2 * n_channels)
                rate = operations / (2 if mode == "w4a16" else 1)
                floor = max(moved / bandwidth, 2 * n_tokens * n_channels * n_inputs / rate) * 1e6
                yield Result(
                    mode, n_channels, n_inputs, n_tokens, error, time_launches(launches), floor, moved
                )
            del copies
        for peer in peers:
            for n_tokens in tokens:
                peer_launches = peer.prepare(n_channels, n_inputs, n_tokens)
                if peer_launches is not None:
                    n_bytes = 2 if peer.name in ("fp16", "bf16") else 1
                    moved = n_bytes * n_inputs * (n_channels + n_tokens) + 2 * n_tokens * n_channels
                    floor = max(
                        moved / bandwidth,
                        2 * n_tokens * n_channels * n_inputs * n_bytes / operations,
                    )
                    timing = time_launches(peer_launches)
                    yield Result(peer.name, n_channels, n_inputs, n_tokens, None, timing, floor * 1e6, moved)


def environment() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "warm_up_us": _WARM_UP_US,
        "replays": _REPLAYS,
        "cold_samples": _COLD_SAMPLES,
        "statistic": "median",
    }


def time_launches(launches: list[Callable[[], object]]) -> Timing:
    """Time launches, one for each copy of the weight, on a stream of their own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def timed(run: Callable[[], object]) -> float:
        begin.record(stream)
        run()
        end.record(stream)
        stream.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    with torch.cuda.stream(stream):
        for launch in launches:
            launch()
        estimate = max(timed(launches[0]), 3.0)
        n_launches = math.ceil(max(_GRAPH_US / estimate, 1) / len(launches)) * len(launches)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(n_launches):
                launches[i % len(launches)]()
        for _ in range(math.ceil(_WARM_UP_US / (n_launches * estimate))):
            graph.replay()
        samples = sorted(timed(graph.replay) / n_launches for _ in range(_REPLAYS))
        flushed = torch.empty(int(_CACHE_BYTES), dtype=torch.uint8, device="cuda")
        cold = []
        for i in range(_COLD_SAMPLES):
            flushed.zero_()
            cold.append(timed(launches[i % len(launches)]))
    deciles = statistics.quantiles(samples, n=10)
    return Timing(statistics.median(samples), deciles[0], deciles[8], statistics.median(cold))


def _copies(n_channels: int, n_inputs: int, k: int, group_size: int, mode: Mode) -> list[PackedWeight]:
    """Random weights of one shape, enough of them to leave the cache behind."""
    n_copies = max(1, math.ceil(_CACHE_BYTES / (n_channels * n_inputs / 2)))
    n_groups = math.ceil((n_inputs - k) / group_size)
    progressive = mode == "w4a4-progressive"

    def random_weight() -> PackedWeight:
        shape = (n_channels, n_groups)
        factors = torch.randint(1, 17, shape, device="cuda").to(torch.uint8)
        scales = (torch.rand(shape, device="cuda") * 0.02 + 0.001).half()
        return repack_weight(
            CanonicalWeight(
                qweight=torch.randint(0, 256, (n_channels, (n_inputs - k + 1) // 2), device="cuda").to(
                    torch.uint8
                ),
                scales=factors if progressive else scales,
                n_inputs=n_inputs - k,
                group_size=group_size,
                scale_base=torch.rand(n_channels, device="cuda") * 0.002 + 1e-4 if progressive else None,
                outlier_weight=torch.randint(-127, 128, (n_channels, k), device="cuda").to(torch.int8)
                if k
                else None,
                outlier_scales=torch.rand(n_channels, device="cuda") * 0.001 + 1e-4 if k else None,
            )
        )

    return [random_weight() for _ in range(n_copies)]


def _launches(
    copies: list[PackedWeight], n_tokens: int, n_inputs: int, k: int, group_size: int, mode: Mode
) -> tuple[list[Callable[[], object]], float]:
    """A launch for each copy, and the first one's error against the oracle."""
    out = torch.full((n_tokens, copies[0].n_channels), math.nan, dtype=torch.float16, device="cuda")
    launches: list[Callable[[], object]]
    if mode == "w4a16":
        x = torch.randn(n_tokens, n_inputs, device="cuda", dtype=torch.float16)
        launches = [functools.partial(gemm.w4a16_gemm, x, w, out=out) for w in copies]
        oracle = gemm_reference.w4a16_oracle(x, copies[0])
    else:
        activations = _random_activations(n_tokens, n_inputs, k, group_size, mode)
        launches = [functools.partial(gemm.w4a4_gemm, activations, w, out=out) for w in copies]
        oracle = gemm_reference.w4a4_oracle(activations, copies[0])
    launches[0]()
    error = float((out.double() - oracle).norm() / oracle.norm()) if oracle.numel() else 0.0
    if not error <= FROBENIUS_LIMIT[out.dtype]:
        raise KernelError(
            f"{mode} {copies[0].n_channels}x{n_inputs}, {n_tokens} tokens: the result is {error:.1e} off "
            f"the float64 oracle; the limit is {FROBENIUS_LIMIT[out.dtype]:.1e}"
        )
    return launches, error


def _random_activations(
    n_tokens: int, n_inputs: int, k: int, group_size: int, mode: Mode
) -> PackedActivations:
    n_groups = math.ceil((n_inputs - k) / group_size)
    progressive = mode in ("w4a4-mixed", "w4a4-progressive")
    codes = torch.randint(-8, 8, (n_tokens, n_inputs - k), device="cuda")
    if progressive:
        factors = torch.randint(1, 17, (n_tokens, n_groups), device="cuda")
        codes *= factors.repeat_interleave(group_size, dim=1)[:, : n_inputs - k]
    return pack_activations(
        codes.to(torch.int8),
        torch.rand(n_tokens, 1 if progressive else n_groups, device="cuda") * 0.05 + 0.005,
        _random_int8(n_tokens, k) if k else None,
        torch.rand(n_tokens, device="cuda") * 0.01 + 0.001 if k else None,
        None if progressive else group_size,
    )


def _random_int8(*shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, device="cuda", dtype=torch.int8)
