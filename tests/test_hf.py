"""Checkpoints opened through transformers: bit for bit what the file holds, and what was simulated."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import tiny_checkpoints
import torch
from safetensors.torch import load_file
from tiny_checkpoints import (
    SCHEMES,
    change_json,
    change_tensor,
    quantize_tiny,
    raw_bytes,
    simulate_tiny,
    stored_tensors,
)
from tiny_models import TINY_MODELS, make_tiny_model, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import atomq
import atomq.checkpoints
import atomq.hf
from atomq import key_statistics, pipeline
from atomq.config import CalibrationConfig, override
from atomq.errors import CheckpointError, ConfigError, VerificationError
from atomq.models import quantized
from atomq.numerics import kv
from atomq.numerics.linear import QuantizedLinear

TOKENS = torch.arange(5, 29)[None]
# The last parts of the names of tensors that stay as they are, whatever dtype the model is loaded in.
EXACT = (
    "qweight",
    "scales",
    "scale_base",
    "scale_factors",
    "zeros",
    "outlier_weight",
    "outlier_scales",
    "perm",
    "clip_ratio",
)
# What meets families in different ways: biases, reordered rows, heads of other sizes, norms of K.
FOR_EVERY_FAMILY = ("atom", "progressive hadamard", "asymmetric", "kv after rope", "w16a4", "w8a8")


class Made(NamedTuple):
    """A checkpoint, read block by block and written block by block, and its simulation made in memory."""

    path: Path
    model: PreTrainedModel


def made_of(source: Path, out: Path, scheme: str = "atom") -> Made:
    return Made(quantize_tiny(source, out, scheme).path, simulate_tiny(source, out.parent, scheme))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folders of float models by family, made once each."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in made:
            made[kind] = save_tiny_model(tmp_path_factory.mktemp("float") / kind, kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    """Results of quantizing by family and scheme, made once each. Do not change their folders."""
    made = {}

    def get(kind: str = "llama", scheme: str = "atom"):
        if (kind, scheme) not in made:
            folder = tmp_path_factory.mktemp("out")
            made[kind, scheme] = made_of(source(kind), folder / "OUT", scheme)
        return made[kind, scheme]

    return get


@pytest.fixture
def spoilable(checkpoint, tmp_path):
    """Copies of checkpoints that a test may spoil."""

    def get(kind: str = "llama", scheme: str = "atom") -> Path:
        return Path(shutil.copytree(checkpoint(kind, scheme).path, tmp_path / "OUT"))

    return get


@pytest.fixture(scope="module")
def tiny_scale_checkpoint(tmp_path_factory):
    """A checkpoint whose first o_proj has scales that F16 cannot hold as normal numbers."""
    folder = tmp_path_factory.mktemp("tiny-scales")
    model = make_tiny_model()
    model.model.layers[0].self_attn.o_proj.weight.mul_(1e-6)
    model.save_pretrained(folder / "model")
    tiny_checkpoints.calibration_text(folder)
    from tiny_models import byte_tokenizer

    byte_tokenizer().save_pretrained(folder / "model")
    return made_of(folder / "model", folder / "OUT")


def exact_names(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for name, t in stored_tensors(folder).items() if name.rpartition(".")[2] in EXACT}


def assert_exact(model, folder: Path) -> None:
    """Codes, scales and permutations of `model` are those of the files, bit for bit."""
    state, stored = model.state_dict(), exact_names(folder)
    assert len(stored) > 20
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype, name
        assert state[name].shape == tensor.shape, name
        assert raw_bytes(state[name]) == raw_bytes(tensor), name


# What was simulated is what the file holds.


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [("llama", scheme) for scheme in SCHEMES]
    + [(kind, scheme) for kind in TINY_MODELS if kind != "llama" for scheme in FOR_EVERY_FAMILY],
)
def test_the_simulated_model_and_the_loaded_checkpoint_give_the_same_logits(checkpoint, kind, scheme):
    made = checkpoint(kind, scheme)
    loaded = atomq.hf.load(made.path)
    assert torch.equal(made.model(TOKENS).logits, loaded(TOKENS).logits)
    assert loaded.dtype == torch.float32


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_changes_the_model(checkpoint, source, scheme):
    """Or the comparison above would compare two float models."""
    original = AutoModelForCausalLM.from_pretrained(source("llama"))
    error = (original(TOKENS).logits - atomq.hf.load(checkpoint("llama", scheme).path)(TOKENS).logits).abs()
    assert 1e-4 < float(error.detach().mean()) < 3


@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize("transform", ["none", "hadamard"])
def test_with_8_bit_weights_a_reordered_model_is_nearly_the_original(source, tmp_path, kind, transform):
    """Permutations, reordered rows and biases, and the transform are where they belong."""
    settings = {"weights.n_bits": 8, "activations.n_bits": 16, "kv.n_bits": 16, "transform": transform}
    settings |= {"activations.group_size": 16, "outliers.precision": "fp16"}
    settings |= {"solver.method": "rtn", "solver.clip_ratio": 1.0}
    recipe = override(tiny_checkpoints.recipe_of("atom"), settings)
    text = tiny_checkpoints.calibration_text(tmp_path)
    calibration = CalibrationConfig(str(text), n_samples=4, seq_len=32)
    pipeline.quantize(str(source(kind)), tmp_path / "OUT", recipe, "cpu", calibration=calibration)
    perms = [t for name, t in stored_tensors(tmp_path / "OUT").items() if name.endswith("perm")]
    assert not any(torch.equal(perm, torch.arange(len(perm))) for perm in perms)
    original = AutoModelForCausalLM.from_pretrained(source(kind))(TOKENS).logits
    error = (atomq.hf.load(tmp_path / "OUT")(TOKENS).logits - original).detach().abs().mean()
    assert float(error) < 0.05  # half of the logits would be wrong by 1 if one of them were not


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", ["atom", "w16a4 hadamard"])
def test_a_model_stored_in_16_bits_gives_the_same_logits_too(tmp_path, dtype, scheme):
    folder = save_tiny_model(tmp_path / "model")
    make_tiny_model().to(dtype).save_pretrained(folder)
    made = made_of(folder, tmp_path / "OUT", scheme)
    dtypes = {t.dtype for name, t in stored_tensors(made.path).items() if name.endswith(".weight")}
    assert dtypes == {dtype}
    assert torch.equal(made.model(TOKENS).logits, atomq.hf.load(made.path)(TOKENS).logits)


# Opening by transformers' own names.


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_from_pretrained_opens_every_family(checkpoint, kind):
    made = checkpoint(kind)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    assert torch.equal(model(TOKENS).logits, made.model(TOKENS).logits)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14


def test_atomq_hf_may_be_imported_and_reloaded_many_times(checkpoint):
    for _ in range(2):
        importlib.reload(importlib.import_module("atomq.hf"))
    made = checkpoint()
    assert torch.equal(atomq.hf.load(made.path)(TOKENS).logits, made.model(TOKENS).logits)


def test_the_loaded_model_is_ready_for_use(checkpoint):
    model = atomq.hf.load(checkpoint().path)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config.quantization_config.to_dict()["quant_method"] == "atomq"
    assert dict(model.config.quantization_config) == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("scheme", ["atom", "kv after rope", "w16a4", "kv only"])
def test_generate_with_a_cache_gives_what_it_gives_without(checkpoint, scheme):
    model = atomq.hf.load(checkpoint("llama", scheme).path)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(TOKENS, use_cache=True, **settings)
    assert cached.shape == (1, TOKENS.shape[1] + 8)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **settings))


def test_generate_takes_a_padded_batch(checkpoint):
    model = atomq.hf.load(checkpoint("llama", "kv after rope").path)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = model.generate(TOKENS[:, :6], attention_mask=torch.ones(1, 6, dtype=torch.long), **settings)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), TOKENS[:, :6]), dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    together = model.generate(torch.cat((padded, padded)), attention_mask=torch.cat((mask, mask)), **settings)
    assert torch.equal(together[0, 3:], alone[0])
    assert torch.equal(together[0], together[1])


@pytest.mark.parametrize("kind", ["llama", "gemma3", "smollm3", "phi3", "opt"])
def test_places_of_a_padded_batch_and_of_new_tokens_choose_rows_of_k_s_offset(kind, tmp_path, monkeypatch):
    """Rows of 4 positions: a token's row is that of its place in its own text, with a cache and without."""
    for module in (quantized, key_statistics, kv):
        monkeypatch.setattr(module, "OFFSET_TOKENS", 4)
    source = save_tiny_model(tmp_path / "model", kind)
    model = atomq.hf.load(quantize_tiny(source, tmp_path / "OUT", "kv after rope").path)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    own = TOKENS[:, :7]
    alone = model.generate(own, attention_mask=torch.ones_like(own), **settings)
    batch = torch.cat((TOKENS[:, :17], torch.cat((torch.zeros(1, 10, dtype=torch.long), own), dim=1)))
    mask = torch.tensor([[1] * 17, [0] * 10 + [1] * 7])
    together = model.generate(batch, attention_mask=mask, **settings)
    without = model(alone.sequences[:, :-1], use_cache=False).logits[0, 6:]
    expected = torch.stack(alone.logits, 1)[0]
    assert torch.allclose(torch.stack(together.logits, 1)[1], expected, atol=1e-3)
    assert torch.allclose(without, expected, atol=1e-3)


