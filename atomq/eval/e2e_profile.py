"""Where the time of a captured step goes: kernels of a step by what they do, from CUDA's own trace.

A kernel's share begins where the one before it ended, since launches may overlap (GEMMs begin early and wait
for their tokens); what lies between two kernels is the launches' share. So the shares add up to the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {
    "attention": ("kv_attention", "flash", "fmha", "sdpa"),
    "cache": ("kv_append", "kv_read"),
    "quantize": ("quantize_act", "quantize_gathered", "rows", "scale_sums"),
    "products": ("gemm", "nvjet", "cutlass", "cublas", "xmma", "splitk"),
}
"""Kind of work -> what the names of its kernels contain; the first that fits counts."""
OTHERS, LAUNCHES = "others", "launches"


class Span(NamedTuple):
    """A kernel's name, and when it ran, in microseconds."""

    name: str
    start: float
    end: float


def shares(spans: Iterable[Span]) -> dict[str, float]:
    """Microseconds of each kind of work (`KINDS`, "others") and of the gaps ("launches")."""
    ordered = sorted(spans, key=lambda span: (span.start, span.end))
    found = dict.fromkeys((*KINDS, OTHERS, LAUNCHES), 0.0)
    last = ordered[0].start if ordered else 0.0
    for span in ordered:
        found[LAUNCHES] += max(0.0, span.start - last)
        found[kind_of(span.name)] += max(0.0, span.end - max(span.start, last))
        last = max(last, span.end)
    return found


def kind_of(name: str) -> str:
    """The kind of work of a kernel."""
    lowered = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in lowered for p in parts)), OTHERS)


def profile_step(launch: Callable[[], object]) -> dict[str, float]:
    """`shares` of one replay of `launch` captured as a CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            launch()
        finally:
            graph.capture_end()
        graph.replay()
        stream.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            graph.replay()
            stream.synchronize()
    return shares(
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events()
        if event.device_type.name == "CUDA"
    )
