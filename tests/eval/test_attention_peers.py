"""Peers of the decode kernel: stand-ins for FlashAttention and FlashInfer that compute what theirs would."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from atomq.errors import KernelError
from atomq.eval import attention_peers
from atomq.eval.attention_peers import Case, launches_of, peers

CASE = Case(batch=2, context=70, n_heads=2, group=3, head_dim=16)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(attention_peers, "DEVICE", "cpu")
    monkeypatch.setattr(attention_peers, "_WORKSPACE_BYTES", 16)


def attention(query, keys, values):
    """Of [heads, head_dim] on [tokens, heads of K, head_dim]: queries of a group are neighbours."""
    group = query.shape[0] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1).transpose(0, 1) for x in (keys, values))
    scores = (keys @ query.float()[:, :, None])[..., 0] / query.shape[1] ** 0.5
    return (scores.softmax(-1)[:, None] @ values)[:, 0].half()


def with_kvcache(query, keys, values, cache_seqlens):
    assert query.shape == (2, 1, 6, 16)
    rows = [
        attention(query[i, 0], keys[i, :length], values[i, :length])
        for i, length in enumerate(cache_seqlens.tolist())
    ]
    return torch.stack(rows)[:, None]


class PagedWrapper:
    def __init__(self, workspace, layout, use_tensor_cores):
        assert (workspace.dtype, layout, use_tensor_cores) == (torch.uint8, "NHD", True)

    def plan(self, starts, pages, last, n_queries, n_heads, head_dim, page_tokens, q_data_type):
        assert (n_queries, n_heads, head_dim, page_tokens) == (6, 2, 16, 64)
        assert q_data_type == torch.float16
        self.starts, self.pages, self.last = starts.tolist(), pages.tolist(), last.tolist()

    def run(self, query, cache):
        rows = []
        for i in range(len(query)):
            own = self.pages[self.starts[i] : self.starts[i + 1]]
            length = 64 * (len(own) - 1) + self.last[i]
            keys, values = (torch.cat([x[page] for page in own])[:length] for x in cache)
            rows.append(attention(query[i], keys, values))
        return torch.stack(rows)


def install(monkeypatch, name, **members):
    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))


def test_every_peer_is_asked_for_the_same_attention(monkeypatch):
    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=with_kvcache)
    install(monkeypatch, "flashinfer", BatchDecodeWithPagedKVCacheWrapper=PagedWrapper)
    for name in ("torch flash", "flash-attn", "flashinfer"):
        launches = launches_of(peers()[name], CASE, 2)
        assert [launch().shape for launch in launches] == [(2, 2, 3, 16)] * 2


def test_a_peer_that_is_wrong_is_refused(monkeypatch):
    def wrong(query, keys, values, cache_seqlens):
        return with_kvcache(query, keys, values.flip(0), cache_seqlens)

    install(monkeypatch, "flash_attn", flash_attn_with_kvcache=wrong)
    with pytest.raises(KernelError, match="its result is off by"):
        launches_of(peers()["flash-attn"], CASE, 1)


@pytest.mark.parametrize("name", ["flash-attn", "flashinfer"])
def test_a_peer_that_is_not_installed_says_so(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)
    with pytest.raises(ImportError):
        launches_of(peers()[name], CASE, 1)
