"""Texts by name and by file: the joining by hand, the hub's calls, and each refusal's sentence."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from atomq.errors import CalibrationDataError
from atomq.eval import corpora
from atomq.eval.corpora import Corpus, load_corpus

WIKITEXT_FILE = " \n = Robert Boulter = \n \n Robert is an actor . \n He acts . \n \n = = Career = = \n \n"
WIKITEXT_ROWS = [
    "",
    " = Robert Boulter = \n",
    "",
    " Robert is an actor . \n",
    " He acts . \n",
    "",
    " = = Career = = \n",
    "",
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """`datasets.load_dataset` replaced: `hub.rows` are given back, `hub.calls` are recorded."""
    import datasets

    class Hub:
        def __init__(self) -> None:
            self.column = "text"
            self.rows = ["one", "two", "three"]
            self.error: Exception | None = None
            self.calls: list[tuple[str, dict]] = []

        def load_dataset(self, path, **options):
            self.calls.append((path, options))
            if self.error is not None:
                raise self.error
            return datasets.Dataset.from_dict({self.column: self.rows})

    hub = Hub()
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def write_parquet(path: Path, columns: dict) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def refusal(data: str, split="evaluation") -> str:
    with pytest.raises(CalibrationDataError) as caught:
        load_corpus(data, split)
    return str(caught.value)


# --- files


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_a_text_file_is_one_document_as_it_is(tmp_path, split):
    text = "  A line.\r\n\n\nÄnother\u2028one.\x0b "
    corpus = load_corpus(write(tmp_path / "Notes.TXT", text), split)
    assert corpus == Corpus("Notes.TXT", (text,), hashlib.sha256(text.encode()).hexdigest(), "plain text")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    assert load_corpus(write(tmp_path / "a.txt", b"\xef\xbb\xbfhello"), "evaluation").documents == ("hello",)


def test_a_raw_wikitext_file_gives_the_text_and_hash_of_the_hub_data_set(tmp_path, hub):
    corpus = load_corpus(write(tmp_path / "wiki.test.raw.txt", WIKITEXT_FILE), "evaluation")
    assert corpus.documents == ("\n\n".join(WIKITEXT_ROWS),)
    assert corpus.layout == "WikiText rows"
    hub.rows = WIKITEXT_ROWS
    from_hub = load_corpus("wikitext2", "evaluation")
    assert (from_hub.documents, from_hub.sha256) == (corpus.documents, corpus.sha256)


@pytest.mark.parametrize(
    "text",
    [
        WIKITEXT_FILE + "A line without a leading space . \n",
        WIKITEXT_FILE + " A line without a trailing space .\n",
        WIKITEXT_FILE + " A last line without an end . ",
        WIKITEXT_FILE + "\n",
        WIKITEXT_FILE.replace("\n", "\r\n"),
        " \n Text , but no title . \n \n = = Not of the first order = = \n",
    ],
)
def test_a_file_not_wholly_of_wikitext_form_is_plain_text(tmp_path, text):
    corpus = load_corpus(write(tmp_path / "a.txt", text), "evaluation")
    assert (corpus.documents, corpus.layout) == ((text,), "plain text")


def test_a_jsonl_file_gives_one_document_a_line(tmp_path):
    texts = ["first\nwith a line end", "", "dritter Ü\u2028"]
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    corpus = load_corpus(write(tmp_path / "a.jsonl", "\r\n\n".join(lines) + "\n"), "calibration")
    assert corpus.documents == tuple(texts)
    assert corpus.layout == "one document a line (JSON)"


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_a_parquet_file_gives_one_document_a_row(tmp_path, kind):
    import pyarrow

    array = pyarrow.array(["first", "second"])
    array = array.dictionary_encode() if kind == "dictionary" else array.cast(getattr(pyarrow, kind)())
    corpus = load_corpus(write_parquet(tmp_path / "a.parquet", {"n": [1, 2], "text": array}), "calibration")
    assert corpus.documents == ("first", "second")
    assert corpus.layout == "one document a row (Parquet)"


def test_the_hash_tells_documents_apart_that_join_to_the_same_bytes(tmp_path):
    hashes = {
        load_corpus(write_parquet(tmp_path / f"{i}.parquet", {"text": texts}), "evaluation").sha256
        for i, texts in enumerate([["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""]])
    }
    assert len(hashes) == 4
    assert hashlib.sha256(b"ab\xffc").hexdigest() in hashes


# --- refused files


def test_an_unknown_name_is_told_the_names_of_its_split(tmp_path):
    assert refusal("wikitext3") == (
        "'wikitext3' is neither a file nor a text known for evaluation; "
        "give a .txt, .jsonl or .parquet file, or one of builtin, wikitext2, ptb, ptb-new, c4, c4-new"
    )
    assert refusal("c4-new", "calibration").endswith("or one of builtin, wikitext2, ptb, c4")


def test_a_folder_is_refused(tmp_path):
    assert refusal(str(tmp_path)) == f"'{tmp_path}' is a folder; give one .txt, .jsonl or .parquet file"


@pytest.mark.parametrize(
    ("name", "ending"), [("a.json", "the ending .json"), ("a.jsonl.gz", "the ending .gz"), ("a", "no ending")]
)
def test_an_unknown_ending_is_refused(tmp_path, name, ending):
    assert (
        refusal(write(tmp_path / name, "x")) == f"{name} has {ending}; give a .txt, .jsonl or .parquet file"
    )


@pytest.mark.parametrize(("content", "offset"), [(b"abc\xff", 3), (b"\xef\xbb\xbfabc\xff", 6)])
@pytest.mark.parametrize("ending", ["txt", "jsonl"])
def test_a_file_not_in_utf8_is_refused_by_offset(tmp_path, ending, content, offset):
    assert refusal(write(tmp_path / f"a.{ending}", content)) == (
        f"a.{ending} is not UTF-8: byte 0xff at offset {offset}; save it as UTF-8"
    )


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, monkeypatch, ending):
    path = write(tmp_path / f"a.{ending}", "x")

    def deny(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", deny)
    assert refusal(path) == (
        f"a.{ending} cannot be read (Permission denied); give a readable .txt, .jsonl or .parquet file"
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", ""), ("a.txt", " \n\t\n"), ("a.jsonl", "\n"), ("a.jsonl", '{"text": " "}')],
)
def test_a_file_without_text_is_refused(tmp_path, name, content):
    path = write(tmp_path / name, content)
    assert refusal(path) == f"{name} holds no text; give a file with text in it, or 'builtin'"


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"text": []})
    assert refusal(path) == "a.parquet holds no text; give a file with text in it, or 'builtin'"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{'text': 1}", "not JSON (Expecting property name"),
        ("9" * 5000, "not JSON (Exceeds the limit"),
        ('["text"]', "a JSON list; each line"),
        ("null", "a JSON NoneType; each line"),
        ('{"query": "a", "gold": 1}', 'no "text" among its keys (query, gold); each line'),
        ('{"text": 3}', '"text" is int, not a string; drop or fix it'),
        ('{"text": null}', '"text" is NoneType, not a string; drop or fix it'),
        ('{"text": "\\ud800"}', '"text" holds a lone surrogate; drop or fix it'),
    ],
)
def test_a_jsonl_line_that_holds_no_text_is_refused_by_number(tmp_path, line, complaint):
    path = write(tmp_path / "a.jsonl", f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')
    assert refusal(path).startswith(f"a.jsonl, line 3: {complaint}")


def test_a_parquet_file_without_a_text_column_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", {"id": [1], "content": ["x"]})
    assert refusal(path) == (
        "a.parquet has no column 'text', only id, content; rename the one that holds the text"
    )


@pytest.mark.parametrize(("values", "seen"), [(["a", None], "NoneType"), ([b"a", b"b"], "bytes")])
def test_a_parquet_row_that_is_no_string_is_refused_by_number(tmp_path, values, seen):
    row = next(i for i, value in enumerate(values, start=1) if not isinstance(value, str))
    path = write_parquet(tmp_path / "a.parquet", {"text": values})
    assert refusal(path) == f'a.parquet, row {row}: "text" is {seen}, not a string; drop or fix it'


@pytest.mark.parametrize("content", [b"", b"PAR1 but no more", b"PAR1" + bytes(40) + b"PAR1"])
def test_a_broken_parquet_file_is_refused(tmp_path, content):
    message = refusal(write(tmp_path / "a.parquet", content))
    assert re.fullmatch(r"a\.parquet is not a readable Parquet file \(.+\); write it anew", message)


# --- the built-in texts


def test_the_builtin_text_is_the_folder_in_order_of_names(tmp_path, monkeypatch):
    for i in (5, 0, 3, 7, 1, 6, 2, 4):
        write(tmp_path / f"0{i}.txt", f"text {i}\n")
    write(tmp_path / "README.md", "not this")
    monkeypatch.setattr(corpora.resources, "folder", lambda name: {"calibration_data": tmp_path}[name])
    for split in ("calibration", "evaluation"):
        corpus = load_corpus("builtin", split)
        assert corpus.documents == ("\n\n".join(f"text {i}\n" for i in range(8)),)
        assert (corpus.name, corpus.layout) == ("builtin", "built-in texts")


def test_an_installation_without_the_builtin_texts_says_so(tmp_path, monkeypatch):
    def folder(name):
        raise FileNotFoundError(f"atomq's folder {name!r} is missing; searched A and B")

    monkeypatch.setattr(corpora.resources, "folder", folder)
    assert refusal("builtin") == (
        "atomq's folder 'calibration_data' is missing; searched A and B; reinstall atomq, or give a text file"
    )


# --- named data sets

WIKITEXT2 = ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"})
PTB = ("ptb-text-only/ptb_text_only", {"revision": "refs/convert/parquet", "data_dir": "penn_treebank"})
C4_TRAIN = ("allenai/c4", {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}})
C4_VALIDATION = ("allenai/c4", {"data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"}})
APART = ("one", "two", "three")
JOINED = ("one\n\ntwo\n\nthree",)
SPACED = ("one two three",)


@pytest.mark.parametrize(
    ("data", "split", "source", "hub_split", "column", "documents", "layout"),
    [
        ("wikitext2", "calibration", WIKITEXT2, "train", "text", JOINED, "WikiText rows"),
        ("wikitext2", "evaluation", WIKITEXT2, "test", "text", JOINED, "WikiText rows"),
        ("ptb", "calibration", PTB, "train", "sentence", JOINED, "Penn Treebank sentences"),
        ("ptb", "evaluation", PTB, "validation", "sentence", JOINED, "Penn Treebank sentences"),
        ("ptb-new", "evaluation", PTB, "test", "sentence", SPACED, "Penn Treebank sentences"),
        ("c4", "calibration", C4_TRAIN, "train", "text", APART, "C4 documents"),
        ("c4", "evaluation", C4_VALIDATION, "validation", "text", APART, "C4 documents"),
        ("c4-new", "evaluation", C4_VALIDATION, "validation", "text", SPACED, "C4 documents"),
    ],
)
def test_a_named_data_set_comes_from_the_right_split_and_is_joined_as_published(
    hub, data, split, source, hub_split, column, documents, layout
):
    hub.column = column
    corpus = load_corpus(data, split)
    repository, options = source
    assert hub.calls == [(repository, {"split": hub_split, **options})]
    assert (corpus.name, corpus.documents, corpus.layout) == (data, documents, layout)


def test_c4_new_takes_the_first_1100_documents(hub):
    hub.rows = [str(i) for i in range(1101)]
    (text,) = load_corpus("c4-new", "evaluation").documents
    assert text.split(" ") == hub.rows[:1100]


def test_a_name_wins_over_a_file_of_that_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "ptb", "x")
    hub.column = "sentence"
    assert load_corpus("ptb", "evaluation").documents == JOINED


@pytest.mark.parametrize(
    "error_name", ["ConnectionError", "FileNotFoundError", "ValueError", "RuntimeError", "DatasetsError"]
)
def test_a_data_set_that_cannot_be_reached_says_what_to_do_in_one_sentence(hub, error_name):
    import builtins

    import datasets

    kind = getattr(builtins, error_name, None) or getattr(datasets.exceptions, error_name)
    hub.error = kind("Couldn't reach it.\nA second line.")
    assert refusal("wikitext2") == (
        "data set 'wikitext2' (Salesforce/wikitext) cannot be loaded from the cache or the hub: "
        "Couldn't reach it; give the text as a .txt, .jsonl or .parquet file, or use 'builtin'"
    )


def test_a_programming_error_in_loading_is_not_taken_for_a_missing_network(hub):
    hub.error = TypeError("unexpected keyword")
    with pytest.raises(TypeError, match="unexpected keyword"):
        load_corpus("wikitext2", "evaluation")


def test_a_data_set_whose_column_has_gone_is_refused(hub):
    hub.column = "tokens"
    assert refusal("ptb") == (
        "data set 'ptb' (ptb-text-only/ptb_text_only) has no column 'sentence', only tokens; "
        "give the text as a .txt, .jsonl or .parquet file, or use 'builtin'"
    )


def test_files_are_read_without_datasets(tmp_path):
    path = write(tmp_path / "a.txt", "x")
    code = (
        "import sys; from atomq.eval.corpora import load_corpus; "
        f"load_corpus({path!r}, 'evaluation'); load_corpus('builtin', 'calibration'); "
        "print('datasets' in sys.modules, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
