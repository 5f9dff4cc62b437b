"""Text from prompts: sampling, stop tokens, and the loop over a decoder's steps or a simulated model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from atomq.errors import ConfigError
from atomq.runtime.decoder import Cache, Decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnToken = Callable[[int, int], bool]
"""Told the prompt's number and its new token; answers whether that prompt is to go on."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when a prompt ends.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: among this many most likely tokens only; None for all.
        top_p: among the fewest tokens whose probabilities reach this sum.
        stop_tokens: each ends its prompt, and is not among the result.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or not 0 <= self.temperature < float("inf"):
            raise ConfigError(
                f"max_new_tokens {self.max_new_tokens} must be at least 1, "
                f"temperature {self.temperature} at least 0"
            )
        if (self.top_k is not None and self.top_k < 1) or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"top_k {self.top_k} must be at least 1, top_p {self.top_p} above 0 and at most 1"
            )


class Sampler:
    """Draws tokens int64 [B] from logits [B, vocabulary]; one stream of random numbers for each prompt."""

    def __init__(self, sampling: Sampling, device: torch.device, n_prompts: int) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator(device).manual_seed(sampling.seed + i) for i in range(n_prompts)]

    def draw(self, logits: torch.Tensor, prompts: Sequence[int]) -> torch.Tensor:
        """`prompts` names the prompt of each row."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return logits.argmax(-1)
        scores = logits.float() / sampling.temperature
        if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
            least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        probabilities = scores.softmax(-1)
        if sampling.top_p < 1:
            ranked, order = probabilities.sort(-1, descending=True)
            before = ranked.cumsum(-1) - ranked  # the most likely one always stays
            kept = torch.zeros_like(probabilities, dtype=torch.bool)
            kept = kept.scatter(-1, order, before < sampling.top_p)
            probabilities = probabilities.masked_fill(~kept, 0)
        drawn = [
            torch.multinomial(row, 1, generator=self.generators[prompt])
            for row, prompt in zip(probabilities, prompts, strict=True)
        ]
        return torch.cat(drawn)


class Stepper:
    """One step of decoding for a fixed batch, on a GPU as a CUDA graph: the same memory at every step.

    Attributes:
        tokens: int64 [B], read by the next step. lengths: int32 [B], tokens in the cache; 0 is an empty slot,
        which stays empty. logits: [B, vocabulary] of the last step.
    """

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self.decoder, self.cache = decoder, cache
        self.tokens = torch.zeros(len(cache.rows), dtype=torch.int64, device=decoder.device)
        self.lengths = torch.zeros(len(cache.rows), dtype=torch.int32, device=decoder.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if decoder.device.type == "cuda":
            self._capture()

    def run(self) -> None:
        """Append the tokens, and leave the logits after them."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self._run()

    def _run(self) -> None:
        self.lengths += self.lengths > 0
        self.logits = self.decoder.step(self.tokens, self.lengths, self.cache)

    def _capture(self) -> None:
        """With all slots empty: a run outside of the graph first, which compiles, then the graph."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
            stream.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self._run()
        torch.cuda.current_stream().wait_stream(stream)


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_token: OnToken = lambda _prompt, _token: True,
) -> list[list[int]]:
    """New tokens of each prompt, all of them decoded as one batch.

    Raises:
        ConfigError: an empty prompt.
        KernelError: prompt and new tokens are more than the decoder's positions.
    """
    _check_prompts(prompts)
    device, n_prompts = decoder.device, len(prompts)
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    cache = Cache(decoder, n_prompts, longest)
    sampler = Sampler(sampling, device, n_prompts)
    stepper = Stepper(decoder, cache)
    ids = [torch.tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    logits = decoder.prefill(ids, range(n_prompts), cache)
    stepper.lengths.copy_(torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32))
    results: list[list[int]] = [[] for _ in prompts]
    active = set(range(n_prompts))
    for _ in range(sampling.max_new_tokens):
        stepper.tokens.copy_(sampler.draw(logits, range(n_prompts)))
        for prompt, token in enumerate(stepper.tokens.tolist()):
            if prompt in active and not _take(token, results[prompt], sampling, on_token, prompt):
                active.discard(prompt)
                stepper.lengths[prompt] = 0
        if not active or len(results[min(active)]) == sampling.max_new_tokens:
            break
        stepper.run()
        logits = stepper.logits
    return results


@torch.inference_mode()
def simulate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_token: OnToken = lambda _prompt, _token: True,
) -> list[list[int]]:
    """What `generate` answers, by a model of transformers, one prompt after the other.

    Raises:
        ConfigError: an empty prompt.
    """
    _check_prompts(prompts)
    call: Any = model
    sampler = Sampler(sampling, model.device, len(prompts))
    results: list[list[int]] = [[] for _ in prompts]
    for prompt, ids in enumerate(prompts):
        tokens = torch.tensor([list(ids)], dtype=torch.int64, device=model.device)
        past = None
        while len(results[prompt]) < sampling.max_new_tokens:
            output = call(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, tokens = output.past_key_values, sampler.draw(output.logits[:, -1], [prompt])[:, None]
            if not _take(int(tokens), results[prompt], sampling, on_token, prompt):
                break
    return results


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {i + 1} of {len(prompts)} is empty")


def _take(token: int, result: list[int], sampling: Sampling, on_token: OnToken, prompt: int) -> bool:
    """Add a token to a prompt's result; answers whether the prompt goes on."""
    if token in sampling.stop_tokens:
        return False
    result.append(token)
    return on_token(prompt, token)
