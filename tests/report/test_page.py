"""The page: well-formed, self-contained, small, with every linear in a chart; read here by a strict parser.

tests/report/test_browser.py opens it in a real browser where there is one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from strict_html import StrictPage
from tiny_checkpoints import quantize_tiny

from atomq.report import charts
from atomq.report.facts import LinearFacts, OutlierMap, Report, ScaleHistogram, Summary, gather
from atomq.report.page import report_page

ROOT = Path(__file__).resolve().parent.parent.parent
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<script>alert("1")</script>&'


def linear(name: str, block: int, kind: str, error: float | None = 0.01) -> LinearFacts:
    return LinearFacts(name, block, kind, 1000, error, "gptq", 0.01, 0)


def made_up(linears: list[LinearFacts], **fields) -> Report:
    summary = Summary(
        "model", "W4A4KV4", "atom", {"weight": 4.5, "activation": 5.0, "kv": 4.5}, 10**6, 3 * 10**6, {}, {}
    )
    empty = {"warnings": [], "outliers": [], "scales": [], "starved": {}, "records": {}, "about": {}}
    return Report(**{"summary": summary, "linears": linears, **empty, **fields})


@pytest.fixture(scope="module")
def report(tiny_dir, tmp_path_factory) -> Report:
    out = tmp_path_factory.mktemp("made") / "OUT"
    quantize_tiny(tiny_dir, out)
    return gather(out)


def titled(page: StrictPage, tag: str) -> list[str]:
    """The titles of all SVG elements of one kind."""
    return [e.findtext(f"{SVG}title") or "" for svg in page.svgs for e in svg.iter(f"{SVG}{tag}")]


def test_the_page_is_strict_and_every_linear_is_a_mark_of_its_own(report):
    page = StrictPage(report_page(report))
    marks = titled(page, "circle")
    assert len(marks) == len(report.linears) == 14
    for found in report.linears:
        assert found.relative_error is not None
        (mark,) = [m for m in marks if m.startswith(f"{found.name}: ")]
        assert float(mark.split(": ")[1].removesuffix(" %")) == pytest.approx(
            100 * found.relative_error, rel=6e-3
        )


def test_every_chart_names_and_describes_itself(report):
    page = StrictPage(report_page(report))
    images = [svg for svg in page.svgs if svg.get("aria-hidden") != "true"]
    assert len(images) == 7 + len(report.outliers) + len(report.scales)
    for image in images:
        assert image.get("role") == "img"
        assert [child.tag for child in image[:2]] == [f"{SVG}title", f"{SVG}desc"]
        assert all(child.text for child in image[:2])


def test_every_linear_is_in_the_table_too(report):
    cells = StrictPage(report_page(report)).texts["td"]
    assert {found.name for found in report.linears} <= set(cells)


def test_a_mark_lies_where_its_error_is():
    """The axis is logarithmic: equal factors are equal distances, and the ends are whole powers of ten."""
    points = [charts.Point(i, 10.0 ** (i - 3), f"layer {i}") for i in range(4)]
    axis = charts.error_range([p.error for p in points])
    assert axis == (-3, 0)
    (svg,) = StrictPage(f"<!doctype html>\n{charts.error_chart('k', points, 3, axis)}").svgs
    heights = [float(mark.get("cy")) for mark in svg.iter(f"{SVG}circle")]
    plot = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert heights == pytest.approx([charts.TOP + plot * share for share in (1, 2 / 3, 1 / 3, 0)], abs=0.06)
    places = [float(mark.get("cx")) for mark in svg.iter(f"{SVG}circle")]
    assert places == sorted(places)


@pytest.mark.parametrize("error", [0.0, math.inf, math.nan])
def test_errors_without_a_logarithm_stay_inside_the_chart(error):
    points = [charts.Point(0, error, "odd"), charts.Point(1, 0.01, "even")]
    (svg,) = StrictPage(f"<!doctype html>\n{charts.error_chart('k', points, 1, (-3, 0))}").svgs
    for mark in svg.iter(f"{SVG}circle"):
        assert charts.TOP <= float(mark.get("cy")) <= charts.HEIGHT - charts.BOTTOM


def test_bars_of_a_histogram_are_as_high_as_their_counts():
    found = ScaleHistogram("k", -8, [1, 0, 4])
    (svg,) = StrictPage(f"<!doctype html>\n{charts.histogram(found)}").svgs
    first, last = (float(rect.get("height")) for rect in svg.iter(f"{SVG}rect"))
    assert last == pytest.approx(4 * first, abs=0.1)
    assert charts.describe_scales(found) == "5 scales from 0.25 to 0.42, half of them below 0.42."


def test_an_outlier_map_marks_each_channel_in_its_row():
    found = OutlierMap("k", 10, {0: [0, 9], 1: [9]})
    (svg,) = StrictPage(f"<!doctype html>\n{charts.outlier_map(found)}").svgs
    marks = "".join(path.get("d") for path in svg.iter(f"{SVG}path")).split("M")[1:]
    places = [tuple(float(v) for v in mark.partition("h")[0].split()) for mark in marks]
    width = (charts.WIDTH - charts.LEFT - charts.RIGHT) / 10
    assert sorted({x for x, _ in places}) == pytest.approx([charts.LEFT, charts.LEFT + 9 * width], abs=0.06)
    assert len(places) == 3
    assert len({y for _, y in places}) == 2
    assert charts.describe_outliers(found) == (
        "2 of 10 channels are outliers in some block, 1 in more than half of the 2 blocks."
    )


def test_names_and_records_cannot_break_out_of_the_page():
    records = {
        HOSTILE: {HOSTILE: HOSTILE, "rows": [{HOSTILE: HOSTILE}]},
        f"eval-ppl-{HOSTILE}": {
            "ppl": 1.0, "model": HOSTILE, "data": HOSTILE, "n_windows": HOSTILE, "seq_len": 1
        },
    }  # fmt: skip
    report = made_up(
        [linear(HOSTILE, 0, HOSTILE)],
        warnings=[HOSTILE],
        outliers=[OutlierMap(HOSTILE, 4, {0: [1]})],
        scales=[ScaleHistogram(HOSTILE, 0, [1])],
        records=records,
        about={HOSTILE: HOSTILE},
    )
    assert "<script" not in report_page(report)
    StrictPage(report_page(report))


def test_a_mixture_of_many_experts_stays_under_two_megabytes():
    """48 blocks of 128 experts: 18432 expert linears and the attention's."""
    linears = [
        linear(f"model.layers.{b}.mlp.experts.{e}.{k}", b, f"mlp.experts.*.{k}", 0.001 * (1 + (b * e) % 50))
        for b in range(48)
        for e in range(128)
        for k in ("gate_proj", "up_proj", "down_proj")
    ]
    outliers = [OutlierMap(f"group {g}", 8192, {b: list(range(128)) for b in range(80)}) for g in range(6)]
    text = report_page(made_up(linears, outliers=outliers))
    assert len(text.encode()) < 2_000_000
    page = StrictPage(text)
    dots = [p.get("d") for svg in page.svgs for p in svg.iter(f"{SVG}path") if p.get("class") == "dots"]
    assert sum(d.count("M") for d in dots) == len(linears)


