"""Attention on the KV cache begins while kernels before it run: what it may read of theirs, and when."""

from __future__ import annotations

import math
import re

import pytest
import torch
from sass import disassemble

from atomq.kernels.kv_cache import append_kv, attention_defines, decode_attention
from atomq.kernels.kv_pages import PAGE_TOKENS, HeadParameters, PageFormat
from atomq.kernels.loader import compile_for

LAYOUT = PageFormat(8, 128, 4, "after_rope", "hadamard", "hadamard")
LENGTHS = (1, 63, 64, 65, 0, 128, 129, 700, 1024, 2000) * 6


@pytest.mark.parametrize("group", [1, 8])
def test_what_earlier_kernels_write_is_loaded_behind_their_end(group, tmp_path):
    pytest.importorskip("cupy", reason="compiling a kernel needs CuPy and NVRTC")
    defines = attention_defines(LAYOUT, torch.float16, group, False)
    sass = disassemble(compile_for("kv_attention", "sm_90a", **defines).cubin, tmp_path)
    ahead, behind = sass.split("ACQBULK", 1)
    loads = re.compile(r"LDG\.E(?:\.U\d+)? ")  # not those of what is taken for constant: they move anywhere
    assert not loads.search(ahead)
    assert len(loads.findall(behind)) >= 3  # lengths, page ids, queries


class Batch:
    """Sequences of `LENGTHS` on a GPU, in pages all over the pool."""

    def __init__(self):
        self.generator = torch.Generator("cuda").manual_seed(0)
        angles = torch.arange(2048)[:, None] * torch.logspace(0, -3, LAYOUT.head_dim // 2)
        rotary = torch.stack((angles.cos(), angles.sin()), dim=-1).cuda().contiguous()
        self.heads = HeadParameters.of(rotary, LAYOUT.head_dim**-0.5)
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")
        per_row = math.ceil(max(LENGTHS) / PAGE_TOKENS)
        n_pages = per_row * len(LENGTHS)
        self.table = torch.randperm(n_pages, generator=self.generator, device="cuda").int()
        self.table = self.table.reshape(-1, per_row).contiguous()
        shape = (n_pages, LAYOUT.n_heads, LAYOUT.page_bytes)
        self.pages = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        self.query = self.normal(len(LENGTHS), 4 * LAYOUT.n_heads)

    def normal(self, *shape):
        shape = (*shape, LAYOUT.head_dim)
        return torch.randn(shape, generator=self.generator, device="cuda", dtype=torch.float16)

    def append(self, rows, positions):
        keys, values = (self.normal(len(rows), LAYOUT.n_heads) for _ in range(2))
        append_kv(keys, values, self.pages, self.table, rows, positions, LAYOUT, self.heads)

    def append_prompts(self):
        rows = torch.arange(len(LENGTHS), device="cuda").repeat_interleave(self.lengths).int()
        positions = torch.cat([torch.arange(n, device="cuda") for n in LENGTHS]).int()
        self.append(rows, positions)

    def attend(self, **choices):
        return decode_attention(
            self.query, self.pages, self.table, self.lengths, LAYOUT, self.heads, **choices
        )


@pytest.mark.gpu
def test_a_prompt_is_seen_by_attention_right_behind_it():
    batch = Batch()
    for _ in range(20):
        batch.pages.zero_()
        batch.append_prompts()
        found = batch.attend()
        torch.cuda.synchronize()
        assert torch.equal(found, batch.attend())


@pytest.mark.gpu
@pytest.mark.parametrize("n_splits", [None, 1, 3])
def test_a_step_sees_its_newest_tokens_though_older_ones_are_asked_for_ahead(n_splits):
    batch = Batch()
    batch.append_prompts()
    rows = torch.arange(len(LENGTHS), dtype=torch.int32, device="cuda")
    for _ in range(50):
        positions = batch.lengths - 1  # torch's: all that came before has been written
        batch.append(rows, positions)
        found = batch.attend(is_settled=True, n_splits=n_splits)
        torch.cuda.synchronize()
        assert torch.equal(found, batch.attend(n_splits=n_splits))
