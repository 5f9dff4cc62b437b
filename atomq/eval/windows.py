"""Token windows of equal length: what calibration and perplexity feed to a model.

The rules are Atom's (arXiv 2310.19102, published code), which are GPTQ's: calibration takes random windows of
the training text, evaluation takes all whole windows of the test text side by side, and C4 takes random
windows of random long documents. A text is tokenized once, with the tokenizer's own special tokens: at most
one BOS, at the very start, and none at the start of later windows.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from atomq.errors import CalibrationDataError, ConfigError, UnsupportedModelError
from atomq.eval.corpora import DOCUMENT_JOINER, Corpus, load_corpus

_BUILTIN_SEQ_LEN = 512
_SEQ_LEN = 2048
DEFAULT_SAMPLES = 128
_C4_EVALUATION_WINDOWS = 256
_C4_EVALUATION_SEED = 0


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer: the call, giving "input_ids" (a flat list of int)."""

    def __call__(
        self, text: str, *, return_attention_mask: bool | None, verbose: bool
    ) -> Mapping[str, Any]: ...


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows of a text.

    Attributes:
        corpus: the text's name (`Corpus.name`).
        corpus_sha256: the text's hash (`Corpus.sha256`).
        layout: how the text was read (`Corpus.layout`).
        token_ids: int64 [n_windows, seq_len], CPU.
        seed: of the draw; None where nothing was drawn.
    """

    corpus: str
    corpus_sha256: str
    layout: str
    token_ids: torch.Tensor
    seed: int | None = None

    @property
    def n_windows(self) -> int:
        return self.token_ids.shape[0]

    @property
    def seq_len(self) -> int:
        return self.token_ids.shape[1]

    @property
    def n_tokens(self) -> int:
        return self.token_ids.numel()

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuse token ids that a model of `vocab_size` embeddings does not have.

        Raises:
            UnsupportedModelError: the tokenizer is not this model's.
        """
        largest = int(self.token_ids.max())
        if largest >= vocab_size:
            raise UnsupportedModelError(
                f"the tokenizer gives token {largest}, but the model has {vocab_size} embeddings; "
                f"the tokenizer is another model's: put the right one beside the weights"
            )

    def check_variety(self) -> None:
        """Refuse a text that says nothing of a model: one token over and over.

        Raises:
            CalibrationDataError: naming the token.
        """
        if int(self.token_ids.min()) == int(self.token_ids.max()):
            raise CalibrationDataError(
                f"{self.corpus} is token {int(self.token_ids[0, 0])} over and over; give a text of many words"
            )

    @property
    def data_hash(self) -> str:
        """sha256 of the ids as little-endian int64, row after row."""
        return hashlib.sha256(self.token_ids.numpy().astype("<i8").tobytes()).hexdigest()