def test_the_cards_say_what_is_known_and_what_is_not():
    texts = StrictPage(report_page(made_up([linear("a", 0, "a")]))).texts["dd"]
    assert "1.0 MB" in texts
    assert "before 3.0 MB in 16 bits, 3.00 times as much" in texts
    assert "not evaluated" in texts
    records = {"eval-ppl-x": {"ppl": 12.3456, "baseline_ppl": 10.0, "data": "x"}}
    texts = StrictPage(report_page(made_up([], records=records))).texts["dd"]
    assert "12.346" in texts
    assert "on x, unquantized 10.000" in texts
    records |= {"eval-ppl-a": {"ppl": 7.0, "data": "a", "n_tokens": 512}}
    assert "7.000" in StrictPage(report_page(made_up([], records=records))).texts["dd"]


def test_records_of_known_kinds_have_a_form_of_their_own():
    rows = [{"name": "rounded", "ppl": 40.0}, {"name": "all of it", "ppl": 20.0}]
    rows[1] |= {"kl": 0.12345, "effective_bits": {"weight": 4.5}}
    gemm = json.loads((ROOT / "benchmarks/results/2026-11-22-h100-gemm.json").read_text())
    verify = {
        "n_linears": 14, "n_failed": 0, "failed": [], "computed_by": {"torch": 14}, "tolerance": 1e-6,
        "largest_error": 2e-7,
    }  # fmt: skip
    score = {"metric": "acc_norm", "value": 0.4321, "stderr": 0.0123, "n_items": 200}
    asked = {"model": "OUT", "num_fewshot": 0, "tasks": {"piqa": score}, "baseline": "MODEL",
             "baseline_tasks": {"piqa": {**score, "value": 0.5}}}  # fmt: skip
    records = {
        "ablation": {"rows": rows},
        "eval-tasks-piqa-0-shot-200": asked,
        "gemm-here": gemm,
        "verify": verify,
        "other": {"seconds": 3.25},
    }
    text = report_page(made_up([], records=records))
    page = StrictPage(text)
    assert {"43.21 ± 1.23", "50.00 ± 1.23", "acc_norm"} <= set(page.texts["td"])
    order = [
        h for h in page.texts["h2"] if h in ("Zero-shot tasks", "Ladder", "Verification", "GEMM", "other")
    ]
    assert order == ["Zero-shot tasks", "Ladder", "Verification", "GEMM", "other"]
    assert {"Zero-shot tasks", "Ladder", "GEMM", "Verification", "other"} <= set(page.texts["h2"])
    assert {"rounded", "all of it", "40.000", "0.1235", "4.500", "seconds", "3.25"} <= set(page.texts["td"])
    assert {"KL (nats)", "bits per weight"} <= set(page.texts["th"])
    assert "per KV entry" not in page.texts["th"]
    assert "every one passes" in text
    assert "28672 x 8192" in page.texts["caption"]
    assert len(text.encode()) < 500_000


def test_starved_experts_are_listed():
    text = report_page(made_up([], starved={"layers.0.experts.3": 7, "layers.1.experts.0": 2}))
    cells = StrictPage(text).texts["td"]
    assert cells.index("layers.1.experts.0") < cells.index("layers.0.experts.3")
    assert "2 experts saw too few calibration tokens" in text


@pytest.mark.parametrize("name", ["eval-ppl", "eval-tasks", "ablation", "verify", "gemm"])
def test_a_record_of_unexpected_form_is_shown_as_it_is(name):
    for more in ({"list": [1, 2]}, {"list": [{"name": 3}]}, {"rows": [{"name": "a", "ppl": 0.0}]}):
        page = StrictPage(report_page(made_up([], records={name: {"surprise": 7} | more})))
        assert {"surprise", "7"} <= set(page.texts["td"])
