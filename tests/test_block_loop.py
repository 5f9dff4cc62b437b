"""The block loops on tiny models of every family."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny_models import TINY_MODELS, make_tiny_model as make_wild_model

import atomq.block_quantizer as block_quantizer
from atomq.block_loop import calibrate_blocks, quantize_blocks
from atomq.config import (
    ActivationScheme,
    KVScheme,
    OutlierScheme,
    QuantScheme,
    Recipe,
    SolverConfig,
    WeightScheme,
    override,
)
from atomq.errors import AtomqError, ConfigError
from atomq.method.hessian import HessianAccumulator
from atomq.models.blocks import capture_block_inputs
from atomq.models.families import find_family
from atomq.numerics.channels import ChannelStatistics
from atomq.numerics.linear import QuantizedLinear

CPU = torch.device("cpu")
TOKENS = torch.randint(2, 256, (4, 40), generator=torch.Generator().manual_seed(0))
REORDERED = OutlierScheme(8, "int8", "hessian", reorder=True)
ATOM = Recipe(
    QuantScheme(
        WeightScheme(group_size=16, channel_group=2),
        ActivationScheme(group_size=16, clip_ratio=0.9),
        REORDERED,
        KVScheme(n_bits=4),
    ),
    SolverConfig("gptq", clip_ratio=0.85, scale_span="half"),
)


def bits8(transform="none", solver=None, **kv) -> Recipe:
    """Everything at once in eight bits, so that only a mistake moves the output far."""
    scheme = QuantScheme(
        WeightScheme(8, group_size=16),
        ActivationScheme(8, group_size=16),
        REORDERED,
        KVScheme(n_bits=8, **kv),
        transform,
    )
    return Recipe(scheme, solver or SolverConfig())


RTN = SolverConfig("rtn")
# Recipe and the largest relative error of the logits that it may cause.
RECIPES = {
    "atom": (ATOM, 0.8),
    "8-bits": (bits8(), 0.05),
    "8-bits-rtn": (bits8(solver=RTN), 0.05),
    "8-bits-hadamard": (bits8("hadamard"), 0.05),
    "8-bits-after-rope": (bits8(key_position="after_rope", rotation="hadamard"), 0.05),
    "8-bits-asym": (
        Recipe(
            QuantScheme(
                WeightScheme(8, symmetric=False, group_size=None, channel_group=2),
                ActivationScheme(8, symmetric=False, group_size=None),
                OutlierScheme(5, "fp16", "abs_mean", reorder=True),
            )
        ),
        0.05,
    ),
    "rtn-without-order": (
        Recipe(QuantScheme(WeightScheme(8, group_size=16), ActivationScheme(8, group_size=16)), RTN),
        0.08,
    ),
    "progressive": (
        Recipe(
            QuantScheme(
                WeightScheme(group_size=16, scale_mode="progressive"),
                ActivationScheme(group_size=16, scale_mode="progressive"),
                REORDERED,
            )
        ),
        0.8,
    ),
    "weights-only": (
        Recipe(QuantScheme(WeightScheme(8, group_size=16), ActivationScheme(16), OutlierScheme())),
        0.05,
    ),
    "activations-only": (
        Recipe(QuantScheme(WeightScheme(16), ActivationScheme(8, group_size=16), REORDERED)),
        0.05,
    ),
    "kv-only": (
        Recipe(QuantScheme(WeightScheme(16), ActivationScheme(16), OutlierScheme(), KVScheme(8))),
        0.05,
    ),
}


def quiet(_done: float, _total: int, _step: str) -> None:
    pass


def make_tiny_model(kind: str = "llama"):
    """A tiny model without outliers in the norms of q and k: they make attention so sharp that the smallest
    difference decides which token it looks at.
    """
    model = make_wild_model(kind)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter[3] = 1.5
    return model


def quantized(kind: str, recipe: Recipe, tokens=TOKENS, **rest):
    model = make_tiny_model(kind)
    report = quantize_blocks(model, recipe, CPU, quiet, tokens, **rest)
    return model, report


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def linears_of(model) -> dict[str, QuantizedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("transform", ["none", "hadamard"])
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_a_reordered_model_that_rounds_nothing_equals_the_original(kind, transform, monkeypatch):
    """Orders gathered and absorbed, biases and transforms; only the rounding of inputs is switched off."""
    monkeypatch.setattr("atomq.numerics.linear.fake_quantize_activations", lambda x, *_scheme: x)
    scheme = QuantScheme(
        WeightScheme(16, group_size=16), ActivationScheme(8, group_size=16), REORDERED, transform=transform
    )
    model, _ = quantized(kind, Recipe(scheme))
    expected = make_tiny_model(kind)(TOKENS).logits
    logits = model(TOKENS).logits
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    orders = [linear.input_order() for linear in linears_of(model).values()]
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in orders)
    assert not any(torch.equal(order, torch.arange(len(order))) for order in orders)


@pytest.mark.parametrize("part", ["rows", "bias"])
def test_that_comparison_notices_two_exchanged_rows_or_biases(part, monkeypatch):
    monkeypatch.setattr("atomq.numerics.linear.fake_quantize_activations", lambda x, *_scheme: x)
    scheme = QuantScheme(WeightScheme(16, group_size=16), ActivationScheme(8, group_size=16), REORDERED)
    model, _ = quantized("llama-mha-bias", Recipe(scheme))
    expected = make_tiny_model("llama-mha-bias")(TOKENS).logits
    gate = model.model.layers[0].mlp.gate_proj
    tensor = gate._buffers["weight"] if part == "rows" else gate.bias.data
    tensor[[3, 4]] = tensor[[4, 3]]
    logits = model(TOKENS).logits
    assert (logits - expected).abs().max() > 1e-4 * expected.abs().max()


@pytest.mark.parametrize(("recipe", "tolerance"), RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_every_family_is_quantized_by_every_recipe(kind, recipe, tolerance):
    model, report = quantized(kind, recipe)
    expected = make_tiny_model(kind)(TOKENS).logits
    logits = model(TOKENS).logits
    assert 1e-5 < relative_error(logits, expected) < tolerance
    scheme, linears = recipe.scheme, linears_of(model)
    assert len(linears) == (14 if scheme.quantizes_linears else 0)
    assert len(report.linears) == (14 if scheme.weights.n_bits < 16 else 0)
    assert {r.method for r in report.linears} <= {recipe.solver.method}
    assert report.widest_input == 80
    assert not report.warnings
    for linear in linears.values():
        assert ("weight" in linear.state_dict()) == (scheme.weights.n_bits == 16)
        assert linear.observer is None
    names = [r.name for r in report.linears]
    assert names == [
        f"model.layers.{index}.{name}"
        for index in range(2)
        for group in find_family(model.config.model_type).groups
        for name in group.linears
        if names
    ]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_gptq_beats_rounding_on_the_calibration_text(kind):
    expected = make_tiny_model(kind)(TOKENS).logits
    scheme = dataclasses.replace(ATOM.scheme, activations=ActivationScheme(8, group_size=16), kv=KVScheme())
    solver = ATOM.solver
    errors = [
        relative_error(quantized(kind, Recipe(scheme, s))[0](TOKENS).logits, expected)
        for s in (solver, dataclasses.replace(solver, method="rtn"))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("kind", TINY_MODELS)
def test_statistics_equal_those_of_hooks_on_a_forward_of_the_whole_model(kind):
    found = calibrate_blocks(make_tiny_model(kind), TOKENS, CPU, quiet)
    model = make_tiny_model(kind)
    seen: dict[str, torch.Tensor] = {}
    owners = [group.owner for group in find_family(model.config.model_type).groups]
    for index, block in enumerate(model.model.layers):
        for owner in owners:
            name = f"model.layers.{index}.{owner}"

            def watch(_module, args, name=name):
                seen[name] = args[0].double()

            block.get_submodule(owner).register_forward_pre_hook(watch)
    model(TOKENS)
    assert set(found) == set(seen)
    for name, x in seen.items():
        hessian = 2 * x.square().mean((0, 1))
        abs_mean = x.abs().mean(1).amax(0)
        assert torch.allclose(found[name].hessian.double(), hessian, rtol=1e-4, atol=1e-9), name
        assert torch.allclose(found[name].abs_mean.double(), abs_mean, rtol=1e-4, atol=1e-9), name


def test_calibration_leaves_the_model_as_it_was():
    model = make_tiny_model("qwen3")
    before = copy.deepcopy(model.state_dict())
    calibrate_blocks(model, TOKENS, CPU, quiet)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(TOKENS).logits, make_tiny_model("qwen3")(TOKENS).logits)


@pytest.mark.parametrize("tokens_per_batch", [1, 80, 120])
def test_batches_change_neither_statistics_nor_the_number_of_windows_told(tokens_per_batch, monkeypatch):
    whole = calibrate_blocks(make_tiny_model(), TOKENS, CPU, quiet)
    monkeypatch.setattr("atomq.models.blocks.TOKENS_PER_BATCH", tokens_per_batch)
    told = []
    parts = calibrate_blocks(
        make_tiny_model(), TOKENS, CPU, lambda done, total, _: told.append((done, total))
    )
    for name, statistics in whole.items():
        assert torch.allclose(parts[name].hessian, statistics.hessian, rtol=1e-5)
        assert torch.allclose(parts[name].abs_mean, statistics.abs_mean, rtol=1e-5)
    done = [d for d, _ in told]
    assert done == sorted(done)
    assert done[-1] == 2
    assert 0.25 in done or tokens_per_batch != 1
    assert {total for _, total in told} == {2}


@pytest.mark.parametrize("metric", ["hessian", "abs_mean"])
def test_orders_follow_the_given_statistics_and_put_the_strongest_channels_last(metric):
    own = calibrate_blocks(make_tiny_model(), TOKENS, CPU, quiet)
    generator = torch.Generator().manual_seed(1)
    given = {
        name: ChannelStatistics(
            torch.rand(len(s.hessian), generator=generator), torch.rand(len(s.hessian), generator=generator)
        )
        for name, s in own.items()
    }
    scheme = dataclasses.replace(ATOM.scheme, outliers=dataclasses.replace(REORDERED, metric=metric))
    for statistics in (None, given):
        model, report = quantized("llama", Recipe(scheme, ATOM.solver), statistics=statistics)
        assert ("statistics" in report.seconds) == (statistics is None)
        for name, found in (statistics or own).items():
            score = getattr(found, metric).tolist()
            expected = sorted(range(len(score)), key=lambda channel: score[channel])
            assert model.get_submodule(name).state_dict()["perm"].tolist() == expected


def test_only_the_first_linear_of_a_group_stores_the_order():
    model, _ = quantized("llama", ATOM)
    holders = {name.rsplit(".", 2)[1] for name in model.state_dict() if name.endswith(".perm")}
    assert holders == {"q_proj", "o_proj", "gate_proj", "down_proj"}
    attention = model.model.layers[0].self_attn
    assert attention.v_proj.input_order() is attention.q_proj.input_order()


def spy_on_solving(monkeypatch) -> list[tuple[list[torch.Tensor], HessianAccumulator]]:
    calls = []

    def spy(weights, hessian, scheme, solver):
        calls.append((weights, hessian))
        return solve(weights, hessian, scheme, solver)

    solve = block_quantizer.solve_group
    monkeypatch.setattr(block_quantizer, "solve_group", spy)
    return calls


def inputs_of_linears(model, block: int) -> dict[str, torch.Tensor]:
    """What each linear of a block multiplies on the calibration text."""
    seen: dict[str, torch.Tensor] = {}
    prefix = f"model.layers.{block}."
    for name, linear in linears_of(model).items():
        if name.startswith(prefix):
            linear.observer = lambda x, name=name: seen.update({name.removeprefix(prefix): x.clone()})
    with torch.no_grad():
        model(TOKENS)
    for linear in linears_of(model).values():
        linear.observer = None
    return seen


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_hessians_see_quantized_inputs_and_kv_of_this_block_and_all_of_the_blocks_before(kind, monkeypatch):
    calls = spy_on_solving(monkeypatch)
    model, _ = quantized(kind, ATOM)
    groups = find_family(model.config.model_type).groups
    assert len(calls) == 2 * len(groups)
    # Float weights in block 0, everything else quantized: the same recipe with 16-bit weights.
    statistics = calibrate_blocks(make_tiny_model(kind), TOKENS, CPU, quiet)
    floats, _ = quantized(
        kind,
        Recipe(dataclasses.replace(ATOM.scheme, weights=WeightScheme(16, group_size=16))),
        statistics=statistics,
    )
    # Then block 0 as it came out, block 1 with float weights.
    mixed = copy.deepcopy(floats)
    mixed.model.layers[0] = model.model.layers[0]
    for block, reference in ((0, floats), (1, mixed)):
        seen = inputs_of_linears(reference, block)
        for group, (weights, hessian) in zip(groups, calls[block * len(groups) :], strict=False):
            x = seen[group.owner].reshape(-1, weights[0].shape[1]).double()
            expected = 2 * x.T @ x / len(x)
            assert relative_error(hessian.hessian.double(), expected) < 1e-5, group.owner
            assert hessian.n_tokens == TOKENS.numel()
            for name, weight in zip(group.linears, weights, strict=True):
                stored = reference.model.layers[block].get_submodule(name).dense_weight(torch.float32)
                assert torch.equal(weight, stored)


@pytest.mark.parametrize("mode", ["block", "sequential"])
def test_the_asymmetric_target_sees_the_float_models_inputs_in_every_block(mode, monkeypatch):
    floats: dict[HessianAccumulator, list[torch.Tensor]] = {}

    def add(self, x, x_float=None):
        floats.setdefault(self, []).append(x_float)
        return original(self, x, x_float)

    original = HessianAccumulator.add
    monkeypatch.setattr(HessianAccumulator, "add", add)
    calls = spy_on_solving(monkeypatch)
    model, _ = quantized("llama", override(ATOM, {"solver.asymmetry": 0.5, "solver.calibration": mode}))
    untouched = make_tiny_model()
    groups = find_family("llama").groups
    hessians = iter(hessian for _, hessian in calls)
    for block in (0, 1):
        for group in groups:
            name, seen = f"model.layers.{block}.{group.owner}", []
            hook = untouched.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                untouched(TOKENS)
            hook.remove()
            hessian = next(hessians)
            found = torch.cat(floats[hessian])
            expected = model.get_submodule(name).order_channels(seen[0])
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5), name
            assert hessian.shift is not None


def test_the_same_call_gives_the_same_bytes():
    first, _ = quantized("qwen2", ATOM)
    second, _ = quantized("qwen2", ATOM)
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), first.state_dict()[name].view(torch.uint8)), name


def test_finished_blocks_are_handed_over_in_order_with_their_codes():
    told = []

    def on_block(name, block, reports):
        told.append(name)
        assert [r.name.startswith(f"{name}.") for r in reports] == [True] * 7
        linears = [m for m in block.modules() if isinstance(m, QuantizedLinear)]
        assert all("qweight" in linear.state_dict() for linear in linears)

    _, report = quantized("llama", ATOM, on_block=on_block)
    assert told == ["model.layers.0", "model.layers.1"]
    assert {"statistics", "hessians", "solving", "forward", "writing"} == set(report.seconds)
    assert all(seconds >= 0 for seconds in report.seconds.values())


def test_progress_rises_to_the_number_of_blocks():
    told = []
    quantize_blocks(make_tiny_model(), ATOM, CPU, lambda *step: told.append(step), TOKENS)
    solving = [done for done, _, step in told if step != "channel statistics"]
    assert solving == sorted(solving)
    assert told[-1] == (2, 2, "done")
    assert any(s[:2] == (1.5, 2) and s[2].startswith("model.layers.1.mlp.down_proj") for s in told)


def test_with_few_tokens_gptq_may_give_way_to_rounding_and_says_so():
    tokens = TOKENS[:1, :6]
    model, report = quantized("llama", ATOM, tokens)
    rounded = [r for r in report.linears if r.method == "rtn"]
    assert rounded
    assert all(r.damp_frac is None for r in rounded)
    assert f"{len(rounded)} of 14 linears were rounded to nearest" in report.warnings[0]
    assert torch.isfinite(model(TOKENS).logits).all()


def test_channels_that_are_never_active_are_counted_and_reported():
    model = make_tiny_model()
    model.model.layers[0].mlp.gate_proj.weight[5] = 0  # silu(0) * up is 0
    report = quantize_blocks(model, ATOM, CPU, quiet, TOKENS)
    dead = {r.name: r.n_dead for r in report.linears if r.n_dead}
    assert dead == {"model.layers.0.mlp.down_proj": 1}
    assert report.warnings == (
        "1 linears have input channels that were never active; most: model.layers.0.mlp.down_proj with 1",
    )


def test_raised_damping_is_reported(monkeypatch):
    factorize = block_quantizer.solve_group.__globals__["factorize_hessian"]

    def with_trouble(hessian, damp_frac):
        return factorize(hessian, damp_frac * (10 if hessian.shape[0] == 80 else 1))

    monkeypatch.setattr("atomq.method.solve.factorize_hessian", with_trouble)
    _, report = quantized("llama", ATOM)
    assert {r.name for r in report.linears if r.damp_frac == 0.1} == {
        f"model.layers.{index}.mlp.down_proj" for index in range(2)
    }
    assert report.warnings == (
        "2 linears needed more damping than 0.01; most: model.layers.0.mlp.down_proj with 0.1",
    )


def test_relative_errors_are_reported_per_linear():
    _, report = quantized("llama", ATOM)
    assert all(0 < r.relative_error < 0.3 for r in report.linears)
    assert report.to_dict()["linears"][0]["name"] == "model.layers.0.self_attn.q_proj"


def test_values_that_are_not_finite_stop_the_run():
    model = make_tiny_model()
    model.model.layers[0].mlp.down_proj.weight *= 1e38
    model.model.layers[0].mlp.down_proj.weight *= 8
    assert model.model.layers[0].mlp.down_proj.weight.isfinite().all()
    message = (
        r"model\.layers\.0\.mlp\.down_proj gives values that are not finite on the calibration text, "
        r"first in channel 0 of its output"
    )
    with pytest.raises(AtomqError, match=message):
        quantize_blocks(model, ATOM, CPU, quiet, TOKENS)


def test_the_channel_that_is_not_finite_is_named():
    model = make_tiny_model()
    model.model.layers[1].self_attn.v_proj.weight[5] = 3e38
    model.model.layers[1].self_attn.v_proj.weight[7] = torch.nan
    for run in (
        lambda: calibrate_blocks(model, TOKENS, CPU, quiet),
        lambda: quantize_blocks(model, ATOM, CPU, quiet, TOKENS),
    ):
        with pytest.raises(
            AtomqError, match=r"^model\.layers\.1\.self_attn\.v_proj gives .* channel [57] of"
        ):
            run()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("n_outliers", "allowed"), [(47, True), (48, False), (100, False)])
def test_outliers_must_leave_a_normal_channel(n_outliers, allowed):
    scheme = dataclasses.replace(ATOM.scheme, outliers=dataclasses.replace(REORDERED, n_outliers=n_outliers))
    if allowed:
        model, _ = quantized("llama", Recipe(scheme, RTN))
        assert torch.isfinite(model(TOKENS).logits).all()
        return
    message = (
        f"n_outliers {n_outliers} leaves no normal channel of the 48 inputs of "
        "model.layers.0.self_attn.q_proj; use at most 47"
    )
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        quantized("llama", Recipe(scheme, RTN))


@pytest.mark.parametrize("recipe", [ATOM, bits8(solver=RTN)], ids=["gptq", "reorder"])
def test_a_recipe_that_looks_at_activations_needs_windows(recipe):
    with pytest.raises(ConfigError, match="this recipe looks at activations; give calibration windows"):
        quantized("llama", recipe, None)


def test_a_recipe_that_looks_at_none_needs_no_windows():
    model, report = quantized("llama", RECIPES["rtn-without-order"][0], None)
    assert {r.relative_error for r in report.linears} == {None}
    assert torch.isfinite(model(TOKENS).logits).all()


GENERATING = {"atom": ATOM, **{name: RECIPES[name][0] for name in ("8-bits-after-rope", "kv-only")}}


@pytest.mark.parametrize("recipe", GENERATING.values(), ids=GENERATING)
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_one_token_steps_with_a_cache_give_the_logits_of_the_full_forward(kind, recipe):
    """In float64, where nothing lies so near a tie that the order of additions could move a code."""
    model, _ = quantized(kind, recipe)
    model.double()
    tokens = TOKENS[:1, :14]
    with torch.inference_mode():
        full = model(tokens, use_cache=False).logits
        cache, steps = None, []
        for start, end in [(0, 5), *((i, i + 1) for i in range(5, 14))]:
            output = model(tokens[:, start:end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert relative_error(torch.cat(steps, 1), full) < 1e-6


@pytest.mark.parametrize("recipe", GENERATING.values(), ids=GENERATING)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_generate_continues_with_the_most_likely_tokens_of_the_full_forward(kind, recipe):
    model, _ = quantized(kind, recipe)
    model.double()
    prompt = TOKENS[:1, :6]
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    tokens = prompt
    for _ in range(6):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat((tokens, best), dim=1)
    assert torch.equal(generated, tokens)


def test_a_deep_copy_of_a_quantized_model_computes_the_same():
    model, _ = quantized("qwen3", ATOM)
    expected = model(TOKENS).logits
    assert torch.equal(copy.deepcopy(model)(TOKENS).logits, expected)


def test_in_sequence_every_group_sees_the_codes_of_those_before_it(monkeypatch):
    """So its Hessian is that of the finished block; with one pass for the block it is not."""
    seen: dict[str, dict[int, torch.Tensor]] = {}
    original = block_quantizer.solve_group
    for mode in ("sequential", "block"):
        model = make_tiny_model()
        hessians: list[torch.Tensor] = []

        def solve(weights, hessian, scheme, solver, hessians=hessians):
            hessians.append(hessian.hessian)
            return original(weights, hessian, scheme, solver)

        monkeypatch.setattr(block_quantizer, "solve_group", solve)
        recipe = override(ATOM, {"solver.calibration": mode})
        family = find_family("llama")
        inputs = capture_block_inputs(model, family, TOKENS, CPU)
        quantize_blocks(model, recipe, CPU, lambda *_: None, TOKENS)
        block = model.model.layers[0]
        finished = []
        for group in family.groups:
            linear = block.get_submodule(group.owner)
            accumulator = HessianAccumulator(linear.in_features, CPU, holdout=False)
            linear.observer = accumulator.add
            finished.append(accumulator)
        inputs.run(block)
        for accumulator in finished:
            accumulator.finish()
        seen[mode] = {
            i: (hessians[i] - accumulator.hessian).norm() / accumulator.hessian.norm()
            for i, accumulator in enumerate(finished)
        }
    assert all(distance < 1e-5 for distance in seen["sequential"].values()), seen
    assert seen["block"][0] < 1e-5
    assert seen["block"][3] > 1e-3
