"""bench-e2e as far as it goes without a GPU: its arithmetic, decoders on twins, trace and pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from atomq.cli import main
from atomq.commands import console
from atomq.commands.bench_e2e import _ratios
from atomq.commands.e2e_output import print_record
from atomq.eval import e2e_bench
from atomq.eval.attention_bench import layouts
from atomq.eval.e2e_bench import Ceiling, Footprint, Step, describe_cache
from atomq.eval.e2e_profile import Span, shares
from atomq.eval.e2e_trace import COMPILED_TOKENS, Request, run_trace, workload
from atomq.formats.e2e_plot import draw_throughput
from atomq.kernels.gemm_tiles import choose_tile
from atomq.kernels.kv_pages import PageFormat
from atomq.presets import DEFAULT_PRESET, find_preset
from atomq.runtime.decoder import Cache
from atomq.runtime.random_decoder import (
    SCHEMES,
    SHAPES,
    DecoderShape,
    cache_layout,
    cache_scheme,
    random_decoder,
)

CPU = torch.device("cpu")
TINY = DecoderShape(
    n_layers=4, hidden=256, intermediate=320, n_heads=4, n_kv_heads=2, head_dim=64, vocabulary=96
)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def tiny_decoder(scheme, n_layers=2, key_position=None):
    torch.manual_seed(0)
    return random_decoder(TINY, scheme, n_layers, 128, CPU, key_position)


@needs_no_gpu
def test_without_a_gpu_it_says_so(capsys):
    assert main(["bench-e2e"]) == 1
    assert "no CUDA device here; atomq doctor says what" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-9"], "unknown model 'gpt-9'; shapes are known of llama-2-7b"),
        (["--batches", "1,none"], "--batches 1,none must be numbers of at least 1"),
        (["--layers", "33"], "--layers 33 must lie between 1 and the 32 of the model"),
        (["--schemes", "w4a4,w2a2"], "unknown scheme 'w2a2'; schemes are w4a4"),
        (["--context", "0"], "--context must be at least 1"),
        (["--key-position", "none"], "--key-position none is not one of before_rope, after_rope"),
        (["--save", "record.txt"], "record.txt must end in .json"),
        (["--plot", "figure.pdf"], "figure.pdf must end in .png or .svg"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys):
    assert main(["bench-e2e", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("scheme", "key_position"),
    [*((scheme, None) for scheme in SCHEMES), ("w4a4", "before_rope"), ("w4a4", "after_rope")],
)
def test_random_decoders_of_every_scheme_compute_something_sane(scheme, key_position):
    decoder = tiny_decoder(scheme, key_position=key_position)
    cache = Cache(decoder, 2, 64)
    prompts = [torch.arange(5), torch.arange(3)]
    logits = decoder.prefill(prompts, [0, 1], cache)
    lengths = torch.tensor([6, 4], dtype=torch.int32)
    after = decoder.step(logits.argmax(-1), lengths, cache)
    for found in (logits, after):
        assert found.isfinite().all()
        assert 0.1 < found.float().std() < 10


def test_the_cache_is_the_default_presets_unless_it_is_asked_for():
    preset = find_preset(DEFAULT_PRESET).scheme.kv
    assert tiny_decoder("w4a4").layout == PageFormat.of(preset, TINY.n_kv_heads, TINY.head_dim)
    told = {place: describe_cache(tiny_decoder("w4a4", 1, place)) for place in ("before_rope", "after_rope")}
    assert told == {
        "before_rope": "4 bits, K before RoPE less an offset, Hadamard",
        "after_rope": "4 bits, K after RoPE, balanced, Hadamard",
    }
    assert describe_cache(tiny_decoder("int8", 1, "before_rope")) == "8 bits, K after RoPE"


def test_shares_of_overlapping_kernels_add_up_to_the_step():
    spans = [
        Span("quantize_act", 10.0, 14.0),
        Span("sm90_w4a4_gemm", 12.0, 30.0),  # launched early: it waits until 14
        Span("kv_attention", 31.0, 40.0),
        Span("void pytorch_flash::flash_fwd_kernel", 40.0, 41.0),
        Span("void at::native::add", 41.0, 42.5),
        Span("nvjet_hsh_128x64", 43.0, 44.0),
    ]
    found = shares(reversed(spans))
    assert found == {
        "attention": 10.0,
        "cache": 0.0,
        "quantize": 4.0,
        "products": 17.0,
        "others": 1.5,
        "launches": 1.5,
    }
    assert sum(found.values()) == 44.0 - 10.0
    assert not any(shares([]).values())


def test_the_footprint_is_that_of_all_layers():
    decoder = tiny_decoder("w4a4", n_layers=2)
    prints = e2e_bench.footprint(decoder, TINY)
    assert prints.weights == tiny_decoder("w4a4", n_layers=4).weight_bytes
    heads, ranges = 2 * 64, 2 * 4  # bytes of K and V in 4 bits; scale and minimum of each
    assert prints.token == 4 * 2 * (heads // 2 + ranges)
    budget = prints.of(7, 100) + 10
    assert prints.largest_batch(budget, 100) == 7
    assert prints.of(8, 100) > budget
    assert prints.largest_batch(1e6, 100) == 0


def test_llama_2_7b_has_the_bytes_that_are_known_of_it():
    shape = SHAPES["llama-2-7b"]
    assert shape.n_parameters == 6_607_077_376  # of 6.74e9 with the embeddings
    tokens = {
        scheme: cache_layout(shape, scheme, cache_scheme()).token_bytes * shape.n_layers for scheme in SCHEMES
    }
    assert tokens["fp16"] == 524_288
    assert tokens["w4a4"] == 524_288 // 4 + 2 * 32 * 32 * 4
    assert tokens["int8"] == 524_288 // 2 + 2 * 32 * 32 * 4


def test_the_floor_is_bytes_or_operations():
    prints, ceiling = Footprint(weights=3 * 10**9, token=10**5, row=0), Ceiling(3e12)
    shape = SHAPES["llama-2-7b"]
    assert e2e_bench.floor_us(prints, shape, "w4a4", 1, 10, ceiling) == pytest.approx(1000, rel=1e-3)
    assert e2e_bench.floor_us(prints, shape, "fp16", 4096, 1, ceiling) == pytest.approx(
        2e6 * 6_607_077_376 * 4096 / 989e12
    )


def step(scheme, batch, step_us, floor_us, comparison="equal batch"):
    times = {"step_us": step_us, "p10_us": step_us, "p90_us": step_us, "floor_us": floor_us}
    return Step(comparison, scheme, batch, 1024, 8, step_us / 4, 10.0, memory_bytes=2**30, **times)


def test_ratios_say_when_there_is_no_valid_baseline(capsys, monkeypatch):
    monkeypatch.setattr(console.out, "width", 200)
    steps = [
        step("w4a4", 32, 1000.0, 900.0),
        step("fp16", 32, 4000.0, 3000.0),
        step("int8", 32, 4000.0, 2000.0),
        step("w4a4", 128, 2000.0, 1800.0, "largest batch"),
        step("fp16", 16, 2000.0, 1900.0, "largest batch"),
        step("fp16", 8, 2000.0, 1900.0),
    ]
    ratios = _ratios(steps)
    assert [(r["scheme"], r["baseline"], r["baseline_batch"]) for r in ratios] == [
        ("w4a4", "fp16", 32),
        ("w4a4", "int8", 32),
        ("w4a4", "fp16", 16),
    ]
    assert [r["measured"] for r in ratios] == pytest.approx([4, 4, 8])
    assert ratios[2]["at_floors"] == pytest.approx(128 / 1800 * 1900 / 16)
    assert [r["baseline_is_valid"] for r in ratios] == [True, False, True]
    record = {
        "model": "llama-2-7b",
        "gpu": "some GPU",
        "context": 1024,
        "memory_gib": 0.5,
        "n_layers": 32,
        "n_layers_measured": 8,
        "kv_cache": {"w4a4": "4 bits"},
        "steps": [s.to_dict() for s in steps],
        "ratios": ratios,
        "prefill": {
            "w4a4": {
                "graph_us": 5000.0,
                "launched_us": 9000.0,
                "shares": {"attention": 1234.0, "launches": 20.0},
            }
        },
    }
    record["steps"][0]["shares"] = {"attention": 700.0, "launches": 300.0}
    print_record(record)
    shown = " ".join(capsys.readouterr().out.split())
    assert "8 of 32 layers measured, step = head + (measured - head) x 32 / 8" in shown
    assert "no valid baseline: 50 % of its floor" in shown
    assert "1.0, over 0.5" in shown
    assert "7.7x of FP16 and 2.5x of INT8, are of an RTX 4090" in shown
    assert "where the time goes" in shown
    assert "│ w4a4 │ 5.0 │ 9.0 │" in shown
    assert "│ w4a4 │ prompt │ 1.23 │ 0.02 │" in shown
    assert "0.70" in shown


def test_w4a16_is_left_out_where_its_kernel_is_not_made_for():
    assert e2e_bench.within_reach({"w4a16": 128, "fp16": 0, "int8": 900}) == {"w4a16": 128, "int8": 900}
    assert e2e_bench.within_reach({"w4a16": 129}) == {}


def test_the_workload_is_seeded_and_within_its_bounds():
    requests = workload(200, seed=1)
    assert requests == workload(200, seed=1)
    assert requests != workload(200, seed=2)
    assert all(r.n_prompt >= 1 and r.n_new >= 1 and r.n_prompt + r.n_new <= 2048 for r in requests)
    assert 15 < sum(r.n_prompt for r in requests) / 200 < 40


@pytest.mark.parametrize("n_pages", [None, 3])
def test_a_trace_serves_every_request(n_pages):
    decoder = tiny_decoder("fp16", n_layers=1)
    requests = [Request(3, 2), Request(60, 10), Request(5, 1), Request(1, 4), Request(70, 3)]
    page = decoder.layout.n_heads * decoder.layout.page_bytes
    memory = None if n_pages is None else torch.zeros(n_pages * page, dtype=torch.uint8)
    result = run_trace(decoder, requests, 2, memory)
    assert (result.n_requests, result.prompt_tokens, result.new_tokens) == (5, 139, 20)
    assert 0 < result.request_p50_s <= result.request_p99_s <= result.seconds
    assert 0 < result.token_p50_ms <= result.token_p99_ms
    assert result.to_dict()["tokens_per_s"] == pytest.approx(20 / result.seconds)


def test_a_trace_reads_prompts_of_many_lengths_before_its_clock_starts(monkeypatch):
    decoder = tiny_decoder("fp16", n_layers=1)
    read: list[int] = []
    prefill = type(decoder).prefill

    def watched(self, prompts, rows, cache):
        read.append(sum(map(len, prompts)))
        return prefill(self, prompts, rows, cache)

    monkeypatch.setattr(type(decoder), "prefill", watched)
    run_trace(decoder, [Request(20, 2), Request(30, 2), Request(9, 1)], 2)
    assert read == [8, 16, 24, 32, 40, 48, 56, 50, 9]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-3-70b"])
def test_prompts_of_all_lengths_are_multiplied_in_tiles_that_were_compiled_before(name, progressive):
    shape = SHAPES[name]
    n_query, n_kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    linears = [(n_query + 2 * n_kv, shape.hidden), (shape.hidden, n_query)]
    linears += [(2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]

    def tiles(n_tokens):
        return {
            choose_tile(n_tokens, 128, progressive, n_panels=n // 64, n_slots=k // 128 + 1)
            for n, k in linears
        }

    compiled = set().union(*map(tiles, COMPILED_TOKENS))
    assert all(tiles(n_tokens) <= compiled for n_tokens in range(1, 2049))


def test_attention_is_timed_for_every_cache_that_a_head_allows():
    assert len(layouts(8, 128)) == 7
    assert "int4 before RoPE, Hadamard" not in layouts(8, 96)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_picture_is_drawn(tmp_path, ending):
    steps = [step("w4a4", 8, 900.0, 800.0), step("fp16", 8, 1500.0, 1200.0)]
    steps += [dataclasses.replace(s, comparison="largest batch", batch=64) for s in steps]
    path = tmp_path / f"e2e.{ending}"
    draw_throughput(path, [s.to_dict() for s in steps], "llama-2-7b, 1024 tokens")
    assert path.stat().st_size > 5000
