"""bench-gemm as far as it goes without a GPU."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from atomq.cli import main
from atomq.errors import KernelError, VerificationError
from atomq.eval import gemm_bench, gemm_candidates, gemm_kernels
from atomq.eval.gemm_bench import Ceilings, Result
from atomq.eval.gemm_candidates import Work
from atomq.eval.gemm_peers import HummingPeer
from atomq.eval.gemm_timing import LONG_TURN, SHORT_TURN, Timing, n_copies, time_sustained, turns
from atomq.formats.gemm_plot import draw_speedups
from atomq.kernels.gemm_tiles import SLOT_US, sm90_defines
from atomq.kernels.loader import ARCHITECTURES
from atomq.kernels.variants import Variant, all_variants

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


@needs_no_gpu
def test_without_a_gpu_it_says_what_can_be_done_instead(capsys):
    assert main(["bench-gemm", "--tokens", "1"]) == 1
    assert "no CUDA device here; use --compile-only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gpt-9"], "unknown model 'gpt-9'; shapes are known of llama-2-7b"),
        (["--shape", "12by3"], "--shape 12by3 must look like 4096x4096"),
        (["--shape", "64x128"], "inputs above 128"),
        (["--tokens", "1,none"], "--tokens 1,none must be numbers of at least 1"),
        (["--tokens", "0"], "--tokens 0 must be numbers of at least 1"),
        (["--save", "record.txt"], "record.txt must end in .json"),
        (["--plot", "figure.pdf"], "figure.pdf must end in .png or .svg"),
        (["--checkpoint", "nowhere"], "there is no checkpoint nowhere"),
    ],
)
def test_bad_input_is_refused(arguments, message, capsys):
    assert main(["bench-gemm", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_compiled_variants_are_shown_by_kernel_and_architecture(monkeypatch, capsys):
    built = [
        Variant("rows", "sm_80", {"QUANTIZE": 0}, 40, 32, 0),
        Variant("rows", "sm_80", {"QUANTIZE": 1}, 56, 32, 8),
        Variant("rows", "sm_120", {"QUANTIZE": 0, "SHARED_BYTES": 1024}, 48, 8, 0),
    ]
    monkeypatch.setattr("atomq.kernels.variants.compile_variants", lambda on_progress: iter(built))
    assert main(["bench-gemm", "--compile-only"]) == 0
    shown = [re.findall(r"[\w-]+", line) for line in capsys.readouterr().out.splitlines() if "rows" in line]
    assert shown == [["rows", "sm_80", "2", "40-56", "32", "0-8"], ["rows", "sm_120", "1", "48", "1032", "0"]]


def test_every_tile_of_the_table_is_among_the_variants():
    built = [defines for name, _, defines in all_variants() if name == "sm90_w4a4_gemm"]
    for tile in SLOT_US:
        assert sm90_defines(tile, 128, 2, False, torch.float16) in built
    assert len(built) == len({tuple(defines.items()) for defines in built})


@pytest.mark.slow
def test_every_kernel_compiles_for_every_architecture_and_none_spills_but_attention(capsys):
    pytest.importorskip("cupy", reason="compiles with NVRTC through CuPy")
    assert main(["bench-gemm", "--compile-only", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["architectures"] == list(ARCHITECTURES)
    built = record["kernels"]
    assert all(kernel["registers"] > 0 for kernel in built)
    spilling = {kernel["name"] for kernel in built if kernel["spill_bytes"]}
    assert spilling <= {"kv_attention"}  # as it was timed; tests/kernels/test_kv_cache.py has its limits
    everywhere = {
        "gptq_block",
        "quantize_act",
        "quantize_gathered",
        "quantize_kv",
        "dequantize_kv",
        "repack_w4",
        "sm80_w4a4_gemm",
    }
    for name in everywhere:
        assert {kernel["arch"] for kernel in built if kernel["name"] == name} == set(ARCHITECTURES)
    assert {k["arch"] for k in built if k["name"].startswith("sm90")} == {"sm_90a"}
    sources = {path.stem for path in (resources_folder()).glob("*.cu")}
    assert {kernel["name"] for kernel in built} == sources


def resources_folder():
    from atomq.resources import folder

    return folder("kernels_cuda")


class FakeCandidate:
    """Takes at most `max_tokens`; its launches are strings, for a clock that does not run them."""

    def __init__(self, name, *, is_peer=True, problem="", max_tokens=99, quantizes=False, error=None):
        self.name, self.is_peer, self.max_tokens = name, is_peer, max_tokens
        self.why, self.quantizes, self.error = problem, quantizes, error

    def problem(self):
        return self.why

    def prepare(self, n_channels, n_inputs, max_tokens):
        self.shape = (n_channels, n_inputs)
        return self

    def work(self, n_tokens):
        if self.error:
            raise self.error
        if n_tokens > self.max_tokens:
            return None
        whole = [f"{self.name} whole"] if self.quantizes else None
        return Work([f"{self.name} alone"], whole, 3000.0, 8, None)


OURS = FakeCandidate("w4a4", is_peer=False, quantizes=True)
CANDIDATES = [FakeCandidate("fp16"), OURS, FakeCandidate("few", max_tokens=8), FakeCandidate("int8")]
MICROSECONDS = {"w4a4 alone": 2.0, "w4a4 whole": 5.0, "fp16 alone": 6.0, "few alone": 3.0, "int8 alone": 4.0}


@pytest.fixture
def _fake_gpu(monkeypatch):
    """A device that is there, candidates that need none, and a clock that knows what each takes."""

    def clock(candidates, rounds=3, turn=SHORT_TURN):
        return [Timing(us, us, us, 2 * us) for us in (MICROSECONDS[launches[0]] for launches in candidates)]

    monkeypatch.setattr(gemm_bench, "time_in_turns", clock)
    monkeypatch.setattr(gemm_bench, "all_candidates", lambda: CANDIDATES)
    monkeypatch.setattr(gemm_bench, "measure_ceilings", lambda: Ceilings(3e9, 1e12))
    monkeypatch.setattr(gemm_bench, "environment", lambda _: {"gpu": "a GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("_fake_gpu")
def test_products_of_many_tokens_are_timed_in_long_turns(monkeypatch):
    clock, taken = gemm_bench.time_in_turns, []

    def noted(candidates, rounds=3, turn=SHORT_TURN):
        taken.append((len(candidates), turn))
        return clock(candidates)

    monkeypatch.setattr(gemm_bench, "time_in_turns", noted)
    fp16 = [FakeCandidate("fp16", max_tokens=1024)]  # its work includes no quantization
    list(gemm_bench.bench([(100, 200)], [64, 128, 1024], fp16, Ceilings(3e9, 1e12), pytest.fail))
    assert [turn for count, turn in taken if count] == [SHORT_TURN, LONG_TURN, LONG_TURN]


@pytest.mark.parametrize(("group_size", "n", "k"), [(128, 192, 448), (None, 203, 448), (None, 192, 450)])
def test_humming_is_left_out_where_it_would_write_past_its_scales(group_size, n, k):
    with pytest.raises(KernelError, match=r"it takes K in multiples of \d+ and N in multiples of 64"):
        HummingPeer(group_size).prepare(n, k, 1)


@pytest.mark.parametrize("count", [2, 3, 10])
def test_a_candidate_does_not_always_follow_the_same_one(count):
    order = [i for number in range(3) for i in turns(count, number)]
    assert sorted(order) == sorted(3 * list(range(count)))
    before = {i: {a for a, b in itertools.pairwise(order) if b == i and a != i} for i in range(count)}
    assert all(len(neighbours) > 1 or count == 2 for neighbours in before.values())


@pytest.mark.usefixtures("_fake_gpu")
def test_every_candidate_gets_its_own_times():
    results = list(gemm_bench.bench([(100, 200)], [1, 16], CANDIDATES, Ceilings(3e9, 1e12), pytest.fail))
    found = [(r.n_tokens, r.name, r.timing.graph_us, r.whole and r.whole.graph_us) for r in results]
    assert found == [
        (1, "fp16", 6.0, None),
        (1, "w4a4", 2.0, 5.0),
        (1, "few", 3.0, None),
        (1, "int8", 4.0, None),
        (16, "fp16", 6.0, None),
        (16, "w4a4", 2.0, 5.0),
        (16, "int8", 4.0, None),
    ]


def test_the_floor_is_the_larger_of_bytes_and_operations():
    ceilings = Ceilings(bandwidth=3e9, operations=1e12)
    assert ceilings.floor_us(Work([], None, 3000.0, 8, None), 1e5) == pytest.approx(1.0)
    assert ceilings.floor_us(Work([], None, 3000.0, 8, None), 5e6) == pytest.approx(5.0)
    assert ceilings.floor_us(Work([], None, 3000.0, 16, None), 5e6) == pytest.approx(10.0)
    assert Ceilings(3e9, float("inf")).floor_us(Work([], None, 3000.0, 8, None), 5e6) == pytest.approx(1.0)


def test_copies_of_an_operand_leave_the_cache_behind():
    assert n_copies(8.4e6) * 8.4e6 > 150e6
    assert n_copies(1e9) == 1


@pytest.mark.usefixtures("_fake_gpu")
def test_the_command_prints_saves_and_draws(tmp_path, capsys):
    files = [tmp_path / "record.json", tmp_path / "speed.png"]
    command = ["bench-gemm", "--shape", "100x200", "--tokens", "1,16", "--save", files[0], "--plot", files[1]]
    assert main([*map(str, command), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads(files[0].read_text())
    assert record["gpu"] == "a GPU"
    assert len(record["results"]) == 7
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert main(["bench-gemm", "--shape", "100x200", "--tokens", "1", "--only", "w4a4,fp16,int8"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if "w4a4" in line)
    cells = [cell.strip() for cell in row.strip("│").split("│")]
    assert cells[1:5] == ["1", "2.0", "4.0", "5.0"]
    assert cells[-2:] == ["3.00x", "2.00x"]  # over fp16, over int8


@pytest.mark.usefixtures("_fake_gpu")
def test_what_cannot_run_is_named_with_the_reason(monkeypatch, capsys):
    lame = FakeCandidate("humming", problem="it is not installed here; pip install it")
    monkeypatch.setattr(gemm_bench, "all_candidates", lambda: [OURS, lame])
    assert main(["bench-gemm", "--shape", "100x200", "--tokens", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert "humming is left out: it is not installed here; pip install it" in printed.err
    assert json.loads(printed.out)["left_out"] == [
        "humming is left out: it is not installed here; pip install it"
    ]
    assert main(["bench-gemm", "--only", "w4a4,marlin"]) == 2
    assert "--only marlin: there is no such kernel or peer; there are w4a4, humming" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.usefixtures("_fake_gpu")
def test_a_peer_that_cannot_do_a_product_is_left_out_and_a_kernel_of_ours_ends_the_run(monkeypatch, capsys):
    lame = FakeCandidate("fp8", error=KernelError("channels in sixteens, please"))
    monkeypatch.setattr(gemm_bench, "all_candidates", lambda: [OURS, lame])
    assert main(["bench-gemm", "--shape", "100x200", "--tokens", "7", "--json"]) == 0
    printed = capsys.readouterr()
    sentence = "fp8 is left out at 100x200, 7 tokens: channels in sixteens, please"
    assert sentence in printed.err
    assert json.loads(printed.out)["left_out"] == [sentence]
    lame.is_peer = False
    assert main(["bench-gemm", "--shape", "100x200", "--tokens", "7", "--json"]) == 1
    assert "error: channels in sixteens, please" in capsys.readouterr().err


@pytest.mark.usefixtures("_fake_gpu")
def test_a_wrong_result_ends_with_exit_code_1(monkeypatch, capsys, tmp_path):
    wrong = FakeCandidate("w4a4", error=VerificationError("w4a4 100x200, 1 tokens: the result is 0.1 off"))
    monkeypatch.setattr(gemm_bench, "all_candidates", lambda: [wrong])
    save = tmp_path / "record.json"
    assert main(["bench-gemm", "--shape", "100x200", "--tokens", "1", "--save", str(save)]) == 1
    assert "the result is 0.1 off" in capsys.readouterr().err
    assert not save.exists()


def test_a_product_is_held_against_the_oracle_at_the_precision_of_its_dtype():
    oracle = torch.randn(50, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        rounded = oracle.to(dtype)
        assert (
            0 < gemm_kernels.frobenius_error("w4a4", rounded, oracle) <= gemm_kernels.FROBENIUS_LIMIT[dtype]
        )
        rounded[3, 4] += 1
        with pytest.raises(VerificationError, match=r"50 tokens: the result is .* off the float64 oracle"):
            gemm_kernels.frobenius_error("w4a4", rounded, oracle)
        rounded[3, 4] = float("nan")
        with pytest.raises(VerificationError):
            gemm_kernels.frobenius_error("w4a4", rounded, oracle)


def test_other_packages_plug_their_peers_in(monkeypatch):
    class Point:
        name, value = "marlin", "elsewhere:peer"

        def __init__(self, load):
            self.load = load

    def fail():
        raise ImportError("no module named elsewhere")

    points = [Point(lambda: OURS)]
    monkeypatch.setattr(gemm_candidates, "entry_points", lambda group: points if "peers" in group else [])
    assert gemm_candidates.plugged_in() == [OURS]
    assert gemm_bench.all_candidates()[-1] is OURS
    points.append(Point(fail))
    with pytest.raises(KernelError, match=r"marlin of elsewhere:peer does not load: no module named"):
        gemm_candidates.plugged_in()


def test_a_result_gives_its_rates():
    result = Result("w4a4", False, 1000, 2000, 10, 0.0, Timing(2.0, 1.9, 2.1, 5.0), None, 1.0, 6e6)
    assert result.tops == pytest.approx(2 * 1000 * 2000 * 10 / 2e-6 / 1e12)
    assert result.gigabytes_per_s == pytest.approx(6e6 / 2e-6 / 1e9)
    assert result.to_dict()["floor_fraction"] == 0.5


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_picture_is_drawn(tmp_path, ending):
    results = [
        Result(name, is_peer, 64, 256, n, None, Timing(us, us, us, us), None, 1.0, 1.0).to_dict()
        for name, is_peer, us in (("w4a4", False, 2.0), ("fp16", True, 6.0))
        for n in (1, 16)
    ]
    path = tmp_path / f"speed{ending}"
    draw_speedups(path, results, "a GPU")
    start = path.read_bytes()[:8]
    assert start.startswith(b"\x89PNG" if ending == ".png" else b"<?xml")


@pytest.mark.gpu
def test_on_a_gpu_every_kernel_is_checked_and_timed(capsys):
    assert main(["bench-gemm", "--shape", "203x448", "--tokens", "1,17,130", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    ours = [r for r in results if not r["is_peer"]]
    assert {r["name"] for r in ours} >= {"w4a4", "w4a4-mixed", "w4a4-progressive"}
    for r in ours:
        assert 0 < r["error"] <= 3e-4
    for r in results:
        assert 0.5 < r["timing"]["graph_us"] < 1000, r
        assert r["timing"]["graph_p10_us"] <= r["timing"]["graph_us"] <= r["timing"]["graph_p90_us"]
    whole = {r["name"]: r["whole"] for r in results}
    assert whole["w4a4"]["graph_us"] > 1
    assert whole["fp16"] is None


@pytest.mark.gpu
def test_on_a_gpu_a_sustained_run_is_timed_all_along():
    x = torch.randn(1024, 1024, device="cuda")
    samples = time_sustained([lambda: x @ x], 0.05)
    assert all(earlier[0] < later[0] for earlier, later in itertools.pairwise(samples))
    assert 20 < samples[-1][0] < 500
    assert all(1 < us < 1e4 for _, us in samples)


@pytest.mark.gpu
def test_on_a_gpu_a_wrong_kernel_ends_with_exit_code_1(monkeypatch, capsys):
    multiply = gemm_kernels.gemm.w4a4_gemm
    monkeypatch.setattr(
        gemm_kernels.gemm, "w4a4_gemm", lambda *args, out: multiply(*args, out=out).mul_(1.001)
    )
    assert main(["bench-gemm", "--shape", "208x448", "--tokens", "17", "--only", "w4a4"]) == 1
    assert "off the float64 oracle" in capsys.readouterr().err


def test_asking_for_help_loads_no_torch():
    code = "import sys, atomq.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
