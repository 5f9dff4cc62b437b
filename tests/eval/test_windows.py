"""Token windows, by hand with the byte tokenizer: a token is a byte, so windows are slices of the text."""

from __future__ import annotations

import hashlib
import logging
import random
import struct

import pytest
import torch
from tiny_models import byte_tokenizer

from atomq.errors import CalibrationDataError, ConfigError
from atomq.eval import windows
from atomq.eval.corpora import Corpus
from atomq.eval.windows import TokenWindows, calibration_windows, evaluation_windows


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch):
    """`load_corpus` replaced by a table: texts[data, split] = documents."""
    table: dict[tuple[str, str], tuple[str, ...]] = {}

    def load(data, split):
        return Corpus(data, table[data, split], "ab" * 32, "by hand")

    monkeypatch.setattr(windows, "load_corpus", load)
    return table


def letters(n: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz .", k=n))


def decode(tokenizer, found: TokenWindows) -> list[str]:
    return [tokenizer.decode(row) for row in found.token_ids]


# --- evaluation


def test_evaluation_windows_lie_side_by_side_and_drop_the_tail(texts, tokenizer):
    texts["wikitext2", "evaluation"] = ("abcdefghijk",)
    found = evaluation_windows(tokenizer, seq_len=4)
    assert decode(tokenizer, found) == ["abcd", "efgh"]
    assert (found.n_windows, found.seq_len, found.n_tokens, found.seed) == (2, 4, 8, None)
    assert (found.corpus, found.corpus_sha256, found.layout) == ("wikitext2", "ab" * 32, "by hand")
    assert (found.token_ids.dtype, found.token_ids.device.type) == (torch.int64, "cpu")


@pytest.mark.parametrize(
    ("max_windows", "expected"), [(1, ["abcd"]), (2, ["abcd", "efgh"]), (9, ["abcd", "efgh"])]
)
def test_max_windows_takes_the_first_ones(texts, tokenizer, max_windows, expected):
    texts["a.txt", "evaluation"] = ("abcdefghijk",)
    assert decode(tokenizer, evaluation_windows(tokenizer, "a.txt", 4, max_windows)) == expected


def test_documents_are_joined_by_two_newlines_and_tokenized_as_one_text(texts, tokenizer):
    texts["a.jsonl", "evaluation"] = ("abc", "de", "f")
    assert decode(tokenizer, evaluation_windows(tokenizer, "a.jsonl", 5)) == ["abc\n\n", "de\n\nf"]


def test_a_real_file_goes_all_the_way(text_file, tokenizer):
    found = evaluation_windows(tokenizer, str(text_file), 64)
    text = text_file.read_text(encoding="utf-8")
    assert "".join(decode(tokenizer, found)) == text[: len(text) // 64 * 64]
    assert found.corpus == "text.txt"


def test_bos_comes_once_at_the_very_start(texts, tokenizer):
    class WithBos:
        def __call__(self, text, **options):
            return {"input_ids": [0, *tokenizer(text, **options)["input_ids"]]}

    texts["a.txt", "evaluation"] = ("abcdefg",)
    assert evaluation_windows(WithBos(), "a.txt", 4).token_ids[:, 0].tolist() == [
        0,
        tokenizer("d")["input_ids"][0],
    ]


def test_a_text_shorter_than_a_window_is_refused_with_its_tokens(texts, tokenizer):
    texts["a.txt", "evaluation"] = texts["a.txt", "calibration"] = ("abc",)
    for cut in (evaluation_windows, calibration_windows):
        with pytest.raises(CalibrationDataError) as caught:
            cut(tokenizer, "a.txt", seq_len=4)
        assert str(caught.value) == (
            "a.txt holds 3 tokens, fewer than one window of 4; give a longer text, or a lower seq_len"
        )


def test_a_long_text_raises_no_warning_of_the_tokenizer(texts, caplog):
    import transformers

    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = 3
    texts["a.txt", "evaluation"] = ("abcdefgh",)
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):
            evaluation_windows(tokenizer, "a.txt", 4)
            assert caplog.records == []
            tokenizer("abcdefgh")  # the warning that would have been
            assert "longer than the specified maximum" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


# --- calibration


def test_random_windows_start_where_atoms_rule_says(texts, tokenizer):
    text = letters(1000)
    texts["wikitext2", "calibration"] = (text[:400], text[400:])
    joined = text[:400] + "\n\n" + text[400:]
    found = calibration_windows(tokenizer, "wikitext2", n_samples=20, seq_len=30, seed=7)
    random.seed(7)
    starts = [random.randint(0, len(joined) - 30 - 1) for _ in range(20)]
    assert decode(tokenizer, found) == [joined[start : start + 30] for start in starts]
    assert found.seed == 7


def test_the_same_seed_gives_the_same_windows_and_another_seed_others(texts, tokenizer):
    texts["a.txt", "calibration"] = (letters(1000),)
    first, again, other = (
        calibration_windows(tokenizer, "a.txt", 8, 30, seed=seed).data_hash for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_text_of_exactly_one_window_gives_that_window(texts, tokenizer):
    texts["a.txt", "calibration"] = ("abcd",)
    assert decode(tokenizer, calibration_windows(tokenizer, "a.txt", seq_len=4)) == ["abcd"]


def test_the_default_is_128_windows_of_2048_or_as_many_as_the_text_holds(texts, tokenizer):
    texts["long.txt", "calibration"] = (letters(128 * 2048 + 5),)
    texts["short.txt", "calibration"] = (letters(3 * 2048 + 5),)
    assert calibration_windows(tokenizer, "long.txt").token_ids.shape == (128, 2048)
    assert calibration_windows(tokenizer, "short.txt").token_ids.shape == (3, 2048)


def test_more_samples_than_the_text_holds_are_refused(texts, tokenizer):
    for data in ("builtin", "a.txt"):
        texts[data, "calibration"] = (letters(103),)
        assert calibration_windows(tokenizer, data, n_samples=10, seq_len=10).n_windows == 10
        with pytest.raises(CalibrationDataError) as caught:
            calibration_windows(tokenizer, data, n_samples=11, seq_len=10)
        assert str(caught.value) == (
            f"n_samples 11 exceeds the 10 whole windows of 10 tokens in {data} (103 tokens); "
            "ask for at most 10, lower seq_len, or give a longer text"
        )


def test_builtin_gives_every_whole_window_of_512_in_order_whatever_the_seed(texts, tokenizer):
    text = letters(5 * 512 + 100)
    texts["builtin", "calibration"] = (text,)
    found = calibration_windows(tokenizer, seed=3)
    assert decode(tokenizer, found) == [text[i * 512 : (i + 1) * 512] for i in range(5)]
    assert found.seed is None


def test_fewer_builtin_windows_are_spread_evenly_and_distinct(texts, tokenizer):
    text = letters(103)
    texts["builtin", "calibration"] = (text,)
    found = calibration_windows(tokenizer, n_samples=4, seq_len=10)
    assert decode(tokenizer, found) == [text[10 * i : 10 * i + 10] for i in (0, 2, 5, 7)]
    for n_samples in range(1, 11):
        rows = decode(tokenizer, calibration_windows(tokenizer, n_samples=n_samples, seq_len=10))
        assert len(set(rows)) == n_samples


def test_the_shipped_text_fills_the_default_windows(tokenizer):
    found = calibration_windows(tokenizer)
    assert found.corpus == "builtin"
    assert found.seq_len == 512
    assert found.n_windows > 0


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(tokenizer, count):
    told = f"{count} is too few; give at least 1, or leave it out for the default"
    with pytest.raises(ConfigError, match=f"^n_samples {told}$"):
        calibration_windows(tokenizer, n_samples=count)
    with pytest.raises(ConfigError, match=f"^max_windows {told}$"):
        evaluation_windows(tokenizer, max_windows=count)


@pytest.mark.parametrize("seq_len", [1, 0, -5])
def test_a_window_of_less_than_two_tokens_is_refused(tokenizer, seq_len):
    for cut in (calibration_windows, evaluation_windows):
        with pytest.raises(ConfigError, match=rf"^seq_len {seq_len} is too short; give at least 2"):
            cut(tokenizer, seq_len=seq_len)


# --- C4


def c4_by_hand(documents, n_windows: int, seq_len: int, seed: int) -> list[str]:
    """Atom's loop on characters; only with no document of exactly `seq_len`, on which Atom's fails."""
    random.seed(seed)
    rows = []
    for _ in range(n_windows):
        while True:
            document = documents[random.randint(0, len(documents) - 1)]
            if len(document) >= seq_len:
                break
        start = random.randint(0, len(document) - seq_len - 1)
        rows.append(document[start : start + seq_len])
    return rows


C4 = tuple(letters(n, seed=n) for n in (5, 90, 12, 33, 7, 60, 29))


def test_c4_calibration_draws_documents_then_windows_as_atom_does(texts, tokenizer):
    texts["c4", "calibration"] = C4
    found = calibration_windows(tokenizer, "c4", n_samples=40, seq_len=30, seed=5)
    assert decode(tokenizer, found) == c4_by_hand(C4, 40, 30, seed=5)
    assert found.seed == 5


def test_c4_calibration_takes_128_windows_of_2048_by_default(texts, tokenizer):
    texts["c4", "calibration"] = ("short", letters(3000))
    assert calibration_windows(tokenizer, "c4").token_ids.shape == (128, 2048)


def test_c4_evaluation_is_256_windows_drawn_with_seed_0(texts, tokenizer):
    texts["c4", "evaluation"] = C4
    found = evaluation_windows(tokenizer, "c4", 30)
    assert decode(tokenizer, found) == c4_by_hand(C4, 256, 30, seed=0)
    assert found.seed == 0
    first = evaluation_windows(tokenizer, "c4", 30, max_windows=10)
    assert first.token_ids.tolist() == found.token_ids[:10].tolist()


def test_a_c4_document_of_exactly_one_window_is_taken_whole(texts, tokenizer):
    texts["c4", "evaluation"] = ("ab", "abcd")
    assert decode(tokenizer, evaluation_windows(tokenizer, "c4", 4, 2)) == ["abcd", "abcd"]


def test_c4_without_a_long_enough_document_is_refused_not_searched_for_ever(texts, tokenizer):
    texts["c4", "calibration"] = ("ab", "abc", "abcd")
    with pytest.raises(
        CalibrationDataError, match=r"^none of the 3 documents of c4 has 5 tokens; lower seq_len$"
    ):
        calibration_windows(tokenizer, "c4", seq_len=5)


def test_c4_new_ends_after_256_windows(texts, tokenizer):
    texts["c4-new", "evaluation"] = (letters(300 * 4),)
    found = evaluation_windows(tokenizer, "c4-new", 4)
    assert found.n_windows == 256
    assert "".join(decode(tokenizer, found)) == texts["c4-new", "evaluation"][0][: 256 * 4]
    assert evaluation_windows(tokenizer, "c4-new", 4, max_windows=500).n_windows == 256
    assert evaluation_windows(tokenizer, "c4-new", 4, max_windows=3).n_windows == 3


# --- the record


def test_the_data_hash_is_of_the_ids_as_little_endian_int64():
    ids = torch.tensor([[1, 2, 3], [4, 5, 70000]])
    expected = hashlib.sha256(struct.pack("<6q", 1, 2, 3, 4, 5, 70000)).hexdigest()
    assert TokenWindows("a.txt", "", "plain text", ids).data_hash == expected
    assert TokenWindows("a.txt", "", "plain text", ids.t().contiguous().t()).data_hash == expected
    assert TokenWindows("a.txt", "", "plain text", ids + 1).data_hash != expected
