"""A decoder of stages on a paged KV cache: prefill of prompts, and one step of decoding for a batch.

Blocks are Llama's: pre-norm, grouped attention with RoPE, gated MLP (Llama, Mistral, Qwen2, Qwen3). On a GPU
all but embedding and output head are atomq's kernels; on a CPU their twins compute the same. A product goes
on as the `delta` of the residual stream x: the next norm's kernel adds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

from atomq.errors import KernelError
from atomq.kernels import kv_reference
from atomq.kernels.kv_cache import append_kv, decode_attention, read_kv
from atomq.kernels.kv_pages import PAGE_TOKENS, HeadParameters, PageFormat
from atomq.kernels.layout import Added
from atomq.kernels.rows import prepare_rows
from atomq.runtime.stages import Norm, Stage


@dataclass(frozen=True)
class Block:
    """One decoder block; `heads` holds what its attention needs beside the projections."""

    qkv: Stage
    o: Stage
    gate_up: Stage
    down: Stage
    heads: HeadParameters

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.qkv, self.o, self.gate_up, self.down


@dataclass(frozen=True)
class Decoder:
    """Attributes:
    embeddings, head: [vocabulary, hidden] in the dtype of the activations.
    n_query_heads: heads of the queries; those of K and V are the layout's.
    """

    embeddings: torch.Tensor
    blocks: tuple[Block, ...]
    final_norm: Norm
    head: torch.Tensor
    n_query_heads: int
    layout: PageFormat

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def max_positions(self) -> int:
        """Positions that RoPE's table holds."""
        return self.blocks[0].heads.rotary.shape[0]

    @property
    def weight_bytes(self) -> int:
        """Memory of blocks, embeddings and head (counted once where it is tied)."""
        tensors = {x.data_ptr(): x.numel() * x.element_size() for x in (self.embeddings, self.head)}
        return sum(tensors.values()) + sum(stage.n_bytes for block in self.blocks for stage in block.stages)

    def step(self, tokens: torch.Tensor, lengths: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Logits [B, vocabulary] after `tokens` int64 [B], whose K and V are appended to the cache.

        `lengths` int32 [B] counts the cache's tokens with the new one; 0 is an empty slot.
        """
        x = functional.embedding(tokens, self.embeddings)
        delta: torch.Tensor | None = None
        rows, positions = cache.rows[: len(tokens)], lengths - 1
        for block, pages in zip(self.blocks, cache.pages, strict=True):
            qkv, x = _enter(block.qkv, x, delta)
            query, keys, values = self._split(qkv)
            append_kv(keys, values, pages, cache.table, rows, positions, self.layout, block.heads)
            # `lengths - 1` has begun after all that came before this step
            attended = decode_attention(
                query, pages, cache.table, lengths, self.layout, block.heads, is_settled=True
            )
            gate_up, x = _enter(block.gate_up, x, block.o(attended.flatten(1)))
            delta = block.down(gate_up)
        return self.logits(x, delta)

    def prefill(
        self,
        prompts: Sequence[torch.Tensor],
        rows: Sequence[int],
        cache: Cache,
        *,
        after_every_token: bool = False,
    ) -> torch.Tensor:
        """Logits [n, vocabulary] after whole prompts, int64 [tokens] each, put into rows `rows` of the cache.

        With `after_every_token` there are as many as tokens.

        Attention reads K and V back from the cache, so the prompt is seen as later tokens will see it.
        """
        return self.read(Prompts.of(prompts, rows, self.device), cache, after_every_token=after_every_token)

    def read(self, prompts: Prompts, cache: Cache, *, after_every_token: bool = False) -> torch.Tensor:
        """As `prefill`; nothing goes from or to the host, so it can be captured in a CUDA graph."""
        x = functional.embedding(prompts.tokens, self.embeddings)
        delta: torch.Tensor | None = None
        where = (cache.table, prompts.rows, prompts.places, self.layout)
        for block, pages in zip(self.blocks, cache.pages, strict=True):
            qkv, x = _enter(block.qkv, x, delta)
            query, keys, values = self._split(qkv)
            append_kv(keys, values, pages, *where, block.heads)
            keys, values = read_kv(pages, *where, block.heads, query.dtype)
            query = kv_reference.head_norm(query.float(), block.heads.query_norm, block.heads.epsilon)
            query = kv_reference.rotate(query, prompts.places.long(), block.heads).to(keys.dtype)
            attended = _causal_attention(query, keys, values, prompts.counts, block.heads.softmax_scale)
            gate_up, x = _enter(block.gate_up, x, block.o(attended))
            delta = block.down(gate_up)
        which = slice(None) if after_every_token else prompts.ends
        return self.logits(x[which], None if delta is None else delta[which])

    def _split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values [T, heads, head_dim] of the stacked projection."""
        n_kv = self.layout.n_heads
        heads = qkv.reshape(len(qkv), -1, self.layout.head_dim)
        first = self.n_query_heads
        return heads[:, :first], heads[:, first : first + n_kv], heads[:, first + n_kv :]

    def logits(self, x: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Final norm and output head of `x` [T, hidden], to which the last block's `delta` is added first."""
        normed = prepare_rows(
            x,
            norm_weight=self.final_norm.weight,
            epsilon=self.final_norm.epsilon,
            added=None if delta is None else Added.to(delta),
        )
        return functional.linear(normed, self.head)


def _enter(stage: Stage, x: torch.Tensor, delta: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a stage makes of `x` [T, hidden], or of x + delta; and that sum."""
    if delta is None:
        return stage(x), x
    added = Added.to(delta)
    return stage(x, added), added.total


class Prompts(NamedTuple):
    """Whole prompts one after the other, on the decoder's device.

    Attributes:
        tokens: int64 [T]. rows, places: int32 [T]: each token's row of the cache, and its place there.
        ends: int64 [n]: where among the tokens each prompt's last one is. counts: tokens of each prompt.
    """

    tokens: torch.Tensor
    rows: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
    counts: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[torch.Tensor], rows: Sequence[int], device: torch.device) -> Prompts:
        """Of prompts int64 [tokens] each, for rows `rows`."""
        counts = torch.tensor([len(prompt) for prompt in prompts])
        row_of = torch.tensor(rows, dtype=torch.int32).repeat_interleave(counts)
        places = torch.cat([torch.arange(len(prompt), dtype=torch.int32) for prompt in prompts])
        ends = counts.cumsum(0) - 1
        row_of, places, ends = (x.to(device) for x in (row_of, places, ends))
        return cls(torch.cat(list(prompts)), row_of, places, ends, tuple(counts.tolist()))


class Cache:
    """The pages of every block, and which of them each row of a batch has.

    Attributes:
        pages: uint8 [n_pages, n_heads, page_bytes], one tensor for each block.
        table: int32 [n_rows, pages of a row].
        rows: int32 [n_rows]: 0, 1, 2, ..
    """

    def __init__(
        self,
        decoder: Decoder,
        n_rows: int,
        max_tokens: int,
        n_pages: int | None = None,
        memory: torch.Tensor | None = None,
    ) -> None:
        """`n_pages` None gives each row the pages of `max_tokens`; else rows get theirs by `give`.

        `memory` uint8 [bytes], large enough, is where the pages are to lie; None allocates them.

        Raises:
            KernelError: `max_tokens` are more than the model has positions.
        """
        if max_tokens > decoder.max_positions:
            raise KernelError(
                f"{max_tokens} tokens are more than the {decoder.max_positions} positions of the model"
            )
        per_row = pages_for(max_tokens)
        device, layout = decoder.device, decoder.layout
        owns_all = n_pages is None
        n_pages = n_rows * per_row if n_pages is None else n_pages
        size = n_pages * layout.n_heads * layout.page_bytes
        if memory is None:
            memory = torch.empty(size * len(decoder.blocks), dtype=torch.uint8, device=device)
        shape = (n_pages, layout.n_heads, layout.page_bytes)
        self.pages = [memory[i * size : (i + 1) * size].reshape(shape) for i in range(len(decoder.blocks))]
        self.rows = torch.arange(n_rows, dtype=torch.int32, device=device)
        self.table = torch.zeros((n_rows, per_row), dtype=torch.int32, device=device)
        self._free = list(range(n_pages))[::-1]
        self._owned: dict[int, list[int]] = {}
        if owns_all:
            for row in range(n_rows):
                self.give(row, max_tokens)

    @property
    def n_free(self) -> int:
        """Pages that no row has."""
        return len(self._free)

    def give(self, row: int, n_tokens: int) -> None:
        """Pages for `n_tokens` to an empty row; there must be enough."""
        pages = [self._free.pop() for _ in range(pages_for(n_tokens))]
        self._owned[row] = pages
        self.table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32, device=self.table.device)

    def take_back(self, row: int) -> None:
        """Free a row's pages."""
        self._free.extend(self._owned.pop(row))


def pages_for(n_tokens: int) -> int:
    """Pages that hold `n_tokens` of one row."""
    return math.ceil(n_tokens / PAGE_TOKENS)


def _causal_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    counts: Sequence[int],
    softmax_scale: float,
) -> torch.Tensor:
    """Attention of each prompt to itself: [T, heads * head_dim]; prompts of one length go together."""
    length = counts[0]
    if any(count != length for count in counts):
        ends = torch.tensor(counts).cumsum(0).tolist()
        parts = [slice(end - count, end) for count, end in zip(counts, ends, strict=True)]
        each = (
            _causal_attention(query[part], keys[part], values[part], counts[i : i + 1], softmax_scale)
            for i, part in enumerate(parts)
        )
        return torch.cat(list(each))

    def batched(x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(counts), length, *x.shape[1:]).transpose(1, 2)

    attended = functional.scaled_dot_product_attention(
        batched(query),
        batched(keys),
        batched(values),
        is_causal=True,
        scale=softmax_scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return attended.transpose(1, 2).reshape(len(query), -1)
