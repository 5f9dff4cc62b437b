"""A checkpoint on the kernels' decode path against its simulation: greedy tokens, perplexity, speed.

python -m benchmarks.decode CHECKPOINT --prompts FILE --data FILE [--profile] --save RECORD.json
python -m benchmarks.decode CHECKPOINT --data FILE --save RECORD.json

Greedy tokens are compared without a second generation: the simulation reads prompt and made tokens at once,
and its most likely token after each prefix must be the one that was made. By induction that is equality of
both generations; the first difference is recorded with the logits' gap in both, beside the usual gap.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from atomq import checkpoints, hf
from atomq.eval.e2e_profile import profile_step
from atomq.eval.windows import evaluation_windows
from atomq.runtime.decoder import Cache, Decoder
from atomq.runtime.generate import Sampling, generate, simulate
from atomq.runtime.loading import decoder_of

DTYPES = {"float32": torch.float32, "float16": torch.float16}
N_NUDGED = 16  # of the simulation's own roundings that a first difference is held against


@torch.inference_mode()
def compare_greedy(
    model: Any, decoder: Decoder, prompts: list[list[int]], n_tokens: int
) -> list[dict[str, Any]]:
    """For each prompt: how many of `n_tokens` are the simulation's, and the gaps where they first differ.

    A gap is how far the logit of a path's own token lies above that of the other path's: in the simulation,
    in the kernels, and for the simulation's token in the simulation nudged N_NUDGED times (`nudged_logits`).
    """
    rows: list[dict[str, Any]] = []
    for prompt, made in zip(prompts, generate(decoder, prompts, Sampling(n_tokens)), strict=True):
        ids = torch.tensor([prompt + made[:-1]], device=decoder.device)
        logits = model(ids).logits[0, len(prompt) - 1 :].float()
        best = logits.argmax(-1).tolist()
        n_equal = next((i for i, token in enumerate(made) if token != best[i]), n_tokens)
        row: dict[str, Any] = {"n_equal": n_equal}
        if n_equal < n_tokens:
            prefix = torch.tensor(prompt + made[:n_equal], device=decoder.device)
            own = decoder.prefill([prefix], [0], Cache(decoder, 1, len(prefix)))[0].float()
            theirs, ours = best[n_equal], made[n_equal]
            pairs = logits.topk(2).values
            nudged = nudged_logits(model, prefix, N_NUDGED)[:, -1].float()
            row |= {
                "simulation_gap": float(logits[n_equal, theirs] - logits[n_equal, ours]),
                "kernels_gap": float(own[ours] - own[theirs]),
                "usual_gap": float((pairs[:, 0] - pairs[:, 1]).median()),
                "nudged_gaps": (nudged[:, theirs] - nudged[:, ours]).tolist(),
                "largest_difference": float((own - logits[n_equal]).abs().max()),
            }
        rows.append(row)
    return rows


@torch.inference_mode()
def compare_noise(model: Any, decoder: Decoder, texts: list[list[int]]) -> dict[str, dict[str, float]]:
    """How far the decoder is from the simulation over all tokens of texts, and the simulation from itself.

    The latter twice: "simulation" reads each text with five more tokens behind it, which causal attention
    must not see (sums may be rounded in another order), and "nudged" moves each channel of the embeddings to
    one of the two float32 beside it. Of each: the part of tokens after which another token is the most
    likely, and the median relative distance of the logits.
    """
    found: dict[str, list[tuple[bool, float]]] = {"kernels": [], "simulation": [], "nudged": []}
    for text in texts:
        ids = torch.tensor(text, device=decoder.device)
        logits = model(ids[None]).logits[0].float()
        longer = torch.cat((ids, ids[:5]))
        others = {
            "kernels": decoder.prefill([ids], [0], Cache(decoder, 1, len(text)), after_every_token=True),
            "simulation": model(longer[None]).logits[0, : len(text)],
            "nudged": nudged_logits(model, ids)[0],
        }
        for name, other in others.items():
            differs = (other.argmax(-1) != logits.argmax(-1)).tolist()
            distances = ((other.float() - logits).norm(dim=-1) / logits.norm(dim=-1)).tolist()
            found[name] += zip(differs, distances, strict=True)
    return {
        name: {
            "differs": sum(differs for differs, _ in pairs) / len(pairs),
            "distance": statistics.median(distance for _, distance in pairs),
        }
        for name, pairs in found.items()
    }


def nudged_logits(model: Any, ids: torch.Tensor, n: int = 1, seed: int = 0) -> torch.Tensor:
    """[n, tokens, vocabulary] of a float32 `model`, n times, its embeddings of `ids` all off by a unit in the
    last place, up or down at random.
    """
    source = torch.Generator().manual_seed(seed)

    def nudge(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        ups = torch.randint(0, 2, output.shape, generator=source).to(output.device, torch.bool)
        towards = torch.where(ups, torch.inf, -torch.inf).to(output.dtype)
        return torch.nextafter(output, towards)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        logits: torch.Tensor = model(ids.expand(n, -1)).logits
    finally:
        hook.remove()
    return logits


@torch.inference_mode()
def perplexity(compute: Any, windows: list[torch.Tensor]) -> float:
    """Of windows of tokens; `compute` gives the logits [T, vocabulary] of one."""
    losses = [float(functional.cross_entropy(compute(w)[:-1].float(), w[1:])) for w in windows]
    return math.exp(sum(losses) / len(losses))


def tokens_per_s(decoder: Decoder, prompts: list[list[int]], batch: int, n_tokens: int) -> float:
    """Of the steps alone: a generation of `n_tokens` more than another one of the same prompts."""
    many = (prompts * math.ceil(batch / len(prompts)))[:batch]
    generate(decoder, many, Sampling(2))  # kernels compile

    def seconds(n: int) -> float:
        start = time.perf_counter()
        generate(decoder, many, Sampling(n))
        return time.perf_counter() - start

    few = seconds(2)
    return batch * n_tokens / (seconds(n_tokens + 2) - few)


@torch.inference_mode()
def step_shares(decoder: Decoder, prompts: list[list[int]], batch: int, n_tokens: int) -> dict[str, float]:
    """`e2e_profile.shares` of the step half way through a generation of `n_tokens`; the pages hold zeros."""
    many = (prompts * math.ceil(batch / len(prompts)))[:batch]
    counts = [len(prompt) + n_tokens // 2 for prompt in many]
    cache = Cache(decoder, batch, max(counts))
    for pages in cache.pages:
        pages.zero_()
    lengths = torch.tensor(counts, dtype=torch.int32, device=decoder.device)
    tokens = torch.zeros(batch, dtype=torch.int64, device=decoder.device)
    return profile_step(lambda: decoder.step(tokens, lengths, cache).argmax(-1))


def simulation_tokens_per_s(model: Any, prompt: list[int], n_tokens: int) -> float:
    """Of one prompt, its own tokens included in the time."""
    simulate(model, [prompt], Sampling(1))
    start = time.perf_counter()
    made = simulate(model, [prompt], Sampling(n_tokens))
    return len(made[0]) / (time.perf_counter() - start)


def run(
    folder: Path,
    prompts: list[str],
    data: str,
    n_tokens: int,
    n_windows: int,
    seq_len: int,
    *,
    profiles: bool = False,
) -> dict[str, Any]:
    """The record, with perplexities of `eval-ppl`'s windows of `data`.

    `profiles` adds the shares of a step, on CUDA alone.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = hf.load(folder, device=device, dtype="float32")
    tokenizer = checkpoints.load_checkpoint_tokenizer(folder)
    ids = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    windows = list(evaluation_windows(tokenizer, data, seq_len, n_windows).token_ids.to(device))
    record: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none: the twins, on a CPU",
        "torch": torch.__version__,
        "checkpoint": folder.name,
        "n_tokens": n_tokens,
        "n_windows": len(windows),
        "seq_len": seq_len,
        "ppl": {"simulation": perplexity(lambda w: model(w[None]).logits[0], windows)},
        "greedy": {},
        "noise": {},
        "tokens_per_s": {},
        "simulation_tokens_per_s": simulation_tokens_per_s(model, ids[0], min(n_tokens, 16)),
    }
    longest = max(seq_len, max(map(len, ids)) + n_tokens + 2, 64)
    for name, dtype in DTYPES.items():
        decoder = decoder_of(model, longest, dtype)
        record["greedy"][name] = compare_greedy(model, decoder, ids, n_tokens)
        texts = [p + made for p, made in zip(ids, generate(decoder, ids, Sampling(n_tokens)), strict=True)]
        record["noise"][name] = compare_noise(model, decoder, texts)
        record["ppl"][name] = perplexity(
            lambda w, d=decoder: d.prefill([w], [0], Cache(d, 1, len(w)), after_every_token=True), windows
        )
        batches = (1, len(ids), 128) if device == "cuda" else (1,)
        for batch in batches:
            rate = tokens_per_s(decoder, ids, batch, n_tokens)
            record["tokens_per_s"][f"{name}, batch {batch}"] = rate
        if profiles:
            shares = {batch: step_shares(decoder, ids, batch, n_tokens) for batch in batches}
            record.setdefault("shares", {})[name] = shares
    return record


