"""Verification on a machine without GPU: exact arithmetic, and what it catches."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import byte_tokenizer, make_tiny_model, save_tiny_model

import atomq
from atomq.block_loop import quantize_blocks
from atomq.checkpoints import open_checkpoint, stored_blocks
from atomq.cli import main
from atomq.config import override
from atomq.errors import KernelError
from atomq.eval.verify import TOLERANCE, verify_linear, verify_linears
from atomq.kernels.linear import KernelLinear, envelope_problem, use_kernels
from atomq.kernels.repack import CODE_BYTES
from atomq.numerics.activations import quantize_activations
from atomq.numerics.exact import exact_outputs
from atomq.numerics.linear import QuantizedLinear
from atomq.presets import find_preset

TOKENS = torch.randint(2, 256, (4, 40), generator=torch.Generator().manual_seed(0))
SMALL = {"weights.group_size": 16, "activations.group_size": 16, "outliers.n_outliers": 8}
RECIPES = {
    "atom": {},
    "hadamard": {"transform": "hadamard"},
    "progressive": {
        "weights.channel_group": 1,
        "weights.scale_mode": "progressive",
        "activations.scale_mode": "progressive",
    },
    "asymmetric": {"weights.symmetric": False, "activations.symmetric": False},
    "fp4": {"weights.number_format": "fp4-e2m1", "activations.number_format": "fp4-bnb"},
    "unequal groups": {"weights.group_size": 12},
    "16-bit activations": {"activations.n_bits": 16},
    "16-bit weights": {"weights.n_bits": 16},
    "E4M3 outliers": {"outliers.precision": "e4m3"},
    "searched clips": {"activations.clip_search": "output"},
    "searched clips, not reordered": {"activations.clip_search": "output", "outliers.reorder": False},
}


def quantized(settings=None, **model):
    tiny = make_tiny_model("llama-mha-bias", **model)
    recipe = override(find_preset("atom"), {**SMALL, **(settings or {})})
    quantize_blocks(tiny, recipe, torch.device("cpu"), lambda *_: None, TOKENS)
    return tiny


def first_linear(model) -> QuantizedLinear:
    return model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES)
def test_every_linear_of_every_scheme_is_proven_in_torch(settings):
    heard = []
    modules = [("", quantized(settings))]
    found = verify_linears(modules, 14, torch.device("cpu"), lambda *args: heard.append(args))
    verdicts = found.verdicts
    assert len(verdicts) == 14
    assert all(v.passed and v.computed_by == "torch" for v in verdicts), max(v.error for v in verdicts)
    assert max(v.error for v in verdicts) > 0  # two ways of summing: not one compared with itself
    assert heard[-1][:2] == (14, 14)


def test_a_linear_of_a_large_models_width_is_proven_in_torch():
    plain = {"solver.method": "rtn", "outliers.n_outliers": 0, "outliers.reorder": False}
    model = quantized(plain, intermediate_size=28672)
    linear = model.model.layers[0].mlp.down_proj
    verdict = verify_linear("down", linear, seed=0)
    assert verdict.passed
    assert verdict.tolerance == pytest.approx(TOLERANCE * 7**0.5)
    linear._dense = linear.dense_weight(torch.float32) * (1 + 1e-5)
    assert not verify_linear("down", linear, seed=0).passed


def test_a_checkpoint_with_a_quantized_cache_alone_has_nothing_to_prove(tmp_path, capsys):
    source, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    floats = ["--preset", "rtn", "--w-bits", "16", "--a-bits", "16", "--kv-bits", "4"]
    assert main(["quantize", str(source), str(out), *floats]) == 0
    assert "0 of 0 linears pass (none)" in capsys.readouterr().out


def test_a_linear_that_computes_with_another_weight_is_found():
    linear = first_linear(quantized())
    right = linear.dense_weight(torch.float32).clone()
    spoilt = right.clone()
    spoilt[3, 5] += 0.01
    linear._dense = spoilt
    assert not verify_linear("q", linear, seed=0).passed
    linear._dense = right
    assert verify_linear("q", linear, seed=0).passed


@pytest.mark.parametrize("alter", ["nibble", "scale", "outlier", "order"])
def test_the_oracle_reads_the_stored_tensors_themselves(alter):
    linear = first_linear(quantized())
    scheme = linear.scheme
    x = torch.randn(5, linear.in_features, generator=torch.Generator().manual_seed(1))

    def oracle():
        ordered = linear.order_input(x)
        inputs = quantize_activations(
            ordered, scheme.activations, scheme.outliers.n_outliers, scheme.outliers.precision
        )
        return exact_outputs(linear, inputs)

    before = oracle()
    match alter:
        case "nibble":
            linear.qweight[2, 1] ^= 0x10
        case "scale":
            linear.scales[1, 0] *= 1.5
        case "outlier":
            linear.outlier_weight[0, 0] += 1
        case "order":
            linear.perm[[0, 7]] = linear.perm[[7, 0]]
    assert (oracle() - before).norm() / before.norm() > 10 * TOLERANCE


def test_the_oracle_equals_a_loop_over_integers():
    linear = first_linear(quantized())
    scheme, weight = linear.scheme, linear.quantized_weight()
    x = torch.randn(2, linear.in_features, generator=torch.Generator().manual_seed(2))
    ordered = linear.order_input(x)
    inputs = quantize_activations(ordered, scheme.activations, 8, "int8")
    found = exact_outputs(linear, inputs)
    n_normal = linear.in_features - 8
    for token in range(2):
        for row in (0, 1, linear.out_features - 1):
            total = float(linear.bias[row])
            for group, start in enumerate(range(0, n_normal, 16)):
                end = min(start + 16, n_normal)
                dot = sum(int(inputs.codes[token, i]) * int(weight.codes[row, i]) for i in range(start, end))
                total += dot * float(inputs.scales[token, group]) * float(weight.scales[row // 2, group])
            dot = sum(
                int(inputs.outliers.values[token, i]) * int(weight.outliers.values[row, i]) for i in range(8)
            )
            total += dot * float(inputs.outliers.scales[token]) * float(weight.outliers.scales[row])
            assert abs(float(found[token, row]) - total) <= 1e-12 * max(1, abs(total))


def test_what_lies_outside_the_kernels_envelope_is_named():
    assert "groups of" in envelope_problem(first_linear(quantized()))
    inside = {"weights.group_size": 64, "activations.group_size": 64, "outliers.n_outliers": 8}
    assert envelope_problem(first_linear(quantized(inside))) == ""
    for settings, reason in (
        ({"weights.n_bits": 3}, "INT4 weights"),
        ({"activations.n_bits": 8}, "INT4 activations"),
        ({"weights.scale_mode": "progressive", "weights.channel_group": 1}, "scale mode"),
        ({"outliers.precision": "fp16"}, "outliers in INT8"),
        ({"activations.n_bits": 16}, "W4A16"),
    ):
        assert reason in envelope_problem(first_linear(quantized({**inside, **settings})))


def test_kernels_refuse_what_they_cannot_run():
    with pytest.raises(KernelError, match="no quantized linears"):
        use_kernels(make_tiny_model())
    with pytest.raises(KernelError, match=r"q_proj lies on cpu; .* or keep the simulation"):
        use_kernels(quantized())
    with pytest.raises(KernelError, match="cannot run on the kernels: the kernels take weight groups"):
        KernelLinear(first_linear(quantized()))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "progressive", "hadamard", "searched clips", "w4a16"])
def test_the_kernels_prove_a_checkpoint_and_run_a_model(mode):
    settings = {"weights.group_size": 64, "activations.group_size": 64, "outliers.n_outliers": 16}
    settings |= {
        "exact": {},
        "progressive": RECIPES["progressive"],
        "hadamard": {"transform": "hadamard", "kv.rotation": "hadamard"},
        "searched clips": RECIPES["searched clips"],
        "w4a16": {"activations.n_bits": 16, "outliers.n_outliers": 0, "outliers.reorder": False},
    }[mode]
    model = quantized(settings, hidden_size=192, intermediate_size=320)
    verdicts = verify_linears([("", model)], 14, torch.device("cuda"), lambda *_: None).verdicts
    assert {v.computed_by for v in verdicts} == {"gpu kernel"}
    assert all(v.passed for v in verdicts), [(v.name, v.error, v.n_wrong_codes) for v in verdicts]
    dtype = torch.float16 if mode == "w4a16" else torch.float32
    model = model.to("cuda", dtype)
    expected = model(TOKENS.cuda()).logits.float()
    assert use_kernels(model) == 14
    distance = (model(TOKENS.cuda()).logits.float() - expected).norm() / expected.norm()
    # Sums in another order: a value on the edge between two codes (or, progressive, two factors of a whole
    # group) may fall to either side.
    assert distance < (1e-3 if mode in ("exact", "searched clips") else 2e-2)


def test_the_command_proves_a_checkpoint_and_says_what_computed_it(tmp_path, capsys):
    source = save_tiny_model(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("all work and no play makes a dull text. " * 40, encoding="utf-8")
    small = ["--group-size", "16", "--n-outliers", "8", "--n-samples", "2", "--seq-len", "64"]
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--calib-data", str(text), *small]) == 0
    capsys.readouterr()
    assert main(["verify", str(out), "--json", "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["computed_by"] == {"torch": 14}
    assert record["n_linears"] == len(record["linears"]) == 14
    assert record["n_failed"] == 0
    assert 0 < record["largest_error"] <= record["tolerance"]
    assert main(["verify", str(out), "--device", "cpu"]) == 0
    assert "14 of 14 linears pass (14 by torch)" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["llama", "mixtral", "opt"])
def test_one_block_at_a_time_is_read(tmp_path, kind):
    source, out = save_tiny_model(tmp_path / "model", kind), tmp_path / "out"
    rounded = ["--preset", "rtn", "--group-size", "16", "--check", "off"]
    assert main(["quantize", str(source), str(out), *rounded]) == 0
    read = []
    for prefix, block in stored_blocks(out, open_checkpoint(out, check_hashes=True)):
        assert all(tensor.is_meta for earlier in read for tensor in earlier.state_dict().values())
        assert not any(tensor.is_meta for tensor in block.state_dict().values())
        expected = atomq.load(out).get_submodule(prefix.rstrip(".")).state_dict()
        assert expected.keys() == block.state_dict().keys()
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, expected[name]), name
        read.append(block)
    assert len(read) == 2


def test_quantize_ends_with_the_proof_and_keeps_it_in_the_reports(tmp_path, capsys):
    source = save_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    rounded = ["quantize", str(source), str(out), "--preset", "rtn", "--group-size", "16", "--device", "cpu"]
    assert main([*rounded, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["verification"]
    assert (shown["computed_by"], shown["n_failed"]) == ({"torch": 14}, 0)
    kept = json.loads((out / "reports" / "verify.json").read_text())
    assert kept["check"] == "auto"
    assert kept["computed_by"] == {"torch": 14}
    assert len(kept["linears"]) == 14
    assert main(["verify", str(out), "--check", "exact"]) == 0  # a report is no part of the manifest
    assert main([*rounded, "--overwrite", "--check", "exact"]) == 0
    assert "14 of 14 linears pass (14 by torch)" in capsys.readouterr().out
    assert main([*rounded, "--overwrite", "--check", "off"]) == 0
    assert "not asked for" in capsys.readouterr().out
    assert not (out / "reports" / "verify.json").exists()


def test_quantize_ends_with_exit_code_1_where_the_proof_fails(tmp_path, capsys, monkeypatch):
    source = save_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    monkeypatch.setattr("atomq.eval.verify.TOLERANCE", 1e-12)
    assert main(["quantize", str(source), str(out), "--preset", "rtn", "--group-size", "16"]) == 1
    assert "linears differ from exact arithmetic: model.layers.0" in capsys.readouterr().err
    assert json.loads((out / "reports" / "verify.json").read_text())["n_failed"] > 0


def test_a_check_that_cannot_be_made_is_refused_before_anything_is_written(tmp_path, capsys):
    source = save_tiny_model(tmp_path / "model")
    command = [
        "quantize",
        str(source),
        str(tmp_path / "out"),
        "--preset",
        "rtn",
        "--device",
        "cpu",
        "--check",
    ]
    assert main([*command, "some"]) == 2
    assert "--check some is not one of auto, kernels, exact, off" in capsys.readouterr().err
    assert main([*command, "kernels"]) == 1
    assert "--check kernels needs a CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_kernels_or_nobody_names_a_linear_that_they_do_not_take():
    with pytest.raises(
        KernelError, match=r"q_proj cannot run on the kernels: the kernels take weight groups"
    ):
        verify_linears([("", quantized())], 14, torch.device("cpu"), lambda *_: None, "kernels")


@pytest.mark.gpu
@pytest.mark.parametrize("alter", ["nibble", "scale", "outlier", "order"])
def test_a_kernel_that_reads_something_else_than_the_checkpoint_is_found(alter, monkeypatch):
    settings = {"weights.group_size": 64, "activations.group_size": 64, "outliers.n_outliers": 16}
    linear = first_linear(quantized(settings, hidden_size=192, intermediate_size=320)).cuda()
    assert verify_linear("q", linear, seed=0).passed

    def altered(linear):
        kernel = KernelLinear(linear)
        records = kernel.weight.records
        match alter:
            case "nibble":
                records[0, 0, 5] ^= 0x10
            case "scale":
                records[0, 1, CODE_BYTES] ^= 0x10  # of the first channel, a mantissa bit
            case "outlier":
                records[0, -1, 0] ^= 1
            case "order":
                slots = kernel.order.slots
                slots[0, [3, 4]] = slots[0, [4, 3]]
        return kernel

    monkeypatch.setattr("atomq.eval.verify.KernelLinear", altered)
    verdict = verify_linear("q", linear, seed=0)
    assert verdict.computed_by == "gpu kernel"
    assert not verdict.passed


@pytest.mark.gpu
@pytest.mark.parametrize("preset", ["atom", "atomq"])
def test_eval_ppl_and_generate_run_on_the_kernels_as_on_the_simulation(preset, tmp_path, capsys, text_file):
    sizes = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 64}
    source, out = tmp_path / "model", tmp_path / "out"
    make_tiny_model("llama", **sizes).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)

    def run(*arguments):
        assert main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    small = ["--group-size", "64", "--n-outliers", "16", "--n-samples", "4", "--seq-len", "64"]
    quantized = run(
        "quantize", source, out, "--preset", preset, "--calib-data", text_file, *small, "--check", "kernels"
    )
    assert quantized["verification"]["computed_by"] == {"gpu kernel": 14}
    ppl, text = {}, {}
    for backend in ("simulation", "kernels"):
        on = ("--device", "cuda", "--backend", backend)
        evaluated = run("eval-ppl", out, "--data", text_file, "--seq-len", 64, "--max-windows", 8, *on)
        assert evaluated["backend"] == backend
        ppl[backend] = evaluated["ppl"]
        text[backend] = run("generate", out, "the quick", "--max-new-tokens", 5, *on)["n_new_tokens"]
    assert ppl["kernels"] == pytest.approx(ppl["simulation"], rel=3e-3)
    assert 1 <= text["kernels"] <= 5


def test_the_command_ends_with_exit_code_1_on_a_mismatch(tmp_path, capsys, monkeypatch):
    source = save_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    rounded = ["--preset", "rtn", "--group-size", "16"]
    assert main(["quantize", str(source), str(out), *rounded]) == 0
    monkeypatch.setattr("atomq.eval.verify.TOLERANCE", 1e-12)
    assert main(["verify", str(out), "--json", "--device", "cpu"]) == 1
    printed = capsys.readouterr()
    assert "linears differ from exact arithmetic: model.layers.0" in printed.err


def test_an_altered_file_is_named_before_anything_is_computed(tmp_path, capsys):
    source = save_tiny_model(tmp_path / "model")
    out = tmp_path / "out"
    assert main(["quantize", str(source), str(out), "--preset", "rtn", "--group-size", "16"]) == 0
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    assert main(["verify", str(out)]) == 2
    assert f"{shard.name} has been altered" in capsys.readouterr().err
