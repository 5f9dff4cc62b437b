"""The model card says what the checkpoint is and how to load it."""

from __future__ import annotations

import pytest
from tiny_checkpoints import SCHEMES, recipe_of

from atomq.config import Recipe, override
from atomq.formats.card import model_card, scheme_name
from atomq.presets import PRESETS

BITS = {"weight": 4.25, "activation": 4.5, "kv": 5.0}


@pytest.mark.parametrize(
    ("preset", "name"),
    [
        ("atom", "W4A4KV4"),
        ("rtn", "W4A4"),
        ("w3a3", "W3A3"),
        ("w4a8", "W4A8"),
        ("w4a16", "W4A16"),
        ("w8a8", "W8A8"),
    ],
)
def test_the_name_says_the_bits(preset, name):
    assert scheme_name(PRESETS[preset].scheme) == name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_row_of_the_table_is_one_line(scheme):
    card = model_card("org/model", recipe_of(scheme), BITS, "0.1.0")
    table = card[card.index("| | |") : card.index("Made with")].strip().splitlines()
    assert all(row.startswith("| ") and row.endswith(" |") and row.count("|") == 3 for row in table)
    assert len(table) == 9


def test_the_card_says_how_to_load_the_folder_and_with_what():
    card = model_card("org/model", PRESETS["atom"], BITS, "0.1.0")
    assert card.startswith('---\nbase_model: "org/model"\nlibrary_name: transformers\n')
    assert "import atomq.hf" in card
    assert 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER")' in card
    assert "Made with atomq 0.1.0" in card
    assert "| weights | 4 bits (int), groups of 128, 4.250 effective bits |" in card
    assert "| KV cache | 4 bits, K before RoPE, 5.000 effective bits |" in card
    assert "| outlier channels per input | 128 in int8 |" in card
    assert "| recipe | atom |" in card
    assert "| calibrated on | nothing |" in card
    text = {"data": "builtin", "n_samples": 24, "seq_len": 512}
    card = model_card("org/model", PRESETS["atom"], BITS, "0.1.0", text)
    assert "| calibrated on | builtin: 24 x 512 tokens |" in card
    assert 'atomq eval-ppl THIS_FOLDER --baseline "org/model"' in card


@pytest.mark.parametrize(
    ("settings", "cache"),
    [
        ({}, "4 bits, K after RoPE balanced, Hadamard"),
        (
            {"kv.key_position": "before_rope", "kv.key_balance": False, "kv.key_offset": True},
            "4 bits, K before RoPE less an offset, Hadamard",
        ),
        ({"kv.n_bits": 16}, "floating point"),
    ],
)
def test_the_card_says_how_k_is_coded(settings, cache):
    card = model_card("org/model", override(PRESETS["atomq"], settings), BITS, "0.1.0")
    assert f"| KV cache | {cache}, 5.000 effective bits |" in card


def test_a_name_cannot_break_out_of_the_front_matter():
    card = model_card("a: b # c", PRESETS["atom"], BITS, "0.1.0")
    assert 'base_model: "a: b # c"\n' in card


def test_weights_left_in_floating_point_are_called_so():
    recipe = override(Recipe(), {"weights.n_bits": 16})
    assert "| weights | floating point, 4.250 effective bits |" in model_card("m", recipe, BITS, "0.1.0")
