"""Decode throughput of whole decoders: ours beside float16, INT8 and W4A16 on one runtime and one arithmetic.

Every scheme decodes with the same loop, pages and captured graph; only its products and the bits of its cache
differ. Two comparisons: all at equal batches, and each at the largest batch that fits a memory budget. All
candidates live in one process and take turns. The KV pool is real: every block has its own pages, of which a
benchmark fills all with random values.

It measures; printing, files and exit codes are the command's business.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from atomq.errors import ConfigError, KernelError
from atomq.eval.e2e_profile import profile_step
from atomq.eval.gemm_timing import RESTED_TURN, Launch, time_in_turns
from atomq.kernels.kv_pages import PAGE_TOKENS
from atomq.runtime.decoder import Cache, Decoder, Prompts, pages_for
from atomq.runtime.random_decoder import DecoderShape

RESERVED_BYTES = 750 * 2**20
"""What CUDA's context, libraries and a graph take of a budget, for every scheme alike."""
VALID_FRACTION = 0.7
"""A baseline counts from this fraction of its own floor on."""
_PEAKS = {"fp16": 989e12, "w4a16": 989e12}  # data sheet, H100 SXM; else INT8's
_INT8_PEAK = 1979e12
_PREFILLS = 5
MAX_W4A16_BATCH = 128
"""Every 64 tokens read W4A16's weights once more: from three times on, float16's product is as fast."""


