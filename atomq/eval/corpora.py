"""Texts by name or by file, read into documents: the raw material of calibration and perplexity.

The named data sets are those of Atom's evaluation (arXiv 2310.19102, section 5, and its published code):
WikiText-2, Penn Treebank and C4, each with the split, the column and the joining that the published numbers
use. Nothing is tokenized here. `datasets` is imported in this module only, and only for a named data set.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from atomq import resources
from atomq.errors import CalibrationDataError

Split = Literal["calibration", "evaluation"]

DOCUMENT_JOINER = "\n\n"  # between rows, documents and built-in texts, as GPTQ and Atom join them

_WIKITEXT_LAYOUT = "WikiText rows"
_WIKITEXT_TITLE = re.compile(r" = [^=]+ = \n")


@dataclass(frozen=True)
class Corpus:
    """A text and what identifies it.

    Attributes:
        name: the data set's name ("builtin", "wikitext2", ...) or the file's last path part; never a path.
        documents: one entry for a continuous text, otherwise one entry per document.
        sha256: over the documents' UTF-8 bytes with a byte 0xff (which UTF-8 never contains) in between.
        layout: how the source was read, for people ("plain text", "WikiText rows", ...).
    """

    name: str
    documents: tuple[str, ...]
    sha256: str
    layout: str


@dataclass(frozen=True)
class _HubSource:
    """One split of a data set on the Hugging Face hub; `joiner` None keeps the rows as documents."""

    repository: str
    split: str
    column: str
    joiner: str | None
    layout: str
    options: dict[str, Any]  # further arguments of datasets.load_dataset: where in the repository
    n_rows: int | None = None


def _wikitext2(split: str) -> _HubSource:
    options = {"name": "wikitext-2-raw-v1"}
    return _HubSource("Salesforce/wikitext", split, "text", DOCUMENT_JOINER, _WIKITEXT_LAYOUT, options)


def _ptb(split: str, joiner: str) -> _HubSource:
    """Penn Treebank as the hub converted it: its own form is a script, which `datasets` no longer runs."""
    options = {"revision": "refs/convert/parquet", "data_dir": "penn_treebank"}
    layout = "Penn Treebank sentences"
    return _HubSource("ptb-text-only/ptb_text_only", split, "sentence", joiner, layout, options)


def _c4(split: str, shard: str, joiner: str | None, n_rows: int | None = None) -> _HubSource:
    options = {"data_files": {split: f"en/c4-{split}.{shard}.json.gz"}}
    return _HubSource("allenai/c4", split, "text", joiner, "C4 documents", options, n_rows)


_HUB_SOURCES: dict[Split, dict[str, _HubSource]] = {
    "calibration": {
        "wikitext2": _wikitext2("train"),
        "ptb": _ptb("train", DOCUMENT_JOINER),
        "c4": _c4("train", "00000-of-01024", None),
    },
    "evaluation": {
        "wikitext2": _wikitext2("test"),
        "ptb": _ptb("validation", DOCUMENT_JOINER),
        "ptb-new": _ptb("test", " "),
        "c4": _c4("validation", "00000-of-00008", None),
        "c4-new": _c4("validation", "00000-of-00008", " ", n_rows=1100),
    },
}


def corpus_names(split: Split) -> tuple[str, ...]:
    """Return the names that `load_corpus` knows for `split`."""
    return ("builtin", *_HUB_SOURCES[split])


def load_corpus(data: str, split: Split) -> Corpus:
    """Read a named text or a file.

    Args:
        data: one of `corpus_names(split)`, otherwise the path of a .txt, .jsonl or .parquet file in UTF-8.
            A raw WikiText file is recognised by its form and joined as the hub's data set is.
        split: what the text is for; it picks the split of a named data set and is ignored for others.

    Raises:
        CalibrationDataError: unknown name, missing, unreadable or empty file, unreachable data set.
    """
    if data == "builtin":
        name, documents, layout = data, _read_builtin(), "built-in texts"
    elif data in _HUB_SOURCES[split]:
        source = _HUB_SOURCES[split][data]
        name, documents, layout = data, _fetch(data, source), source.layout
    else:
        path = Path(data)
        name, (documents, layout) = path.name, _read_file(path, split)
    if not any(document.strip() for document in documents):
        raise CalibrationDataError(f"{name} holds no text; give a file with text in it, or 'builtin'")
    return Corpus(name, documents, _sha256(documents), layout)


def _sha256(documents: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for i, document in enumerate(documents):
        if i:
            digest.update(b"\xff")
        digest.update(document.encode("utf-8"))
    return digest.hexdigest()


def _read_builtin() -> tuple[str, ...]:
    try:
        paths = sorted(resources.folder("calibration_data").glob("*.txt"))
    except FileNotFoundError as error:
        raise CalibrationDataError(f"{error}; reinstall atomq, or give a text file") from error
    return (DOCUMENT_JOINER.join(_decode(path) for path in paths),)


def _fetch(name: str, source: _HubSource) -> tuple[str, ...]:
    """Load one split through `datasets`, from its cache or the hub."""
    import datasets  # noqa: PLC0415 - slow to import, and needed for named data sets only

    try:
        rows = datasets.load_dataset(source.repository, split=source.split, **source.options)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CalibrationDataError(
            f"data set {name!r} ({source.repository}) cannot be loaded from the cache or the hub: "
            f"{_first_line(error)}; give the text as a {_ENDINGS} file, or use 'builtin'"
        ) from error
    if source.column not in rows.column_names:
        raise CalibrationDataError(
            f"data set {name!r} ({source.repository}) has no column {source.column!r}, only "
            f"{', '.join(rows.column_names)}; give the text as a {_ENDINGS} file, or use 'builtin'"
        )
    texts = tuple(itertools.islice(rows[source.column], source.n_rows))
    return texts if source.joiner is None else (source.joiner.join(texts),)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _read_file(path: Path, split: Split) -> tuple[tuple[str, ...], str]:
    """Return a file's documents and its layout; the ending says which reader is right."""
    if not os.path.exists(path):  # unlike Path.exists, False too where a parent folder may not be read
        raise CalibrationDataError(
            f"{str(path)!r} is neither a file nor a text known for {split}; "
            f"give a {_ENDINGS} file, or one of {', '.join(corpus_names(split))}"
        )
    if os.path.isdir(path):
        raise CalibrationDataError(f"{str(path)!r} is a folder; give one {_ENDINGS} file")
    read = _READERS.get(path.suffix.lower())
    if read is None:
        ending = f"the ending {path.suffix}" if path.suffix else "no ending"
        raise CalibrationDataError(f"{path.name} has {ending}; give a {_ENDINGS} file")
    return read(path)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationDataError(
            f"{path.name} cannot be read ({error.strerror}); give a readable {_ENDINGS} file"
        ) from error


