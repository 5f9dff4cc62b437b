"""A record that several runs measured: what stays when another run measures some numbers of tokens anew."""

from __future__ import annotations

from typing import Any

NOTHING: dict[str, Any] = {"runs": [], "results": []}


def without(record: dict[str, Any], tokens: list[int], gpu: str) -> tuple[list[Any], list[Any]]:
    """The runs and results of `record` but for those of `tokens`; a run of which nothing is left goes.

    Raises:
        ValueError: something would be left that another GPU measured.
    """
    results = [result for result in record["results"] if result["n_tokens"] not in tokens]
    if results and record["gpu"] != gpu:
        raise ValueError(f"the record is of {record['gpu']} and this is {gpu}; measure all tokens anew")
    runs = [{**run, "tokens": [n for n in run["tokens"] if n not in tokens]} for run in record["runs"]]
    return [run for run in runs if run["tokens"]], results
