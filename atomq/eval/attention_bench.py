"""Decode attention on its own: our kernel at 4, 8 and 16 bits beside that of others, on equal sequences.

Correctness of the kernel is the tests' business; here every candidate reads a cache of its own size, as often
as its copies need to leave the L2 cache behind, in turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from atomq.config import KVScheme
from atomq.errors import KernelError
from atomq.eval.attention_peers import REFUSALS, Case, launches_of, normal, peers
from atomq.eval.gemm_timing import RESTED_TURN, ROUNDS, Launch, n_copies, time_in_turns
from atomq.kernels.kv_cache import decode_attention
from atomq.kernels.kv_pages import HeadParameters, PageFormat
from atomq.runtime.decoder import pages_for
from atomq.runtime.random_decoder import random_balance

CACHES = {
    "int4 after RoPE, Hadamard": KVScheme(4, key_position="after_rope", rotation="hadamard"),
    "int4 after RoPE, Hadamard, balanced": KVScheme(
        4, key_position="after_rope", rotation="hadamard", key_balance=True
    ),
    "int4 before RoPE": KVScheme(4),
    "int4 before RoPE, Hadamard": KVScheme(4, rotation="hadamard"),
    "int4 before RoPE, Hadamard, offset": KVScheme(4, rotation="hadamard", key_offset=True),
    "int8 after RoPE": KVScheme(8, key_position="after_rope"),
    "float16": KVScheme(),
}
"""What our kernel decodes from."""


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
        timed = {"rounds": ROUNDS, "turn": asdict(RESTED_TURN)}
        fraction = self.floor_us / self.us
        return {**asdict(self), **self.case._asdict(), "floor_fraction": fraction, "timed": timed}


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
        launches[name] = (_ours(case, layout, CACHES[name], n_copies(moved)), moved)
    moved = 4 * case.batch * case.context * case.n_heads * case.head_dim
    for name, make in peers().items():
        try:
            launches[f"{name}, float16"] = (launches_of(make, case, n_copies(moved)), moved)
        except REFUSALS as error:
            on_left_out(f"{name} is left out at {tuple(case)}: {' '.join(str(error).split())[:200]}")
    timings = time_in_turns([launch for launch, _ in launches.values()], turn=RESTED_TURN)
    for (name, (_, moved)), timing in zip(launches.items(), timings, strict=True):
        floor = 1e6 * moved / bandwidth
        yield Result(name, case, timing.graph_us, timing.graph_p10_us, timing.graph_p90_us, moved, floor)


def _ours(case: Case, layout: PageFormat, scheme: KVScheme, copies: int) -> list[Launch]:
    angles = torch.arange(max(64, case.context), device="cuda")[:, None] * torch.logspace(
        0, -4, case.head_dim // 2, device="cuda"
    )
    rotary = torch.stack((angles.cos(), angles.sin()), dim=-1).contiguous()
    offset, scale = random_balance(scheme, layout, case.context, "cuda")
    heads = HeadParameters.of(rotary, case.head_dim**-0.5, key_offset=offset, key_scale=scale)
    query = normal(case.batch, case.n_heads * case.group, case.head_dim)
    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    per_row = pages_for(case.context)
    n_pages = case.batch * per_row
    made: list[Launch] = []
    for _ in range(copies):
        pages = normal(n_pages, case.n_heads, layout.page_bytes // 2).view(torch.uint8)
        table = torch.randperm(n_pages, device="cuda").int().reshape(case.batch, per_row)
        made.append(
            functools.partial(decode_attention, query, pages, table, lengths, layout, heads, is_settled=True)
        )
    return made