def _decode(path: Path) -> str:
    """Return a UTF-8 file's text, without a byte order mark and with its line ends untouched."""
    raw = _read_bytes(path)
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise CalibrationDataError(
            f"{path.name} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {error.start}; "
            "save it as UTF-8"
        ) from error


def _read_text(path: Path) -> tuple[tuple[str, ...], str]:
    """Read a .txt file: one document, the text as it is, unless it is a raw WikiText file."""
    text = _decode(path)
    lines = list(io.StringIO(text, newline="\n"))  # split at \n only, ends kept
    if not _is_wikitext(lines):
        return (text,), "plain text"
    rows = ("" if not line.strip() else line for line in lines)
    return (DOCUMENT_JOINER.join(rows),), _WIKITEXT_LAYOUT


def _is_wikitext(lines: list[str]) -> bool:
    """Whether the lines have WikiText's raw form: all of them " ... \\n" or " \\n", some " = Title = \\n"."""
    return all(line.startswith(" ") and line.endswith(" \n") for line in lines) and any(
        _WIKITEXT_TITLE.fullmatch(line) for line in lines
    )


def _read_jsonl(path: Path) -> tuple[tuple[str, ...], str]:
    """Read a .jsonl file: the string under "text" of each line's object; blank lines are skipped."""
    documents = []
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip():
            documents.append(_json_text(line, f"{path.name}, line {number}"))
    return tuple(documents), "one document a line (JSON)"


def _json_text(line: str, place: str) -> str:
    wanted = 'each line must be an object such as {"text": "..."}'
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CalibrationDataError(f"{place}: not JSON ({error}); {wanted}") from error
    if not isinstance(record, dict):
        raise CalibrationDataError(f"{place}: a JSON {type(record).__name__}; {wanted}")
    if "text" not in record:
        raise CalibrationDataError(f'{place}: no "text" among its keys ({", ".join(record)}); {wanted}')
    return _document(record["text"], place)


def _document(text: object, place: str) -> str:
    """Return `text` if it is a string that UTF-8 can hold."""
    if not isinstance(text, str):
        raise CalibrationDataError(f'{place}: "text" is {type(text).__name__}, not a string; drop or fix it')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationDataError(f'{place}: "text" holds a lone surrogate; drop or fix it') from error
    return text


def _read_parquet(path: Path) -> tuple[tuple[str, ...], str]:
    """Read a .parquet file: the strings of its column "text"."""
    import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415 - comes with datasets, slow to import
    import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: PLC0415

    raw = _read_bytes(path)
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(raw))
        columns = file.schema_arrow.names
        values = file.read(columns=["text"])["text"].to_pylist() if "text" in columns else None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CalibrationDataError(
            f"{path.name} is not a readable Parquet file ({_first_line(error)}); write it anew"
        ) from error
    if values is None:
        raise CalibrationDataError(
            f"{path.name} has no column 'text', only {', '.join(columns)}; rename the one that holds the text"
        )
    documents = tuple(_document(value, f"{path.name}, row {i}") for i, value in enumerate(values, start=1))
    return documents, "one document a row (Parquet)"


_READERS: dict[str, Callable[[Path], tuple[tuple[str, ...], str]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_ENDINGS = ".txt, .jsonl or .parquet"
