"""Perplexity and KL divergence against a naive float64 loop over positions."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import make_tiny_model

from atomq.errors import AtomqError
from atomq.eval import perplexity
from atomq.eval.perplexity import PerplexityProgress, evaluate_perplexity
from atomq.eval.windows import TokenWindows


def windows_of(token_ids: torch.Tensor) -> TokenWindows:
    return TokenWindows("a.txt", "ab" * 32, "plain text", token_ids)


@pytest.fixture
def windows() -> TokenWindows:
    return windows_of(torch.randint(2, 256, (3, 17), generator=torch.Generator().manual_seed(1)))


class Fixed(torch.nn.Module):
    """A model that gives the same logits [seq_len, vocab] for every window."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)
        self.calls: list[tuple[tuple[int, ...], torch.dtype, dict]] = []

    def forward(self, input_ids: torch.Tensor, **options) -> SimpleNamespace:
        self.calls.append((tuple(input_ids.shape), input_ids.dtype, options))
        assert torch.is_inference_mode_enabled()
        return SimpleNamespace(logits=self.logits[None])


def log_softmax64(row: list[float]) -> list[float]:
    top = max(row)
    log_sum = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - log_sum for x in row]


def naive(model, windows, baseline=None) -> tuple[list[float], float]:
    """Window losses of `model` and the KL divergence from `baseline`, one position at a time in float64."""
    window_nll, divergences = [], []
    for ids in windows.token_ids.tolist():
        logits = model(torch.tensor([ids])).logits[0].double().tolist()
        losses = [-log_softmax64(logits[t])[ids[t + 1]] for t in range(len(ids) - 1)]
        window_nll.append(sum(losses) / len(losses))
        if baseline is not None:
            reference = baseline(torch.tensor([ids])).logits[0].double().tolist()
            for t in range(len(ids) - 1):
                p, q = log_softmax64(reference[t]), log_softmax64(logits[t])
                divergences.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return window_nll, sum(divergences) / max(1, len(divergences))


def test_loss_and_perplexity_equal_a_naive_float64_loop(windows):
    model = make_tiny_model()
    result = evaluate_perplexity(model, windows)
    window_nll, _ = naive(model, windows)
    assert result.window_nll == pytest.approx(window_nll, rel=1e-6)
    assert result.ppl == pytest.approx(math.exp(sum(window_nll) / 3), rel=1e-6)
    assert (result.n_windows, result.seq_len, result.n_tokens) == (3, 17, 51)
    assert (result.baseline_ppl, result.kl, result.baseline_window_nll) == (None, None, None)


@pytest.mark.parametrize("chunk_elements", [2**25, 5 * 256, 1])
def test_kl_and_baseline_equal_a_naive_float64_loop_in_chunks_of_any_size(
    windows, monkeypatch, chunk_elements
):
    monkeypatch.setattr(perplexity, "_CHUNK_ELEMENTS", chunk_elements)  # 16 positions at once, 5, 1
    model, baseline = make_tiny_model(), make_tiny_model(seed=1)
    result = evaluate_perplexity(model, windows, baseline)
    window_nll, kl = naive(model, windows, baseline)
    baseline_nll, _ = naive(baseline, windows)
    assert result.window_nll == pytest.approx(window_nll, rel=1e-6)
    assert result.baseline_window_nll == pytest.approx(baseline_nll, rel=1e-6)
    assert result.baseline_ppl == pytest.approx(math.exp(sum(baseline_nll) / 3), rel=1e-6)
    assert result.kl == pytest.approx(kl, rel=1e-5)
    assert kl > 0.01  # large enough for the comparison to mean something


def test_kl_is_taken_from_the_baseline_to_the_model(windows):
    model, baseline = make_tiny_model(), make_tiny_model(seed=1)
    _, kl = naive(model, windows, baseline)
    _, reverse = naive(baseline, windows, model)
    assert abs(kl - reverse) > 1e-3
    assert evaluate_perplexity(baseline, windows, model).kl == pytest.approx(reverse, rel=1e-5)


def test_a_model_equals_itself(windows):
    model = make_tiny_model()
    result = evaluate_perplexity(model, windows, model)
    assert result.kl == 0.0
    assert result.baseline_ppl == result.ppl
    assert result.baseline_window_nll == result.window_nll


def test_a_uniform_model_has_the_vocabulary_as_perplexity():
    result = evaluate_perplexity(Fixed(torch.zeros(8, 100)), windows_of(torch.randint(100, (2, 8))))
    assert result.ppl == pytest.approx(100, rel=1e-6)


def test_logits_in_half_precision_are_summed_in_float32():
    logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(0)).half()
    found = windows_of(torch.randint(5000, (1, 64), generator=torch.Generator().manual_seed(2)))
    result = evaluate_perplexity(Fixed(logits), found, Fixed(logits.flip(1)))
    targets = found.token_ids[0, 1:]
    q, p = (x[:-1].double().log_softmax(-1) for x in (logits, logits.flip(1)))
    assert result.window_nll[0] == pytest.approx(-q[range(63), targets].mean().item(), rel=1e-6)
    assert result.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)


