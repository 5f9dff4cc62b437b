"""The documentation is true where a test can tell: figures, links, commands, presets, the site."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import yaml

import atomq
from atomq.cli import app
from atomq.errors import ConfigError
from atomq.export.folder import FORMATS, bind_format
from atomq.models.families import LinearShape
from atomq.presets import PRESETS
from benchmarks import readme

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The ids that a page's headings get, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def test_figures_on_pages_are_those_of_the_records():
    texts = [page.read_text(encoding="utf-8") for page in readme.PAGES]
    named = [name for text in texts for name in re.findall(r"<!-- figures: (\w+) -->", text)]
    assert sorted(named) == sorted(readme.TABLES)
    assert [readme.with_tables(text) for text in texts] == texts, "run python -m benchmarks.readme"
    assert readme.PICTURE.read_text(encoding="utf-8") == readme.picture(), "run python -m benchmarks.readme"


def test_a_figure_that_is_not_the_record_s_would_be_noticed():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (measured,) = (r["ppl"] for r in readme.record(readme.BALANCED)["rows"] if r["name"] == "atomq")
    assert f" {measured:.2f} " in text
    spoilt = text.replace(f" {measured:.2f} ", f" {measured - 1:.2f} ")
    assert readme.with_tables(spoilt) == text


def test_rows_of_several_cards_say_which():
    steps = {line.split(" | ")[0]: line for line in readme.ladder().splitlines()}
    assert steps["| + asymmetry"].endswith(" H200 |")
    assert steps["| + offset of K = atomq"].endswith(" H100 |")
    lines = readme.presets().splitlines()[2:]
    on_h200 = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.endswith(" H200 |")]
    assert on_h200 == ["`atomq`", "`atomq --refine`", "`atomq-fast`", "`w4a8`"]
    assert len(lines) == sum(line.endswith((" H100 |", " H200 |")) for line in lines)


def test_two_cards_gave_the_same_perplexities():
    one = readme.record("2026-11-28-h100-damping-validation.json")
    other = readme.record("2026-11-28-h200-clip-validation.json")
    assert one["environment"]["gpu"] != other["environment"]["gpu"]
    texts = ("ppl", "second_ppl")
    (before,) = (row for row in one["rows"] if row["name"] == "blk a.5 d1")
    (after,) = (row for row in other["rows"] if row["name"] == "atomq 0.9")
    assert [before[text] for text in texts] == [after[text] for text in texts]
    assert [one[f"float_{text}"] for text in texts] == [other[f"float_{text}"] for text in texts]
    ladder = readme.record(readme.LADDER)
    (h200,) = (row for row in ladder["rows"] if row["rung"] == "descent")
    h100 = ladder["earlier_order"][-1]
    assert h100["device"] != h200["device"]
    assert [h100[text] for text in texts] == [h200[text] for text in texts]


def test_the_readme_is_one_screen_and_every_record_it_links_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 75
    assert len(re.findall(r"\(benchmarks/results/[^)]+\.json\)", text)) >= 2


def test_every_record_backs_a_page_and_every_record_that_a_page_names_is_there():
    records = {path.name for path in (ROOT / readme.RESULTS).glob("*.json")}
    assert len(records) > 50
    pages = [*PAGES, ROOT / "CHANGELOG.md"]
    named = [
        re.findall(r"\b\d{4}-\d\d-\d\d-[\w.-]+?\.json", page.read_text(encoding="utf-8")) for page in pages
    ]
    assert records == {name for names in named for name in names}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links {target}"


def test_the_usage_page_knows_every_command_and_preset():
    text = (ROOT / "docs" / "usage.md").read_text(encoding="utf-8")
    commands = [command.name for command in app.registered_commands]
    assert len(commands) > 10
    for command in commands:
        assert f"atomq {command}" in text, command
    for preset in PRESETS:
        assert f"| `{preset}`" in text, preset


def formats_of(preset: str) -> set[str]:
    """Those that a checkpoint of a model of width 4096 exports to."""
    shapes = {"model.layers.0.self_attn.q_proj": LinearShape(4096, 4096, has_bias=False)}
    found = set()
    for name in FORMATS:
        with contextlib.suppress(ConfigError):
            bind_format(name, PRESETS[preset].scheme, shapes)
            found.add(name)
    return found


def test_the_page_on_exports_says_where_each_preset_leaves():
    text = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--preset ([^|]+)` \| (.+) \|$", text, re.MULTILINE)
    told = {
        preset: {formats.split(" ")[0] for formats in re.sub(r"\([^)]*\)", "", cell).split(", ")}
        for presets, cell in rows
        for preset in presets.split("`, `")
        if "--set" not in preset
    }
    assert told == {preset: formats_of(preset) for preset in PRESETS}


def test_the_menu_of_the_site_has_every_page():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in config["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    build = pytest.importorskip("mkdocs.commands.build", reason="MkDocs is not installed")
    from mkdocs.config import load_config

    build.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) >= 10
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"([^\"]+)\"", page.read_text())
        assert [target for target in loaded if target.startswith(("http", "//"))] == [], page.name


def test_the_citation_names_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == atomq.__version__
    assert citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_fences_are_such_that_the_site_understands():
    """A language of one word: else Python-Markdown takes the fence for text and what follows for code."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) % 2 == 0, page.name
        assert all(re.fullmatch(r"[\w.+-]*", fence) for fence in fences), page.name
