"""First-come continuous batching on a decoder: a seeded workload, its throughput and its latencies.

The workload is Atom's serving benchmark (section 5.1, arXiv 2310.19102): prompts of log-normal length, totals
uniform. All requests wait from the start. A request enters when a row and the pages of all its tokens are
free, its prompt runs at once, and it leaves with its last token. Tokens are read at every step, as a server
must.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from atomq.kernels.kv_pages import PAGE_TOKENS
from atomq.runtime.decoder import Cache, Decoder, pages_for
from atomq.runtime.generate import Stepper

_SIGMA, _LOCATION, _SCALE = 0.8, -1.0, 18.0  # of the log-normal prompt lengths
_TOTAL_TOKENS = 2048
COMPILED_TOKENS = (*range(8, 513, 8), 1024, 2048)  # up to 512 a product's tile goes by them


@dataclass(frozen=True)
class Request:
    """Tokens of a prompt, and of its continuation."""

    n_prompt: int
    n_new: int


@dataclass(frozen=True)
class TraceResult:
    """What a trace took. Latencies run from entering to the last token; a token's from the one before."""

    n_requests: int
    n_rows: int
    prompt_tokens: int
    new_tokens: int
    seconds: float
    request_p50_s: float
    request_p99_s: float
    token_p50_ms: float
    token_p99_ms: float

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def workload(n_requests: int, seed: int, total_tokens: int = _TOTAL_TOKENS) -> list[Request]:
    """Seeded requests of at most `total_tokens` each, prompt and continuation together."""
    source, requests = random.Random(seed), []
    for _ in range(n_requests):
        n_prompt = int(_LOCATION + _SCALE * source.lognormvariate(0, _SIGMA))
        n_prompt = min(max(1, n_prompt), total_tokens - 1)
        total = int(source.uniform(0, total_tokens))
        requests.append(Request(n_prompt, max(1, total - n_prompt)))
    return requests


@torch.inference_mode()
def run_trace(
    decoder: Decoder, requests: Sequence[Request], n_rows: int, memory: torch.Tensor | None = None
) -> TraceResult:
    """Serve all requests with at most `n_rows` at a time.

    The pages are those that `memory` uint8 holds; None takes enough for the longest of every row. Kernels are
    compiled before the clock starts.
    """
    longest = max(request.n_prompt + request.n_new for request in requests)
    per_page = decoder.layout.n_heads * decoder.layout.page_bytes * len(decoder.blocks)
    n_pages = n_rows * pages_for(longest) if memory is None else len(memory) // per_page
    cache = Cache(decoder, n_rows, longest, min(n_pages, n_rows * pages_for(longest)), memory)
    stepper = Stepper(decoder, cache)
    _compile(decoder, cache, sum(sorted((r.n_prompt for r in requests), reverse=True)[:n_rows]))
    waiting, free = deque(enumerate(requests)), list(range(n_rows))[::-1]
    left: dict[int, tuple[int, int]] = {}  # row -> request, tokens still to come
    entered: dict[int, float] = {}
    latencies, token_seconds = [], []
    start = last = time.perf_counter()
    while waiting or left:
        admitted = []
        while waiting and free:
            number, request = waiting[0]
            n_tokens = request.n_prompt + request.n_new
            if cache.n_free < pages_for(n_tokens):
                break
            waiting.popleft()
            row = free.pop()
            cache.give(row, n_tokens)
            admitted.append((row, request.n_prompt))
            left[row], entered[number] = (number, request.n_new), time.perf_counter()
        if admitted:
            rows = [row for row, _ in admitted]
            prompts = [torch.ones(n, dtype=torch.int64, device=decoder.device) for _, n in admitted]
            first = decoder.prefill(prompts, rows, cache).argmax(-1)
            stepper.tokens[rows] = first
            lengths = [n for _, n in admitted]
            stepper.lengths[rows] = torch.tensor(lengths, dtype=torch.int32, device=decoder.device)
        else:
            stepper.run()
            stepper.tokens.copy_(stepper.logits.argmax(-1))
        stepper.tokens.tolist()
        now = time.perf_counter()
        made = rows if admitted else list(left)
        token_seconds += [now - last] * len(made)
        last = now
        for row in made:
            number, n_left = left[row]
            left[row] = (number, n_left - 1)
            if n_left == 1:
                del left[row]
                cache.take_back(row)
                free.append(row)
                stepper.lengths[row] = 0
                latencies.append(now - entered[number])
    return TraceResult(
        n_requests=len(requests),
        n_rows=n_rows,
        prompt_tokens=sum(request.n_prompt for request in requests),
        new_tokens=sum(request.n_new for request in requests),
        seconds=last - start,
        request_p50_s=statistics.median(latencies),
        request_p99_s=_percentile_99(latencies),
        token_p50_ms=1e3 * statistics.median(token_seconds),
        token_p99_ms=1e3 * _percentile_99(token_seconds),
    )


def _compile(decoder: Decoder, cache: Cache, most_tokens: int) -> None:
    """Read prompts of all lengths that choose other kernels: up to `most_tokens` together, in row 0."""
    per_row = cache.table.shape[1] * PAGE_TOKENS
    for n_tokens in COMPILED_TOKENS:
        if n_tokens > per_row or cache.n_free < pages_for(n_tokens):
            break
        cache.give(0, n_tokens)
        decoder.prefill([torch.ones(n_tokens, dtype=torch.int64, device=decoder.device)], [0], cache)
        cache.take_back(0)
        if n_tokens >= most_tokens:
            break


def _percentile_99(values: list[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