def test_the_model_gets_one_int64_window_at_a_time_and_no_cache(windows):
    model = Fixed(torch.zeros(17, 256))
    evaluate_perplexity(model, windows)
    assert model.calls == [((1, 17), torch.int64, {"use_cache": False})] * 3


@pytest.mark.parametrize(
    ("logits_at_once", "sizes"), [(10**9, [1, 3, 1]), (2 * 16 * 256, [1, 2, 2]), (1, [1] * 5)]
)
def test_windows_predicted_together_on_a_gpu_give_the_same(monkeypatch, logits_at_once, sizes):
    windows = windows_of(torch.randint(2, 256, (5, 17), generator=torch.Generator().manual_seed(3)))
    model, baseline = make_tiny_model(), make_tiny_model(seed=1)
    one_by_one = evaluate_perplexity(model, windows, baseline)
    monkeypatch.setattr(perplexity, "_BATCH_TOKENS", 3 * 17 + 1)
    monkeypatch.setattr(perplexity, "_BATCH_LOGITS", logits_at_once)
    monkeypatch.setattr(perplexity, "_ONE_WINDOW_DEVICES", ())  # this CPU shall do as GPUs do
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    together = evaluate_perplexity(model, windows, baseline)
    assert seen == sizes
    assert together.window_nll == pytest.approx(one_by_one.window_nll, rel=1e-6)
    assert together.baseline_window_nll == pytest.approx(one_by_one.baseline_window_nll, rel=1e-6)
    assert together.kl == pytest.approx(one_by_one.kl, rel=1e-5)


def test_progress_is_reported_after_each_window(windows):
    model, baseline = make_tiny_model(), make_tiny_model(seed=1)
    seen: list[PerplexityProgress] = []
    result = evaluate_perplexity(model, windows, baseline, seen.append)
    assert [(at.done, at.total) for at in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0].ppl == pytest.approx(math.exp(result.window_nll[0]))
    assert seen[1].baseline_ppl == pytest.approx(math.exp(sum(result.baseline_window_nll[:2]) / 2))
    assert (seen[2].ppl, seen[2].baseline_ppl) == (result.ppl, result.baseline_ppl)
    seen.clear()
    evaluate_perplexity(model, windows, on_window=seen.append)
    assert [at.baseline_ppl for at in seen] == [None] * 3


@pytest.mark.parametrize(
    ("bad", "loss", "window"), [("nan", "nan", 1), ("inf", "nan", 1), ("-inf", "inf", 2)]
)
def test_a_loss_that_is_not_finite_names_its_window(bad, loss, window):
    logits = torch.zeros(4, 10)
    logits[0, 7] = float(bad)  # -inf harms only the window that has token 7 to predict
    found = windows_of(torch.tensor([[1, 2, 3, 4], [1, 7, 3, 4]]))
    with pytest.raises(
        AtomqError, match=f"^the model's loss in window {window} of 2 of a.txt is {loss}; check"
    ):
        evaluate_perplexity(Fixed(logits), found)


def test_a_baseline_loss_that_is_not_finite_is_the_baselines():
    found = windows_of(torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(AtomqError, match=r"^the baseline's loss in window 1 of 1 of a\.txt is nan; check"):
        evaluate_perplexity(Fixed(torch.zeros(4, 10)), found, Fixed(torch.full((4, 10), math.nan)))


def test_a_divergence_that_is_not_finite_is_refused():
    logits = torch.zeros(4, 10)
    logits[0, 9] = -math.inf  # impossible for the model, not for the baseline, and in no target
    found = windows_of(torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(AtomqError, match=r"^the KL divergence in window 1 of 1 of a\.txt is inf; check"):
        evaluate_perplexity(Fixed(logits), found, Fixed(torch.zeros(4, 10)))


def test_a_perplexity_beyond_the_float_range_is_refused():
    logits = torch.zeros(4, 10)
    logits[:, 0] = 1000.0
    with pytest.raises(
        AtomqError, match=r"^a mean loss of 1000 nats has no perplexity within the float range"
    ):
        evaluate_perplexity(Fixed(logits), windows_of(torch.tensor([[1, 2, 3, 4]])))


def test_a_baseline_of_another_vocabulary_is_refused():
    with pytest.raises(AtomqError, match=r"^the baseline predicts 12 tokens and the model 10; their KL"):
        evaluate_perplexity(
            Fixed(torch.zeros(4, 10)), windows_of(torch.tensor([[1, 2, 3, 4]])), Fixed(torch.zeros(4, 12))
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_baseline_may_lie_on_another_device(windows):
    model, baseline = make_tiny_model(), make_tiny_model(seed=1)
    on_cpu = evaluate_perplexity(model, windows, baseline)
    mixed = evaluate_perplexity(model.cuda(), windows, baseline)
    assert mixed.kl == pytest.approx(on_cpu.kl, rel=1e-3)