def run_noise(folder: Path, data: str, n_texts: int, n_tokens: int) -> dict[str, Any]:
    """The record of `compare_noise` alone, on pieces of the file `data`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = hf.load(folder, device=device, dtype="float32")
    text = Path(data).read_text(encoding="utf-8")
    tokens = checkpoints.load_checkpoint_tokenizer(folder)(text)["input_ids"]
    stride = len(tokens) // n_texts
    texts = [tokens[i * stride : i * stride + n_tokens] for i in range(n_texts)]
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else "none: the twins, on a CPU",
        "torch": torch.__version__,
        "n_texts": n_texts,
        "n_tokens": n_tokens,
        "noise": compare_noise(model, decoder_of(model, max(n_tokens + 5, 64), torch.float32), texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=Path, help="one on each line; without, only the noise is measured")
    parser.add_argument("--data", required=True, help="a text for perplexity, as of eval-ppl")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--profile", action="store_true", help="where a step's time goes; needs CUDA")
    parser.add_argument("--save", type=Path, required=True)
    given = parser.parse_args()
    if given.prompts is None:
        record = run_noise(given.checkpoint, given.data, given.windows, given.tokens)
    else:
        prompts = [line for line in given.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        sizes = (given.tokens, given.windows, given.seq_len)
        record = run(given.checkpoint, prompts, given.data, *sizes, profiles=given.profile)
    given.save.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
