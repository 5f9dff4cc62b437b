"""Two checkpoints side by side: the figures are theirs, and the verdict follows from them."""

from __future__ import annotations

import json
import math

import pytest
from strict_html import StrictPage
from tiny_checkpoints import quantize_tiny

from atomq.cli import main
from atomq.report.compare import Comparison, LinearPair, compare, comparison_page
from atomq.report.facts import gather
from atomq.report.files import save_record


@pytest.fixture(scope="module")
def pair(tiny_dir, tmp_path_factory):
    """Checkpoints of 4 and of 8 bits, the second evaluated. Do not change them."""
    folder = tmp_path_factory.mktemp("made")
    outs = folder / "four", folder / "eight"
    quantize_tiny(tiny_dir, outs[0], "atom")
    quantize_tiny(tiny_dir, outs[1], "8 bits asymmetric")
    record = {"ppl": 9.5, "kl": 0.25, "data": "builtin", "n_windows": 4, "seq_len": 64}
    save_record(outs[1], "eval-ppl-builtin-4x64", record)
    return outs


def test_the_figures_are_those_of_the_reports(pair):
    reports = [gather(out) for out in pair]
    found = compare(reports[0], reports[1], ("four", "eight"))
    facts = {fact.name: (fact.first, fact.second) for fact in found.facts}
    assert facts["size"] == tuple(report.summary.size_bytes for report in reports)
    assert facts["bits per weight"] == tuple(report.summary.bits["weight"] for report in reports)
    assert facts["perplexity (builtin, 4 x 64)"] == (None, 9.5)
    settings = {s.name: (s.first, s.second) for s in found.settings}
    assert settings == {
        "weights.n_bits": (4, 8),
        "weights.symmetric": (True, False),
        "activations.n_bits": (4, 8),
        "kv.n_bits": (4, 8),
    }
    assert ["weights.symmetric", "true", "false"] in [s.cells() for s in found.settings]
    assert len(found.linears) == 14
    assert found.verdict().startswith("eight has the smaller error in 14 of 14 linears; ")


def test_the_verdict_is_the_geometric_mean():
    pairs = [LinearPair("a", 0.1, 0.2), LinearPair("b", 0.1, 0.05), LinearPair("c", 0.1, 0.1)]
    found = Comparison(("one", "two"), [], [], pairs)
    assert found.verdict() == (
        "two has the smaller error in 1 of 3 linears; "
        "its errors are 1.000 times those of one (geometric mean)."
    )
    assert math.isfinite(LinearPair("a", 0.0, 0.0).change)


def test_a_checkpoint_beside_itself_differs_in_nothing(pair):
    report = gather(pair[0])
    found = compare(report, report, ("four", "four"))
    assert found.names == ("four (A)", "four (B)")
    assert found.settings == []
    assert all(fact.first == fact.second for fact in found.facts)
    page = comparison_page(found)
    assert "the recipes are equal" in page
    assert "improves most" not in page
    assert "worsens most" not in page


def test_checkpoints_without_measured_errors_are_compared_too(pair, tiny_dir, tmp_path):
    quantize_tiny(tiny_dir, tmp_path / "rtn", "rtn")
    found = compare(gather(pair[0]), gather(tmp_path / "rtn"), ("four", "rtn"))
    assert found.linears == []
    assert found.verdict() == "No linear has a measured error in both."
    StrictPage(comparison_page(found))


def test_the_command_prints_a_table_json_or_a_page(pair, tmp_path, capsys):
    argv = ["compare", *map(str, pair)]
    assert main(argv) == 0
    assert "eight has the smaller error in 14 of 14" in capsys.readouterr().out
    assert main([*argv, "--json", "--html", str(tmp_path / "both.html")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["names"] == ["four", "eight"]
    page = StrictPage((tmp_path / "both.html").read_text())
    assert page.tags["circle"] == 14
    written = (tmp_path / "both.html").read_text()
    assert "rebuilt at any time by <code>atomq compare A B --html FILE.html</code>" in written
    assert "those that eight improves most" in page.texts["caption"]
    assert "those that eight worsens most" not in page.texts["caption"]
    assert main([*argv, "--html", str(tmp_path / "both.txt")]) == 2
    assert "must name a file that ends in .html" in capsys.readouterr().err