@pytest.mark.parametrize("scheme", ["atom", "w8a8", "asymmetric"])
def test_one_token_alone_gives_finite_logits(checkpoint, scheme):
    assert bool(atomq.hf.load(checkpoint("llama", scheme).path)(TOKENS[:, :1]).logits.isfinite().all())


@pytest.mark.parametrize("scheme", ["hadamard", "fp4 bnb", "w16a4"])
def test_a_model_used_in_inference_mode_works_with_gradients_afterwards(checkpoint, scheme):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama", scheme).path)
    with torch.inference_mode():
        expected = model(TOKENS).logits
    logits = model(TOKENS).logits
    assert logits.requires_grad
    assert torch.equal(logits, expected)
    logits.sum().backward()


# Bits survive every dtype.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_codes_and_scales_are_those_of_the_file_in_every_dtype(checkpoint, scheme, dtype):
    folder = checkpoint("llama", scheme).path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.get_input_embeddings().weight.dtype == dtype
    logits = model(TOKENS).logits
    assert logits.dtype == dtype
    assert bool(logits.isfinite().all())
    if scheme not in ("kv only", "w16a4", "w16a4 hadamard"):
        assert_exact(model, folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tables_of_k_are_those_of_the_file_in_every_dtype(checkpoint, dtype):
    folder = checkpoint("llama", "kv after rope").path
    tables = {n: t for n, t in stored_tensors(folder).items() if n.endswith(("key_offset", "key_scale"))}
    assert len(tables) == 4
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert all(raw_bytes(model.get_buffer(name)) == raw_bytes(t) for name, t in tables.items())
    model.to(dtype)  # they are numbers of bfloat16, so that a cast changes none but float16's subnormal ones
    atol = 2**-25 if dtype == torch.float16 else 0
    for name, table in tables.items():
        assert torch.allclose(model.get_buffer(name).float(), table, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_codes_and_scales_survive_half_in_every_family(checkpoint, kind):
    folder = checkpoint(kind).path
    model = AutoModelForCausalLM.from_pretrained(folder).half()
    assert model.get_input_embeddings().weight.dtype == torch.float16
    assert_exact(model, folder)
    assert_exact(model.to(torch.bfloat16), folder)
    assert_exact(model.float(), folder)
    assert bool(model(TOKENS).logits.isfinite().all())


@pytest.mark.parametrize("scheme", ["e5m2 outliers", "e4m3 outliers", "fp16 outliers", "searched clips"])
def test_every_kind_of_float_code_survives_half(checkpoint, scheme):
    folder = checkpoint("llama", scheme).path
    model = atomq.hf.load(folder)
    before = model(TOKENS).logits
    assert_exact(model.half(), folder)
    assert_exact(model.float(), folder)
    assert float((model(TOKENS).logits - before).abs().mean()) < 0.2  # norms and embeddings were rounded


@pytest.mark.parametrize("scheme", ["atom", "progressive", "e4m3 outliers", "searched clips"])
def test_float_codes_are_those_of_the_file_whatever_transformers_made_of_them(checkpoint, scheme):
    folder = checkpoint("llama", scheme).path
    model = AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if name in EXACT and buffer.is_floating_point():
                module._buffers[name] = buffer.to(torch.bfloat16)
    model.hf_quantizer._process_model_after_weight_loading(model)
    assert_exact(model, folder)


def test_the_16_bit_weights_of_a_reordered_model_keep_their_perm_in_half(checkpoint):
    folder = checkpoint("llama", "w16a4").path
    model = atomq.hf.load(folder, dtype="float16")
    perms = {name: t for name, t in stored_tensors(folder).items() if name.endswith("perm")}
    assert len(perms) == 8
    for name, perm in perms.items():
        assert perm.dtype == torch.int32
        assert torch.equal(model.state_dict()[name], perm)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scales_that_need_float32_keep_it(tiny_scale_checkpoint, dtype):
    made = tiny_scale_checkpoint
    scales = stored_tensors(made.path)["model.layers.0.self_attn.o_proj.scales"]
    assert scales.dtype == torch.float32
    assert float(scales.min()) < 2**-14
    assert stored_tensors(made.path)["model.layers.1.self_attn.o_proj.scales"].dtype == torch.float16
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=dtype)
    assert_exact(model, made.path)
    assert_exact(model.half(), made.path)


def test_scales_that_need_float32_give_the_simulated_logits(tiny_scale_checkpoint):
    made = tiny_scale_checkpoint
    assert torch.equal(made.model(TOKENS).logits, atomq.hf.load(made.path)(TOKENS).logits)


# Saving again.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_that_was_cast_is_saved_as_one_that_opens(checkpoint, dtype, tmp_path):
    """Also with tables of K, which the cast takes along."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama", "kv after rope").path).to(dtype)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=dtype)
    assert_exact(again, checkpoint("llama", "kv after rope").path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name].float(), tensor.float()), name


@pytest.mark.parametrize("kind", TINY_MODELS)
@pytest.mark.parametrize(
    "scheme", ["atom", "progressive hadamard", "searched clips", "e4m3 outliers", "w16a4", "kv after rope"]
)
def test_save_pretrained_writes_the_same_tensors(checkpoint, kind, scheme, tmp_path):
    made = checkpoint(kind, scheme)
    model = AutoModelForCausalLM.from_pretrained(made.path)
    model.save_pretrained(tmp_path / "again")
    before, after = stored_tensors(made.path), stored_tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw_bytes(after[name]) == raw_bytes(tensor), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_save_pretrained_in_several_shards_loads_again(checkpoint, tmp_path):
    made = checkpoint()
    AutoModelForCausalLM.from_pretrained(made.path).save_pretrained(tmp_path / "again", max_shard_size="40KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(again(TOKENS).logits, made.model(TOKENS).logits)


def test_a_model_loaded_in_half_saves_the_codes_of_the_file(tiny_scale_checkpoint, tmp_path):
    made = tiny_scale_checkpoint
    AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float16).save_pretrained(tmp_path / "again")
    saved = stored_tensors(tmp_path / "again")
    for name, tensor in exact_names(made.path).items():
        assert saved[name].dtype == tensor.dtype, name
        assert raw_bytes(saved[name]) == raw_bytes(tensor), name
    assert AutoConfig.from_pretrained(tmp_path / "again").dtype == torch.float16


# Every nibble, scale and entry of a permutation counts.


def flip_low_nibble(t: torch.Tensor) -> None:
    t[1, 2] ^= 0b0100


def flip_high_nibble(t: torch.Tensor) -> None:
    t[1, 2] ^= 0b0100_0000


def next_scale(t: torch.Tensor) -> None:
    t[0, 1] *= 1.5


def swap_entries(t: torch.Tensor) -> None:
    t[[2, 9]] = t[[9, 2]]


def set_first(value: float):
    def change(t: torch.Tensor) -> None:
        t[0, 0] = value

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mlp.gate_proj.qweight", flip_low_nibble),
        ("mlp.gate_proj.qweight", flip_high_nibble),
        ("self_attn.k_proj.qweight", flip_low_nibble),
        ("mlp.down_proj.scales", next_scale),
        ("mlp.down_proj.outlier_scales", lambda t: t.mul_(1.5)),
        ("mlp.down_proj.outlier_weight", lambda t: t.neg_()),
        ("self_attn.q_proj.perm", swap_entries),
        ("self_attn.o_proj.perm", swap_entries),
        ("mlp.gate_proj.perm", swap_entries),
    ],
)
def test_one_altered_value_alters_the_logits(checkpoint, spoilable, name, change):
    folder = spoilable()
    change_tensor(folder, f"model.layers.1.{name}", change)
    altered = atomq.hf.load(folder, check_hashes=True)
    assert not torch.equal(altered(TOKENS).logits, checkpoint().model(TOKENS).logits)


@pytest.mark.parametrize("index", range(4))
def test_the_flag_of_each_group_says_whether_it_is_transformed(checkpoint, spoilable, index):
    folder = spoilable("llama", "hadamard")

    def change(config) -> None:
        config["quantization_config"]["family"]["groups"][index]["transformed"] = False

    change_json(folder / "config.json", change)
    altered = atomq.hf.load(folder, check_hashes=True)
    assert not torch.allclose(altered(TOKENS).logits, checkpoint("llama", "hadamard").model(TOKENS).logits)


@pytest.mark.parametrize(
    ("scheme", "name", "change", "rule"),
    [
        ("atom", "self_attn.q_proj.perm", lambda t: t.copy_(t[0].expand_as(t)), "not a permutation"),
        ("atom", "mlp.down_proj.perm", lambda t: t.add_(1), "not a permutation"),
        ("atom", "mlp.up_proj.scales", set_first(float("nan")), "not positive and finite"),
        ("atom", "mlp.up_proj.scales", set_first(0), "not positive and finite"),
        ("atom", "mlp.up_proj.outlier_scales", lambda t: t.neg_(), "not positive and finite"),
        ("progressive", "mlp.up_proj.scale_base", lambda t: t.fill_(float("inf")), "not positive and finite"),
        ("asymmetric", "mlp.up_proj.zeros", set_first(16), "not below 16"),
        ("searched clips", "mlp.gate_proj.clip_ratio", lambda t: t.fill_(1.5), "not above 0 and at most 1"),
        ("searched clips", "self_attn.o_proj.clip_ratio", lambda t: t.zero_(), "not above 0 and at most 1"),
        ("e5m2 outliers", "mlp.up_proj.outlier_weight", lambda t: (t.float() / 0).to(t.dtype), "not finite"),
    ],
)
def test_values_that_no_writer_makes_are_refused_by_name(spoilable, scheme, name, change, rule):
    folder = spoilable("llama", scheme)
    change_tensor(folder, f"model.layers.0.{name}", change)
    words = rf"model\.layers\.0\.{name} holds values that are {rule}, first .* in row \d+ of"
    with pytest.raises(CheckpointError, match=words):
        atomq.hf.load(folder, check_hashes=True)
    with pytest.raises(CheckpointError, match=words):
        atomq.verify(folder)
    with pytest.raises(VerificationError, match=words):
        atomq.checkpoints.describe(folder, check=True)
    atomq.checkpoints.describe(folder, check=False)


# Refusals.


def test_from_pretrained_refuses_what_does_not_fit_before_it_loads_anything(spoilable):
    folder = spoilable()
    change_tensor(folder, "model.layers.0.mlp.up_proj.scales", lambda t: t[:, :-1].contiguous())
    with pytest.raises(CheckpointError, match=r"up_proj\.scales is F16 \[40, 2\]; it must be .* \[40, 3\]"):
        AutoModelForCausalLM.from_pretrained(folder)


def spoil(**changes):
    return lambda config: config.update(changes)


def spoil_family(**changes):
    return lambda config: config["quantization_config"]["family"].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (spoil(hidden_size="many"), "the config is unusable"),
        (spoil(hidden_act="sine"), "the config makes no model"),
        (spoil(model_type="gpt_oss"), "'gpt_oss' is not a family that atomq knows"),
        (spoil(model_type=7), "names no model_type"),
        (spoil(num_hidden_layers=10**9), "should have 1000000000 blocks"),
        (spoil(num_hidden_layers=3), r"lacks model\.layers\.2\."),
        (spoil(num_hidden_layers=1), r"do not belong to it: model\.layers\.1\."),
        (spoil(vocab_size=255), r"embed_tokens\.weight is F32 \[256, 48\]; it must be .* \[255, 48\]"),
        (spoil_family(blocks="model.nowhere"), "does not fit the model"),
        (spoil_family(blocks="model.norm"), "does not fit the model"),
        (spoil_family(model_type="qwen3"), "does not fit the model"),
        (spoil_family(key="self_attn.q_norm"), "does not fit the model"),
        (spoil_family(groups=[]), "is empty"),
        (spoil_family(groups="abc"), "not readable"),
        (
            spoil_family(groups=[{"linears": ["mlp.no_proj"], "absorbed_by": [], "transformed": True}]),
            "does not fit the model",
        ),
        (
            spoil_family(groups=[{"linears": ["mlp"], "absorbed_by": [], "transformed": True}]),
            "does not fit the model",
        ),
        (
            spoil_family(
                groups=[{"linears": ["mlp.up_proj", "mlp.up_proj"], "absorbed_by": [], "transformed": True}]
            ),
            "does not fit the model",
        ),
        (
            spoil_family(
                groups=[
                    {"linears": ["mlp.up_proj"], "absorbed_by": ["self_attn.o_proj"], "transformed": True}
                ]
            ),
            "does not fit the model",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(spoilable, change, words):
    folder = spoilable()
    change_json(folder / "config.json", change)
    with pytest.raises(CheckpointError, match=words):
        atomq.hf.load(folder)
    with pytest.raises(CheckpointError, match=words):
        atomq.checkpoints.describe(folder, check=False)


def test_a_dtype_that_is_none_of_the_three_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of float32, float16, bfloat16"):
        atomq.hf.load(checkpoint().path, dtype="int8")


def test_a_float_model_is_no_checkpoint(source):
    with pytest.raises(CheckpointError, match="is not quantized"):
        atomq.hf.load(source("llama"))
    assert not atomq.checkpoints.is_checkpoint(source("llama"))


def test_describe_states_what_the_headers_state(checkpoint):
    folder = checkpoint().path
    facts = atomq.checkpoints.describe(folder, check=True)
    stored = stored_tensors(folder)
    assert facts["size_bytes"] == sum(t.numel() * t.element_size() for t in stored.values())
    assert (facts["n_blocks"], facts["n_linears"], facts["scheme_name"]) == (2, 14, "W4A4KV4")
    entry = facts["block"]["self_attn.q_proj.qweight"]
    assert entry == {"dtype": "uint8", "shape": [48, 22], "bytes": 48 * 22}
    assert set(load_file(folder / "model-00002-of-00003.safetensors")) == {
        f"model.layers.0.{name}" for name in facts["block"]
    }
