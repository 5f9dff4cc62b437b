"""GPTQ exports opened by the real gptqmodel on the CPU, where it is installed (`make test-peers`)."""

from __future__ import annotations

import pytest
import torch
from tiny_exports import make_checkpoint
from tiny_models import save_tiny_model

from atomq.checkpoints import open_checkpoint
from atomq.export.folder import export
from atomq.export.stored import read_blocks

gptqmodel = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")

SCHEMES = {
    "symmetric": ("gptq", {}),
    "reordered": ("gptq", {"outliers.reorder": True}),
    "whole rows": ("gptq", {"weights.group_size": None}),
    "8 bits": ("gptq", {"weights.n_bits": 8}),
    "version 2": ("gptq_v2", {}),
    "version 2 asymmetric and reordered": ("gptq_v2", {"outliers.reorder": True, "weights.symmetric": False}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_reads_the_checkpoints_weights(tmp_path, scheme):
    version, settings = SCHEMES[scheme]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    model = save_tiny_model(tmp_path / "model", "llama", **sizes)
    out = make_checkpoint(model, tmp_path / "OUT", "w4a16", {"weights.group_size": 32, **settings})
    dest = export(out, tmp_path / "DEST", version).path
    loaded = gptqmodel.GPTQModel.load(
        str(dest), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16
    ).model
    for block in read_blocks(out, open_checkpoint(out, check_hashes=False)):
        for name, stored in block.linears.items():
            found = loaded.get_submodule(name).dequantize_weight().T
            assert torch.equal(found, stored.model_weight().half())
