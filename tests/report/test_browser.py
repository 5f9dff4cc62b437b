"""The report in a real headless Chromium, at a desk's and at a phone's width, light and dark.

Skipped where no browser is found (ATOMQ_BROWSER may name one); tests/report/test_page.py then still reads the
same page with a strict parser. `.ci/run` installs the browser where it can.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from browser import Browser, find_browser
from matplotlib.image import imread
from tiny_checkpoints import quantize_tiny

from atomq.report.files import save_record

pytestmark = pytest.mark.skipif(find_browser() is None, reason="no Chromium here")
LONG = "a-name-without-any-place-to-break-it-" * 12


@pytest.fixture(scope="module")
def out(tiny_dir, tmp_path_factory) -> Path:
    """A checkpoint whose report has every section, and names that are much too long."""
    folder = tmp_path_factory.mktemp("made") / "OUT"
    quantize_tiny(tiny_dir, folder)
    rows = [{"name": LONG, "ppl": 40.0}, {"name": "short", "ppl": 20.0}]
    save_record(folder, "ablation", {"rows": rows})
    save_record(folder, "anything", {LONG: LONG, "wide": [{f"column {i}": LONG for i in range(12)}]})
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = find_browser()
    assert program is not None
    browser = Browser(program, tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 900, False), (390, 844, True)])
def test_the_report_in_a_browser(browser, out, width, height, dark):
    page = out / "reports" / "report.html"
    browser.open(page, width, height, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.requests == [page.as_uri()]
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    names = browser.evaluate("[...document.querySelectorAll('circle title')].map(t => t.textContent)")
    assert len({name.split(":")[0] for name in names}) == 14
    visible = "[...document.querySelectorAll('circle')].every(c => c.getBoundingClientRect().width > 2)"
    assert browser.evaluate(visible)
    smallest = "Math.min(...[...document.querySelectorAll('figure svg')].map(s => s.clientWidth))"
    assert browser.evaluate(smallest) >= 300
    background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
    picture = imread(BytesIO(browser.screenshot()))[:, :, :3]
    assert width - 20 < picture.shape[1] <= width  # less a scroll bar
    assert picture.shape[0] > 2 * height
    mark = (108, 178, 242) if dark else (43, 108, 176)
    drawn = (abs(picture * 255 - mark) < 2).all(axis=2)
    assert drawn.sum() > 1000
    assert drawn.any(axis=0).sum() > 0.5 * width  # from left to right, not in one corner


def test_what_the_page_s_policy_forbids_is_not_loaded(browser, out, tmp_path):
    """The check above would notice: an image from elsewhere, put into the page, is refused and reported."""
    page = tmp_path / "spoiled.html"
    text = (out / "reports" / "report.html").read_text()
    page.write_text(text.replace("<main>", '<main><img src="https://localhost:9/x.png" alt="">'))
    browser.open(page, 390, 844, dark=False)
    assert any("Content Security Policy" in error for error in browser.errors)
