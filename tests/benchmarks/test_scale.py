"""Models made for timing are models like any other."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from atomq.models.loading import load_float_model, load_tokenizer
from atomq.models.source import resolve_source
from benchmarks.scale import make


@pytest.mark.parametrize(("shape", "n_blocks"), [("tiny", 3), ("tiny", None), ("tiny-mixtral", 1)])
def test_a_made_model_has_the_shape_and_the_depth_asked_for(tmp_path, shape, n_blocks):
    make(tmp_path / "model", shape, n_blocks, "cpu")
    source = resolve_source(str(tmp_path / "model"))
    model = load_float_model(source)
    assert model.config.num_hidden_layers == (n_blocks or 4)
    assert json.loads((tmp_path / "model" / "scale.json").read_text())["full_depth"] == 4
    assert model.config.hidden_size == 256
    gate = model.get_submodule("model.layers.0.mlp")
    values = torch.cat([p.flatten() for p in gate.parameters()])
    assert values.std().item() == pytest.approx(0.02, rel=0.05)
    logits = model(torch.tensor([load_tokenizer(source)("words")["input_ids"]])).logits
    assert logits.isfinite().all()


def test_every_block_has_a_file_of_its_own_that_the_index_names(tmp_path):
    make(tmp_path / "model", "tiny", 6, "cpu")
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) == 7
    for file in set(index.values()):
        with safe_open(tmp_path / "model" / file, framework="pt") as shard:
            assert set(shard.keys()) == {name for name, place in index.items() if place == file}
