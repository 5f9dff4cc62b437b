"""The tokenizer that a GGUF file describes, as a transformers tokenizer.

A GGUF file holds a vocabulary, merges or scores, and special tokens, but of the rule that splits text
before the merges only a name (`tokenizer.ggml.pre`). transformers reads some of these names only, in
some versions only, and tokenizes the others as GPT-2: `PRE_TOKENIZERS` says what each name means.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from atomq.errors import UnsupportedModelError
from atomq.models.gguf import GgufFile
from atomq.models.gguf_model import gguf_token_ids

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type


@dataclass(frozen=True)
class PreTokenizer:
    """How text becomes words, before byte-level BPE merges inside each word.

    Attributes:
        splits: regular expressions, applied one after the other; each match becomes a piece of its own.
        whole_words: a word that is in the vocabulary is one token, whatever the merges say.
        nfc: text is put into Unicode's composed form first.
        add_bos: whether BOS is added where the file does not say.
    """

    splits: tuple[str, ...]
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_DIGIT = r"\p{N}"
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", _DIGIT)
_TEKKEN_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_GPT2 = PreTokenizer((_GPT2_WORDS,))
_DIGITS_THEN_GPT2 = PreTokenizer((_DIGIT, _GPT2_WORDS))
_LLAMA3 = PreTokenizer((_LLAMA3_WORDS,), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer((_QWEN2_WORDS,), nfc=True)

# The values of tokenizer.ggml.pre that files of atomq's families carry.
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "olmo": _GPT2,
    "smollm": _DIGITS_THEN_GPT2,
    "starcoder": _DIGITS_THEN_GPT2,
    "refact": _DIGITS_THEN_GPT2,
    "codeshell": _DIGITS_THEN_GPT2,
    "minerva-7b": _DIGITS_THEN_GPT2,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": PreTokenizer((_TEKKEN_WORDS,), whole_words=True, add_bos=True),
}


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """Build the tokenizer: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

    Raises:
        UnsupportedModelError: the file has no vocabulary, or one of a kind that atomq does not know.
    """
    metadata, name = file.metadata, file.path.name
    model, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UnsupportedModelError(f"{name} has no tokenizer: tokenizer.ggml.tokens is missing or empty")
    if model == "gpt2":
        backend, add_bos = _byte_level(file, tokens)
    elif model == "llama":
        backend, add_bos = _sentence_piece(file, tokens), True
    else:
        raise UnsupportedModelError(
            f"{name} has a tokenizer of kind {model!r}; atomq reads 'gpt2' and 'llama' from GGUF"
        )
    for token, kind in zip(tokens, metadata.get("tokenizer.ggml.token_type", []), strict=False):
        if kind in (_CONTROL, _USER_DEFINED):
            backend.add_tokens([AddedToken(token, normalized=False, special=kind == _CONTROL)])
    ids = gguf_token_ids(file) | {"unk_token_id": metadata.get("tokenizer.ggml.unknown_token_id")}
    special = {}
    for key, token_id in ids.items():
        if token_id is not None:
            if not 0 <= token_id < len(tokens):
                raise UnsupportedModelError(f"{name}: {key} {token_id} exceeds the {len(tokens)} tokens")
            special[key.removesuffix("_id")] = tokens[token_id]
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", add_bos) and "bos_token" in special,
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False) and "eos_token" in special,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=file.require("context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _byte_level(file: GgufFile, tokens: list[str]) -> tuple[Tokenizer, bool]:
    """Byte-level BPE, and whether it adds BOS if the file does not say."""
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"{file.path.name} splits text by {pre!r} (tokenizer.ggml.pre), which atomq does not know; it "
            f"knows {', '.join(sorted(PRE_TOKENIZERS))}. Give the original model's directory instead"
        )
    rule = PRE_TOKENIZERS[pre]
    merges = _pairs(file, tokens, file.metadata.get("tokenizer.ggml.merges", []))
    backend = Tokenizer(_bpe(tokens, merges, ignore_merges=rule.whole_words))
    if rule.nfc:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), behavior="isolated") for split in rule.splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend, rule.add_bos


def _sentence_piece(file: GgufFile, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE with byte fallback; merges follow from the scores where the file has none."""
    scores = file.metadata.get("tokenizer.ggml.scores", [])
    merges = file.metadata.get("tokenizer.ggml.merges")
    if merges is not None:
        pairs = _pairs(file, tokens, merges)
    elif len(scores) == len(tokens):
        vocabulary = {token: i for i, token in enumerate(tokens)}
        pairs = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)))
    else:
        raise UnsupportedModelError(
            f"{file.path.name} has {len(tokens)} tokens but {len(scores)} scores and no merges"
        )
    space_first = bool(file.metadata.get("tokenizer.ggml.add_space_prefix", True))
    backend = LlamaTokenizer(vocab={}, merges=[], add_prefix_space=space_first).backend_tokenizer
    backend.model = _bpe(tokens, pairs, fuse_unk=True, byte_fallback=True)
    return backend


def _pairs(file: GgufFile, tokens: list[str], merges: list[str]) -> list[tuple[str, str]]:
    """The merges as pairs, each of which must be made of tokens and make one."""
    vocabulary = set(tokens)
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    for left, right in pairs:
        if not {left, right, left + right} <= vocabulary:
            raise UnsupportedModelError(
                f"{file.path.name}: the merge of {left!r} and {right!r} does not fit the vocabulary"
            )
    return pairs


def _bpe(tokens: list[str], merges: list[tuple[str, str]], **options: bool) -> BPE:
    return BPE({token: i for i, token in enumerate(tokens)}, merges, **options)
