"""Decode attention on its own: our kernel at 4, 8 and 16 bits beside what torch has, on equal sequences.

Correctness is the tests' business; here every candidate reads a cache of its own size, as often as its
copies need to leave the L2 cache behind, in turns. torch's attention gets K and V contiguous, already after
RoPE and in float16, and the queries of a group as neighbouring tokens, which is the fastest way to ask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from atomq.config import KVScheme
from atomq.errors import KernelError
from atomq.eval.gemm_timing import Launch, n_copies, time_in_turns
from atomq.kernels.kv_cache import decode_attention
from atomq.kernels.kv_pages import HeadParameters, PageFormat
from atomq.runtime.decoder import pages_for

CACHES = {
    "int4 after RoPE, Hadamard": KVScheme(4, key_position="after_rope", rotation="hadamard"),
    "int4 before RoPE": KVScheme(4),
    "int4 before RoPE, Hadamard": KVScheme(4, rotation="hadamard"),
    "int4 before RoPE, Hadamard, offset": KVScheme(4, rotation="hadamard", key_offset=True),
    "int8 after RoPE": KVScheme(8, key_position="after_rope"),
    "float16": KVScheme(),
}
"""What our kernel decodes from."""
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class Case(NamedTuple):
    """Equal sequences: `group` query heads for each of `n_heads` of K and V."""

    batch: int
    context: int
    n_heads: int
    group: int
    head_dim: int


@dataclass(frozen=True)
class Result:
    """Microseconds of one candidate on one case; bytes are those of K and V with ranges."""

    name: str
    case: Case
    us: float
    p10_us: float
    p90_us: float
    moved_bytes: int
    floor_us: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), **self.case._asdict(), "floor_fraction": self.floor_us / self.us}


def layouts(n_heads: int, head_dim: int) -> dict[str, PageFormat]:
    """The pages of `CACHES` by name; those that the kernel does not take at this head dim are left out."""
    taken = {}
    for name, scheme in CACHES.items():
        try:
            taken[name] = PageFormat.of(scheme, n_heads, head_dim)
        except KernelError:
            continue
    return taken


def bench(case: Case, bandwidth: float, on_left_out: Callable[[str], None]) -> Iterator[Result]:
    """Time all candidates on `case`; `bandwidth` in bytes per second makes the floors."""
    launches: dict[str, tuple[list[Launch], int]] = {}
    for name, layout in layouts(case.n_heads, case.head_dim).items():
        moved = case.batch * case.context * layout.token_bytes
        has_offset = CACHES[name].has_key_offset
        launches[name] = (_ours(case, layout, has_offset, n_copies(moved)), moved)
    moved = 4 * case.batch * case.context * case.n_heads * case.head_dim
    for name, backend in BACKENDS.items():
        try:
            launches[f"torch {name}, float16"] = (_torch(case, backend, n_copies(moved)), moved)
        except RuntimeError as error:
            on_left_out(f"torch {name} is left out at {tuple(case)}: {' '.join(str(error).split())[:200]}")
    timings = time_in_turns([launch for launch, _ in launches.values()])
    for (name, (_, moved)), timing in zip(launches.items(), timings, strict=True):
        floor = 1e6 * moved / bandwidth
        yield Result(name, case, timing.graph_us, timing.graph_p10_us, timing.graph_p90_us, moved, floor)


def _ours(case: Case, layout: PageFormat, has_offset: bool, copies: int) -> list[Launch]:
    angles = torch.arange(max(64, case.context), device="cuda")[:, None] * torch.logspace(
        0, -4, case.head_dim // 2, device="cuda"
    )
    rotary = torch.stack((angles.cos(), angles.sin()), dim=-1).contiguous()
    offset = torch.randn(case.n_heads, case.head_dim, device="cuda") if has_offset else None
    heads = HeadParameters.of(rotary, case.head_dim**-0.5, key_offset=offset)
    query = _normal(case.batch, case.n_heads * case.group, case.head_dim)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    per_row = pages_for(case.context)
    n_pages = case.batch * per_row
    made: list[Launch] = []
    for _ in range(copies):
        pages = _normal(n_pages, case.n_heads, layout.page_bytes // 2).view(torch.uint8)
        table = torch.randperm(n_pages, device="cuda").int().reshape(case.batch, per_row)
        made.append(functools.partial(decode_attention, query, pages, table, lengths, layout, heads))
    return made


def _torch(case: Case, backend: SDPBackend, copies: int) -> list[Launch]:
    query = _normal(case.batch, case.n_heads, case.group, case.head_dim)
    shape = (case.batch, case.n_heads, case.context, case.head_dim)
    scale = 1 / math.sqrt(case.head_dim)

    def launch(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, keys, values, scale=scale)

    launch(_normal(*shape), _normal(*shape))
    torch.cuda.synchronize()
    return [functools.partial(launch, _normal(*shape), _normal(*shape)) for _ in range(copies)]


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float16, device="cuda") * 0.5
