"""Decode attention of others, on float16 K and V after RoPE: torch's backends, FlashAttention, FlashInfer.

Each is asked in the way that suits it best: torch with K and V contiguous and the queries of a group as
neighbouring tokens, FlashAttention with a contiguous cache, FlashInfer with pages of 64 tokens. A library
that is not installed is left out; so is one whose first sequence is not softmax(q K) V.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from atomq.errors import KernelError
from atomq.eval.gemm_timing import Launch
from atomq.kernels.kv_pages import PAGE_TOKENS

DEVICE = "cuda"
_WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation asks for
_TOLERANCE = 5e-3  # of float16 results, relative
REFUSALS = (ImportError, RuntimeError, ValueError, AssertionError, OSError, KernelError)
"""How a peer says that it is not installed, cannot be compiled here, takes no such case, or is wrong."""


class Case(NamedTuple):
    """Equal sequences: `group` query heads for each of `n_heads` of K and V."""

    batch: int
    context: int
    n_heads: int
    group: int
    head_dim: int


Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of queries [batch, n_heads, group, head_dim] and K and V as the peer has them; gives the queries' shape."""


class Peer(NamedTuple):
    """How a library lays K and V out, from [batch, n_heads, context, head_dim], and what it computes."""

    lay_out: Callable[[torch.Tensor], torch.Tensor]
    attend: Attend


def peers() -> dict[str, Callable[[Case], Peer]]:
    """By name; making one raises ImportError where its library is not installed."""
    return {
        "torch flash": functools.partial(_torch, backend=SDPBackend.FLASH_ATTENTION),
        "torch cudnn": functools.partial(_torch, backend=SDPBackend.CUDNN_ATTENTION),
        "flash-attn": _flash_attn,
        "flashinfer": _flashinfer,
    }


def launches_of(make: Callable[[Case], Peer], case: Case, copies: int) -> list[Launch]:
    """Launches on `copies` caches, the first of which has been checked.

    Raises:
        Exception: one of REFUSALS; KernelError if its first sequence is wrong.
    """
    peer = make(case)
    query = normal(case.batch, case.n_heads, case.group, case.head_dim)
    launches: list[Launch] = []
    for number in range(copies):
        keys, values = (normal(case.batch, case.n_heads, case.context, case.head_dim) for _ in range(2))
        laid_out = (peer.lay_out(keys), peer.lay_out(values))
        if number == 0:
            _check(peer.attend(query, *laid_out)[0], query[0], keys[0], values[0])
        launches.append(functools.partial(peer.attend, query, *laid_out))
    return launches


def normal(*shape: int) -> torch.Tensor:
    """float16 values of standard deviation 0.5."""
    return torch.randn(shape, dtype=torch.float16, device=DEVICE) * 0.5


def _check(found: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Of one sequence, [n_heads, ...] each."""
    scores = query.float() @ keys.float().transpose(1, 2) / math.sqrt(query.shape[-1])
    expected = scores.softmax(-1) @ values.float()
    error = float((found.float() - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:
        raise KernelError(f"its result is off by {error:.1e}; at most {_TOLERANCE:.0e} is allowed")


def _torch(case: Case, backend: SDPBackend) -> Peer:
    scale = 1 / math.sqrt(case.head_dim)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(query, keys, values, scale=scale)

    return Peer(lambda x: x, attend)


def _flash_attn(case: Case) -> Peer:
    from flash_attn import flash_attn_with_kvcache

    lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=DEVICE)

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        one_token = query.reshape(case.batch, 1, case.n_heads * case.group, case.head_dim)
        out: torch.Tensor = flash_attn_with_kvcache(one_token, keys, values, cache_seqlens=lengths)
        return out.reshape(query.shape)

    return Peer(lambda x: x.transpose(1, 2).contiguous(), attend)


def _flashinfer(case: Case) -> Peer:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)
    wrapper: Any = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=case.group > 1)
    per_row = math.ceil(case.context / PAGE_TOKENS)
    starts = torch.arange(case.batch + 1, dtype=torch.int32, device=DEVICE) * per_row
    pages = torch.arange(case.batch * per_row, dtype=torch.int32, device=DEVICE)
    last = torch.full((case.batch,), (case.context - 1) % PAGE_TOKENS + 1, dtype=torch.int32, device=DEVICE)
    n_queries = case.n_heads * case.group
    wrapper.plan(
        *(starts, pages, last, n_queries, case.n_heads, case.head_dim, PAGE_TOKENS),
        q_data_type=torch.float16,
    )

    def lay_out(x: torch.Tensor) -> torch.Tensor:
        filled = functional.pad(x, (0, 0, 0, per_row * PAGE_TOKENS - case.context)).transpose(1, 2)
        return filled.reshape(-1, PAGE_TOKENS, case.n_heads, case.head_dim).contiguous()

    def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = wrapper.run(query.reshape(case.batch, n_queries, case.head_dim), (keys, values))
        return out.reshape(query.shape)

    return Peer(lay_out, attend)
