"""Folding a permutation into the weights around an activation."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from atomq.method.reorder import reorder_inputs, reorder_outputs


def test_reordered_weights_read_the_reordered_input():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 6, generator=generator), torch.randn(3, 6, generator=generator)
    perm = torch.randperm(6, generator=generator).int()
    reordered = reorder_inputs(weight, perm)
    for new, old in enumerate(perm.tolist()):
        assert torch.equal(reordered[:, new], weight[:, old])
    assert torch.allclose(linear(x[:, perm.long()], reordered), linear(x, weight), atol=1e-6)


def test_rows_and_bias_move_together():
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(6, 4, generator=generator), torch.randn(6, generator=generator)
    x, perm = torch.randn(3, 4, generator=generator), torch.randperm(6, generator=generator).int()
    rows, moved = reorder_outputs(weight, bias, perm)
    assert torch.allclose(linear(x, rows, moved), linear(x, weight, bias)[:, perm.long()], atol=1e-6)
    assert torch.equal(moved, bias[perm.long()])
    rows, nothing = reorder_outputs(weight, None, perm)
    assert nothing is None
    assert torch.equal(rows, weight[perm.long()])


def test_each_part_of_a_fused_linear_takes_the_order():
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 5, 4, generator=generator)
    bias, perm = torch.randn(10, generator=generator), torch.randperm(5, generator=generator).int()
    rows, moved = reorder_outputs(torch.cat((gate, up)), bias, perm)
    assert torch.equal(rows, torch.cat((gate[perm.long()], up[perm.long()])))
    assert torch.equal(moved, torch.cat((bias[:5][perm.long()], bias[5:][perm.long()])))
