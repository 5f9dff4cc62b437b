"""The measured tables of docs/kernels.md, from the newest records in benchmarks/results.

python -m benchmarks.kernel_docs --write

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; everything else in the page is written by
hand. tests/benchmarks/test_kernel_docs.py fails where page and records differ.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import clocks
from benchmarks.e2e_goals import attention_goals, decode_goals, e2e_goals
from benchmarks.e2e_tables import attention_table, decode_table, e2e_tables, trace_table, variants_table
from benchmarks.gemm_goals import check_goals
from benchmarks.gemm_tables import (
    few_token_table,
    limits_table,
    quantize_table,
    table,
    tile_steps_table,
    tiles_table,
    tuning_table,
)

ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "kernels.md", ROOT / "benchmarks" / "results"
TABLES: dict[str, tuple[str, Callable[..., str]]] = {
    "gemm": ("h200-gemm", table),
    "goals": ("h100-gemm h200-gemm", check_goals),
    "limits": ("h200-gemm", limits_table),
    "few-tokens": ("h200-few-token-tiles", few_token_table),
    "tiles": ("h200-gemm-tiles", tiles_table),
    "tile-steps": ("h200-gemm-tiles", tile_steps_table),
    "clocks": ("h200-clocks", clocks.table),
    "quantize": ("h200-gemm", quantize_table),
    "tuning": ("h100-kernel-steps", tuning_table),
    "attention": ("h200-attention", attention_table),
    "attention-gqa": ("h200-attention-gqa", attention_table),
    "attention-gqa-4": ("h200-attention-gqa-4", attention_table),
    "attention-variants": ("h100-attention", variants_table),
    "attention-goals": ("h100-attention h200-attention", attention_goals),
    "attention-gqa-goals": ("h100-attention-gqa h200-attention-gqa", attention_goals),
    "e2e-llama-2-7b": ("h200-e2e-llama-2-7b", e2e_tables),
    "e2e-llama-3-8b": ("h200-e2e-llama-3-8b", e2e_tables),
    "e2e-llama-3-70b": ("h200-e2e-llama-3-70b", e2e_tables),
    "e2e-goals": ("h100-e2e-llama-2-7b h200-e2e-llama-2-7b", e2e_goals),
    "e2e-trace": ("h200-e2e-trace", trace_table),
    "decode": ("h200-decode-smollm2", decode_table),
    "decode-goals": ("h200-decode-smollm2", decode_goals),
}
"""Name of a table -> the records it is made from (`<date>-<name>.json` each), and how."""


def fill(page: str, results: Path = RESULTS) -> str:
    """The page with every table made anew.

    Raises:
        ValueError: a table of a name that is not known, or no record for it.
    """

    def one(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"table {name}; known are {', '.join(TABLES)}")
        kinds, make = TABLES[name]
        newest = [_newest(results, kind) for kind in kinds.split()]
        text = make(*(json.loads(path.read_text(encoding="utf-8")) for path in newest))
        sources = " and ".join(f"`benchmarks/results/{path.name}`" for path in newest)
        return f"<!-- table: {name} -->\nFrom {sources}:\n\n{text}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", one, page, flags=re.DOTALL)


def _newest(results: Path, kind: str) -> Path:
    records = sorted(results.glob(f"????-??-??-{kind}.json"))
    if not records:
        raise ValueError(f"no record *-{kind}.json in {results}")
    return records[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md; else to stdout")
    text = fill(PAGE.read_text(encoding="utf-8"))
    if parser.parse_args().write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