@dataclass(frozen=True)
class Footprint:
    """Bytes that a scheme takes on a whole model: weights; cache of a token; workspace of a row."""

    weights: int
    token: int
    row: int

    def of(self, batch: int, context: int) -> int:
        """Everything that must fit a budget."""
        per_row = pages_for(context) * PAGE_TOKENS * self.token + self.row
        return RESERVED_BYTES + self.weights + batch * per_row

    def largest_batch(self, budget: float, context: int) -> int:
        """The most rows of `context` tokens, 0 if there is no room for one."""
        per_row = self.of(1, context) - self.of(0, context)
        return max(0, int((budget - self.of(0, context)) // per_row))


@dataclass(frozen=True)
class Ceiling:
    """Bytes per second that this device reads, measured."""

    bandwidth: float


@dataclass(frozen=True)
class Step:
    """One decoding step of a scheme.

    Attributes:
        comparison: "equal batch" or "largest batch".
        step_us: of the whole model: measured where `n_layers` is all of them, else
            head_us + (measured_us - head_us) * all layers / n_layers.
        head_us: embedding, final norm and output head alone.
        floor_us: bytes of weights and cache over the bandwidth, or operations over the peak if that is more.
        memory_bytes: of the whole model with its cache.
        shares: microseconds of the whole model by kind of work (`e2e_profile`), from a replay under CUDA's
            trace; None if that was not asked for.
    """

    comparison: str
    scheme: str
    batch: int
    context: int
    n_layers: int
    measured_us: float
    head_us: float
    step_us: float
    p10_us: float
    p90_us: float
    floor_us: float
    memory_bytes: int
    shares: dict[str, float] | None = None

    @property
    def tokens_per_s(self) -> float:
        return 1e6 * self.batch / self.step_us

    @property
    def floor_fraction(self) -> float:
        return self.floor_us / self.step_us

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s, "floor_fraction": self.floor_fraction}


def describe_cache(decoder: Decoder) -> str:
    """What a decoder's pages hold, in words."""
    layout = decoder.layout
    position = "before" if layout.key_mode else "after"
    heads = decoder.blocks[0].heads
    offset = (
        "" if heads.key_offset is None else " less an offset" if heads.key_scale is None else ", balanced"
    )
    rotation = ", Hadamard" if layout.rotates_keys else ""
    return f"{layout.n_bits} bits, K {position} RoPE{offset}{rotation}"


def ratio(ours: Step, other: Step) -> tuple[float, float, bool]:
    """Throughput of `ours` over `other`: measured, at both floors, and if `other` counts as a baseline."""
    floors = (ours.batch / ours.floor_us) / (other.batch / other.floor_us)
    return ours.tokens_per_s / other.tokens_per_s, floors, other.floor_fraction >= VALID_FRACTION


def footprint(decoder: Decoder, shape: DecoderShape) -> Footprint:
    """Of all layers of `shape`, from the layers that `decoder` has."""
    blocks = sum(stage.n_bytes for block in decoder.blocks for stage in block.stages)
    weights = decoder.weight_bytes - blocks + blocks * shape.n_layers // len(decoder.blocks)
    width = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    row = 2 * (shape.vocabulary + 4 * shape.hidden + width + 3 * shape.intermediate)
    return Footprint(weights, decoder.layout.token_bytes * shape.n_layers, row)


def floor_us(
    prints: Footprint, shape: DecoderShape, scheme: str, batch: int, context: int, ceiling: Ceiling
) -> float:
    """The time below which no step gets."""
    moved = prints.weights + batch * context * prints.token
    operations = 2.0 * shape.n_parameters * batch
    return 1e6 * max(moved / ceiling.bandwidth, operations / _PEAKS.get(scheme, _INT8_PEAK))


def measure_ceiling() -> Ceiling:
    """The best of two copies, a library's and a kernel's, and of a sum over a tensor that no cache holds.

    Raises:
        KernelError: no CUDA device.
    """
    if not torch.cuda.is_available():
        raise KernelError("bench-e2e: no CUDA device here; atomq doctor says what its kernels need")
    source = torch.zeros(1 << 29, dtype=torch.float16, device="cuda")
    target = torch.empty_like(source)
    candidates: dict[Launch, int] = {
        lambda: target.copy_(source): 2,
        lambda: torch.neg(source, out=target): 2,
        lambda: source.amax(): 1,
    }
    timings = time_in_turns([[launch] for launch in candidates])
    n_bytes = source.numel() * source.element_size()
    passes = zip(candidates.values(), timings, strict=True)
    return Ceiling(1e6 * max(n * n_bytes / timing.graph_us for n, timing in passes))


def measure_steps(
    comparison: str,
    decoders: dict[str, Decoder],
    batches: dict[str, int],
    context: int,
    shape: DecoderShape,
    memory: torch.Tensor,
    ceiling: Ceiling,
    *,
    profile: bool = False,
) -> Iterator[Step]:
    """Time one step of each scheme at its batch, in turns from rest; schemes whose batch is 0 are left out.

    `memory` holds the pages of one scheme after the other; its bytes are finite float16 values, so they are
    sane codes and ranges in any layout.
    """
    names = [name for name in decoders if batches.get(name)]
    steps = [_step(decoders[name], batches[name], context, memory) for name in names]
    heads = [_head(decoders[name], batches[name]) for name in names]
    timings = zip(
        time_in_turns([[launch] for launch in steps], turn=RESTED_TURN),
        time_in_turns([[launch] for launch in heads]),
        strict=True,
    )
    shares = [
        [profile_step(launch) if profile else {} for launch in pair]
        for pair in zip(steps, heads, strict=True)
    ]
    for name, (step, head), (step_shares, head_shares) in zip(names, timings, shares, strict=True):
        decoder, batch = decoders[name], batches[name]
        prints, scaling = footprint(decoder, shape), shape.n_layers / len(decoder.blocks)

        def whole(us: float, head_us: float = head.graph_us, scaling: float = scaling) -> float:
            return head_us + (us - head_us) * scaling

        yield Step(
            comparison=comparison,
            scheme=name,
            batch=batch,
            context=context,
            n_layers=len(decoder.blocks),
            measured_us=step.graph_us,
            head_us=head.graph_us,
            step_us=whole(step.graph_us),
            p10_us=whole(step.graph_p10_us),
            p90_us=whole(step.graph_p90_us),
            floor_us=floor_us(prints, shape, name, batch, context, ceiling),
            memory_bytes=prints.of(batch, context),
            shares={kind: whole(us, head_shares[kind]) for kind, us in step_shares.items()} or None,
        )


def measure_prefills(
    decoders: dict[str, Decoder],
    n_tokens: int,
    shape: DecoderShape,
    memory: torch.Tensor,
    *,
    profile: bool = False,
) -> dict[str, dict[str, Any]]:
    """Microseconds of a prompt of `n_tokens` through the whole model, scaled by layers.

    Of each scheme: "graph_us", captured as a CUDA graph, in turns; "launched_us", launched from Python;
    "shares" of the graph as those of `Step`.
    """
    launches = {name: _prefill(decoder, n_tokens, memory) for name, decoder in decoders.items()}
    timings = time_in_turns([[launch] for launch in launches.values()])
    results: dict[str, dict[str, Any]] = {}
    for (name, launch), timing in zip(launches.items(), timings, strict=True):
        scaling = shape.n_layers / len(decoders[name].blocks)
        launched = [_launched_us(launch) for _ in range(_PREFILLS)]
        results[name] = {
            "graph_us": scaling * timing.graph_us,
            "launched_us": scaling * statistics.median(launched),
            "shares": None,
        }
        if profile:
            results[name]["shares"] = {kind: scaling * us for kind, us in profile_step(launch).items()}
    return results


def _prefill(decoder: Decoder, n_tokens: int, memory: torch.Tensor) -> Launch:
    cache = Cache(decoder, 1, n_tokens, memory=memory)
    tokens = torch.randint(len(decoder.embeddings), (n_tokens,), device=decoder.device)
    prompts = Prompts.of([tokens], [0], decoder.device)
    return torch.inference_mode()(lambda: decoder.read(prompts, cache))


def _launched_us(launch: Launch) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    launch()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def within_reach(batches: dict[str, int]) -> dict[str, int]:
    """The batches without schemes that have none, or more than `MAX_W4A16_BATCH`."""
    return {
        name: batch
        for name, batch in batches.items()
        if batch and (name != "w4a16" or batch <= MAX_W4A16_BATCH)
    }


def memory_for(decoders: dict[str, Decoder], cases: Sequence[dict[str, int]], context: int) -> torch.Tensor:
    """Memory for the pages of the largest of the cases, each the batches of the schemes.

    Raises:
        ConfigError: the device has less.
    """
    rows = max(case[name] * _row_bytes(decoders[name], context) for case in cases for name in case)
    size = math.ceil(rows / 2) * 2
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if size > free - 2 * RESERVED_BYTES:
        raise ConfigError(
            f"the KV pool takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} are free beside the weights; "
            f"measure fewer layers with --layers, or fewer schemes"
        )
    memory = torch.empty(size, dtype=torch.uint8, device="cuda")
    halves = memory.view(torch.float16)
    for start in range(0, len(halves), 1 << 28):
        halves[start : start + (1 << 28)].normal_(0, 0.5)
    return memory


def _row_bytes(decoder: Decoder, context: int) -> int:
    """Pages of one row of the blocks that the decoder has."""
    return len(decoder.blocks) * pages_for(context) * PAGE_TOKENS * decoder.layout.token_bytes


def _step(decoder: Decoder, batch: int, context: int, memory: torch.Tensor) -> Launch:
    """A step at a fixed length, that leaves the most likely tokens for the next one."""
    cache = Cache(decoder, batch, context, memory=memory)
    order = torch.randperm(cache.table.numel(), device=decoder.device)
    cache.table.copy_(cache.table.flatten()[order].reshape(cache.table.shape))
    tokens = torch.randint(len(decoder.embeddings), (batch,), device=decoder.device)
    lengths = torch.full((batch,), context, dtype=torch.int32, device=decoder.device)

    def launch() -> None:
        tokens.copy_(decoder.step(tokens, lengths, cache).argmax(-1))

    return torch.inference_mode()(launch)


def _head(decoder: Decoder, batch: int) -> Launch:
    tokens = torch.randint(len(decoder.embeddings), (batch,), device=decoder.device)

    def launch() -> None:
        tokens.copy_(decoder.logits(decoder.embeddings[tokens]).argmax(-1))

    return torch.inference_mode()(launch)
