"""GEMM operands and kernels: layouts against plain arithmetic, every template against the float64 oracle."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re

import pytest
import torch
from gemm_operands import make_inputs, make_weight, misaligned, move, pack_inputs, plain_product
from sass import disassemble, stages_are_given_back_behind_a_fence

from atomq.errors import KernelError
from atomq.kernels import gemm, gemm_reference, repack
from atomq.kernels.gemm import Engine, Tile, w4a4_gemm
from atomq.kernels.gemm_tiles import MAX_COUNTERS, split_tiles
from atomq.kernels.loader import ARCHITECTURES, compile_for
from atomq.kernels.repack import pack_activations, repack_weight

# n_channels, n_inputs (INT4), n_outliers, group_size, channel_group: ragged groups, odd panels, odd channels
SHAPES = [
    (100, 448, 128, 128, 1),
    (64, 1536, 0, 64, 2),
    (130, 1344, 64, 64, 1),
    (203, 190, 20, 128, 1),
    (320, 2048, 256, 128, 2),
]
TOKENS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 64, 127, 128, 129, 255, 256, 1000, 4096)
TOLERANCE = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
TILES = [
    Tile(8, 8, 2, 1, 0),
    Tile(16, 16, 2, 1, 0),
    Tile(32, 32, 2, 1, 0),
    Tile(64, 64, 2, 1, 0),
    Tile(64, 64, 2, 2, 232),
    Tile(128, 64, 2, 1, 232),
    Tile(128, 64, 2, 2, 232),
    Tile(80, 80, 2, 1, 232),
    Tile(80, 80, 3, 1, 152),
    Tile(96, 96, 2, 1, 232),
    Tile(96, 96, 3, 1, 152),
    Tile(128, 64, 3, 1, 152),
    Tile(160, 80, 2, 1, 232),
    Tile(192, 64, 2, 1, 232),
    Tile(192, 96, 2, 1, 232),
    Tile(256, 64, 2, 1, 232),
    Tile(256, 32, 2, 1, 232),
    Tile(8, 8, 1, 1, 0, 2),
    Tile(16, 16, 1, 1, 0, 2, has_neighbour=True),
    Tile(16, 16, 2, 1, 0, 2),
    Tile(32, 32, 1, 1, 0, 2),
    Tile(32, 32, 2, 1, 0, 2, has_neighbour=True),
    Tile(64, 64, 2, 1, 104, 2),
    Tile(80, 80, 1, 1, 232, 2),
    Tile(96, 48, 1, 1, 232, 2),
    Tile(128, 128, 1, 1, 232, 2),
    Tile(160, 80, 1, 1, 232, 2),
    Tile(192, 96, 1, 1, 232, 2),
]


def error(result: torch.Tensor, oracle: torch.Tensor) -> float:
    return ((result.double() - oracle).norm() / oracle.norm()).item()


@pytest.mark.parametrize("base_scales", [False, True], ids=["group-scales", "base-scales"])
@pytest.mark.parametrize("progressive", [False, True], ids=["exact", "progressive"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operands_hold_what_the_checkpoint_holds(shape, progressive, base_scales):
    weight = make_weight(*shape, progressive=progressive)
    inputs = make_inputs(13, weight, base_scales=base_scales)
    packed, activations = repack_weight(weight), pack_inputs(inputs, weight)
    expected = plain_product(inputs, weight)
    assert error(gemm_reference.w4a4_oracle(activations, packed), expected) < 1e-12
    assert error(gemm_reference.w4a4_gemm(activations, packed, torch.float32), expected) < 1e-6


def test_a_record_has_the_documented_bytes():
    # Row 9 is warp 0, lane 4, second row of the pair; input 34 is step 1 of half 0, lane % 4 = 0, byte 2.
    weight = make_weight(64, 128, 0, 128)
    weight.qweight.zero_()
    weight.qweight[9, 17] = 0x0D  # the low nibble is input 34: code -3
    record = repack_weight(weight).records[0, 0]
    position = (4 * 4 + 1) * 4 + 2  # thread 4, word 1 (row + 8, first 16 inputs), byte 2
    assert record[position] == 0xD0
    assert record[: repack.CODE_BYTES].count_nonzero() == 1
    scales = record[repack.CODE_BYTES :].view(torch.float16)
    assert torch.equal(scales[:4], weight.scales[[0, 8, 1, 9], 0])


def test_tiles_of_activations_are_swizzled():
    codes = torch.arange(128, dtype=torch.int8).repeat(3, 1)
    packed = pack_activations(codes, torch.ones(3, 1), None, None, 128)
    assert packed.codes.shape == (1, 8, 128)
    assert packed.codes[0, 2, :16].tolist() == list(range(32, 48))
    assert torch.equal(repack.unpack_activations(packed), codes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 32}, "group_size 32"),
        ({"channel_group": 4}, "channel_group 4"),
        ({"qweight": torch.zeros(100, 223, dtype=torch.uint8)}, "qweight"),
        ({"qweight": torch.zeros(100, 224, dtype=torch.int8)}, "qweight"),
        ({"scales": torch.ones(100, 4, dtype=torch.float64)}, "scales"),
        ({"outlier_weight": torch.zeros(100, 257, dtype=torch.int8)}, "257 outliers"),
        ({"outlier_scales": None}, "outlier_scales"),
        ({"bias": torch.zeros(99)}, "bias"),
    ],
)
def test_repack_refuses_tensors_that_do_not_fit(change, message):
    weight = dataclasses.replace(make_weight(100, 448, 128, 128), **change)
    with pytest.raises(KernelError, match=message):
        repack_weight(weight)


def test_the_front_refuses_a_cpu_weight():
    weight = make_weight(64, 128, 0, 128)
    activations = pack_inputs(make_inputs(3, weight), weight)
    with pytest.raises(KernelError, match="gemm_reference"):
        w4a4_gemm(activations, repack_weight(weight))


@pytest.mark.parametrize(
    ("shape", "progressive", "n_warpgroups"),
    [  # panels and slots of a weight
        ((448, 65), False, 2),  # 28672 x 8192
        ((128, 225), False, 2),  # 8192 x 28672
        ((128, 65), False, 1),  # 8192 x 8192
        ((128, 65), True, 2),
        ((64, 87), False, 1),  # 4096 x 11008
        ((64, 87), True, 1),
        ((64, 33), False, 1),  # 4096 x 4096
    ],
)
def test_few_tokens_go_by_panels_and_records(shape, progressive, n_warpgroups):
    for n_tokens in (1, 16, 32):
        tile = gemm.choose_tile(n_tokens, 128, progressive, n_panels=shape[0], n_slots=shape[1])
        assert (tile.n_warpgroups, tile.k_teams, tile.row_blocks) == (n_warpgroups, 2, 1)
        threads = 128 * (tile.n_warpgroups * tile.k_teams + 1)
        assert tile.shared_bytes + 1024 <= 180 * 1024  # a CTA that quantizes fits beside it:
        if threads == 640:
            assert tile.max_registers * threads + 256 * 56 <= 65536
    assert not gemm.choose_tile(16, 64, progressive).has_neighbour  # these would spill
    assert not gemm.choose_tile(16, 128, progressive, out_dtype=torch.float32).has_neighbour


@pytest.mark.parametrize(
    ("n_tokens", "shape", "cut"),
    [  # of Llama-2-7B and Llama-3: tokens, warpgroups and teams of the fastest tile, or of one within 3 %
        (147, (192, 33), (80, 3, 1)),
        (147, (64, 33), (80, 1, 2)),
        (147, (344, 33), (160, 2, 1)),
        (147, (64, 88), (80, 1, 2)),
        (147, (896, 65), (160, 2, 1)),
        (192, (192, 33), (96, 3, 1)),
        (192, (64, 33), (96, 1, 2)),
        (192, (128, 65), (192, 1, 2)),
        (128, (344, 33), (128, 3, 1)),
        (128, (64, 88), (128, 1, 2)),
        (80, (344, 33), (80, 3, 1)),
        (80, (64, 33), (80, 1, 2)),
        (96, (344, 33), (96, 3, 1)),
        (96, (64, 88), (96, 1, 2)),
        (1000, (64, 33), (256, 2, 1)),
        (4096, (448, 65), (256, 2, 1)),
    ],
)
def test_tokens_with_exact_scales_go_by_slots_and_joining(n_tokens, shape, cut):
    tile = gemm.choose_tile(n_tokens, 128, False, n_panels=shape[0], n_slots=shape[1])
    assert (tile.tokens, tile.n_warpgroups, tile.k_teams) == cut


@pytest.mark.parametrize(
    ("n_tokens", "tokens"),
    [
        (128, 128),
        (129, 160),
        (160, 160),
        (161, 192),
        (193, 256),
        (300, 160),
        (384, 192),
        (385, 256),
        (513, 256),
    ],
)
def test_a_progressive_tile_is_no_larger_than_the_tokens_need(n_tokens, tokens):
    for base in (False, True):
        tile = gemm.choose_tile(n_tokens, 128, True, token_base=base)
        assert (tile.tokens, tile.tokens % tile.chunk_tokens) == (tokens, 0)
    assert gemm.choose_tile(n_tokens, 64, True).tokens == (128 if n_tokens == 128 else 256)  # others spill
    small = gemm.choose_tile(147, 128, True, n_panels=64, n_slots=33)  # 4096 x 4096
    assert small == gemm.choose_tile(147, 128, False, n_panels=64, n_slots=33)


def slots_of_ctas(stream, n_tiles, n_slots, n_ctas):
    """Tile and slots that each CTA goes through, as `Schedule` of gemm_stream.cuh does."""
    work = []
    n_stream_slots = stream.n_tiles * stream.slots_per_tile
    for cta in range(n_ctas):
        first = min(cta * stream.slots_per_cta, n_stream_slots)
        pieces = []
        for slot in range(first, min(first + stream.slots_per_cta, n_stream_slots)):
            tile, place = divmod(slot, stream.slots_per_tile)
            if place < n_slots:
                pieces.append((tile, place))
        whole = range(stream.n_tiles + cta, n_tiles, n_ctas)
        work.append(pieces + [(tile, place) for tile in whole for place in range(n_slots)])
    return work


@pytest.mark.parametrize("n_slots", [1, 6, 33, 65])
@pytest.mark.parametrize("n_tiles", [1, 9, 64, 96, 131, 132, 133, 172, 224, 264, 448])
def test_every_slot_is_dealt_out_once_and_a_cta_joins_two_pieces_at_most(n_tiles, n_slots):
    n_ctas = 132
    for join_slots in (9, 13):
        stream = split_tiles(n_tiles, n_slots, n_ctas, join_slots)
        work = slots_of_ctas(stream, n_tiles, n_slots, n_ctas)
        dealt = sorted(itertools.chain.from_iterable(work))
        assert dealt == [(tile, slot) for tile in range(n_tiles) for slot in range(n_slots)]
        busiest = max(map(len, work))
        assert busiest <= stream.cost <= -(-n_tiles // n_ctas) * n_slots
        assert stream.n_tiles <= MAX_COUNTERS
        for slots in work:
            tiles = {tile for tile, _ in slots}
            assert sum(sum(tile == own for own, _ in slots) < n_slots for tile in tiles) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("token_base", [False, True])
@pytest.mark.parametrize("scale_bytes", [1, 2, 4])
@pytest.mark.parametrize("group_size", [64, 128])
def test_hopper_templates_compile_to_wgmma_without_spills(group_size, scale_bytes, token_base, tmp_path):
    pytest.importorskip("cupy", reason="compiles with NVRTC through CuPy")
    for out_dtype in (torch.float32, torch.bfloat16):  # float16 takes what bfloat16 does
        tiles = {
            gemm.choose_tile(
                n_tokens,
                group_size,
                scale_bytes == 1,
                token_base=token_base,
                n_panels=n_panels,
                out_dtype=out_dtype,
            )
            for n_tokens in (8, 16, 32, 64, 80, 96, 128, 147, 192, 1000)
            for n_panels in (64, 192, 344, 448)
        }
        for tile in tiles:
            defines = gemm.sm90_defines(tile, group_size, scale_bytes, token_base, out_dtype)
            kernel = compile_for("sm90_w4a4_gemm", "sm_90a", **defines)
            assert kernel.spill_bytes == 0, (tile, out_dtype)
        sass = disassemble(kernel.cubin, tmp_path)
        assert re.search(r"IGMMA\.64x\d+x32\.S8\.S8", sass)
        assert not re.search(r"\.S4|\.U4", sass)  # no INT4 instruction, which Hopper only emulates
        assert stages_are_given_back_behind_a_fence(sass)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_portable_templates_compile_everywhere_without_spills(arch, tmp_path):
    pytest.importorskip("cupy", reason="compiles with NVRTC through CuPy")
    is_native = arch in ("sm_80", "sm_86", "sm_89")
    for scale_bytes in (1, 2, 4):
        for group_size in (64, 128):
            compile_for(
                "repack_w4",
                arch,
                PROGRESSIVE=int(scale_bytes == 1),
                GROUP_SIZE=group_size,
                SCALE_BYTES=scale_bytes,
                CHANNEL_GROUP=1,
            )
            for engine in (Engine.MMA_INT8, *([Engine.MMA_INT4] if is_native and scale_bytes > 1 else [])):
                for tile_tokens in (16, 64):
                    defines = gemm.sm80_defines(
                        tile_tokens, engine, group_size, scale_bytes, scale_bytes == 1, torch.float16
                    )
                    kernel = compile_for("sm80_w4a4_gemm", arch, **defines)
                    assert kernel.spill_bytes == 0, (engine, tile_tokens, group_size, scale_bytes)
    sass = disassemble(kernel.cubin, tmp_path)
    assert bool(re.search(r"IMMA\.16864\.S4", sass)) == is_native


def test_int4_mma_is_refused_where_it_is_emulated():
    pytest.importorskip("cupy", reason="compiles with NVRTC through CuPy")
    defines = gemm.sm80_defines(16, Engine.MMA_INT4, 128, 2, False, torch.float16)
    with pytest.raises(KernelError, match="emulated from sm_90 on"):
        compile_for("sm80_w4a4_gemm", "sm_90a", **defines)


def test_the_default_engine_follows_device_and_operands():
    weight = make_weight(64, 256, 0, 128)
    packed, inputs = repack_weight(weight), make_inputs(3, weight)
    four, eight = pack_inputs(inputs, weight), pack_inputs(inputs, weight, 8)
    assert gemm.default_engine((9, 0), four, packed) is Engine.WGMMA_INT8
    assert gemm.default_engine((8, 9), four, packed) is Engine.MMA_INT4
    assert gemm.default_engine((8, 0), eight, packed) is Engine.MMA_INT8
    assert gemm.default_engine((12, 0), four, packed) is Engine.MMA_INT8
    with pytest.raises(KernelError, match="sm_75"):
        gemm.default_engine((7, 5), four, packed)


MODES = list(itertools.product((False, True), repeat=2))  # progressive weights, progressive activations
TEMPLATES = [
    *((Engine.WGMMA_INT8, mode, tile) for mode in MODES for tile in TILES),
    (Engine.WGMMA_INT8, (True, True), Tile(128, 128, 2, 2, 232)),
    (Engine.WGMMA_INT8, (True, True), Tile(256, 128, 2, 1, 232)),
    *((Engine.MMA_INT8, mode, None) for mode in MODES),
    (Engine.MMA_INT4, (False, False), None),
]


def on_gpu(engine: Engine) -> None:
    if engine is Engine.WGMMA_INT8 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper GPU here")


@functools.cache
def case(shape: tuple[int, ...], mode: tuple[bool, bool], n_tokens: int, *, power_of_two: bool = False):
    """A weight, inputs and the float64 product, on the GPU; fewer tokens are the first rows of it."""
    progressive, base_scales = mode
    float32_scales = power_of_two or SHAPES.index(shape) % 2 == 1
    cpu = make_weight(
        *shape, progressive=progressive, float32_scales=float32_scales, power_of_two=power_of_two
    )
    weight = move(cpu, "cuda")
    inputs = make_inputs(n_tokens, cpu, base_scales=base_scales, power_of_two=power_of_two)
    inputs = tuple(x.cuda() for x in inputs)
    packed = repack_weight(weight)
    assert torch.equal(packed.records.cpu(), repack_weight(cpu).records)
    return weight, packed, inputs, plain_product(inputs, weight)


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "mode", "tile"), TEMPLATES, ids=str)
def test_every_template_matches_the_oracle_for_any_number_of_tokens(engine, mode, tile):
    on_gpu(engine)
    for i, shape in enumerate(SHAPES):
        weight, packed, inputs, expected = case(shape, mode, max(TOKENS))
        out_dtype = list(TOLERANCE)[i % 3]
        for n_tokens in TOKENS:
            activations = pack_inputs(tuple(x[:n_tokens] for x in inputs), weight)
            out = torch.full_like(expected[:n_tokens], float("nan"), dtype=out_dtype)
            w4a4_gemm(activations, packed, out_dtype, out=out, engine=engine, tile=tile)
            assert error(out, expected[:n_tokens]) <= TOLERANCE[out_dtype], (shape, n_tokens, out_dtype)
            again = w4a4_gemm(activations, packed, out_dtype, engine=engine, tile=tile)
            assert torch.equal(out, again), (shape, n_tokens)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_the_device_picks_matches_the_oracle(mode):
    for shape in SHAPES:
        weight, packed, inputs, expected = case(shape, mode, max(TOKENS))
        for n_tokens, (out_dtype, tolerance) in itertools.product(TOKENS, TOLERANCE.items()):
            activations = pack_inputs(tuple(x[:n_tokens] for x in inputs), weight)
            result = w4a4_gemm(activations, packed, out_dtype)
            assert error(result, expected[:n_tokens]) <= tolerance, (shape, n_tokens, out_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "mode", "tile"), TEMPLATES, ids=str)
def test_powers_of_two_are_bit_exact(engine, mode, tile):
    on_gpu(engine)
    weight, packed, inputs, expected = case(SHAPES[2], mode, 300, power_of_two=True)
    for n_tokens in (33, 300):
        activations = pack_inputs(tuple(x[:n_tokens] for x in inputs), weight)
        result = w4a4_gemm(activations, packed, torch.float32, engine=engine, tile=tile)
        assert torch.equal(result.double(), expected[:n_tokens])


LONG_WALKS = [  # of both teams' kinds; those of more than 128 tokens read their own pieces back
    Tile(16, 16, 2, 1, 0, 2, has_neighbour=True),
    Tile(80, 80, 1, 1, 232, 2),
    Tile(128, 64, 3, 1, 152),
    Tile(160, 80, 1, 1, 232, 2),
    Tile(192, 96, 2, 1, 232),
    Tile(256, 64, 2, 1, 232),
]
LONG_INPUTS, LONG_OUTLIERS = 4096, 64


def long_size(tile: Tile) -> tuple[int, int]:
    """Channels and tokens of 20 x 7 tiles, the last ones not full."""
    return 20 * tile.panels * 64 - 10, 7 * tile.tokens - 5


@pytest.mark.parametrize("tile", LONG_WALKS, ids=str)
def test_a_cta_on_a_long_walk_has_the_end_of_a_tile_a_whole_one_and_the_beginning_of_one(tile):
    n_slots, n_ctas = LONG_INPUTS // 128 + 1, 132
    stream = split_tiles(140, n_slots, n_ctas, tile.join_slots)
    counts = [
        [sum(tile == own for own, _ in slots) for tile in dict.fromkeys(tile for tile, _ in slots)]
        for slots in slots_of_ctas(stream, 140, n_slots, n_ctas)
    ]
    assert any(len(own) == 3 and own[1] == n_slots and max(own[0], own[2]) < n_slots for own in counts)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", LONG_WALKS, ids=str)
@pytest.mark.parametrize("progressive", [False, True])
def test_powers_of_two_are_bit_exact_on_long_walks(progressive, tile):
    on_gpu(Engine.WGMMA_INT8)
    n_channels, n_tokens = long_size(tile)
    options = {"progressive": progressive, "float32_scales": not progressive, "power_of_two": True}
    cpu = make_weight(n_channels, LONG_INPUTS, LONG_OUTLIERS, 128, **options)
    inputs = make_inputs(n_tokens, cpu, base_scales=progressive, power_of_two=True)
    weight, inputs = move(cpu, "cuda"), tuple(x.cuda() for x in inputs)
    packed, activations = repack_weight(weight), pack_inputs(inputs, weight)
    expected = plain_product(inputs, weight)
    for _ in range(3):
        result = w4a4_gemm(activations, packed, torch.float32, tile=tile)
        assert torch.equal(result.double(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("engine", [Engine.WGMMA_INT8, Engine.MMA_INT8])
@pytest.mark.parametrize("n_tokens", TOKENS)
def test_int8_activations_match_the_oracle(engine, n_tokens):
    on_gpu(engine)
    weight = make_weight(203, 1000, 256, 128, device="cuda")
    inputs = tuple(x.cuda() for x in make_inputs(n_tokens, move(weight, "cpu"), n_bits=8))
    result = w4a4_gemm(pack_inputs(inputs, weight, 8), repack_weight(weight), torch.float32, engine=engine)
    assert error(result, plain_product(inputs, weight)) <= 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize(("engine", "mode", "tile"), TEMPLATES, ids=str)
def test_one_altered_nibble_scale_or_place_is_seen(engine, mode, tile):
    on_gpu(engine)
    weight, packed, inputs, _ = case(SHAPES[2], mode, 300)
    multiply = functools.partial(w4a4_gemm, out_dtype=torch.float32, engine=engine, tile=tile)
    activations = pack_inputs(inputs, weight)
    right = multiply(activations, packed)
    for name, row, column in (("qweight", 77, 300), ("scales", 100, 12), ("outlier_weight", 129, 63)):
        altered = getattr(weight, name).clone()
        altered[row, column] += 1
        wrong = multiply(activations, repack_weight(dataclasses.replace(weight, **{name: altered})))
        assert (wrong != right).any(dim=0).nonzero().flatten().tolist() == [row], name
    codes, scales, outliers, outlier_scales = inputs
    swapped = codes.clone()
    swapped[:, [5, 700]] = codes[:, [700, 5]]
    wrong = multiply(pack_inputs((swapped, scales, outliers, outlier_scales), weight), packed)
    assert not torch.equal(wrong, right)
    longer = scales.clone()
    longer[17, -1] *= 1.5
    wrong = multiply(pack_inputs((codes, longer, outliers, outlier_scales), weight), packed)
    assert (wrong != right).any(dim=1).nonzero().flatten().tolist() == [17]


@pytest.mark.gpu
def test_no_tokens_give_an_empty_result():
    weight = make_weight(130, 448, 128, 128, device="cuda")
    activations = move(pack_inputs(make_inputs(0, weight), weight), "cuda")
    assert w4a4_gemm(activations, repack_weight(weight)).shape == (0, 130)


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [3, 300])
def test_a_captured_graph_replays_the_same_result(n_tokens):
    weight = make_weight(1000, 4096, 128, 128, device="cuda")
    activations = move(pack_inputs(make_inputs(n_tokens, weight), weight), "cuda")
    packed = repack_weight(weight)
    expected = w4a4_gemm(activations, packed)
    out = torch.empty_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        w4a4_gemm(activations, packed, out=out)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
def test_the_front_refuses_operands_that_do_not_fit():
    weight = make_weight(130, 448, 128, 128, device="cuda")
    packed = repack_weight(weight)
    activations = move(pack_inputs(make_inputs(17, weight), weight), "cuda")
    codes, scales, records = activations.codes, activations.token_scales, packed.records
    operands = (
        ({"codes": codes[:4].contiguous()}, {}, r"activations.codes.*it must be \(5, 24, 128\) torch.int8"),
        ({"codes": codes.view(torch.uint8)}, {}, r"activations.codes.*it must be .* torch.int8"),
        ({"codes": codes.transpose(1, 2).contiguous().transpose(1, 2)}, {}, "codes.*has strides"),
        ({"codes": codes.cpu()}, {}, r"codes.*on cpu; it must be .* on cuda"),
        ({"codes": misaligned(codes)}, {}, "codes.*multiple of 16 bytes"),
        ({"token_scales": scales.half()}, {}, "token_scales.*float16.*it must be .*float32"),
        ({"token_scales": scales[1:]}, {}, "token_scales"),
        ({"token_scales": scales.T.contiguous().T}, {}, "token_scales.*has strides"),
        ({}, {"records": records.view(torch.int8)}, "records are not those that repack_weight makes"),
        ({}, {"records": records[..., :-16].contiguous()}, "records are not those that repack_weight makes"),
        ({}, {"records": misaligned(records)}, "records.*multiple of 16 bytes"),
        ({}, {"channel_scales": packed.channel_scales.double()}, "channel_scales.*it must be .*float32"),
    )
    for changes, weight_changes, message in operands:
        with pytest.raises(KernelError, match=message):
            w4a4_gemm(
                dataclasses.replace(activations, **changes), dataclasses.replace(packed, **weight_changes)
            )
    with pytest.raises(KernelError, match="out_dtype"):
        w4a4_gemm(activations, packed, torch.float64)
    with pytest.raises(KernelError, match="MMA_INT4"):
        w4a4_gemm(dataclasses.replace(activations, n_bits=8), packed, engine=Engine.MMA_INT4)
    for out in (torch.empty(17, 130, device="cuda"), torch.empty(16, 130, device="cuda").half()):
        with pytest.raises(KernelError, match="out of"):
            w4a4_gemm(activations, packed, out=out)
