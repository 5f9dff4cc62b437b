"""Benchmark of the GEMM kernels against each other and against their peers, correctness first.

Every case of ours is checked against the float64 oracle before it is timed. Two timings are made of each: a
graph of back-to-back launches over enough copies of the weight that none is still in the L2 cache when its
turn comes, and single launches after the cache was overwritten. All candidates run in the same process and
take turns. Activations are already quantized, and stay in the cache, as in real use; a third timing includes
their quantization.

It measures; printing, files and exit codes are the command's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from atomq.errors import KernelError
from atomq.eval.gemm_candidates import Candidate, Prepared, Work, plugged_in
from atomq.eval.gemm_kernels import MODES, KernelCandidate
from atomq.eval.gemm_peers import HUMMING_PEERS, TORCH_PEERS
from atomq.eval.gemm_timing import (
    LONG_TURN,
    SHORT_TURN,
    Launch,
    Timing,
    describe_method,
    time_in_turns,
)

MODEL_SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "llama-2-7b": ((4096, 4096), (11008, 4096), (4096, 11008)),
    "llama-2-13b": ((5120, 5120), (13824, 5120), (5120, 13824)),
    "llama-2-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "llama-3-8b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "llama-3-70b": ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672)),
    "mistral-7b": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "qwen2.5-7b": ((3584, 3584), (512, 3584), (18944, 3584), (3584, 18944)),
    "qwen3-8b": ((4096, 4096), (1024, 4096), (12288, 4096), (4096, 12288)),
    "smollm2-135m": ((576, 576), (192, 576), (1536, 576), (576, 1536)),
}
"""(N, K) = (output channels, inputs) of the linears of a block."""

_INT8_OPERATIONS = {(8, 0): 624e12, (9, 0): 1979e12}
"""Dense INT8 operations per second by compute capability, from NVIDIA's data sheets (A100, H100)."""
_COPY_BYTES = 1 << 29
_POWER_BOUND_TOKENS = (
    128  # from here on the turns before one showed in it on an H100 (docs/LOG.md, 2026-11-28)
)


@dataclass(frozen=True)
class Ceilings:
    """What the device can do: bytes per second of a copy, measured, and INT8 operations per second.

    `operations` is infinite where it is not known; the floor then is that of the bytes alone.
    """

    bandwidth: float
    operations: float

    def floor_us(self, work: Work, n_operations: float) -> float:
        """The time below which nobody gets."""
        return 1e6 * max(
            work.moved_bytes / self.bandwidth, n_operations * work.operand_bits / (8 * self.operations)
        )


@dataclass(frozen=True)
class Result:
    """One case: candidate `name` on an [M, K] x [N, K] product.

    Attributes:
        error: relative Frobenius distance from the exact product; None where a peer has none.
        timing: of the product alone.
        whole: the same with the quantization of float16 activations before it; None if there is none.
    """

    name: str
    is_peer: bool
    n_channels: int
    n_inputs: int
    n_tokens: int
    error: float | None
    timing: Timing
    whole: Timing | None
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


def all_candidates() -> list[Candidate]:
    """Our kernels, then torch, Humming and what other packages plug in."""
    return [*map(KernelCandidate, MODES), *TORCH_PEERS, *HUMMING_PEERS, *plugged_in()]


def usable(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[str]]:
    """The candidates that can run here, and a sentence for each other one.

    Raises:
        KernelError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise KernelError("bench-gemm: no CUDA device here; use --compile-only")
    problems = {candidate.name: candidate.problem() for candidate in candidates}
    able = [candidate for candidate in candidates if not problems[candidate.name]]
    return able, [f"{name} is left out: {problem}" for name, problem in problems.items() if problem]


def bench(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    candidates: Sequence[Candidate],
    ceilings: Ceilings,
    on_left_out: Callable[[str], None],
) -> Iterator[Result]:
    """Check and time every candidate on every (N, K) and number of tokens, shape by shape.

    Args:
        shapes: (N, K); K includes the outliers.
        candidates: `usable` ones.
        ceilings: for the floors.
        on_left_out: told of a peer that cannot do a product, and why.

    Raises:
        VerificationError: a result of ours that is wrong.
        KernelError: a kernel of ours that cannot run.
    """
    for n_channels, n_inputs in shapes:
        shape = f"{n_channels}x{n_inputs}"
        prepared: list[tuple[Candidate, Prepared]] = []
        for candidate in candidates:
            with _peer_may_fail(candidate, shape, on_left_out):
                prepared.append((candidate, candidate.prepare(n_channels, n_inputs, max(tokens))))
        for n_tokens in tokens:
            works: list[tuple[Candidate, Work]] = []
            for candidate, weights in prepared:
                with _peer_may_fail(candidate, f"{shape}, {n_tokens} tokens", on_left_out):
                    work = weights.work(n_tokens)
                    if work is not None:
                        works.append((candidate, work))
            yield from _time(works, (n_channels, n_inputs, n_tokens), ceilings)
        del prepared, works  # before the next shape's memory is taken


@contextmanager
def _peer_may_fail(candidate: Candidate, case: str, on_left_out: Callable[[str], None]) -> Iterator[None]:
    try:
        yield
    except KernelError as error:
        if not candidate.is_peer:
            raise
        on_left_out(f"{candidate.name} is left out at {case}: {error}")


def _time(
    works: Sequence[tuple[Candidate, Work]], sizes: tuple[int, int, int], ceilings: Ceilings
) -> Iterator[Result]:
    wholes = [work.whole for _, work in works if work.whole is not None]
    turn = LONG_TURN if sizes[2] >= _POWER_BOUND_TOKENS else SHORT_TURN
    timings = time_in_turns([work.launches for _, work in works], turn=turn)
    with_quantization = iter(time_in_turns(wholes, rounds=1))
    for (candidate, work), timing in zip(works, timings, strict=True):
        yield Result(
            candidate.name,
            candidate.is_peer,
            *sizes,
            work.error,
            timing,
            None if work.whole is None else next(with_quantization),
            ceilings.floor_us(work, 2.0 * math.prod(sizes)),
            work.moved_bytes,
        )


def measure_ceilings() -> Ceilings:
    """Time copies larger than any cache; look the tensor cores' rate up.

    The fastest copy counts: the driver's own reached 2.4 TB/s on an H100 where a kernel's reaches 3.0.
    """
    source = torch.randn(_COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    copies: list[list[Launch]] = [[lambda: target.copy_(source)], [lambda: torch.neg(source, out=target)]]
    fastest = min(timing.graph_us for timing in time_in_turns(copies))
    operations = _INT8_OPERATIONS.get(torch.cuda.get_device_capability(), float("inf"))
    return Ceilings(2e6 * _COPY_BYTES / fastest, operations)


def environment(ceilings: Ceilings) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    known = ceilings.operations != float("inf")
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "copy_bytes_per_s": ceilings.bandwidth,
        "int8_tops": 1e-12 * ceilings.operations if known else None,
        **describe_method(),
        "long_turn_from_tokens": _POWER_BOUND_TOKENS,
    }