def calibration_windows(
    tokenizer: Tokenizer,
    data: str = "builtin",
    n_samples: int | None = None,
    seq_len: int | None = None,
    seed: int = 0,
) -> TokenWindows:
    """Cut calibration windows out of a text.

    - "builtin": whole windows side by side, in order; all of them by default, otherwise `n_samples` distinct
      ones spread evenly over the text. Nothing is drawn.
    - "c4": each window from a random place of a random document that is long enough.
    - others: `n_samples` starts drawn by `random.Random(seed)` from [0, n_tokens - seq_len - 1], both ends
      included (Atom's rule); windows may overlap.

    Args:
        tokenizer: see `Tokenizer`.
        data: a name or a file, see `load_corpus`.
        n_samples: how many windows; None: every one of "builtin", elsewhere 128, or as many as there are
            whole windows where the text holds fewer.
        seq_len: tokens a window; None: 512 for "builtin", elsewhere 2048.
        seed: of the draw.

    Raises:
        ConfigError: `n_samples` below 1 or `seq_len` below 2.
        CalibrationDataError: the text cannot be had or is too short for what was asked.
    """
    if seq_len is None:
        seq_len = _BUILTIN_SEQ_LEN if data == "builtin" else _SEQ_LEN
    _check_sizes(seq_len, "n_samples", n_samples)
    corpus = load_corpus(data, "calibration")
    if data == "c4":
        rows = _draw_from_documents(tokenizer, corpus, n_samples or DEFAULT_SAMPLES, seq_len, seed)
        return _windows(corpus, rows, seed)

    ids = _tokenize(tokenizer, DOCUMENT_JOINER.join(corpus.documents))
    n_whole = _count_whole(ids, seq_len, corpus)
    if n_samples is not None and n_samples > n_whole:
        raise CalibrationDataError(
            f"n_samples {n_samples} exceeds the {n_whole} whole windows of {seq_len} tokens in {corpus.name} "
            f"({len(ids)} tokens); ask for at most {n_whole}, lower seq_len, or give a longer text"
        )
    if data == "builtin":
        n_samples = n_samples or n_whole
        starts = [i * n_whole // n_samples * seq_len for i in range(n_samples)]
        return _windows(corpus, _cut(ids, starts, seq_len))
    generator = random.Random(seed)
    starts = [
        _draw_start(generator, len(ids), seq_len) for _ in range(n_samples or min(DEFAULT_SAMPLES, n_whole))
    ]
    return _windows(corpus, _cut(ids, starts, seq_len), seed)


def evaluation_windows(
    tokenizer: Tokenizer, data: str = "wikitext2", seq_len: int = 2048, max_windows: int | None = None
) -> TokenWindows:
    """Cut a test text into floor(n_tokens / seq_len) windows side by side; the tail is dropped.

    "c4" is drawn instead, as Atom does: 256 windows, each from a document of at least `seq_len` tokens, with
    seed 0. "c4-new" ends after 256 windows.

    Args:
        tokenizer: see `Tokenizer`.
        data: a name or a file, see `load_corpus`.
        seq_len: tokens a window.
        max_windows: take the first ones only; None: all.

    Raises:
        ConfigError: `seq_len` below 2 or `max_windows` below 1.
        CalibrationDataError: the text cannot be had or holds no whole window.
    """
    _check_sizes(seq_len, "max_windows", max_windows)
    corpus = load_corpus(data, "evaluation")
    if data in ("c4", "c4-new"):
        max_windows = min(max_windows or _C4_EVALUATION_WINDOWS, _C4_EVALUATION_WINDOWS)
        if data == "c4":
            rows = _draw_from_documents(tokenizer, corpus, max_windows, seq_len, _C4_EVALUATION_SEED)
            return _windows(corpus, rows, _C4_EVALUATION_SEED)
    ids = _tokenize(tokenizer, DOCUMENT_JOINER.join(corpus.documents))
    n_whole = _count_whole(ids, seq_len, corpus)
    starts = [i * seq_len for i in range(min(max_windows or n_whole, n_whole))]
    return _windows(corpus, _cut(ids, starts, seq_len))


def _check_sizes(seq_len: int, count_name: str, count: int | None) -> None:
    if seq_len < 2:
        raise ConfigError(f"seq_len {seq_len} is too short; give at least 2 (512 and 2048 are usual)")
    if count is not None and count < 1:
        raise ConfigError(
            f"{count_name} {count} is too few; give at least 1, or leave it out for the default"
        )


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a whole text; `verbose=False` keeps the tokenizer from calling the text too long."""
    ids: list[int] = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def _count_whole(ids: list[int], seq_len: int, corpus: Corpus) -> int:
    n_whole = len(ids) // seq_len
    if n_whole == 0:
        raise CalibrationDataError(
            f"{corpus.name} holds {len(ids)} tokens, fewer than one window of {seq_len}; "
            "give a longer text, or a lower seq_len"
        )
    return n_whole


def _draw_start(generator: random.Random, n_tokens: int, seq_len: int) -> int:
    """A start in [0, n_tokens - seq_len - 1], both ends included; 0 where the text is one window exactly."""
    return generator.randint(0, max(0, n_tokens - seq_len - 1))


def _draw_from_documents(
    tokenizer: Tokenizer, corpus: Corpus, n_windows: int, seq_len: int, seed: int
) -> list[list[int]]:
    """Draw documents until one has `seq_len` tokens, then a window of it; `n_windows` times."""
    generator = random.Random(seed)
    too_short: set[int] = set()
    rows: list[list[int]] = []
    while len(rows) < n_windows:
        pick = generator.randint(0, len(corpus.documents) - 1)
        if pick in too_short:
            continue
        ids = _tokenize(tokenizer, corpus.documents[pick])
        if len(ids) >= seq_len:
            start = _draw_start(generator, len(ids), seq_len)
            rows.append(ids[start : start + seq_len])
            continue
        too_short.add(pick)
        if len(too_short) == len(corpus.documents):
            raise CalibrationDataError(
                f"none of the {len(corpus.documents)} documents of {corpus.name} has {seq_len} tokens; "
                "lower seq_len"
            )
    return rows


def _cut(ids: list[int], starts: Sequence[int], seq_len: int) -> list[list[int]]:
    return [ids[start : start + seq_len] for start in starts]


def _windows(corpus: Corpus, rows: list[list[int]], seed: int | None = None) -> TokenWindows:
    token_ids = torch.tensor(rows, dtype=torch.int64)  # (n_windows, seq_len)
    return TokenWindows(corpus.name, corpus.sha256, corpus.layout, token_ids, seed)
