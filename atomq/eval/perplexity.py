"""Perplexity of a causal language model on token windows, and its divergence from a baseline.

Atom's protocol (arXiv 2310.19102, section 5, published code), which is GPTQ's: each window on its own, the
mean cross-entropy of its seq_len - 1 predicted tokens, and ppl = exp(mean of the window means). Models are
handed in; nothing is loaded, cut or quantized here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from atomq import distributed
from atomq.errors import AtomqError, ConfigError
from atomq.eval.windows import TokenWindows

_CHUNK_ELEMENTS = 2**25  # float32 log-probabilities held at once for each model: 128 MiB
# A GPU predicts several windows at once, of at most so many tokens and logits: it outruns Python at one.
_BATCH_TOKENS = 2**13
_BATCH_LOGITS = 2**29
_ONE_WINDOW_DEVICES = ("cpu",)


@dataclass(frozen=True)
class PerplexityProgress:
    """Where an evaluation stands: windows done, of how many, and the perplexities over those done.

    Of several processes each counts its own share.
    """

    done: int
    total: int
    ppl: float
    baseline_ppl: float | None


@dataclass(frozen=True)
class PerplexityResult:
    """What an evaluation found.

    Attributes:
        ppl: exp of the mean of `window_nll`.
        n_windows, seq_len: as evaluated.
        n_tokens: n_windows * seq_len (of which n_windows * (seq_len - 1) are predicted).
        window_nll: mean negative log-likelihood of each window, nats a predicted token.
        baseline_ppl, baseline_window_nll: the same for the baseline; None without one.
        kl: KL(P_baseline || P_model) over the vocabulary, nats, mean over all n_windows * (seq_len - 1)
            predicted positions; None without a baseline.
    """

    ppl: float
    n_windows: int
    n_tokens: int
    seq_len: int
    window_nll: tuple[float, ...]
    baseline_ppl: float | None = None
    kl: float | None = None
    baseline_window_nll: tuple[float, ...] | None = None


def evaluate_perplexity(
    model: torch.nn.Module,
    windows: TokenWindows,
    baseline: torch.nn.Module | None = None,
    on_window: Callable[[PerplexityProgress], None] | None = None,
) -> PerplexityResult:
    """Measure the perplexity of `model` and, against `baseline`, the KL divergence of its predictions.

    Log-probabilities are taken in float32 from the logits as the model gives them, a few positions at a
    time; sums over positions and windows are in float64.

    Args:
        model: a causal language model in evaluation mode, called as `model(input_ids, use_cache=False)` with
            int64 [n, seq_len] on the model's device and giving `.logits` [n, seq_len, vocab]; n is 1 on CPUs.
        windows: what to predict; see `evaluation_windows`.
        baseline: a second such model with the same vocabulary, on any device.
        on_window: called after each window, for progress.

    Raises:
        AtomqError: a window's loss is not finite, a perplexity leaves the float range, or the two models'
            vocabularies differ.
    """
    window_nll: list[float] = []
    baseline_nll: list[float] = []
    window_kl: list[float] = []
    with torch.inference_mode():
        numbers = distributed.own_share(torch.arange(windows.n_windows)).tolist()
        n_batch = 1
        while len(window_nll) < len(numbers):
            batch = numbers[len(window_nll) : len(window_nll) + n_batch]
            predicted = _predict(model, windows.token_ids[batch])  # (n, T - 1, vocab)
            references = None if baseline is None else _predict(baseline, windows.token_ids[batch])
            for row, i in enumerate(batch):
                logits, targets = predicted[row], windows.token_ids[i, 1:]
                place = f"window {i + 1} of {windows.n_windows} of {windows.corpus}"
                window_nll.append(_finite(_mean_nll(logits, targets), "the model's loss", place))
                if references is not None:
                    reference = references[row]
                    baseline_nll.append(_finite(_mean_nll(reference, targets), "the baseline's loss", place))
                    window_kl.append(_finite(_mean_kl(reference, logits), "the KL divergence", place))
                if on_window is not None:
                    done = PerplexityProgress(
                        len(window_nll),
                        len(numbers),
                        _ppl(window_nll),
                        _ppl(baseline_nll) if baseline_nll else None,
                    )
                    on_window(done)
            n_batch = _windows_at_once(predicted)
            del predicted, references  # or they would lie there beside the next ones
    window_nll, baseline_nll, window_kl = map(_of_all_processes, (window_nll, baseline_nll, window_kl))
    return PerplexityResult(
        ppl=_ppl(window_nll),
        n_windows=windows.n_windows,
        n_tokens=windows.n_tokens,
        seq_len=windows.seq_len,
        window_nll=tuple(window_nll),
        baseline_ppl=_ppl(baseline_nll) if baseline_nll else None,
        kl=_mean(window_kl) if window_kl else None,
        baseline_window_nll=tuple(baseline_nll) if baseline_nll else None,
    )


def _of_all_processes(values: list[float]) -> list[float]:
    return [value for part in distributed.gather(values) for value in part]


def _predict(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Logits [n, seq_len - 1, vocab] of all tokens of `batch` [n, seq_len] but the first of each window, in
    the model's dtype, on its device.
    """
    device = next(itertools.chain(model.parameters(), model.buffers()), batch).device
    logits: torch.Tensor = model(batch.to(device), use_cache=False).logits
    return logits[:, :-1]


def _windows_at_once(predicted: torch.Tensor) -> int:
    """How many windows to predict in one pass, after one that gave `predicted` [n, seq_len - 1, vocab]."""
    if predicted.device.type in _ONE_WINDOW_DEVICES:
        return 1
    n_tokens, n_logits = predicted.shape[1] + 1, predicted[0].numel()
    return max(1, min(_BATCH_TOKENS // n_tokens, _BATCH_LOGITS // n_logits))


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    """Cut the rows of `logits` [P, vocab] into runs of at most `_CHUNK_ELEMENTS` elements."""
    n_rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    return (slice(start, start + n_rows) for start in range(0, len(logits), n_rows))


def _mean_nll(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Mean cross-entropy in nats of `logits` [P, vocab] against `targets` [P]."""
    targets = targets.to(logits.device)
    total = 0.0
    for rows in _chunks(logits):
        nll = torch.nn.functional.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
        total += nll.double().sum().item()
    return total / len(targets)


def _mean_kl(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL(P_reference || P_logits) in nats over the rows of two [P, vocab]."""
    if reference.shape != logits.shape:
        raise ConfigError(
            f"the baseline predicts {reference.shape[-1]} tokens and the model {logits.shape[-1]}; "
            "their KL divergence needs one vocabulary: give the unquantized model as baseline"
        )
    total = 0.0
    for rows in _chunks(logits):
        p_log = reference[rows].to(logits.device).float().log_softmax(-1)  # (n_rows, vocab)
        q_log = logits[rows].float().log_softmax(-1)
        kl = (p_log.exp() * (p_log - q_log)).sum(-1)  # (n_rows,)
        total += kl.double().sum().item()
    return total / len(logits)


def _finite(value: float, quantity: str, place: str) -> float:
    if not math.isfinite(value):
        raise AtomqError(
            f"{quantity} in {place} is {value}; check the checkpoint with `atomq verify`, and the dtype: "
            "float16 overflows where bfloat16 does not"
        )
    return value


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ppl(nll: Sequence[float]) -> float:
    mean = _mean(nll)
    try:
        return math.exp(mean)
    except OverflowError as error:
        raise AtomqError(
            f"a mean loss of {mean:.0f} nats has no perplexity within the float range; the model is broken"
        ) from error
